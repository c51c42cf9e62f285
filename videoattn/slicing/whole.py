"""When a module is to run whole, by its class's own forward, though its groups are cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward: something that may remember what it saw last, such as
    the caches of diffusers, must see the call, and all of it. A profiler's hooks only observe."""
    return "forward" in vars(module) or watched(module)


def watched(module: nn.Module) -> bool:
    """Whether hooks on the module may do more than observe."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(getattr(hook, "observes", False) for hook in hooks)


def needs_host(module: nn.Module, x: Tensor) -> bool:
    """Whether a call needs more than values: gradients, which keep every intermediate anyway, or autocast's types."""
    if torch.is_grad_enabled() and (x.requires_grad or any(y.requires_grad for y in module.parameters())):
        return True
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
