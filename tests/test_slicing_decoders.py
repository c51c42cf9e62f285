"""Decoders of VAEs in slices: the same frames to rounding, in a part of the memory, and nothing left behind."""

import contextlib
from types import MethodType

import accelerate
import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan
from diffusers.hooks import HookRegistry, ModelHook
from tiny_parts import randomize

from videoattn.benchmarks import models
from videoattn.slicing import decoder_switches, decoder_wan, decoders, forecast
from videoattn.slicing.install import SlicedForward
from videoattn.slicing.norm import Statistics

FORWARDS = decoders.FORWARDS | decoder_wan.FORWARDS
COUNTS = (1, 2, 3, 7, 1000)

pytestmark = pytest.mark.usefixtures("poisoned")


@contextlib.contextmanager
def cut(vae, **counts):
    """The decoder of `vae` in slices, through its FORWARDS alone; yields its groups."""
    name = "" if type(vae).__name__ in FORWARDS else "decoder"
    module = vae.get_submodule(name)
    site = SlicedForward(name, module, FORWARDS[type(module).__name__])
    assert site.kind.refuses(module) is None
    assert counts.keys() <= site.groups.counts.keys()
    site.groups.counts |= counts
    before = vars(module).get(site.kind.method)
    try:
        setattr(
            module, site.kind.method, lambda *args, **kwargs: site.kind.forward(module, site.groups, *args, **kwargs)
        )
        yield site.groups
    finally:
        delattr(module, site.kind.method)
        assert before is None


def made(vae):
    randomize(vae.eval().requires_grad_(False), torch.Generator().manual_seed(0))
    return vae


def image_vae():
    return tiny_pipelines.build("animatediff").vae


def video_vae(layers=2):
    """Channels that change from level to level, and attention in the middle block."""
    return made(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            latent_channels=4,
            layers_per_block=layers,
        )
    )


def wan_vae(**config):
    return made(
        AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True], **config
        )
    )


def wan22_vae():
    """Residual up blocks, and two pixels a row of the decoder."""
    return wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8)


@pytest.fixture
def short_bands(monkeypatch):
    """Bands of one row, so that small pictures have several."""
    monkeypatch.setattr(decoder_wan, "LEAST", 1)


def decode(vae, latents, **options):
    with torch.no_grad():
        return vae.decode(latents, **options).sample


def close(out, expected, tolerance=1e-5):
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def off(out, expected):
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


# --- the same frames ---


def test_images():
    vae = image_vae()
    for frames in (1, 10):
        latents = torch.randn(frames, 4, 9, 13)
        expected, given = decode(vae, latents), latents.clone()
        for count in COUNTS:
            with cut(vae, spatial=count) as groups:
                close(decode(vae, latents), expected)
            assert groups.sizes == {"spatial": frames}
        assert torch.equal(latents, given)


def test_images_normed_by_their_latents():
    """The decoder of VQModel, which takes latents beside its input."""
    decoder = made(decoders.Decoder(4, 3, ("UpDecoderBlock2D",), (32,), norm_type="spatial"))
    vae = torch.nn.Module()
    vae.decoder = decoder
    x, latents = torch.randn(5, 4, 6, 7), torch.randn(5, 4, 6, 7)
    expected = decoder(x, latents)
    with cut(vae, spatial=3):
        close(decoder(x, latents), expected)
        close(decoder(x, latents[:1].expand(5, -1, -1, -1)), decoder(x, latents[:1]))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("batch", "frames"), [(2, 5), (1, 1)])
def test_videos(layers, batch, frames):
    vae = video_vae(layers)
    latents = torch.randn(batch * frames, 4, 7, 5)
    expected, given = decode(vae, latents, num_frames=frames), latents.clone()
    for spatial, temporal in (*zip(COUNTS, COUNTS, strict=True), (1, 3), (3, 1)):
        with cut(vae, spatial=spatial, temporal=temporal) as groups:
            close(decode(vae, latents, num_frames=frames), expected)
        assert groups.sizes == {"spatial": batch * frames, "temporal": 14}
    assert torch.equal(latents, given)


def test_statistics_are_of_the_whole_video(monkeypatch):
    """Halves of another mean and spread. With statistics of a slice the frames would be far off, so this test can fail."""
    vae = video_vae()
    latents = torch.randn(5, 4, 12, 8)
    latents[..., 4:] = latents[..., 4:] * 8 + 5
    latents[..., 6:, :] = latents[..., 6:, :] * 4 - 3
    expected = decode(vae, latents, num_frames=5)
    with cut(vae, spatial=3, temporal=3):
        close(decode(vae, latents, num_frames=5), expected)
        monkeypatch.setattr(Statistics, "normalised", lambda self, x, silu: F.silu(self.norm(x)))
        assert off(decode(vae, latents, num_frames=5), expected) > 0.01


def test_fewer_frames_a_call_is_another_function():
    """diffusers' decode_chunk_size, which slices stand in for."""
    vae = video_vae()
    latents = torch.randn(6, 4, 7, 5)
    chunks = torch.cat([decode(vae, chunk, num_frames=3) for chunk in latents.split(3)])
    assert off(chunks, decode(vae, latents, num_frames=6)) > 0.01


@pytest.mark.parametrize("build", [wan_vae, wan22_vae])
def test_wan(build, short_bands):
    """Of 23 rows, some bands end on both sides before the picture does."""
    vae = build()
    latents = torch.randn(1, 4, 3, 23, 3)
    expected, given = decode(vae, latents), latents.clone()
    for rows, frames in (*zip(COUNTS, COUNTS, strict=True), (1, 2), (7, 1)):
        with cut(vae, rows=rows, frames=frames) as groups:
            close(decode(vae, latents), expected)
        assert groups.sizes == ({} if rows == frames == 1 else {"rows": 23, "frames": 2})
    assert torch.equal(latents, given)
    with cut(vae, rows=3, frames=2), torch.no_grad():
        (video,) = vae.decode(latents, return_dict=False)
        close(video, expected)
    assert "forward" not in vars(vae.decoder)


@pytest.mark.parametrize("shape", [(2, 4, 1, 5, 4), (2, 4, 2, 3, 2), (1, 4, 4, 1, 1)])
def test_wan_of_small_sizes(shape, short_bands):
    vae = wan_vae()
    latents = torch.randn(shape)
    expected = decode(vae, latents)
    for count in (2, 1000):
        with cut(vae, rows=count, frames=count):
            close(decode(vae, latents), expected)
    vae.enable_slicing()
    with cut(vae, rows=2, frames=2):
        close(decode(vae, latents), expected)


def test_wan_rows_reach_as_far_as_they_must(short_bands, monkeypatch):
    """With one row less around a band its values change, so the check of the same frames can fail."""
    vae = wan_vae()
    latents = torch.randn(1, 4, 2, 23, 3)
    expected, wider = decode(vae, latents), decoder_wan._wider
    monkeypatch.setattr(decoder_wan, "_wider", lambda rows, module, height: rows)
    with cut(vae, rows=3):
        assert off(decode(vae, latents), expected) > 0.01
    monkeypatch.setattr(decoder_wan, "_wider", wider)
    first, middle, last = (decoder_wan._inputs(vae.decoder, rows, 23)[0] for rows in ((0, 4), (44, 48), (88, 92)))
    assert first[0] == 0 and last[1] == 23
    assert 0 < middle[0] < 11 and 12 < middle[1] < 23


def test_wan_bands_are_not_shorter_than_they_should_be():
    vae = wan_vae()
    latents = torch.randn(1, 4, 1, 17, 2)
    expected = decode(vae, latents)
    with cut(vae, rows=1000) as groups:
        close(decode(vae, latents), expected)
    assert groups.sizes["rows"] == 17 // decoder_wan.LEAST


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, short_bands):
    """No further from fp32 than the host is."""
    cases = [
        (image_vae(), torch.randn(4, 4, 6, 6), {}, {"spatial": 3}),
        (video_vae(), torch.randn(4, 4, 6, 6), {"num_frames": 4}, {"spatial": 3, "temporal": 3}),
        (wan_vae(), torch.randn(1, 4, 2, 12, 3), {}, {"rows": 2, "frames": 2}),
    ]
    for vae, latents, options, counts in cases:
        exact = decode(vae, latents, **options)
        vae, latents = vae.to(dtype), latents.to(dtype)
        host = decode(vae, latents, **options)
        with cut(vae, **counts):
            out = decode(vae, latents, **options)
        assert out.dtype == dtype and out.isfinite().all()
        assert off(out, exact) <= 1.2 * off(host, exact) + torch.finfo(dtype).eps


# --- what a call needs beside values, and what stands around it ---


def cases():
    yield image_vae(), torch.randn(4, 4, 5, 5), {}, {"spatial": 3}
    yield video_vae(), torch.randn(4, 4, 5, 5), {"num_frames": 4}, {"spatial": 3, "temporal": 3}
    yield wan_vae(), torch.randn(1, 4, 2, 9, 3), {}, {"rows": 2, "frames": 2}


def test_gradients_and_autocast_are_the_hosts(short_bands):
    for vae, latents, options, counts in cases():
        latents.requires_grad_(True)
        vae.decode(latents, **options).sample.square().sum().backward()
        expected, latents.grad = latents.grad, None
        with cut(vae, **counts) as groups:
            vae.decode(latents, **options).sample.square().sum().backward()
        assert torch.equal(latents.grad, expected) and groups.sizes == {}
        latents = latents.detach()
        with torch.autocast("cpu", torch.bfloat16):
            expected = decode(vae, latents, **options)
            with cut(vae, **counts):
                assert torch.equal(decode(vae, latents, **options), expected)


def test_an_exception_in_a_slice_leaves_nothing_behind(short_bands):
    for vae, latents, options, counts in cases():
        expected = decode(vae, latents, **options)
        convolution, calls = vae.decoder.conv_out, []

        def fails(self, *args, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("in the middle")
            return type(self).forward(self, *args)

        with cut(vae, **counts):
            convolution.forward = MethodType(fails, convolution)
            with pytest.raises(RuntimeError, match="in the middle"):
                decode(vae, latents, **options)
            assert len(calls) == 2
            del convolution.forward
            close(decode(vae, latents, **options), expected)
        assert torch.equal(decode(vae, latents, **options), expected)
        assert all("forward" not in vars(module) for module in vae.modules())


class Around(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        type(self).calls += 1
        return args, kwargs


def test_hooks_around_wans_decoder_run_once_a_video(short_bands):
    """Offloading of the decoder as one brings its weights so, and would not if its parts alone were called."""
    vae, latents = wan_vae(), torch.randn(1, 4, 2, 9, 3)
    expected = decode(vae, latents)
    HookRegistry.check_if_exists_or_initialize(vae.decoder).register_hook(Around(), "around")
    Around.calls = 0
    for _ in range(2):
        with cut(vae, rows=2, frames=2) as groups:
            close(decode(vae, latents), expected)
        assert groups.sizes["rows"] == 9
    assert Around.calls == 2
    assert torch.equal(decode(vae, latents), expected)


def test_weights_that_come_and_go(short_bands):
    """accelerate's sequential offload: a module has weights while it is called, and no longer."""
    for vae, latents, options, counts in cases():
        expected = decode(vae, latents, **options)
        accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
        assert all(x.is_meta for x in vae.decoder.parameters())
        with cut(vae, **counts) as groups:
            close(decode(vae, latents, **options), expected)
        assert groups.sizes


def test_a_decoder_that_is_compiled_or_replaced_stays_the_hosts(short_bands):
    vae, latents = wan_vae(), torch.randn(1, 4, 2, 9, 3)
    expected = decode(vae, latents)
    vae.decoder._compiled_call_impl = vae.decoder._call_impl
    with cut(vae, rows=2) as groups:
        assert torch.equal(decode(vae, latents), expected) and groups.sizes == {}
    vae.decoder._compiled_call_impl = None
    own = vae.decoder.forward = vae.decoder.forward
    with cut(vae, rows=2) as groups:
        assert torch.equal(decode(vae, latents), expected) and groups.sizes == {}
    assert vars(vae.decoder)["forward"] is own


def test_parts_of_two_types_are_the_hosts():
    vae = video_vae()
    vae.decoder.up_blocks.to(torch.bfloat16)
    vae.decoder.conv_norm_out.to(torch.bfloat16)
    vae.decoder.conv_out.to(torch.bfloat16)
    vae.decoder.time_conv_out.to(torch.bfloat16)
    latents = torch.randn(3, 4, 5, 5)
    expected = decode(vae, latents, num_frames=3)
    with cut(vae, spatial=3, temporal=2) as groups:
        assert torch.equal(decode(vae, latents, num_frames=3), expected) and groups.sizes == {}


# --- what it does not know ---


class Other(decoders.Decoder):
    pass


def test_refusals():
    def refuses(module, name=None):
        return FORWARDS[name or type(module).__name__].refuses(module)

    other = made(AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)).decoder
    assert refuses(other) is None
    other.__class__ = Other
    assert "is not the decoder of AutoencoderKL" in refuses(other, "Decoder")
    assert "is not the decoder of AutoencoderKLTemporalDecoder" in refuses(other, "TemporalDecoder")

    vae = video_vae()
    vae.decoder.up_blocks[0].upsamplers[0].interpolate = False
    assert "Upsample2D does not double the picture" in refuses(vae.decoder)
    vae = video_vae()
    vae.decoder.up_blocks[0].resnets[0] = vae.decoder.up_blocks[0].resnets[0].spatial_res_block
    assert "ResnetBlock2D is no residual block" in refuses(vae.decoder)
    narrow = AutoencoderKLTemporalDecoder(block_out_channels=(32, 256), down_block_types=("DownEncoderBlock2D",) * 2)
    assert refuses(narrow.decoder) == "a level is smaller than the one before"

    vae = wan_vae()
    vae.decoder.up_blocks[0] = torch.nn.Identity()
    assert "how far Identity sees is not known" in refuses(vae)
    vae = wan_vae()
    vae.decoder.up_blocks[1].resnets[0] = torch.nn.Identity()
    assert "how far the blocks of WanUpBlock see is not known" in refuses(vae)
    assert "has another decoder" in refuses(image_vae(), "AutoencoderKLWan")


# --- memory ---


def real(name):
    entry = models.spec(name)
    return models.build(entry["components"]["vae"], device="meta", dtype=getattr(torch, entry["dtype"]), seed=0)


def latents_of(vae, *shape):
    return torch.empty(shape, dtype=next(vae.parameters()).dtype, device="meta")


def peak(vae, latents, counts=None, **options):
    with cut(vae, **counts) if counts else contextlib.nullcontext():
        return forecast.peak(lambda: vae.decode(latents, **options))[0]


def test_memory_of_images():
    vae = real("animatediff")
    latents = latents_of(vae, 16, 4, 36, 64)
    assert peak(vae, latents, {"spatial": 16}) < 0.08 * peak(vae, latents)


def test_memory_of_videos():
    """One tensor of the last level, and a quarter of it again: a frame on its way up from the level before."""
    vae = real("svd-xt")
    latents = latents_of(vae, 25, 4, 36, 64)
    last = 25 * 128 * 288 * 512 * 2
    assert peak(vae, latents, {"spatial": 25, "temporal": 24}, num_frames=25) < 1.26 * last
    assert peak(vae, latents, num_frames=25) > 7.9 * last


def test_memory_of_wan():
    vae = real("wan-1.3b")
    latents = latents_of(vae, 1, 16, 5, 30, 52)
    whole = peak(vae, latents)
    assert peak(vae, latents, {"rows": 1, "frames": 4}) < 0.8 * whole  # for nothing
    assert peak(vae, latents, {"rows": 2, "frames": 2}) < 0.6 * whole
    assert peak(vae, latents, {"rows": 3, "frames": 4}) < 0.5 * whole


def test_a_forecast_of_wan_stops_early(monkeypatch):
    """And says what all frames would."""
    vae = real("wan-1.3b")
    latents = latents_of(vae, 1, 16, 5, 16, 8)
    short = {rows: peak(vae, latents, {"rows": rows, "frames": 2}) for rows in (1, 2)}
    monkeypatch.setattr(decoder_wan, "SETTLED", 1000)
    assert short == {rows: peak(vae, latents, {"rows": rows, "frames": 2}) for rows in (1, 2)}
    assert short[2] < short[1]


# --- the host's switches ---


def test_switches_that_change_the_video():
    def known(name):
        return {switch.option: switch.exact for switch in decoder_switches.switches(tiny_pipelines.build(name).vae)}

    assert known("animatediff") == {"vae_frames": True, "vae_tiling": False}
    assert known("svd") == {"vae_frames": False}
    assert known("wan") == {"vae_tiling": False}


@pytest.mark.parametrize("build", [image_vae, wan_vae])
def test_tiling_comes_and_goes(build):
    vae = build()
    before = dict(vars(vae))
    restore = decoder_switches.tile(vae)
    assert vae.use_tiling
    if isinstance(vae, AutoencoderKLWan):
        vae.enable_tiling(tile_sample_min_height=32)
    vae.tile_latent_min_size, vae.decode = 3, vae.decode  # of others: ours stays away from what is not of tiles
    restore()
    assert vars(vae).pop("decode") is not None
    left = dict(vars(vae))
    left.pop("tile_latent_min_size") if "tile_latent_min_size" not in before else None
    assert left.keys() == before.keys() and all(left[name] is before[name] for name in before)


def test_tiling_that_was_on_stays_on():
    vae = wan_vae()
    vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    decoder_switches.tile(vae, tile_sample_min_height=32)()
    assert (vae.use_tiling, vae.tile_sample_min_height, vae.tile_sample_min_width) == (True, 16, 16)
    latents = torch.randn(1, 4, 1, 6, 6)
    expected = decode(vae, latents)
    with cut(vae, rows=2, frames=2):  # tiles were asked for
        assert torch.equal(decode(vae, latents), expected)


def test_no_tiles():
    with pytest.raises(ValueError, match="wanted a VAE that decodes in tiles, got AutoencoderKLTemporalDecoder"):
        decoder_switches.tile(video_vae())
