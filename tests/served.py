"""What the tests of served pipelines share."""

import torch
from tiny_parts import TEXT_DIM
from tiny_pipelines import denoisers

import videoattn
from videoattn.pipelines.adapter import attention_modules
from videoattn.pipelines.processor import FastProcessor
from videoattn.session import session_of


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_served(pipe, *, except_for=()):
    """Every attention layer runs on ours, but for those of the given names."""
    report = videoattn.report(pipe)
    for row in report.sites:
        if row.name in except_for:
            assert row.adapter == "untouched", row
        else:
            assert row.calls > 0 and not row.why, row
    for _, model in denoisers(pipe):
        sites = dict(session_of(model).adapter.sites(model))
        assert {patch.attn for patch in session_of(model).patches} == sites.keys()


def assert_undone(pipe):
    for _, model in denoisers(pipe):
        assert not any(isinstance(module.processor, FastProcessor) for _, module in attention_modules(model))
        assert not model._forward_pre_hooks


def wan_call(seed=0):
    """Arguments of one call of the tiny Wan denoiser."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 3, 6, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, TEXT_DIM, generator=generator),
        "return_dict": False,
    }
