"""What every processor of ours shares: the host's processor that it stands in for, and the runner it calls."""

from __future__ import annotations

from torch import Tensor

from videoattn.prologue import Prologue, Stream


def _switch(name: str) -> property:
    """One of diffusers' switches on a processor: what is set after enabling is the host's, and ours steps aside."""

    def set_switch(self, value) -> None:
        self.switches[name] = value
        self.switched = any(value is not None for value in self.switches.values())
        setattr(self.host, name, value)

    return property(lambda self: self.switches.get(name), set_switch)


class FastProcessor:
    """Base of the attention processors that videoattn sets on a denoiser.

    Args:
        host: the processor that was there, called unchanged while `run` is None (training, context parallelism) and put
            back by `disable`.
    """

    _attention_backend = _switch("_attention_backend")
    _parallel_config = _switch("_parallel_config")
    prologue: Prologue

    def __init__(self, host) -> None:
        self.host = host
        self.switches: dict[str, object] = {}
        self.switched = False
        self.run = None
        self.kv_len: Tensor | None = None

    def bind(self, run) -> None:
        """Send the next calls to `run` (a Runner), or to the host's own path with None."""
        self.run = run

    def attend(self, heads: int, *streams: Stream, kv_len: Tensor | None = None) -> Tensor:
        """Attention of raw projections. Returns [B, N, H*D]."""
        return self.run.attend(self.prologue, heads, *streams, kv_len=kv_len).flatten(2, 3)


def project_out(attn, x: Tensor) -> Tensor:
    """The output projection and its dropout, as every host module keeps them: to_out = [Linear, Dropout]."""
    return attn.to_out[1](attn.to_out[0](x))
