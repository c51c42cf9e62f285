"""Fast attention for diffusers video pipelines: `enable_fast_attention(pipe)`."""

from pathlib import Path

_root = Path(__file__).parents[1]
if (_root / "pyproject.toml").is_file():  # a checkout: kernels/, pipelines/ and benchmarks/ sit beside this folder
    __path__.append(str(_root))

from videoattn.api import (
    disable,
    disable_fast_attention,
    disable_feature_slicing,
    disable_step_rehash,
    enable_fast_attention,
    enable_feature_slicing,
    enable_step_rehash,
    fast_attention,
    profile,
    report,
    warmup,
)
from videoattn.policy import Dense, Policy, Sparse

__version__ = "0.1.0"
__all__ = [
    "Dense",
    "Policy",
    "Sparse",
    "disable",
    "disable_fast_attention",
    "disable_feature_slicing",
    "disable_step_rehash",
    "enable_fast_attention",
    "enable_feature_slicing",
    "enable_step_rehash",
    "fast_attention",
    "profile",
    "report",
    "warmup",
]
