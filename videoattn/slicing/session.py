"""What feature slicing did to one model of a pipeline, a denoiser or a VAE, and how it is undone.

The session is the denoiser's own forward pre-hook, as that of attention is, and stands before a VAE's `decode`: it knows each
call's sizes before it runs, and chooses slices by a budget once for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from videoattn.slicing import forecast
from videoattn.slicing.budget import shown
from videoattn.slicing.decoder_switches import Switch, mixes_frames, switches, tile
from videoattn.slicing.handover import connect
from videoattn.slicing.install import SlicedForward
from videoattn.slicing.norm import FewRows
from videoattn.slicing.registry import Sliced, table

Entry = Literal["forward", "decode"]
WORTH = 0.97  # of the activations at most, or more slices brought nothing,
PATIENCE = 2  # and so many times in a row are enough
MOST = 64  # slices of a group


class OverBudget(ValueError):
    """No choice of slices keeps the budget; `least`: bytes that one takes, the best of them."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for calls of one size.

    Args:
        counts: site -> group -> slices.
        activations: bytes that a call makes at its peak, as predicted.
        resident: bytes that lay on the device before it.
    """

    counts: dict[str, dict[str, int]]
    activations: int
    resident: int

    @property
    def total(self) -> int:
        return self.activations + self.resident


class Slicing:
    """Feature slicing of one model.

    Args:
        model: a denoiser, or a VAE.
        entry: what a pipeline calls of it: "forward", or "decode".
        slices: of every group; or None, and
        budget: bytes on the device that a call must not pass.
        tiling: of a VAE, whether to switch on the host's own tiling, which changes videos.
        frames: of a VAE that takes frames as rows of a batch, how many at a time; where it mixes frames, this changes videos.

    Raises:
        ValueError: nothing in it can be sliced.
    """

    def __init__(
        self,
        model: nn.Module,
        entry: Entry = "forward",
        *,
        slices: int | None = None,
        budget: int | None = None,
        tiling: bool = False,
        frames: int | None = None,
    ) -> None:
        self.model = model
        self.entry = entry
        self.slices = slices
        self.budget = budget
        self.tiling = tiling
        self.frames = frames
        self._untile: Callable[[], None] | None = None
        self.refused: list[tuple[str, str]] = []
        self.sites = [SlicedForward(where, module, kind) for where, module, kind in sliceable(model, self.refused)]
        if not self.sites:
            reasons = "; ".join(sorted({reason for _, reason in self.refused})) or "no class that is known"
            raise ValueError(
                f"slicing: wanted a model with parts that can be sliced, got {type(model).__name__}: {reasons}"
            )
        connect(self.sites)
        self._norms = FewRows(model)
        self.choices: dict[tuple, Choice] = {}
        self.choice: Choice | None = None  # of the call that runs, or ran last
        self.then: Callable[[tuple, dict], None] | None = None  # looks at what the same generation will call later
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self) -> None:
        self._norms.install()
        for site in self.sites:
            site.install()
            site.groups.counts = dict.fromkeys(site.groups.counts, self.slices or 1)
        if self.entry == "forward":
            self._handle = self.model.register_forward_pre_hook(self, with_kwargs=True)
        else:
            self.model.decode = _Decode(self)
        if self.tiling:
            self._untile = tile(self.model)

    def detach(self) -> None:
        if self.entry == "forward":
            self._handle.remove()
        else:
            del self.model.decode
        if self._untile is not None:
            self._untile()
        for site in self.sites:
            site.remove()
        self._norms.remove()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each call: the slices of its size."""
        if self.budget is None:
            return
        known = len(self.choices)
        choice = self.chosen(args, kwargs)
        if self.then is not None and len(self.choices) > known:
            self.then(args, kwargs)
        if choice is not self.choice:
            self.choice = choice
            for site in self.sites:
                site.groups.counts = dict(choice.counts[site.name])

    def chosen(self, args: tuple, kwargs: dict) -> Choice:
        """For calls with arguments like these."""
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in tree_leaves((args, kwargs)))
        if key not in self.choices:
            self.choices[key] = self._choose(args, kwargs, _resident(self.model))
        return self.choices[key]

    def _choose(self, args: tuple, kwargs: dict, resident: int) -> Choice:
        """The fewest slices that keep the budget: more where a part passes it, one elsewhere.

        Raises:
            OverBudget: none do; it names the least that can.
            ValueError: the model does not run without values.
        """
        twin = forecast.twin(self.model)
        sites = {where: SlicedForward(where, module, kind) for where, module, kind in sliceable(twin, [])}
        connect(sites.values())
        for site in sites.values():
            site.install()
        gpu = _gpu(self.model)
        FewRows(twin, stands_for=gpu).install()
        args, kwargs = forecast.on_meta((args, kwargs))
        call = twin if self.entry == "forward" else twin.decode
        allowed = self.budget - resident

        def told() -> tuple[Choice, dict[forecast.Place, int]]:
            try:
                peak, most = forecast.peak(lambda: call(*args, **kwargs), sites.values(), workspaces=gpu is not None)
            except RuntimeError as error:  # what torch raises where something needs values
                raise ValueError(
                    f"memory: {type(self.model).__name__}.{self.entry} does not run on the meta device, which foretells what "
                    f"it takes ({' '.join(str(error).split())}); a number of slices goes without that"
                ) from error
            counts = {name: dict(site.groups.counts) for name, site in sites.items()}
            return Choice(counts=counts, activations=peak, resident=resident), most

        found, most = told()
        least, idle = found, 0
        while found.activations > allowed and idle < PATIENCE:
            over = [place for site in sites.values() for place in _over(site, most, allowed)]
            if not over:
                break  # what is left is not in slices
            for name, group in over:
                sites[name].groups.counts[group] *= 2
            found, most = told()
            idle = 0 if found.activations < WORTH * least.activations else idle + 1
            least = min(least, found, key=lambda choice: choice.activations)
        if least.activations <= allowed:
            return self._coarser(least, sites, told, allowed)
        raise OverBudget(
            f"memory: wanted at most {shown(self.budget)}, and {type(self.model).__name__}.{self.entry} at this size needs "
            f"{shown(least.total)}: {shown(resident)} that lie there already, and {shown(least.activations)} that it makes"
            + "".join(f"; less may do with {switch}" for switch in self._left(args)),
            least.total,
        )

    def _left(self, args: tuple) -> Iterator[Switch]:
        """Switches of a decoder that would change what this call takes."""
        if self.entry == "decode":
            one_by_one = getattr(self.model, "use_slicing", False) or len(args[0]) == 1
            on = {"vae_frames": one_by_one, "vae_tiling": getattr(self.model, "use_tiling", False)}
            yield from (switch for switch in switches(self.model) if not on[switch.option])

    @staticmethod
    def _coarser(
        choice: Choice, sites: dict[str, SlicedForward], told: Callable[[], tuple[Choice, object]], allowed: int
    ) -> Choice:
        """Three slices in the place of four, six of eight, if that keeps the budget too."""
        for name, counts in choice.counts.items():
            sites[name].groups.counts = {group: max(count * 3 // 4, min(count, 2)) for group, count in counts.items()}
        if all(site.groups.counts == choice.counts[name] for name, site in sites.items()):
            return choice
        found, _ = told()
        return found if found.activations <= allowed else choice

    def notes(self) -> Iterator[str]:
        """For reports."""
        told = f"{len(self.sites)} modules in slices, outputs as without to rounding"
        if self.slices is not None:
            yield f"{told}; {self.slices} of each group"
        elif self.choice is None:
            yield f"{told}; budget {shown(self.budget)}, not called yet"
        else:
            counts = sorted({count for groups in self.choice.counts.values() for count in groups.values()})
            yield (
                f"{told}; budget {shown(self.budget)}: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} of a "
                f"group, {shown(self.choice.total)} predicted, of which {shown(self.choice.resident)} lay there before"
            )
        if self.entry == "decode" and getattr(self.model, "use_tiling", False):  # asked of us, or of the host before
            yield "decodes in tiles, by the host's own switch: this changes the video"
        if self.frames is not None:
            yield f"decodes {self.frames} frames at a time" + (
                ", which do not see those of another: this changes the video" if mixes_frames(self.model) else ""
            )
        for name, reason in self.refused:
            yield f"{name} stays whole: {reason}"
        if any(module._compiled_call_impl is not None for module in self.model.modules()):
            yield "what is compiled stays whole: a compiler plans the memory of its graph itself"


class _Decode:
    """`decode` of a VAE while its decoder is sliced."""

    def __init__(self, slicing: Slicing) -> None:
        self.slicing = slicing

    def __call__(self, z: Tensor, *args, **kwargs):
        frames = self.slicing.frames
        if frames is None or len(z) <= frames:
            return self._once(z, *args, **kwargs)
        made = [self._once(part, *args, **_counted(kwargs, len(part))) for part in z.split(frames)]
        if isinstance(made[0], tuple):
            return (torch.cat([each[0] for each in made]),)
        return type(made[0])(sample=torch.cat([each.sample for each in made]))

    def _once(self, *args, **kwargs):
        model = self.slicing.model
        self.slicing(model, args, kwargs)
        return type(model).decode(model, *args, **kwargs)


def _counted(options: dict, frames: int) -> dict:
    """Of `decode`, for so many frames."""
    return options | ({"num_frames": frames} if "num_frames" in options else {})


def sliceable(root: nn.Module, refused: list[tuple[str, str]]) -> Iterator[tuple[str, nn.Module, Sliced]]:
    """(name, module, how) of the outermost modules that can run in slices; adds to `refused` what cannot, and why."""
    inside: tuple[str, ...] = ()
    known = table()
    for name, module in root.named_modules():
        kind = known.get(type(module).__name__)
        if kind is None or name.startswith(inside):
            continue
        reason = kind.refuses(module)
        if reason is not None:
            refused.append((name, reason))
            continue
        inside = (*inside, f"{name}." if name else "")
        yield name, module, kind


def _over(site: SlicedForward, most: dict[forecast.Place, int], allowed: int) -> Iterator[forecast.Place]:
    """The groups of a site that are to be cut finer: those that pass what is allowed. Where the site does and none of its groups'
    own loops is to blame, the first that has not come to its size: they are listed with those first that cost least."""
    if most.get((site.name, None), 0) <= allowed:
        return
    groups = site.groups
    rest = [name for name in groups.counts if groups.counts[name] < min(MOST, groups.sizes.get(name, MOST))]
    to_blame = [name for name in rest if most.get((site.name, name), 0) > allowed]
    for name in to_blame or rest[:1]:
        yield site.name, name


def _gpu(model: nn.Module) -> torch.device | None:
    """The GPU that a model runs on, now or where offloading will bring it."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _resident(model: nn.Module) -> int:
    """Bytes on the device that a call runs on, before it; of a CPU, what the model itself holds."""
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        return torch.cuda.memory_allocated(weight.device)
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def slicing_of(model: nn.Module) -> Slicing | None:
    """The session on a model, if slicing is enabled on it."""
    decode = vars(model).get("decode")
    if isinstance(decode, _Decode):
        return decode.slicing
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Slicing)), None)
