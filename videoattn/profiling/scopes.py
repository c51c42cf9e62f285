"""Which module of a pipeline is running: hooks on its modules, and its methods that are no module's call, tell listeners.

Nothing is hooked inside a compiled module or method: a hook there would be traced or make a new graph. It is one scope,
entered around its compiled call.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from videoattn.pipelines.adapter import attention_modules
from videoattn.pipelines.registry import adapter_for
from videoattn.profiling.categories import ATTENTION, CONVOLUTION, LINEAR, NORMALISATION

COMPILED = "compiled"
DENOISERS = ("transformer", "transformer_2", "unet")
_PARTS_OF_OTHERS = ("motion_adapter",)  # its weights live in the UNet, which is what runs
_METHODS = (  # (component or "" for the pipeline, method, stage)
    ("vae", "encode", "vae.encode"),
    ("vae", "decode", "vae.decode"),
    ("audio_vae", "encode", "audio_vae.encode"),
    ("audio_vae", "decode", "audio_vae.decode"),
    ("scheduler", "step", "scheduler"),
    ("scheduler", "scale_model_input", "scheduler"),
    ("scheduler", "set_timesteps", "scheduler"),
    ("scheduler", "add_noise", "scheduler"),
    ("", "encode_prompt", "text_encoder"),
)
# These only pass on: what they run shows in the module around them.
_UNSCOPED = (nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Sigmoid)
_OF_COMPONENTS = {  # what attends in the other parts
    "vae": "spatial",
    "audio_vae": "audio",
    "vocoder": "audio",
    "image_encoder": "spatial",
    "text_encoder": "text",
    "connectors": "text",
}
_PLAIN = (("*pooler", "text"),)  # attention of denoisers that has no processor, and so is no site: Mochi pools its text
_WRAPPER = re.compile(r"\._orig_mod(?=\.|$)")  # torch.compile's, in a path
_CONVOLUTIONS = tuple(getattr(nn, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3))


@dataclass(frozen=True, slots=True)
class Scope:
    """A part of the pipeline that runs.

    Args:
        stage: "pipeline", a component, or "vae.decode".
        module: path of the module with the component in front, or the method's name.
        role: "attention", "normalisation", "convolution", "linear", "compiled" or "".
        kind: of the attention module that is innermost around it, "" where there is none or its kind is not known.
    """

    stage: str
    module: str
    role: str = ""
    kind: str = ""


ROOT = Scope("pipeline", "pipeline")


class Listener(Protocol):
    def enter(self, scope: Scope) -> None:
        """A scope has begun."""

    def leave(self, scope: Scope) -> None:
        """It has ended, also where it raised."""


class Scopes:
    """A context: inside it `listener` is told of every scope of the pipeline. Afterwards nothing is left on it.

    Args:
        components: name -> part of the pipeline; those that are modules are hooked, and the methods above are wrapped.
        listener: is told.
        pipe: the pipeline itself, for its own methods; None without one.
        into_compiled: hook inside compiled modules too; only where they run eagerly, as under
            `torch.compiler.set_stance("force_eager")`.
    """

    def __init__(
        self, components: dict[str, object], listener: Listener, pipe: object = None, *, into_compiled: bool = False
    ) -> None:
        self.compiled: list[str] = []  # modules and methods that are one scope each because they are compiled
        self._components = components
        self._listener = listener
        self._pipe = pipe
        self._into_compiled = into_compiled
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._undo:  # undone here where something raises
            whole = set(self._wrap_methods())
            hooked: set[nn.Module] = set()  # a model under two names goes by the first
            for name, part in self._components.items():
                if isinstance(part, nn.Module) and name not in _PARTS_OF_OTHERS and part not in hooked:
                    hooked.add(part)
                    self._hook(name, part, whole)
            self._undo = self._undo.pop_all()

    def __exit__(self, *error: object) -> None:
        self._undo.close()  # all of it, also where one of them raises

    def _wrap_methods(self) -> Iterator[str]:
        """Yields the stages whose method is compiled."""
        for name, method, stage in _METHODS:
            owner = self._components.get(name) if name else self._pipe
            function, scope = getattr(owner, method, None), Scope(stage, f"{name or 'pipeline'}.{method}")
            if not callable(function):
                continue
            if _is_compiled_function(function) and not self._into_compiled:
                yield stage
                self.compiled.append(scope.module)
                scope = replace(scope, role=COMPILED)
            self._wrap(owner, method, scope)

    def _hook(self, component: str, model: nn.Module, whole: set[str]) -> None:
        compiled: list[str] = []
        # A processor's own code is the attention module's, also where it is a module.
        processors = {attn.processor for _, attn in attention_modules(model) if isinstance(attn.processor, nn.Module)}
        for path, module, kind, is_attention in _walk(component, model):
            if any(path == around or path.startswith(f"{around}." if around else "") for around in compiled):
                continue
            name = _WRAPPER.sub("", f"{component}.{path}" if path else component)
            stage = _stage(component, path)
            if stage in whole or module in processors:
                continue
            if _is_compiled(module) and not self._into_compiled:
                compiled.append(path)
                self.compiled.append(name)
                self._wrap_compiled(module, Scope(stage, name, COMPILED, kind))
            elif not isinstance(module, _UNSCOPED) and not hasattr(module, "_orig_mod"):
                self._hook_module(module, Scope(stage, name, ATTENTION if is_attention else _role(module), kind))

    def _hook_module(self, module: nn.Module, scope: Scope) -> None:
        enter, leave = self._listener.enter, self._listener.leave

        def before(module: nn.Module, args: object) -> None:
            enter(scope)

        def after(module: nn.Module, args: object, output: object) -> None:
            leave(scope)

        before.observes = after.observes = (
            True  # so that what reads a norm's weights instead of calling it does so still
        )
        self._undo.callback(module.register_forward_pre_hook(before, prepend=True).remove)
        self._undo.callback(module.register_forward_hook(after, always_call=True).remove)

    def _wrap_compiled(self, module: nn.Module, scope: Scope) -> None:
        """Around the compiled call: no guard sees it, so no graph breaks and none is made anew."""
        if module._compiled_call_impl is None:  # a wrapper, or a compiled forward: the module's own hooks run outside
            self._hook_module(module, scope)
        else:
            self._wrap(module, "_compiled_call_impl", scope)

    def _wrap(self, owner: object, method: str, scope: Scope) -> None:
        function, own = getattr(owner, method), method in vars(owner)
        setattr(owner, method, _Told(function, scope, self._listener))
        self._undo.callback((lambda: setattr(owner, method, function)) if own else (lambda: delattr(owner, method)))


class _Told:
    """A method that tells a listener of its calls. In a copy of its owner (a pipeline may copy its scheduler) it is the
    method of the copy."""

    def __init__(self, function: Callable, scope: Scope, listener: Listener) -> None:
        functools.update_wrapper(self, function)
        self._function, self._scope, self._listener = function, scope, listener

    def __call__(self, *args, **kwargs):
        self._listener.enter(self._scope)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._listener.leave(self._scope)

    def __deepcopy__(self, memo: dict) -> _Told:
        return _Told(copy.deepcopy(self._function, memo), self._scope, self._listener)


def denoisers(components: dict[str, object]) -> dict[str, nn.Module]:
    """The parts that denoise: those that an adapter knows, or that stand where diffusers keeps denoisers."""
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and (name in DENOISERS or adapter_for(original(part)) is not None)
    }


def original(module: nn.Module) -> nn.Module:
    """The module inside a torch.compile wrapper."""
    return getattr(module, "_orig_mod", module)


def _walk(component: str, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """(path, module, kind of the innermost attention around it, whether it is attention itself), parents first."""
    kinds, other = _attention_kinds(component, original(model))
    inherited: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = kinds.get(module, inherited.get(path.rpartition(".")[0], other))
        inherited[path] = kind
        yield path, module, kind, module in kinds


def _attention_kinds(component: str, model: nn.Module) -> tuple[dict[nn.Module, str], str]:
    """The kind of every attention module, "" where it is not known; and the kind of what is none of them."""
    adapter = adapter_for(model)
    other = next((kind for prefix, kind in _OF_COMPONENTS.items() if component.startswith(prefix)), "")
    found = dict(attention_modules(model))
    found |= {path: module for path, module in model.named_modules() if _projects(module)}
    kinds = dict.fromkeys(found.values(), other)
    if adapter is not None:
        kinds |= {found[path]: kind for path in found for pattern, kind in _PLAIN if fnmatchcase(path, pattern)}
        kinds |= {attn: site.kind for attn, site in adapter.sites(model)}
    return kinds, other


def _projects(module: nn.Module) -> bool:
    """Whether a module looks like attention of a library that knows no processors."""
    return any(
        {*names} <= module._modules.keys()
        for names in (
            ("q_proj", "k_proj", "v_proj"),
            ("q", "k", "v", "o"),
            ("to_q", "to_kv"),
            ("to_qkv",),
            ("to_q", "to_k"),
        )
    )


def _stage(component: str, path: str) -> str:
    """A VAE's parts are those of its encoder or of its decoder."""
    if component not in ("vae", "audio_vae"):
        return component
    return f"{component}.{'encode' if path.startswith(('encoder', 'quant_conv')) else 'decode'}"


def _role(module: nn.Module) -> str:
    if isinstance(module, _CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(module, nn.Linear):
        return LINEAR
    return NORMALISATION if "norm" in type(module).__name__.lower() else ""


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has the module, as a wrapper around it, in place, or its forward alone."""
    of_call = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    return of_call or _is_compiled_function(vars(module).get("forward"))


def any_compiled(components: dict[str, object]) -> bool:
    """Whether anything of a pipeline's parts is compiled."""
    modules = (module for part in components.values() if isinstance(part, nn.Module) for module in part.modules())
    methods = (getattr(components.get(name), method, None) for name, method, _ in _METHODS)
    return any(map(_is_compiled_function, methods)) or any(map(_is_compiled, modules))


def _is_compiled_function(function: object) -> bool:
    """torch.compiler.disable marks what it returns as torch.compile does, and once more."""
    return hasattr(function, "_torchdynamo_orig_callable") and not getattr(function, "_torchdynamo_disable", False)
