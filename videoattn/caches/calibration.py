"""How alike a model's outputs are from step to step: measured once for a model, a scheduler and its steps, kept as TOML.

Kept are the cosine similarities of all pairs of steps and the norms, means over guidance branches and videos. The key-step
search reads them, and so do the weights of outputs that are fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SAMPLED = 2**18  # elements of an output at most that are compared


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one full generation tells.

    Args:
        key: of what; see `timetable.key`, and the point.
        ran: the steps that this denoiser ran; of two denoisers that share a generation each has its own.
        gram: mean products of the outputs at any two of them, float64 [len(ran), len(ran)].
    """

    key: Mapping[str, object]
    ran: range
    gram: np.ndarray = field(repr=False)

    @property
    def norms(self) -> np.ndarray:
        return np.sqrt(np.diag(self.gram))

    @property
    def cosine(self) -> np.ndarray:
        return self.gram / np.outer(self.norms, self.norms)


class Recorder:
    """Takes the outputs of a generation that runs every step."""

    def __init__(self, key: Mapping[str, object]) -> None:
        self.key = key
        self._samples: dict[str, dict[int, Tensor]] = {}  # branch -> step
        self._products: dict[str, dict[int, Tensor]] = {}  # with those of all steps so far

    def add(self, branch: str, step: int, outputs: Iterable[Tensor]) -> None:
        sample = torch.cat([_sample(output) for output in outputs])
        samples = self._samples.setdefault(branch, {})
        samples[step] = sample
        self._products.setdefault(branch, {})[step] = torch.stack(
            [sample.double() @ each.double() for each in samples.values()]
        )

    def calibration(self) -> Calibration | None:
        """None while there are no two steps of a branch that ran all the time. Waits for the device."""
        longest = max((list(samples) for samples in self._samples.values()), key=len, default=[])
        if len(longest) < 2 or longest != list(range(longest[0], longest[-1] + 1)):
            return None
        gram = np.zeros((len(longest), len(longest)))
        for branch, products in self._products.items():
            if list(self._samples[branch]) != longest:
                continue
            for row, products_of in enumerate(products.values()):
                gram[row, : row + 1] += products_of.cpu().numpy()
        gram = gram + np.tril(gram, -1).T
        return Calibration(key=self.key, ran=range(longest[0], longest[-1] + 1), gram=gram / np.mean(np.diag(gram)))


def load(path: Path) -> list[Calibration]:
    """All in a file; none where there is no such file.

    Raises:
        ValueError: it is no file of calibrations.
    """
    if not path.exists():
        return []
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["calibration"]
        return [_from_toml(entry) for entry in entries]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"calibration: wanted a file that step rehash wrote, got {path}: {error}") from error


def save(path: Path, calibrations: Iterable[Calibration]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(_to_toml, calibrations)), encoding="utf-8")


def _sample(output: Tensor) -> Tensor:
    """Every so many elements, fp32: an odd step, so that no dimension is left out."""
    flat = output.detach().reshape(-1)
    step = -(-flat.numel() // SAMPLED)
    return flat[:: step + 1 - step % 2].float().clone()


def _to_toml(calibration: Calibration) -> str:
    lines = ["[[calibration]]"]
    lines += [f"{name} = {value if isinstance(value, int) else repr(value)}" for name, value in calibration.key.items()]
    lines.append(f"norms = [{_row(calibration.norms)}]")
    rows = (f"  [{_row(row[: index + 1])}]," for index, row in enumerate(calibration.cosine))
    return "\n".join([*lines, "cosine = [  # to this step and those before", *rows, "]", ""])


def _row(values: np.ndarray) -> str:
    return ", ".join(f"{value:.9g}" if value != int(value) else f"{value:.1f}" for value in values)


def _from_toml(entry: dict) -> Calibration:
    rows, norms = entry.pop("cosine"), np.array(entry.pop("norms"), np.float64)
    first = entry["first_step"]
    cosine = np.zeros((len(rows), len(rows)))
    for index, row in enumerate(rows):
        cosine[index, : index + 1] = cosine[: index + 1, index] = row
    return Calibration(key=entry, ran=range(first, first + len(rows)), gram=cosine * np.outer(norms, norms))
