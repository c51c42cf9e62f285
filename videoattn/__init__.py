"""Fast attention for diffusers video pipelines."""

from pathlib import Path

_root = Path(__file__).parents[1]
if (_root / "pyproject.toml").is_file():  # a checkout: kernels/, pipelines/ and benchmarks/ sit beside this folder
    __path__.append(str(_root))

__version__ = "0.1.0"
