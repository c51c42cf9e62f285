"""What requires grad keeps the host's path, and is served again once nothing does."""

import pytest
import torch
from served import distance, wan_call
from tiny_pipelines import build, run

import videoattn


@pytest.mark.parametrize("what", ["input", "weights", "lora", "checkpointed weights"])
def test_what_requires_grad_keeps_the_hosts_path(what):
    def gradients(enabled):
        model = build("wan").transformer
        call = wan_call()
        if what == "input":
            call["hidden_states"].requires_grad_()
            leaves = [call["hidden_states"]]
        elif what == "lora":
            peft = pytest.importorskip("peft")
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
            leaves = [p for p in model.parameters() if p.requires_grad]
        else:
            model.requires_grad_()
            leaves = list(model.parameters())
        if what == "checkpointed weights":
            model.enable_gradient_checkpointing()
            model.train()
        if enabled:
            videoattn.enable_fast_attention(model, "exact")
        out = model(**call)[0]
        out.square().sum().backward()
        if enabled:
            report = videoattn.report(model)
            assert report.notes == ("WanTransformer3DModel: inputs or weights require grad: the host's own path",)
            assert not any(row.calls for row in report.sites)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for ours, host in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, host)


def test_it_is_served_again_once_nothing_requires_grad():
    model = videoattn.enable_fast_attention(build("wan").transformer.requires_grad_(), "exact")
    out = model(**wan_call())[0]
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(model(**wan_call())[0], out)
    report = videoattn.report(model)
    assert not report.notes and all(row.calls for row in report.sites)
    assert model(**wan_call())[0].requires_grad
    assert videoattn.report(model).notes


@pytest.mark.parametrize("name", ["wan", "hunyuan_video15", "svd"])
def test_inference_mode(name):
    pipe = build(name)
    with torch.inference_mode():
        host = run(name, pipe)
    videoattn.enable_fast_attention(pipe, "exact")
    with torch.inference_mode():
        ours = run(name, pipe)
    assert distance(ours, host) < 2e-6
    assert distance(run(name, pipe), host) < 2e-6  # and without it, on lengths that it has cached
