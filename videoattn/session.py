"""What was done to one denoiser, what it does before each forward, and how it is undone.

The session is the denoiser's own forward pre-hook: nothing is kept outside the patched module, and the hook survives
offloading, which wraps `forward`, not the hooks.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videoattn import guard
from videoattn.backend import backends, stand_in, validate_backend
from videoattn.call import Call, Site, Step
from videoattn.clock import Clock
from videoattn.pipelines import rebind
from videoattn.pipelines.adapter import Adapter, set_processor
from videoattn.pipelines.processor import FastProcessor
from videoattn.pipelines.token_order import TokenOrder, refuses
from videoattn.policy import EXACT, Decision, Dense, Policy, Sparse
from videoattn.runner import Placed, Plan, Runner
from videoattn.selection.arrangement import Order, Tokens, arrange
from videoattn.selection.kept import Kept


@dataclass(slots=True, eq=False)
class Patch:
    """One site: its module, the processor that the host had there, and ours, or why there is none."""

    attn: nn.Module
    site: Site
    host: object
    ours: FastProcessor | None
    adapter: str
    refusal: str = ""


class Session:
    """Fast attention on one denoiser.

    Args:
        model: the denoiser.
        adapter: what is known of its family.
        policy: what may be traded.
        backend: a backend's name, or "auto".
        pipe: the pipeline that runs the denoiser, for its scheduler; None for a bare denoiser.

    Raises:
        ValueError: the named backend is unknown or refuses a site, or no attention of the denoiser can be served. The
            denoiser is then as it was.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, policy: Policy, backend: str, pipe: object = None) -> None:
        self.model_name = type(model).__name__
        self.adapter = adapter
        self.policy = policy
        self.backend = backend
        self.bypass = ""  # why the last forward took the host's own path, if it did
        self.step = Step()  # of the forward that runs, or ran last
        self.clock = Clock()
        self.marks: list[str] = []  # what in this generation was not finite
        self.in_place = ""  # why the video's tokens stay in raster order though a selector wants another, if they do
        self._token_order: TokenOrder | None = None
        self._phase: tuple | None = None  # what the processors are bound for
        self._pipe = PipeReference(pipe)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._runners: dict[tuple, Runner] = {}
        self._places: dict[tuple, Placed] = {}
        self._kv_lens: list[tuple[tuple, tuple, Tensor | None]] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        validate_backend(backend)
        self.patches = [self._patch(attn, site, _host(attn)) for attn, site in adapter.sites(model)]
        if not any(patch.ours for patch in self.patches):
            raise ValueError(
                f"{self.model_name}: wanted a denoiser with attention that can be served, got "
                + ("; ".join(sorted({patch.refusal for patch in self.patches})) or "no attention module")
            )
        self._validate_named_backend()

    @property
    def plans(self) -> list[Plan]:
        return [plan for runner in self._runners.values() for plan in runner.plans.values()]

    @property
    def planning_seconds(self) -> float:
        """Of every plan so far: the choice, the check of kernels of our own, and their compilation."""
        return sum(runner.planning_seconds for runner in self._runners.values())

    @property
    def kept(self) -> list[Kept]:
        """The lists of what is sparse."""
        return [runner.kept for runner in self._runners.values() if runner.kept is not None]

    def __getstate__(self) -> dict:
        return vars(self) | {"_kv_lens": []}  # a copy's masks are other objects

    # -- patching ------------------------------------------------------------------------------------------------------

    def _patch(self, attn: nn.Module, site: Site, host: object) -> Patch:
        """Find who stands in for `host`; changes nothing."""
        if getattr(host, "_parallel_config", None) is not None:
            return Patch(attn, site, host, None, "untouched", "runs under context parallelism")
        own = self.adapter.processors.get(type(host))
        if own is not None:
            return Patch(attn, site, host, own(host), self.adapter.name)
        reason = rebind.refuses(host)
        if reason is not None:
            return Patch(attn, site, host, None, "untouched", reason)
        return Patch(attn, site, host, rebind.rebind(host), "generic")

    def _validate_named_backend(self) -> None:
        if self.backend == "auto":
            return
        backend = next(backend for backend in backends() if backend.name == self.backend)
        asked = [
            (patch, decision)
            for patch in self.patches
            if patch.ours is not None
            for decision in self.policy.decisions(patch.site)
        ]
        if not any(backend.computes(stand_in(backend, decision)) for _, decision in asked):
            raise ValueError(
                f"backend {self.backend!r}: wanted a policy that asks for what it computes, got {self.policy.name!r}, which "
                f"decides {', '.join(sorted({str(decision) for _, decision in asked}))}"
            )
        for patch, decision in asked:
            weight = next(patch.attn.parameters(), None)
            if patch.site.head_dim is None or weight is None:  # found out when it runs
                continue
            if decision == EXACT and not backend.computes(EXACT):
                continue  # which are chosen for as with "auto"
            if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2 or weight.device.type == "meta":
                continue  # quantised or offloaded storage does not tell the dtype or the device of the call
            if weight.device.type == "cpu" and torch.cuda.is_available():
                continue  # nor do weights that have yet to be moved
            call = Call(
                kind=patch.site.kind,
                layout="BNHD",
                batch=1,
                q_len=1024,
                kv_len=1024,
                heads=patch.site.heads,
                kv_heads=patch.site.heads,
                head_dim=patch.site.head_dim,
                dtype=weight.dtype,
                device=weight.device,
            )
            computed, asked_of = stand_in(backend, decision), backend
            if hasattr(backend, "dense"):  # of which blocks is found out when it runs
                computed, asked_of = Dense(computed.precision), backend.dense
            reason = asked_of.refuses(call, computed)
            if reason is not None:
                raise ValueError(f"backend {self.backend!r} refuses {self.model_name} {patch.site.name}: {reason}")

    def attach(self, model: nn.Module) -> None:
        for patch in self.patches:
            if patch.ours is not None:
                set_processor(patch.attn, patch.ours)
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)
        if self.adapter.seams is not None and self._wanted_order() != "raster":
            self._token_order = TokenOrder(model, self.adapter.seams)  # behind our own hook, which tells it the order

    def detach(self) -> None:
        """Put the host's processors back: the very same objects, or what the user has set since."""
        self._handle.remove()
        if self._token_order is not None:
            self._token_order.remove()
            self._token_order = None
        for patch in self.patches:
            if patch.ours is not None:
                patch.ours.bind(None)  # should the host keep it (fuse_qkv does), it does nothing of its own
            if isinstance(patch.attn.processor, FastProcessor):
                set_processor(patch.attn, patch.attn.processor.host)

    # -- before each forward -------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        grid = None if self.adapter.grid is None else self.adapter.grid(model, inputs)
        pipe, generation = self._pipe(), self.clock.generation
        step = self.step = self.clock.tick(getattr(pipe, "scheduler", None), inputs.get("timestep"), grid)
        begins = step.generation != generation
        self.look(generation, wait=begins and pipe is not None)
        if begins:
            self.marks.clear()
            if pipe is not None:
                self._follow_modules(model)
            self._follow_order(model)
        kv_len = self._kv_len(model, inputs, grid)
        self.bypass = _needs_grad(model, inputs)
        phase = (self.bypass, self.policy.phase(step))
        for index, patch in enumerate(self.patches):
            processor = patch.attn.processor
            followed = processor is not (patch.ours or patch.host)
            if followed:
                patch = self.patches[index] = self._follow(patch, processor)
            ours = patch.ours
            if ours is None:
                continue
            ours.kv_len = kv_len
            if followed or ours.switched or phase != self._phase or ours.run is None:
                self._bind(patch, step)
        self._phase = phase
        order = self._lay_out(model, inputs, step)
        for runner in self._runners.values():
            runner.begin(step, order)

    def look(self, generation: int, *, wait: bool) -> None:
        """See whether outputs of our kernels were finite: if not, other kernels take over, and the generation is marked.

        generation: which one has run so far.
        wait: also for what the device has yet to do; without, it costs the host a few microseconds.
        """
        if wait:
            guard.wait({plan.call.device for plan in self.plans if plan.flag is not None})
        if not guard.raised():
            return
        for line in [line for runner in self._runners.values() for line in runner.replace_flagged()]:
            if line not in self.marks:
                named = line.startswith(f"output of {self.backend} ")
                then = (
                    "The backend was named and stays."
                    if named
                    else "From now on torch's attention computes such calls."
                )
                self.marks.append(line)
                warnings.warn(
                    f"{self.model_name}, generation {generation}: {line}. Its inputs may not have been finite either. "
                    f"The report marks this generation. {then}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _follow_modules(self, model: nn.Module) -> None:
        """The host has swapped whole blocks since (FreeNoise): theirs are the sites now."""
        known = {patch.attn: patch for patch in self.patches}
        sites = list(self.adapter.sites(model))
        if known.keys() != {attn for attn, _ in sites}:
            self.patches = [known.get(attn) or self._patch(attn, site, _host(attn)) for attn, site in sites]

    def _wanted_order(self) -> Order:
        """In which order a selector wants the tokens, if one does and it can be had outside the layers."""
        decision = self.policy.decision
        order = decision.selector.order if isinstance(decision, Sparse) else "raster"
        return "raster" if order == "tiles" else order  # tiles leave places empty, which tokens cannot be outside

    def _follow_order(self, model: nn.Module) -> None:
        """Once a generation: whether tokens may take another order, and where."""
        self.in_place = ""
        if self._wanted_order() == "raster":
            return
        if self._token_order is None:
            self.in_place = f"{self.adapter.name}: no place known outside the layers"
            return
        self.in_place = refuses(model) or ""
        self._token_order.follow(model)

    def _lay_out(self, model: nn.Module, inputs: dict, step: Step) -> Order:
        """Have the tokens of the forward that begins take the order that a selector wants; returns how they lie."""
        if self._token_order is None:
            return "raster"
        order = self._wanted_order()
        reason = self.in_place
        if not reason and self._sparse(inputs, step):
            reason = self.adapter.seams.refuses(model, inputs) or ""
            if not reason:
                arrangement = arrange(Tokens(grid=step.grid), order, _device(inputs), block_q=128, block_k=128)
                self._token_order.set(arrangement.index, arrangement.places)
                return order
            self.in_place = reason
        self._token_order.set(None, None)
        return "raster"

    def _sparse(self, inputs: dict, step: Step) -> bool:
        """Whether the forward that begins may leave key blocks out, as far as is known."""
        if self.bypass or step.grid is None or not self.policy.sparse_at(step):
            return False
        if self.backend == "auto" and _device(inputs).type != "cuda":
            return False
        plans = [plan for plan in self.plans if plan.call.tokens is not None and plan.call.tokens.grid == step.grid]
        return not plans or any(isinstance(plan.choice.decision, Sparse) for plan in plans)

    def _follow(self, patch: Patch, processor: object) -> Patch:
        """The host or the user has swapped the processor since: fused projections, an IP-Adapter."""
        if patch.ours is not None:
            patch.ours.bind(None)
        if isinstance(processor, FastProcessor):  # one of ours, put back by the host
            name = "generic" if isinstance(processor, rebind.ReboundProcessor) else self.adapter.name
            return Patch(patch.attn, patch.site, processor.host, processor, name)
        followed = self._patch(patch.attn, patch.site, processor)
        if followed.ours is not None:
            set_processor(patch.attn, followed.ours)
        return followed

    def _bind(self, patch: Patch, step: Step) -> None:
        ours = patch.ours
        patch.refusal = ""
        if ours.switched:
            patch.refusal = "an attention backend or a parallel configuration of diffusers was set after enabling"
        decision = self.policy(patch.site, step)
        if isinstance(decision, Sparse) and patch.adapter == "generic":
            decision = Dense(decision.precision)  # where text lies among its tokens is not known
        run = None if ours.switched or self.bypass else self._runner(patch.site, decision)
        if run is not ours.run:
            ours.bind(run)

    def _runner(self, site: Site, decision: Decision) -> Runner | Placed:
        """Sites of one kind that decide alike share a runner, and with it a compiled graph; so do those that differ in their
        windows alone, each at a place of its own."""
        common = self.policy.decision if isinstance(decision, Sparse) else decision
        key = (site.kind, common)
        if key not in self._runners:
            self._runners[key] = Runner(site.kind, common, self.backend)
        if self.policy.windows is None or not isinstance(decision, Sparse):
            return self._runners[key]
        place = (site.kind, decision)
        if place not in self._places:
            self._places[place] = self._runners[key].placed(decision)
        return self._places[place]

    def _kv_len(self, model: nn.Module, inputs: dict, grid: object) -> Tensor | None:
        """The adapter's lengths, computed once for each set of mask tensors: they stay the same objects over the steps."""
        if self.adapter.kv_len is None:
            return None
        masks = tuple(inputs.get(name) for name in self.adapter.kv_len_from)
        key = (grid, *((id(mask), _version(mask)) for mask in masks))
        for known, _, kv_len in self._kv_lens:
            if known == key:
                return kv_len
        kv_len = self.adapter.kv_len(model, inputs)
        self._kv_lens = [*self._kv_lens[-3:], (key, masks, kv_len)]  # the masks stay referenced, so ids stay theirs
        return kv_len


class PipeReference:
    """The pipeline, held weakly; a copy of the pipeline's denoiser made with the pipeline refers to the copy."""

    def __init__(self, pipe: object) -> None:
        self._ref = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> object:
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: dict) -> PipeReference:
        pipe = self()
        return PipeReference(memo.get(id(pipe), pipe))

    def __reduce__(self):
        return PipeReference, (None,)


def session_of(model: nn.Module) -> Session | None:
    """The session on a denoiser, if attention is enabled on it."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Session)), None)


def _host(attn: nn.Module) -> object:
    """The processor that is there, or the one that ours stands in for: enabling twice does not stack."""
    return attn.processor.host if isinstance(attn.processor, FastProcessor) else attn.processor


def _device(inputs: dict) -> torch.device:
    """Of the video's tokens."""
    return inputs["hidden_states"].device


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _needs_grad(model: nn.Module, inputs: dict) -> str:
    if not torch.is_grad_enabled():
        return ""
    tensors = (*(x for x in inputs.values() if isinstance(x, Tensor)), *model.parameters())
    return "inputs or weights require grad: the host's own path" if any(x.requires_grad for x in tensors) else ""
