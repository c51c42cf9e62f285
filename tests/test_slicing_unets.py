"""Blocks of video UNets in slices: the same outputs, less memory."""

import functools

import pytest
import tiny_pipelines
import torch
from torch import nn

import videoattn
from videoattn.benchmarks import models
from videoattn.slicing import forecast, handover, unet_3d, unet_motion, unet_spatio_temporal
from videoattn.slicing.install import SlicedForward
from videoattn.slicing.norm import statistics
from videoattn.slicing.spatial_temporal import Take

NAMES = ("animatediff", "svd", "text_to_video_sd", "i2vgen_xl")
FORWARDS = unet_motion.FORWARDS | unet_spatio_temporal.FORWARDS | unet_3d.FORWARDS
COUNTS = (2, 3, 7, 1000)
NEAR = {"rtol": 1e-5, "atol": 1e-5}
SVD = 2e-4  # of the largest latent: its sigmas start at 700, and latents are that multiple of what the UNet rounds


def sliced(root: nn.Module, count: int, *, handing_over: bool = False) -> list[SlicedForward]:
    """The outermost modules that are known, in `count` slices of every group."""
    sites = []
    for name, module in root.named_modules():
        if any(name.startswith(f"{site.name}.") for site in sites):
            continue
        kind = FORWARDS.get(type(module).__name__)
        if kind is not None and kind.refuses(module) is None:
            sites.append(SlicedForward(name, module, kind))
    if handing_over:
        handover.connect(sites)
    for site in sites:
        site.install()
        site.groups.counts = dict.fromkeys(site.groups.counts, count)
    return sites


def whole(sites: list[SlicedForward]) -> None:
    for site in sites:
        site.remove()


@functools.cache
def built(name: str, layers: int = 2):
    return tiny_pipelines.build(name, layers=layers)


def block_calls(unet: nn.Module, run) -> list[tuple[str, nn.Module, tuple, dict]]:
    """(name, module, args, kwargs) of the first call of each module that can be sliced, of one run."""
    calls = {}
    sites = sliced(unet, 1)
    whole(sites)

    def seen(name, module, args, kwargs):
        calls.setdefault(name, (name, module, args, kwargs))

    handles = [
        site.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=site.name: seen(name, module, args, kwargs), with_kwargs=True
        )
        for site in sites
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return list(calls.values())


def tensors(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [tensor for part in out for tensor in tensors(part)]


def assert_equal(out, expected, **tolerance) -> None:
    out, expected = tensors(out), tensors(expected)
    assert [x.shape for x in out] == [x.shape for x in expected]
    for x, y in zip(out, expected, strict=True):
        assert (x - y).abs().max() <= tolerance.get("share", 1e-5) * y.abs().max()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_blocks_return_what_they_return(name):
    pipe = built(name)
    batch = 1 if name == "svd" else 2
    run = lambda: tiny_pipelines.run(name, pipe, batch=batch)
    for _, module, args, kwargs in block_calls(pipe.unet, run):
        expected = module(*args, **kwargs)
        given = [x.clone() for x in tensors([x for x in kwargs.values() if isinstance(x, torch.Tensor)])]
        site = SlicedForward("", module, FORWARDS[type(module).__name__])
        for count in (1, *COUNTS):
            site.groups.counts = dict.fromkeys(site.groups.counts, count)
            out = site.kind.forward(module, site.groups, *args, **kwargs)
            assert type(out) is type(expected)
            assert_equal(out, expected)
            assert set(site.groups.sizes) == set(site.kind.groups)
        now = tensors([x for x in kwargs.values() if isinstance(x, torch.Tensor)])
        assert all(torch.equal(x, y) for x, y in zip(given, now, strict=True)), "a caller's tensor was written to"


@pytest.mark.parametrize("handing_over", [False, True], ids=["blocks", "handover"])
@pytest.mark.parametrize("name", NAMES)
def test_latents_are_the_same(name, handing_over):
    pipe = built(name)
    expected = tiny_pipelines.run(name, pipe)
    keys = list(pipe.unet.state_dict())
    sites = sliced(pipe.unet, 3, handing_over=handing_over)
    try:
        assert list(pipe.unet.state_dict()) == keys
        assert_equal(tiny_pipelines.run(name, pipe), expected, share=SVD if name == "svd" else 1e-5)
    finally:
        whole(sites)
    assert torch.equal(tiny_pipelines.run(name, pipe), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_odd_sizes(name):
    """Levels of 7 x 11 and 4 x 6 places: the upsampler is told the size."""
    pipe = built(name)
    [(unet, args, kwargs)] = tiny_pipelines.denoiser_inputs(name, pipe)
    crop = lambda x: x[..., :7, :11] if isinstance(x, torch.Tensor) and x.ndim == 5 else x
    args, kwargs = [crop(x) for x in args], {key: crop(x) for key, x in kwargs.items()}
    expected = unet(*args, **kwargs)[0]
    assert expected.shape[-2:] == (7, 11)
    sites = sliced(unet, 3, handing_over=True)
    assert_equal(unet(*args, **kwargs)[0], expected)
    whole(sites)


@pytest.mark.parametrize("name", NAMES)
def test_with_fast_attention(name):
    pipe = tiny_pipelines.build(name)
    run = functools.partial(tiny_pipelines.run, name, pipe, batch=1 if name == "svd" else 2)
    expected = run()
    videoattn.enable_fast_attention(pipe, "exact")
    sites = sliced(pipe.unet, 3, handing_over=True)
    assert_equal(run(), expected, share=SVD if name == "svd" else 2e-5)
    whole(sites)


@pytest.mark.parametrize("name", ["animatediff", "text_to_video_sd"])
def test_freeu(name):
    pipe = tiny_pipelines.build(name)
    plain = tiny_pipelines.run(name, pipe)
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    expected = tiny_pipelines.run(name, pipe)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    sites = sliced(pipe.unet, 3, handing_over=True)
    assert_equal(tiny_pipelines.run(name, pipe), expected)
    pipe.disable_freeu()
    assert_equal(tiny_pipelines.run(name, pipe), plain)
    whole(sites)


def test_free_noise_and_its_split_inference():
    pipe = tiny_pipelines.build("animatediff")
    pipe.enable_free_noise(context_length=4, context_stride=2)
    run = functools.partial(tiny_pipelines.run, "animatediff", pipe, prompt="two dots", negative_prompt="blur")
    expected = run()
    for split in (False, True):
        if split:
            pipe.enable_free_noise_split_inference(spatial_split_size=32, temporal_split_size=4)
        sites = sliced(pipe.unet, 3)
        assert any(site.name == "mid_block" for site in sites)
        assert_equal(run(), expected)
        whole(sites)


def test_a_replaced_motion_module_is_refused():
    class Other(nn.Module):
        pass

    block = nn.Module()
    block.motion_modules = nn.ModuleList([Other()])
    assert "Other" in unet_motion.FORWARDS["DownBlockMotion"].refuses(block)
    block.temp_convs = nn.ModuleList([Other()])
    assert "Other" in unet_3d.FORWARDS["DownBlock3D"].refuses(block)
    block.resnets = nn.ModuleList([Other()])
    assert "Other" in unet_spatio_temporal.FORWARDS["DownBlockSpatioTemporal"].refuses(block)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_norms_over_time_know_the_other_half_of_the_picture(name):
    """With dark left and bright right halves, statistics of one slice are those of another picture."""
    pipe = built(name)
    calls = block_calls(pipe.unet, lambda: tiny_pipelines.run(name, pipe))
    _, module, args, kwargs = next(call for call in calls if call[0] == "down_blocks.0")
    x = kwargs["hidden_states"]
    contrast = torch.linspace(-20, 20, x.shape[-1]).sign() * torch.ones_like(x) * 5
    kwargs = kwargs | {"hidden_states": x + contrast}
    expected = module(*args, **kwargs)
    kind = FORWARDS[type(module).__name__]
    site = SlicedForward("", module, kind)
    site.groups.counts = dict.fromkeys(site.groups.counts, 3)
    assert_equal(kind.forward(module, site.groups, *args, **kwargs), expected)

    norm = next(y for y in module.modules() if isinstance(y, nn.GroupNorm))
    video = kwargs["hidden_states"].flatten(2).unflatten(0, (-1, 5)).transpose(1, 2)
    exact = norm(video)
    ours = statistics(norm, video.split(10, dim=-1)).normalised(video)
    each = torch.cat([norm(part) for part in video.split(10, dim=-1)], dim=-1)
    torch.testing.assert_close(ours, exact, **NEAR)
    assert (each - exact).norm() > 0.01 * exact.norm()


@torch.no_grad()
def test_masks_residuals_and_rows_of_arguments():
    pipe = built("animatediff")
    calls = block_calls(pipe.unet, lambda: tiny_pipelines.run("animatediff", pipe))
    _, block, args, kwargs = next(call for call in calls if call[0] == "down_blocks.0")
    kwargs = dict(kwargs)
    rows, tokens = kwargs["encoder_hidden_states"].shape[:2]
    kwargs["encoder_attention_mask"] = (torch.arange(rows)[:, None] + torch.arange(tokens) < tokens).long()
    out = kwargs["hidden_states"].shape
    kwargs["additional_residuals"] = torch.randn(out[0], block.resnets[0].out_channels, *out[2:])
    kwargs["cross_attention_kwargs"] = {}
    expected = block(*args, **kwargs)
    site = SlicedForward("", block, FORWARDS[type(block).__name__])
    site.groups.counts = {"spatial": 3, "temporal": 2}
    assert_equal(site.kind.forward(block, site.groups, *args, **kwargs), expected)

    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:4]  # a slice has as many frames
    with pytest.raises(ValueError, match="rows"):
        site.kind.forward(block, site.groups, *args, **kwargs)


def test_rows_are_taken_of_all_that_have_them():
    take = Take(6, lambda x: x[2:4])
    text, images, mask = torch.rand(6, 3), torch.rand(6, 2), torch.rand(1, 8)
    taken_text, [taken_images] = take((text, [images]))  # as IP-Adapter gives them
    assert torch.equal(taken_text, text[2:4]) and torch.equal(taken_images, images[2:4])
    kwargs = take({"gligen": {"objs": images}, "ip_adapter_masks": [mask], "scale": 0.5, "odd": torch.rand(5)})
    assert torch.equal(kwargs["gligen"]["objs"], images[2:4]) and kwargs["ip_adapter_masks"][0] is mask
    assert kwargs["scale"] == 0.5 and len(kwargs["odd"]) == 5
    assert take(None) is None and take(mask) is mask
    with pytest.raises(ValueError, match="rows"):
        take(text[:2])


@torch.no_grad()
def test_hooks_of_the_parts_run():
    pipe = tiny_pipelines.build("svd")
    expected = tiny_pipelines.run("svd", pipe)
    block = pipe.unet.down_blocks[0]
    seen = []
    parts = {
        "hooked and so whole": block.attentions[0],
        "in slices": block.resnets[0].spatial_res_block,
        "of a temporal half": block.resnets[0].temporal_res_block,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    sites = sliced(pipe.unet, 2, handing_over=True)
    assert_equal(tiny_pipelines.run("svd", pipe), expected, share=SVD)
    whole(sites)
    assert set(seen) == set(parts)
    assert seen.count("in slices") == 2 * seen.count("hooked and so whole")


@torch.no_grad()
def test_a_block_that_is_watched_gives_nothing_away():
    """What hangs on an up block sees the block's own output."""
    pipe = tiny_pipelines.build("animatediff")
    shapes = []
    handle = pipe.unet.up_blocks[0].register_forward_hook(lambda module, args, out: shapes.append(out.shape[-2:]))
    expected = tiny_pipelines.run("animatediff", pipe)
    sites = sliced(pipe.unet, 2, handing_over=True)
    assert_equal(tiny_pipelines.run("animatediff", pipe), expected)
    assert len(set(shapes)) == 1
    handle.remove()
    given = []
    taker = pipe.unet.up_blocks[1]
    forward = taker.forward.kind.forward
    taker.forward.kind = type(taker.forward.kind)(
        groups=("spatial", "temporal"),
        forward=lambda module, groups, *args, **kwargs: (
            given.append(kwargs["hidden_states"].shape[-2:]) or forward(module, groups, *args, **kwargs)
        ),
    )
    assert_equal(tiny_pipelines.run("animatediff", pipe), expected)
    assert given and given[0] != shapes[0], "without a hook the smaller picture is handed over"
    whole(sites)


def test_after_an_exception_all_is_well():
    pipe = built("animatediff")
    expected = tiny_pipelines.run("animatediff", pipe)
    sites = sliced(pipe.unet, 3, handing_over=True)
    block = pipe.unet.up_blocks[1].resnets[0]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in a slice")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a slice"):
        tiny_pipelines.run("animatediff", pipe)
    handle.remove()
    assert_equal(tiny_pipelines.run("animatediff", pipe), expected)
    whole(sites)
    assert torch.equal(tiny_pipelines.run("animatediff", pipe), expected)


def test_weights_that_offloading_moves_in_for_a_call():
    """accelerate keeps weights elsewhere, a norm's too, and brings them for the time of the module's own call."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipelines.build("animatediff")
    expected = tiny_pipelines.run("animatediff", pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    norm = pipe.unet.up_blocks[1].motion_modules[0].norm
    assert norm.weight.is_meta
    sites = sliced(pipe.unet, 3, handing_over=True)
    assert_equal(tiny_pipelines.run("animatediff", pipe), expected)
    whole(sites)


def test_gradients_are_the_hosts():
    pipe = tiny_pipelines.build("animatediff")
    [(unet, args, kwargs)] = tiny_pipelines.denoiser_inputs("animatediff", pipe)
    sites = sliced(unet, 3)
    sample = kwargs.pop("sample", None)
    sample, args = (args[0], args[1:]) if sample is None else (sample, args)
    sample = sample.clone().requires_grad_()
    unet(sample, *args, **kwargs)[0].sum().backward()
    assert sample.grad.abs().max() > 0
    whole(sites)


PEAKS = {  # of a real UNet with two levels of one layer: at most this share in 8 slices of each group
    "animatediff": ("Motion", 0.25),
    "svd-xt": ("SpatioTemporal", 0.30),
    "modelscope": ("3D", 0.20),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_a_share_of_what_it_was(name):
    """On the meta device, where tensors are counted and none is computed."""
    kind, share = PEAKS[name]
    levels = {
        "block_out_channels": (320, 640),
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
        "layers_per_block": 1,
    }
    if name == "svd-xt":
        levels["num_attention_heads"] = (5, 10)
    unet = models.denoiser(name, device="meta", dtype=torch.float16, overrides=levels)
    inputs = models.inputs(name, 256, 256, 16, device="meta", dtype=torch.float16, overrides=levels)

    def peak() -> int:
        return forecast.peak(lambda: unet(**inputs))[0]

    before = peak()
    peaks = {}
    for handing_over in (True, False):
        sites = sliced(unet, 8, handing_over=handing_over)
        peaks[handing_over] = peak()
        whole(sites)
    assert peaks[True] < share * before, f"{peaks[True] / before:.3f}"
    assert peaks[True] < 0.9 * peaks[False], (
        f"{peaks[False] / before:.3f}: what the upsampler makes should not be whole"
    )
