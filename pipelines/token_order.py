"""Another order of the video's tokens, taken once a forward outside the layers rather than in every one of them.

Block-sparse attention wants neighbours in space and time side by side, which raster order does not give. The layers of
a DiT treat all tokens of the video alike: where one lies in the video comes in only through rotary tables, or was added
to the tokens before the first layer. So tokens and tables in another order at the entrance, and the inverse at the
exit, give the same output, up to the order of sums in attention.

Letters: B batch, N tokens of the video, n of text, C channels, D of a rotary table; T, Y, X frames, rows and columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from videoattn.pipelines.adapter import Inputs, attention_modules

# Hooks of diffusers that treat tokens alike and keep none of them from step to step. Caches keep tokens, and a step in
# another order would read them; guidance by smoothed energy blurs queries over the raster.
_HARMLESS = {
    "group_offloading",
    "layer_execution_tracker",
    "layer_skip_hook",
    "layerwise_casting",
    "lazy_leafs",
    "lazy_prefetch_group_offloading",
    "peft_autocast_disable",
}


def _never(model: nn.Module, inputs: Inputs) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """Where the video's tokens enter the layers of a denoiser and leave them, and what else there is one of a token.

    Args:
        enter: path of the module whose output is the tokens: [B, C, T, Y, X], or [B, n + N, C], text first.
        leave: path of the module whose output is the video's tokens alone, [B, N, C]. The output projection will do:
            fewer channels leave it than enter it.
        tables: path of the module whose output is the rotary tables (cos, sin), or the name of the denoiser's input
            that holds them or None. Each is [N, D] or [B or 1, N, ...]. None where positions are added to the tokens.
        per_token: inputs of the denoiser that may come as [B, N], as timesteps do where some frames are given; as [B]
            or [B, 1] they stay as they are.
        refuses: (denoiser, inputs) -> why the tokens of this call must stay in raster order, or None if they need not.
    """

    enter: str
    leave: str
    tables: str | None = None
    per_token: tuple[str, ...] = ()
    refuses: Callable[[nn.Module, Inputs], str | None] = _never


def refuses(model: nn.Module) -> str | None:
    """Why a denoiser's tokens must stay in raster order whatever the call, or None where they need not.

    Looks for what the host or the user has put into the layers. That walks every module (about a millisecond), so it is
    for the start of a generation; `Seams.refuses` is for each call.
    """
    own = vars(model)
    patched = "forward" in own and not {"_hf_hook", "_diffusers_hook"} & own.keys()  # accelerate's and diffusers' hooks
    if patched or not type(model).forward.__module__.startswith("diffusers."):
        return f"{type(model).__name__} has a forward of its own"
    if getattr(model, "_parallel_config", None) is not None:
        return "runs in parallel on several devices"
    if any(getattr(hook, "keeps_tokens", False) for hook in model._forward_pre_hooks.values()):
        return "tokens are kept from step to step"  # by step rehash, which a step in another order would read
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        foreign = () if registry is None else sorted(registry.hooks.keys() - _HARMLESS)
        if foreign:
            return f"hook {foreign[0]!r} may keep tokens or rely on their order"
    for _, attn in attention_modules(model):
        processor = type(attn.processor)
        if not processor.__module__.startswith(("diffusers.", "videoattn.")):
            return f"{processor.__name__} may rely on the order of tokens"
    return None


class TokenOrder:
    """Holds the order of the video's tokens for the next forwards of one denoiser, and the hooks that take it.

    A hook of the denoiser itself may set the order for the very forward that it precedes, if it was registered before.
    Until an order is set the hooks do nothing. A copy of the denoiser has hooks and an order of its own. A forward in
    which some hook did not run raises RuntimeError: torch.compile does not look for hooks that are newer than its code.

    Args:
        model: the denoiser.
        seams: of its family.

    Raises:
        ValueError: the denoiser lacks a module of the seams. It is then as it was.
    """

    def __init__(self, model: nn.Module, seams: Seams) -> None:
        self.index: Tensor | None = None
        self.inverse: Tensor | None = None
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._per_token = seams.per_token
        self._tables = tuple(name for name in (seams.tables,) if name in self._parameters)
        self._hooks = {seams.enter: self._enter, seams.leave: self._leave}
        if seams.tables is not None and not self._tables:
            self._hooks[seams.tables] = self._make_tables
        self._hooked: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        self._ran = 0  # hooks of this forward so far: compiled code that is older than a hook leaves it out
        self.follow(model)
        self._handles = [
            model.register_forward_pre_hook(self._permute_inputs, with_kwargs=True),
            model.register_forward_hook(self._check),
        ]

    def follow(self, model: nn.Module) -> None:
        """Move the hooks to the modules of the seams as they are now; a few microseconds where nothing has changed.

        LoRA wraps a module, and quantisation swaps it: a hook would be left inside, or behind.

        Raises:
            ValueError: the denoiser lacks a module of the seams. The hooks are then where they were.
        """
        modules = {path: _module(model, path) for path in self._hooks}
        for path, module in modules.items():
            hooked, handle = self._hooked.get(path, (None, None))
            if module is hooked:
                continue
            if handle is not None:
                handle.remove()
            self._hooked[path] = module, module.register_forward_hook(self._hooks[path])

    def set(self, index: Tensor | None, inverse: Tensor | None) -> None:
        """Take the video's tokens in this order from the next forward on, or as they come with None for both.

        index: int64 [N], place -> token, counted in raster order; every token once, which is not checked.
        inverse: int64 [N], token -> place.

        Raises:
            TypeError: not int64. ValueError: not two vectors of one length, or one of them alone.
        """
        if index is None or inverse is None:
            if index is not inverse:
                raise ValueError("wanted index and inverse, or neither, got one of them")
        elif index.dtype != torch.int64 or inverse.dtype != torch.int64:
            raise TypeError(f"wanted index and inverse in int64, got {index.dtype} and {inverse.dtype}")
        elif index.ndim != 1 or index.shape != inverse.shape:
            raise ValueError(
                f"wanted index and inverse of one shape [N], got {list(index.shape)} and {list(inverse.shape)}"
            )
        self.index, self.inverse = index, inverse

    def remove(self) -> None:
        """Take every hook off the denoiser; a second time does nothing."""
        self.set(None, None)
        for handle in (*self._handles, *(handle for _, handle in self._hooked.values())):
            handle.remove()
        self._hooked.clear()

    # -- hooks: they return None for "as it is" ------------------------------------------------------------------------

    def _permute_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.index is None:
            return None
        self._ran = 0
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        permuted = {}
        for name in self._per_token:
            x = inputs.get(name)
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] > 1:
                permuted[name] = _permute(x, 1, self.index)
        for name in self._tables:
            if inputs.get(name) is not None:
                permuted[name] = _permute_tables(inputs[name], self.index)
        args = tuple(permuted.get(name, x) for name, x in zip(self._parameters, args, strict=False))
        return args, {name: permuted.get(name, x) for name, x in kwargs.items()}

    def _make_tables(self, module: nn.Module, args: tuple, tables: tuple) -> tuple[Tensor, ...] | None:
        if self.index is None:
            return None
        self._ran += 1
        return _permute_tables(tables, self.index)

    def _enter(self, module: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
        if self.index is None:
            return None
        self._ran += 1
        if x.ndim == 5:
            # Tokens become rows in memory before they are moved, whole rows at a time. The host makes that copy itself
            # next, and finds it made: what we return is a view of rows.
            rows = x.flatten(2).transpose(1, 2).contiguous()
            return _permute(rows, 1, self.index).transpose(1, 2).unflatten(2, x.shape[2:])
        text = max(x.shape[1] - self.index.numel(), 0)
        video = _permute(x[:, text:], 1, self.index)
        return torch.cat([x[:, :text], video], dim=1) if text else video

    def _leave(self, module: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
        if self.inverse is None:
            return None
        self._ran += 1
        return _permute(x, 1, self.inverse)

    def _check(self, model: nn.Module, args: tuple, output: object) -> None:
        if self.index is not None and self._ran != len(self._hooks):
            raise RuntimeError(
                f"{type(model).__name__}: wanted {len(self._hooks)} hooks of the token order to run, got {self._ran}; "
                "code compiled before they were registered leaves them out; `torch.compiler.reset()` drops that code"
            )


def _permute(x: Tensor, dim: int, index: Tensor) -> Tensor:
    if x.shape[dim] != index.numel():
        raise ValueError(
            f"wanted {index.numel()} tokens, as the order has, in dimension {dim}, got a tensor {list(x.shape)}"
        )
    return x.index_select(dim, index.to(x.device))  # a denoiser spread over devices has its seams on several


def _permute_tables(tables: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    return tuple(_permute(table, 0 if table.ndim == 2 else 1, index) for table in tables)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__}: wanted a module {path!r}, got none") from None
