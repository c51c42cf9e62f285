"""Tiny pipelines with step rehash: what its tests share."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)
from tiny_pipelines import build, denoisers, run

import videoattn
from videoattn.caches.session import rehash_of

STEPS = 12
EVEN = {"steps": 7, "keys": "uniform", "mode": "extrapolate"}  # no calibration


class Abort(Exception):
    pass


def make(name, *, scheduler=None, layers=None):
    pipe = build(name, layers=layers)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def euler_wan(**options):
    return make("wan", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **options)


def generate(name, pipe, **options):
    return run(name, pipe, **{"steps": STEPS} | options)


def rehash(pipe, which=0):
    return rehash_of(denoisers(pipe)[which][1])


def ran(pipe, which=0):
    return sorted(rehash(pipe, which).ran)


def report(pipe):
    return str(videoattn.report(pipe))


def abort_at(step):
    def callback(pipe, index, t, kwargs):
        if index == step:
            raise Abort
        return {}

    return callback


class Count:
    """How often a module's class computed."""

    def __init__(self, module, monkeypatch):
        self.calls = 0
        forward = type(module).forward

        def counted(own, *args, **kwargs):
            self.calls += own is module
            return forward(own, *args, **kwargs)

        monkeypatch.setattr(type(module), "forward", counted)
