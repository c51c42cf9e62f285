"""Feature slicing as a user calls it: what is set on a pipeline, by which budget, and that it goes again.

One kind of module is sliced here, by a stand-in for the families' own files: the feed-forward of a transformer, by tokens.
"""

import copy

import accelerate
import pytest
import tiny_pipelines
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import FeedForward

import videoattn
from videoattn.slicing import budget, forecast, registry, session
from videoattn.slicing.install import SlicedForward
from videoattn.slicing.norm import statistics
from videoattn.slicing.registry import Sliced
from videoattn.slicing.session import OverBudget, sliceable, slicing_of
from videoattn.slicing.slices import Groups, ranges, sliced


class Calls:
    """Counts the slices that ran, and can fail in one."""

    def __init__(self):
        self.count = 0
        self.fails_at = None


@pytest.fixture
def calls(monkeypatch):
    seen = Calls()

    def forward(module, groups, x):
        def part(start, stop):
            seen.count += not x.is_meta
            if seen.count == seen.fails_at:
                raise RuntimeError("in the middle")
            return FeedForward.forward(module, x[:, start:stop])

        return groups.run("tokens", part, x.shape[1], dim=1)

    monkeypatch.setattr(session, "table", lambda: {"FeedForward": Sliced(groups=("tokens",), forward=forward)})
    return seen


def feed_forwards(pipe):
    return [module for module in pipe.transformer.modules() if isinstance(module, FeedForward)]


# --- budgets, slices ---


@pytest.mark.parametrize(
    ("given", "size"),
    [("11GiB", 11 * 2**30), ("11 GB", 11 * 10**9), (" 1.5 gib ", 3 * 2**29), ("512", 512), (7, 7), ("2m", 2 * 10**6)],
)
def test_budgets(given, size):
    assert budget.parse(given) == size


@pytest.mark.parametrize("wrong", ["", "GiB", "eleven", "11 GiBs", "-1GiB", "0", 0, -5, "1e9", "11 GG"])
def test_no_budgets(wrong):
    with pytest.raises(ValueError, match="memory: wanted"):
        budget.parse(wrong)


@pytest.mark.parametrize("wrong", [1.5, None, True, [1]])
def test_no_kind_of_budget(wrong):
    with pytest.raises(TypeError, match="memory: wanted a number of bytes or a str like '11GiB', got"):
        budget.parse(wrong)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 1000])
def test_ranges_cover_everything_once_and_evenly(size, count):
    found = list(ranges(size, count))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == size
    lengths = [stop - start for start, stop in found]
    assert len(found) == min(size, count) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [1, 3, 100])
def test_slices_lie_side_by_side(count, poisoned):
    x = torch.randn(2, 7, 3, 5)
    for dim in (0, 1, 3):
        size = x.shape[dim]
        out = sliced(lambda a, b, dim=dim: x.narrow(dim, a, b - a) * 2, size, [*ranges(size, count)], dim=dim)
        assert torch.equal(out, 2 * x)
    images = x.to(memory_format=torch.channels_last)
    out = sliced(lambda a, b: images[a:b] + 1, 2, [(0, 1), (1, 2)])
    assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, images + 1)
    own = x.clone()
    assert sliced(lambda a, b: own[a:b] + 1, 2, [*ranges(2, count)], out=own) is own and torch.equal(own, x + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_group_norm_over_slices(dtype):
    """Halves of another mean: a norm of each slice by itself would be far off."""
    norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    x = 20 + torch.randn(2, 16, 3, 8, 6)
    x[..., 3:] += 5
    x = x.to(dtype)
    of = statistics(norm, x.split(3, dim=4))
    made = torch.cat([of.normalised(part) for part in x.split(2, dim=3)], dim=3)
    exact = torch.nn.GroupNorm.forward(norm.double(), x.double())
    assert (made - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    alone = torch.cat([norm(part.double()) for part in x.split(3, dim=4)], dim=4)
    assert (alone - exact).norm() > 0.1 * exact.norm()


# --- on a pipeline ---


@pytest.mark.parametrize("slices", [1, 2, 3, 1000])
def test_the_same_video(calls, slices):
    pipe = tiny_pipelines.build("wan")
    expected = tiny_pipelines.run("wan", pipe)
    keys = list(pipe.transformer.state_dict())
    assert videoattn.enable_feature_slicing(pipe, slices=slices) is pipe
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    assert (calls.count > 0) == (slices > 1)
    assert list(pipe.transformer.state_dict()) == keys
    assert videoattn.disable_feature_slicing(pipe) is pipe
    assert all("forward" not in vars(module) for module in pipe.transformer.modules())
    assert slicing_of(pipe.transformer) is None
    before = calls.count
    assert torch.equal(tiny_pipelines.run("wan", pipe), expected) and calls.count == before


def test_again_replaces_and_disable_undoes_all(calls):
    pipe = videoattn.enable_fast_attention(tiny_pipelines.build("wan"), "exact")
    for slices in (3, 2):
        videoattn.enable_feature_slicing(pipe, slices=slices)
    tiny_pipelines.run("wan", pipe, steps=1)
    assert slicing_of(pipe.transformer).slices == 2
    assert calls.count == 2 * len(feed_forwards(pipe)) * 2  # slices, layers, branches of guidance
    videoattn.disable(pipe)
    assert slicing_of(pipe.transformer) is None and not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "wanted one of memory and slices, got None and None"),
        ({"memory": 1, "slices": 1}, ValueError, "got 1 and 1"),
        ({"slices": 0}, ValueError, "slices: wanted 1 or more, got 0"),
        ({"slices": 2.0}, TypeError, "slices: wanted an int, got float"),
        ({"slices": True}, TypeError, "slices: wanted an int, got bool"),
        ({"memory": "much"}, ValueError, "memory: wanted a size like"),
    ],
)
def test_wrong_use_changes_nothing(calls, options, error, message):
    pipe = tiny_pipelines.build("wan")
    with pytest.raises(error, match=message):
        videoattn.enable_feature_slicing(pipe, **options)
    assert slicing_of(pipe.transformer) is None


def test_nothing_that_can_be_sliced(monkeypatch):
    no = Sliced(groups=("tokens",), forward=None, refuses=lambda module: "its tokens mix")
    monkeypatch.setattr(session, "table", lambda: {"FeedForward": no})
    with pytest.raises(
        ValueError, match="wanted a model with parts that can be sliced, got WanTransformer3DModel: its tokens mix"
    ):
        videoattn.enable_feature_slicing(tiny_pipelines.build("wan"), slices=2)


def test_an_exception_in_a_slice_leaves_a_pipeline_that_works(calls):
    pipe = tiny_pipelines.build("wan")
    expected = tiny_pipelines.run("wan", pipe)
    videoattn.enable_feature_slicing(pipe, slices=2)
    calls.fails_at = 2
    with pytest.raises(RuntimeError, match="in the middle"):
        tiny_pipelines.run("wan", pipe)
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)


def test_a_copy_is_sliced_by_itself(calls):
    pipe = videoattn.enable_feature_slicing(tiny_pipelines.build("wan"), slices=2)
    copied = copy.deepcopy(pipe.transformer)
    site = slicing_of(copied).sites[0]
    assert site.module is copied.get_submodule(site.name)
    videoattn.disable_feature_slicing(copied)
    assert all("forward" not in vars(module) for module in copied.modules())
    assert slicing_of(pipe.transformer) is not None


def test_two_pipelines_that_share_a_denoiser(calls):
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    pipe = tiny_pipelines.build("wan")
    assert isinstance(pipe, WanPipeline)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    videoattn.enable_feature_slicing(pipe, slices=2)
    videoattn.enable_feature_slicing(other, slices=3)
    assert slicing_of(pipe.transformer).slices == 3
    videoattn.disable_feature_slicing(pipe)
    assert slicing_of(other.transformer) is None


class Around(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        type(self).calls += 1
        return args, kwargs


def offload(model, how):
    if how == "accelerate":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        for module in model.modules():
            if isinstance(module, FeedForward):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Around(), "around")


@pytest.mark.parametrize("order", ["offload first", "slice first"])
@pytest.mark.parametrize("how", ["accelerate", "diffusers"])
def test_offloading_goes_around_a_call_and_not_a_slice(calls, how, order):
    pipe = tiny_pipelines.build("wan")
    expected = tiny_pipelines.run("wan", pipe)
    if order == "slice first":
        videoattn.enable_feature_slicing(pipe, slices=3)
    offload(pipe.transformer, how)
    if order == "offload first":
        videoattn.enable_feature_slicing(pipe, slices=3)
    Around.calls = 0
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    assert calls.count > 0
    if how == "diffusers":
        assert 3 * Around.calls == calls.count
    before = calls.count
    videoattn.disable_feature_slicing(pipe)
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    assert calls.count == before
    if how == "accelerate":
        accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
        torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    assert calls.count == before


def test_compiled_blocks_stay_whole(calls):
    pipe = tiny_pipelines.build("wan")
    expected = tiny_pipelines.run("wan", pipe)
    videoattn.enable_feature_slicing(pipe, slices=2)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    assert calls.count == 0


# --- by a budget ---


@pytest.fixture
def wide(calls):
    """A pipeline whose feed-forwards take the most."""
    pipe = tiny_pipelines.build("wan")
    torch.manual_seed(0)
    model = type(pipe.transformer).from_config({**pipe.transformer.config, "ffn_dim": 1024})
    pipe.register_modules(transformer=model.eval().requires_grad_(False))
    return pipe


def needs(pipe, **options):
    """Bytes that a call of the denoiser needs, whole."""
    videoattn.enable_feature_slicing(pipe, memory="1 TiB", vae=False)
    tiny_pipelines.run("wan", pipe, steps=1, **options)
    choice = slicing_of(pipe.transformer).choice
    assert counts(choice) == {1}
    return choice


def counts(choice):
    return {count for groups in choice.counts.values() for count in groups.values()}


def test_a_budget_takes_the_fewest_slices(calls, wide):
    pipe = wide
    expected = tiny_pipelines.run("wan", pipe)
    whole = needs(pipe)
    weights = sum(x.nbytes for x in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    assert whole.resident == weights and whole.activations > 0
    assert calls.count == 0
    videoattn.enable_feature_slicing(pipe, memory=whole.resident + whole.activations * 3 // 4, vae=False)
    torch.testing.assert_close(tiny_pipelines.run("wan", pipe), expected)
    choice = slicing_of(pipe.transformer).choice
    assert choice.activations <= whole.activations * 3 // 4
    assert 1 < max(counts(choice)) <= 4


def test_a_budget_that_cannot_be_met_says_what_can(calls, wide):
    pipe = wide
    whole = needs(pipe)
    videoattn.enable_feature_slicing(pipe, memory=whole.resident + 1000, vae=False)
    with pytest.raises(OverBudget, match="WanTransformer3DModel.forward at this size needs [0-9.]+ KiB"):
        tiny_pipelines.run("wan", pipe)
    assert calls.count == 0


def test_another_size_is_chosen_for_anew(calls):
    pipe = tiny_pipelines.build("wan")
    small = needs(pipe, height=32, width=32)
    session_of_all = slicing_of(pipe.transformer)
    tiny_pipelines.run("wan", pipe, steps=1, height=64, width=64)
    assert len(session_of_all.choices) == 2 and session_of_all.choice.activations > small.activations
    tiny_pipelines.run("wan", pipe, steps=1, height=32, width=32)
    assert len(session_of_all.choices) == 2 and session_of_all.choice is small


def test_the_report_says_what_is_cut(calls, wide):
    videoattn.enable_feature_slicing(wide, slices=3)
    assert "WanTransformer3DModel: 2 modules in slices, outputs as without to rounding; 3 of each group" in str(
        videoattn.report(wide)
    )
    videoattn.enable_fast_attention(wide, "exact")
    videoattn.enable_feature_slicing(wide, memory="1GiB")
    assert any("budget 1.00 GiB, not called yet" in note for note in videoattn.report(wide).notes)
    tiny_pipelines.run("wan", wide, steps=1)
    assert any("budget 1.00 GiB: 1 of a group, " in note for note in videoattn.report(wide).notes)
    videoattn.disable(wide)
    with pytest.raises(ValueError, match="report: wanted"):
        videoattn.report(wide)


def test_a_forecast_counts_what_is_alive():
    """x stays, y goes when z is there: three, then four units at most."""
    unit = 1024 * 4

    def call():
        x = torch.empty(1024, device="meta")
        y = x + x
        z = torch.cat([y, y])
        del y
        return x, z

    assert forecast.peak(call)[0] == 4 * unit


@pytest.mark.parametrize("name", ["animatediff", "svd", "wan"])
def test_a_forecast_runs_two_slices_of_many(name, monkeypatch):
    """And tells what all of them would."""
    pipe = tiny_pipelines.build(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    given = {}
    hook = model.register_forward_pre_hook(lambda *a: given.setdefault("now", a[1:]) and None, with_kwargs=True)
    tiny_pipelines.run(name, pipe)
    hook.remove()
    twin = forecast.twin(model)
    sites = [SlicedForward(where, module, kind) for where, module, kind in sliceable(twin, [])]
    for site in sites:
        site.install()
        site.groups.counts = dict.fromkeys(site.groups.counts, 4)
    args, kwargs = forecast.on_meta(given["now"])
    told = []
    for few in (Groups.REHEARSED, 1000):
        monkeypatch.setattr(Groups, "REHEARSED", few)
        told.append(forecast.peak(lambda: twin(*args, **kwargs), sites))
    assert told[0] == told[1] and any(group is not None for _, group in told[0][1])


def test_a_forecast_knows_what_convolutions_take():
    """As measured on an H200: input, output and weight once more; nothing where channels are last, or nothing is around."""
    convolution = torch.nn.Conv2d(8, 16, 3, padding=1, device="meta")
    x = torch.empty(2, 8, 6, 10, device="meta")
    own = 4 * 2 * 16 * 6 * 10
    more = x.nbytes + own + convolution.weight.nbytes
    assert forecast.peak(lambda: convolution(x))[0] == own
    assert forecast.peak(lambda: convolution(x), workspaces=True)[0] == own + more
    last = x.to(memory_format=torch.channels_last)
    assert forecast.peak(lambda: convolution(last), workspaces=True)[0] == own + convolution.weight.nbytes
    single = torch.nn.Conv2d(8, 16, 1, device="meta")
    assert forecast.peak(lambda: single(x), workspaces=True)[0] == own
    # all of it channels-last takes nothing more, and what comes out is channels-last again
    twice = torch.nn.Sequential(convolution, torch.nn.Conv2d(16, 8, 3, padding=1, device="meta"))
    twice.to(memory_format=torch.channels_last)
    assert forecast.peak(lambda: twice(last), workspaces=True)[0] == own + x.nbytes
    rows = torch.empty(2, 8, 9, 10, device="meta").to(memory_format=torch.channels_last)[:, :, :6]  # these are copied
    assert forecast.peak(lambda: convolution(rows), workspaces=True)[0] == own + x.nbytes


def test_a_twin_has_the_layouts_of_weights():
    """Of a VAE that its user made channels-last, which needs no workspaces."""
    vae = tiny_pipelines.build("animatediff").vae
    latents = torch.empty(2, vae.config.latent_channels, 16, 16, device="meta")
    told = []
    for layout in (torch.contiguous_format, torch.channels_last):
        twin = forecast.twin(vae.to(memory_format=layout))
        assert twin.decoder.conv_in.weight.stride() == vae.decoder.conv_in.weight.stride()
        told.append(forecast.peak(lambda twin=twin: twin.decode(latents), workspaces=True)[0])
    assert told[1] < told[0]


def test_every_family_of_the_registry_has_a_table():
    registry.table.cache_clear()
    for name, kind in registry.table().items():
        assert isinstance(name, str) and kind.groups and callable(kind.forward) and callable(kind.refuses)


def test_groups_know_how_many_rows_they_had():
    groups = Groups("spatial", "temporal")
    groups.counts["spatial"] = 2
    assert torch.equal(groups.run("spatial", lambda a, b: torch.arange(a, b), 5), torch.arange(5))
    assert groups.sizes == {"spatial": 5}
