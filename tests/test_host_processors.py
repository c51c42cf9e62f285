"""Processors and backends that the user chooses: obeyed, or left untouched and reported."""

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from served import assert_served
from tiny_pipelines import build, run

import videoattn
from videoattn.pipelines.adapter import attention_modules


@pytest.fixture(autouse=True)
def active_backend_of_diffusers():
    """`set_attention_backend` also sets one for the whole process, and resetting does not."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_a_backend_of_diffusers_set_before_gives_way():
    """Who speaks last is obeyed: enabling after it takes attention over, and disabling gives it back."""
    for name in ("wan", "skyreels_v2"):
        pipe = build(name)
        pipe.transformer.set_attention_backend("_native_math")
        host = run(name, pipe)
        videoattn.enable_fast_attention(pipe, "exact")
        run(name, pipe)
        assert_served(pipe)
        videoattn.disable(pipe)
        assert torch.equal(run(name, pipe), host)


@pytest.mark.parametrize("name", ["wan", "skyreels_v2"])
def test_a_backend_of_diffusers_set_afterwards_is_obeyed(name):
    pipe = build(name)
    pipe.transformer.set_attention_backend("_native_math")
    math = run(name, pipe)

    pipe = videoattn.enable_fast_attention(build(name), "exact")
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.equal(run(name, pipe), math)
    report = videoattn.report(pipe)
    assert len(report.refused) == len(report.sites) == 4
    assert all("set after enabling" in why for _, why in report.refused)

    pipe.transformer.reset_attention_backend()
    run(name, pipe)
    assert_served(pipe)
    assert not videoattn.report(pipe).refused

    pipe.transformer.set_attention_backend("_native_math")
    videoattn.disable(pipe)  # with no forward between
    assert torch.equal(run(name, pipe), math)


def test_context_parallelism_is_left_untouched_and_reported():
    pipe = build("wan")
    sites = dict(attention_modules(pipe.transformer))
    sites["blocks.0.attn1"].processor._parallel_config = ContextParallelConfig(ulysses_degree=2)
    before = sites["blocks.0.attn1"].processor
    videoattn.enable_fast_attention(pipe, "exact")
    assert sites["blocks.0.attn1"].processor is before
    assert videoattn.report(pipe).refused == (("blocks.0.attn1", "runs under context parallelism"),)

    sites["blocks.1.attn1"].processor._parallel_config = ContextParallelConfig(ulysses_degree=2)
    assert videoattn.disable(pipe)
    assert sites["blocks.1.attn1"].processor._parallel_config is not None


class UserProcessor(AttnProcessor2_0):
    """Somebody's own: it may do anything."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("order", ["enabled before", "enabled after"])
def test_a_processor_of_the_users_own_is_left_untouched(order):
    def set_own(pipe):
        pipe.transformer.transformer_blocks[1].attn1.set_processor(UserProcessor())

    pipe = build("latte")
    set_own(pipe)
    host = run("latte", pipe)
    pipe = build("latte")
    if order == "enabled before":
        videoattn.enable_fast_attention(pipe, "exact")
    set_own(pipe)
    if order == "enabled after":
        videoattn.enable_fast_attention(pipe, "exact")
    assert torch.equal(run("latte", pipe), host)
    reason = "UserProcessor is not the host's own processor"
    assert videoattn.report(pipe).refused == (("transformer_blocks.1.attn1", reason),)
    assert_served(pipe, except_for=["transformer_blocks.1.attn1"])
    videoattn.disable(pipe)
    assert isinstance(pipe.transformer.transformer_blocks[1].attn1.processor, UserProcessor)


def test_the_hosts_own_processor_put_back_by_hand_is_served_again():
    pipe = build("wan")
    attn = pipe.transformer.blocks[0].attn1
    host = attn.processor
    videoattn.enable_fast_attention(pipe, "exact")
    attn.set_processor(host)
    run("wan", pipe)
    assert_served(pipe)
    videoattn.disable(pipe)
    assert attn.processor is host


def test_attention_slicing_is_left_untouched():
    pipe = build("text_to_video_sd")
    pipe.enable_attention_slicing(1)
    host = run("text_to_video_sd", pipe)
    pipe = videoattn.enable_fast_attention(build("text_to_video_sd"), "exact")
    pipe.enable_attention_slicing(1)
    assert torch.equal(run("text_to_video_sd", pipe), host)
    assert {row.adapter for row in videoattn.report(pipe).sites} == {"untouched"}
