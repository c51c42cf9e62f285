"""The generic way: the host's own processor, its own code, with the names it calls attention by bound to our runner.

A processor of diffusers calls `F.scaled_dot_product_attention` or `dispatch_attention_fn`, both globals of its module. A
function is a code object and a dictionary of globals; we make another function of the same code object, with a copy of
those globals in which the two names lead to a Runner. Nothing of the host is changed, and nothing is copied as text.

The globals must be those of a real module that `sys.modules` knows by name: torch.compile guards on globals by module
name and would otherwise look at the host's.
"""

from __future__ import annotations

import functools
import sys
import types

import torch
import torch.nn.functional as F

from videoattn.pipelines.processor import FastProcessor

_NAMES = ("scaled_dot_product_attention", "dispatch_attention_fn")


class ReboundProcessor(FastProcessor):
    """Mixed into a subclass of the host's processor class, so that the host's own isinstance checks still hold."""

    def bind(self, run) -> None:
        self.run = run
        self.call = None if run is None else _rebound_call(type(self.host), run)

    def __reduce__(self):
        return rebind, (self.host,)


def refuses(host) -> str | None:
    """Why a processor cannot go the generic way, or None where it can."""
    host_class = type(host)
    if isinstance(host, torch.nn.Module):
        return f"{host_class.__name__} holds weights of its own"
    if not host_class.__module__.startswith("diffusers."):
        return f"{host_class.__name__} is not the host's own processor"
    if not set(_NAMES) & set(host_class.__call__.__code__.co_names):
        return f"{host_class.__name__} calls no attention that can be routed"
    return None


def rebind(host) -> ReboundProcessor:
    """A processor that runs the host's code on our runner, once `bind` has named one."""
    return _rebound_class(type(host))(host)


@functools.cache
def _rebound_class(host_class: type) -> type:
    def __init__(self, host=None):  # the host makes more of the class that it finds, without arguments
        host = host_class() if host is None else host
        vars(self).update(vars(host))
        FastProcessor.__init__(self, host)
        self.bind(None)

    # The host filters keyword arguments by the signature of __call__: keep it.
    @functools.wraps(host_class.__call__)
    def __call__(self, *args, **kwargs):
        return self.host(*args, **kwargs) if self.call is None else self.call(self, *args, **kwargs)

    methods = {"__init__": __init__, "__call__": __call__}
    return type(f"Fast{host_class.__name__}", (ReboundProcessor, host_class), methods)


_calls: dict[tuple[type, int], types.FunctionType] = {}  # by host class and the runner's key: few, and kept


def _rebound_call(host_class: type, run) -> types.FunctionType:
    key = (host_class, run.key)
    if key not in _calls:
        _calls[key] = _make_call(host_class, run)
    return _calls[key]


def _make_call(host_class: type, run) -> types.FunctionType:
    original = host_class.__call__
    name = f"videoattn._rebound.{host_class.__module__}.{host_class.__name__}.{run.key}"
    module, functional = types.ModuleType(name), types.ModuleType(f"{name}.functional")
    functional.__dict__.update({k: v for k, v in vars(F).items() if not k.startswith("__")})
    functional.scaled_dot_product_attention = _sdpa_to(run.entry)
    kept = ("__builtins__", "__package__")  # the latter for relative imports inside the host's code
    module.__dict__.update({k: v for k, v in original.__globals__.items() if not k.startswith("__") or k in kept})
    for key, value in list(vars(module).items()):
        if value is F:
            setattr(module, key, functional)
    if hasattr(module, "dispatch_attention_fn"):
        module.dispatch_attention_fn = _dispatch_to(run.entry, module.dispatch_attention_fn)
    sys.modules[name] = module
    code = original.__code__.replace()  # a copy: torch.compile tells functions apart by their code objects
    call = types.FunctionType(code, vars(module), original.__name__, original.__defaults__, original.__closure__)
    call.__kwdefaults__ = original.__kwdefaults__
    return call


def _sdpa_to(attend):
    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if dropout_p or query.ndim != 4:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return attend(query, key, value, attn_mask, None, scale, "BHND", is_causal)

    return scaled_dot_product_attention


def _dispatch_to(attend, host_dispatch):
    def dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        attention_kwargs=None,
        *,
        backend=None,
        parallel_config=None,
    ):
        is_mask = attn_mask is None or isinstance(attn_mask, torch.Tensor)  # else a BlockMask of flex attention
        if not is_mask or dropout_p or attention_kwargs or backend is not None or parallel_config is not None:
            return host_dispatch(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        if attn_mask is not None and attn_mask.ndim == 2:  # [B, Nk], as the host's native backend reads it
            attn_mask = attn_mask[:, None, None, :]
        return attend(query, key, value, attn_mask, None, scale, "BNHD", is_causal)

    return dispatch_attention_fn
