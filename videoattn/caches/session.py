"""Step rehash of one denoiser: which of its calls run in full, what the others give, and how it is undone.

The session is the denoiser's forward pre-hook, as that of attention is. It knows the step and the guidance branch before a
call, and puts on the modules what this one call needs; behind the call everything is taken off again, also after an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from videoattn.caches import calibration as calibrations
from videoattn.caches import families, keysteps, timetable
from videoattn.caches.calibration import Calibration, Recorder
from videoattn.caches.past import Past
from videoattn.caches.settings import Settings
from videoattn.caches.stand_ins import StandIns
from videoattn.caches.weights import Fitted, Polynomial, Rule
from videoattn.call import Step
from videoattn.clock import Clock
from videoattn.session import PipeReference
from videoattn.slicing.budget import shown

MOST_CORRECTION = 10.0  # times what was missed, beyond which an output is not bent to make up for it


class Rehash:
    """Step rehash of one denoiser.

    Args:
        model: the denoiser. settings: what the user chose. pipe: the pipeline that runs it, for its scheduler.

    Raises:
        ValueError: it cannot be served.
    """

    def __init__(self, model: nn.Module, settings: Settings, pipe: object) -> None:
        reason = families.refuses(model, settings.point)
        if reason is not None:
            raise ValueError(f"step rehash: wanted a denoiser that can leave blocks out, got one that cannot: {reason}")
        self.model_name = type(model).__name__
        self.asked = settings
        self.settings = settings.resolved(multistep=False)  # of this generation
        self.siblings: list[Rehash] = [self]  # of the pipeline's denoisers; each knows what it has run
        self.why_full = ""  # why every step of this generation runs, if it does
        self.ran: set[int] = set()  # steps of this generation
        self.reused: set[int] = set()
        self.missing: set[int] = set()  # steps that ran since a branch had no past to reuse
        self.total = 0
        self.calibrations: list[Calibration] = (
            [] if settings.calibration is None else calibrations.load(settings.calibration)
        )
        self._pipe = PipeReference(pipe)
        self._clock = Clock()
        self._step = Step(generation=-1)
        self._shares = False  # whether the host passes views of the scheduler's own timesteps
        self._pasts: dict[str, Past] = {}
        self._stand_ins = StandIns()
        self._recorder: Recorder | None = None
        self._rule: Rule | None = None
        self._keys: set[int] = set()
        self._known = range(0)  # the steps that a calibration tells about
        self._influence: np.ndarray | None = None
        self._searched: tuple[Calibration, list[int]] | None = None
        self._multistep = False  # the scheduler
        self._online = False  # what this step's first branch was decided to be, by its first block
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __getstate__(self) -> dict:
        return vars(self) | {"_pasts": {}, "_recorder": None, "_stand_ins": StandIns()}  # a copy generates by itself

    def attach(self, model: nn.Module) -> None:
        self._handles = [
            model.register_forward_pre_hook(self, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        self._stand_ins.clear()
        for handle in self._handles:
            handle.remove()
        self._pasts.clear()

    # -- around each forward -------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._stand_ins.clear()  # of a call that a compiler ran past the hook behind it
        timestep = (dict(zip(self._parameters, args, strict=False)) | kwargs).get("timestep")
        scheduler = getattr(self._pipe(), "scheduler", None)
        before, step = self._step, self._clock.tick(scheduler, timestep, None)
        shares = _shares(timestep, scheduler)
        if step.generation != before.generation or step.index < before.index or shares != self._shares:
            self._begin(model, scheduler, step)
        self._step, self._shares = step, shares
        if self.why_full:
            self.ran.add(step.index)
            return
        past = self._pasts[step.branch] = self._pasts.get(step.branch, Past()).of(_size(args, kwargs))
        self._prepare(model, step, past)

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._stand_ins.clear()
        if self._recorder is not None and self._step.index == self.total - 1:
            for sibling in self.siblings:
                sibling._keep_calibration()

    def _prepare(self, model: nn.Module, step: Step, past: Past) -> None:
        """Have the call that begins give what is guessed, or remember what it gives."""
        wants, can = self._wants_reuse(step), self._can_reuse(step, past)
        if self.settings.threshold is not None:
            self._online = self._online and step.branch != "0"
            if can:
                self._decide_online(model, step, past)
            else:
                self._run(model, step, past)
            return
        if wants and not can:
            self.missing.add(step.index)
        (self._reuse if wants and can else self._run)(model, step, past)

    def _wants_reuse(self, step: Step) -> bool:
        return self._recorder is None and step.index not in self._keys and step.index in self._known[1:-1]

    def _can_reuse(self, step: Step, past: Past) -> bool:
        """Whether the branch took part in all that ran since the last key step, so that its past is of now."""
        if not past.steps or not 0 < step.index < self.total - 1:
            return False
        keys = self._keys if self.settings.threshold is None else self.ran
        return past.steps[-1] >= max((key for key in keys if key < step.index), default=0)

    # -- a new generation ----------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, scheduler: object, step: Step) -> None:
        """Forget everything of the last generation, ended or aborted, and choose the steps of this one."""
        self._pasts.clear()
        self.ran, self.reused, self.missing = set(), set(), set()
        self.total, self._recorder, self._keys, self._influence = step.total, None, set(), None
        self.why_full = self._refuses(model, scheduler, step)
        if self.why_full:
            return
        self._multistep = timetable.multistep(scheduler)
        settings = self.settings = self.asked.resolved(self._multistep)
        at = timetable.coordinates(scheduler, settings.coordinate)
        self._rule = Polynomial(terms=settings.terms, at=at)
        self._known = range(self.total)
        if settings.mode == "correct" or settings.keys == "error":
            self._influence = timetable.influence(scheduler)
        if not settings.calibrated:
            if isinstance(settings.steps, tuple):
                self._keys = set(settings.steps)
            elif settings.threshold is None:
                self._keys = set(keysteps.uniform(self.total, settings.steps))
            return
        key = timetable.key(model, scheduler, step.index) | {
            "point": settings.point,
            "denoiser": self.siblings.index(self),
        }
        found = next((each for each in self.calibrations if each.key == key), None)
        if found is None:
            self._recorder = Recorder(key)
        else:
            self._follow(found)

    def _refuses(self, model: nn.Module, scheduler: object, step: Step) -> str:
        """Why every step has to run; "" where some need not."""
        if step.total == 0:
            return "the pipeline's schedule has ended, so that another one runs the denoiser"
        if torch.is_grad_enabled():
            return "gradients are on"
        if getattr(model, "is_cache_enabled", False):
            return "a cache of diffusers is enabled on the denoiser"
        if _compiled_whole(model, self._pipe()):
            return "the denoiser is compiled as a whole, and a graph runs as it was traced; compile its blocks instead"
        reason = timetable.refuses(scheduler)
        wanted = self.settings.steps
        if reason is None and isinstance(wanted, int) and wanted >= step.total:
            reason = f"wanted {wanted} steps to run, and the sampler has {step.total}"
        return reason or ""

    def _follow(self, found: Calibration) -> None:
        """The steps and the weights by a calibration."""
        settings, steps = self.settings, found.ran
        gram = np.zeros((self.total, self.total))
        gram[np.ix_(steps, steps)] = found.gram
        self._known = steps
        if settings.mode in ("fit", "correct"):
            self._rule = Fitted(terms=settings.terms, gram=gram)
        if isinstance(settings.steps, tuple):
            self._keys = set(settings.steps)
            return
        if settings.similarity is not None:
            self._keys = {steps[key] for key in keysteps.similar(found.cosine, settings.similarity)}
            return
        count = max(2, round(settings.steps * len(steps) / self.total))
        if settings.keys == "uniform":
            self._keys = {steps[key] for key in keysteps.uniform(len(steps), count)}
        elif settings.keys == "similarity":
            self._keys = {steps[key] for key in keysteps.similar_count(found.cosine, count)}
        else:
            self._keys = set(self._least_error(found, gram, count))

    def _least_error(self, found: Calibration, gram: np.ndarray, count: int) -> list[int]:
        """By the influence of steps, not squared: what goes wrong early has the later steps to grow in. Searched for once."""
        if self._searched is None or self._searched[0] is not found:
            corrected = self.settings.mode == "correct" and self._influence is not None
            shares = np.ones(self.total) if self._influence is None else np.abs(self._influence)
            keys = keysteps.least_error(gram, self._rule, found.ran, count, corrected=corrected, shares=shares)
            self._searched = (found, keys)
        return self._searched[1]

    def _keep_calibration(self) -> None:
        """Once the pipeline's generation has run to its end, it tells how alike its steps are."""
        made = None if self._recorder is None else self._recorder.calibration()
        if made is None:
            return
        self.calibrations = [each for each in self.calibrations if each.key != made.key] + [made]
        path = self.settings.calibration
        if path is not None:
            others = [each for each in calibrations.load(path) if each.key != made.key]
            calibrations.save(path, [*others, made])

    # -- a call in full ------------------------------------------------------------------------------------------------

    def _run(self, model: nn.Module, step: Step, past: Past) -> None:
        """Remember what the call gives at the point."""
        self.ran.add(step.index)
        point, family = self.settings.point, families.family_of(model)
        if point == "output":
            self._watch_output(model, family, step, past)
        elif point == "late_block":
            giver, _ = families.late(model)
            self._stand_ins.watch(giver, lambda module, args, kwargs, out: self._ran(step, past, [_kept(module, out)]))
        else:
            self._watch_residual(model, family, step, past)

    def _watch_output(self, model: nn.Module, family: families.Family, step: Step, past: Past) -> None:
        modules = [getattr(model, name) for name in family.output]
        correction = {}
        if self.settings.mode == "correct" and self._influence is not None:
            correction = past.correction(step.index, self._rule, self._influence, MOST_CORRECTION)
        seen: list[Tensor] = []

        def behind(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
            seen.append(_kept(module, out))
            corrected = None
            if correction:
                weights = correction | {step.index: 1.0 + correction.get(step.index, 0.0)}
                corrected = past.sum_of(weights, len(seen) - 1, own=(step.index, seen[-1]))
            if len(seen) == len(modules):
                self._ran(step, past, seen)
            return corrected

        for module in modules:
            self._stand_ins.watch(module, behind)

    def _watch_residual(self, model: nn.Module, family: families.Family, step: Step, past: Past) -> None:
        """What the blocks behind the first one add, and, where the first one decides, what that one adds."""
        modules = [module for module, _ in families.blocks(model, family)]
        given: list[Tensor] = []

        def behind_first(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            given.extend(_tensors(out))
            if self.settings.threshold is not None:
                past.first = given[0] - families.first_arguments(args, kwargs, 1)[0]

        def behind_last(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            self._ran(step, past, [after - before for after, before in zip(_tensors(out), given, strict=True)])

        self._stand_ins.watch(modules[0], behind_first)
        self._stand_ins.watch(modules[-1], behind_last)

    def _ran(self, step: Step, past: Past, outputs: list[Tensor]) -> None:
        if self._recorder is not None:
            self._recorder.add(step.branch, step.index, outputs)
        else:
            past.add(step.index, outputs, self.settings.terms)

    # -- a call that reuses --------------------------------------------------------------------------------------------

    def _reuse(self, model: nn.Module, step: Step, past: Past) -> None:
        """Leave the blocks out."""
        self.reused.add(step.index)
        guessed = past.guess(step.index, self._rule)
        family, stand_ins = families.family_of(model), self._stand_ins
        if self.settings.point == "output":
            left_out = families.blocks(model, family)
            places = [getattr(model, name) for name in family.output]
        elif self.settings.point == "late_block":
            giver, left_out = families.late(model)
            places = [giver]
        else:
            self._replace_behind_first(model, family, guessed)
            return
        for module, hand_on in left_out:
            stand_ins.replace(module, hand_on)
        for module, tensor in zip(places, guessed, strict=True):
            stand_ins.give(module, tensor)

    def _replace_behind_first(self, model: nn.Module, family: families.Family, guessed: list[Tensor]) -> None:
        _, *rest = families.blocks(model, family)
        for module, hand_on in rest[:-1]:
            self._stand_ins.replace(module, hand_on)

        def last(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | tuple[Tensor, ...]:
            given = families.first_arguments(args, kwargs, family.changes)
            sums = tuple(x + added for x, added in zip(given, guessed, strict=True))
            return sums if family.changes > 1 else sums[0]

        self._stand_ins.replace(rest[-1][0], last)

    def _decide_online(self, model: nn.Module, step: Step, past: Past) -> None:
        """Once the first block has run: reuse what the others added while its own output has changed little.

        The change of its residual since the last step that ran, L1, relative; of the first branch of guidance, which the
        others follow. Waits for the device.
        """
        family = families.family_of(model)
        first, _ = next(families.blocks(model, family))
        leader = step.branch == "0"

        def behind_first(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            added = _tensors(out)[0] - families.first_arguments(args, kwargs, 1)[0]
            if leader:
                change = (added - past.first).abs().mean() / past.first.abs().mean()
                self._online = bool(change < self.settings.threshold)
            if self._online:
                self.reused.add(step.index)
                self._replace_behind_first(model, family, past.guess(step.index, self._rule))
                return
            self.ran.add(step.index)
            past.first, given = added, _tensors(out)
            modules = [module for module, _ in families.blocks(model, family)]
            self._stand_ins.watch(
                modules[-1],
                lambda module, args, kwargs, out: self._ran(
                    step, past, [after - before for after, before in zip(_tensors(out), given, strict=True)]
                ),
            )

        self._stand_ins.watch(first, behind_first)

    # -- for reports ---------------------------------------------------------------------------------------------------

    @property
    def keeps_tokens(self) -> bool:
        """Whether what is kept lies in the order of the tokens inside of the layers, which must then stay."""
        return self.settings.point == "first_block"

    @property
    def held(self) -> int:
        """Bytes of outputs that are kept."""
        return sum(past.nbytes for past in self._pasts.values())

    def notes(self) -> Iterator[str]:
        """For reports."""
        yield f"step rehash, {self.settings}: this changes the video"
        if self._step.generation < 0:
            yield "not called yet"
        elif self.why_full:
            yield f"every step runs: {self.why_full}"
        elif self._recorder is not None:
            yield f"all {len(self.ran)} steps ran, to see how alike they are; generations like this one reuse steps from now on"
        else:
            both = len(self.ran & self.reused)
            partly = f", {both} of them for a part of the branches" if both else ""
            yield f"last generation: {len(self.ran)} of {self.total} steps ran{partly}, {len(self.reused)} reused; {shown(self.held)} held"
            if self.missing:
                yield f"{len(self.missing)} more steps ran than asked for: a branch had no past of its own"
            if self._multistep:
                yield "the sampler is a multistep one, where guesses went far wrong on single videos and held outputs did not"
            if self.settings.mode == "correct" and self._influence is None:
                yield "nothing is corrected: the scheduler draws noise, or takes other arguments than most"


def rehash_of(model: nn.Module) -> Rehash | None:
    """The session on a denoiser, if step rehash is enabled on it."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Rehash)), None)


def _size(args: tuple, kwargs: dict) -> tuple:
    return tuple((x.shape, x.dtype, x.device) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _shares(timestep: object, scheduler: object) -> bool:
    """Whether a timestep is a view of the scheduler's: where it is no longer, another scheduler runs."""
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timestep, Tensor) or not isinstance(timesteps, Tensor) or timestep.device != timesteps.device:
        return False
    return timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()


def _compiled_whole(model: nn.Module, pipe: object) -> bool:
    wrappers = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    return model._compiled_call_impl is not None or any(getattr(each, "_orig_mod", None) is model for each in wrappers)


def _kept(module: nn.Module, output: Any) -> Tensor:
    """Of a compiled module a copy: a CUDA graph writes its next output into the same memory."""
    (tensor,) = _tensors(output)
    return tensor.clone() if module._compiled_call_impl is not None else tensor


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]
