"""`videoattn tune --windows`: the windows that are found, and the policy that runs them."""

import dataclasses
import itertools
from collections import defaultdict

import pytest
import tiny_pipelines
import torch

import videoattn
from videoattn import cli, runner, tuning, window_tuning
from videoattn.call import Grid
from videoattn.kernels import masked
from videoattn.policy import Policy
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.recall import block_mass, recall
from videoattn.selection.selector import required
from videoattn.selection.sliding_tiles import SlidingTiles
from videoattn.session import session_of
from videoattn.window_tuning import Heads, Search, WindowTuning, candidates

CPU = torch.device("cpu")
GRID, TILE = Grid(frames=6, height=9, width=10), (2, 3, 2)  # 3 x 3 x 5 tiles
WHOLE = (6, 9, 10)


def laid_out(grid=GRID, tile=TILE, **text):
    return arrange(Tokens(grid=grid, **text), "tiles", CPU, block_q=12, block_k=12, tile=tile)


def attends(label):
    """q, k [1, N, 1, D] with which every token attends to those of its own label alone; label int64 [N]."""
    direction = torch.nn.functional.one_hot(label).float()[None, :, None]
    return 200 * direction, direction


def kinds_of_heads():
    """The window that a head needs -> its labels: by tile, by frames, by rows, by columns over time, and one for all."""
    t, y, x = (
        torch.cartesian_prod(*map(torch.arange, WHOLE)) // torch.tensor(TILE)  # which tile on each axis
    ).unbind(1)
    return {
        (2, 3, 2): (t * 3 + y) * 5 + x,
        (2, 9, 10): t,
        (6, 3, 10): y,
        (6, 9, 2): x,
        (6, 3, 2): y * 5 + x,
        (6, 9, 10): torch.zeros_like(t),
    }


def pad(x, size=64):
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def heads_of(labels):
    made = [attends(each) for each in labels]
    return [torch.cat([pad(each[i]) for each in made], dim=2) for i in (0, 1)]


# -- which windows


def test_candidates_are_odd_tile_counts_and_the_whole_axis():
    found = candidates(Grid(frames=21, height=30, width=52), (7, 3, 6))
    axes = (7, 21), (3, 9, 15, 21, 27, 30), (6, 18, 30, 42, 52)
    assert found == tuple(itertools.product(*axes)) and found[-1] == (21, 30, 52)
    assert candidates(Grid(frames=1, height=2, width=3), (4, 4, 4)) == ((1, 2, 3),)


@pytest.mark.parametrize("rows", [None, 200])
def test_each_head_gets_the_window_that_it_needs(rows):
    kinds = kinds_of_heads()
    search = Search(laid_out())
    q, k = (search.arrangement.arranged(x) for x in heads_of(kinds.values()))
    found = search.cheapest(search.kept(block_mass(q, k, search.arrangement, rows=rows, scale=1.0)), 0.95)
    assert found.windows == tuple(kinds)
    assert found.densities == pytest.approx([1 / 45, 1 / 3, 1 / 3, 1 / 5, 1 / 15, 1.0])
    assert found.recalls == pytest.approx([1.0] * 6, abs=1e-4)


def test_neighbours_at_a_border_are_in_the_window_that_stays_inside():
    """Tiles 0 and 1 of five attend to 0, 1 and 2, which a window of three holds for all of them."""
    x = torch.cartesian_prod(*map(torch.arange, WHOLE))[:, 2] // 2
    near = x.clamp(1, 3)  # the middle of a tile's window
    k = torch.nn.functional.one_hot(x, 5).float()
    q = 200 * sum(torch.nn.functional.one_hot(near + i, 5) for i in (-1, 0, 1)).float()
    search = Search(laid_out())
    q, k = (search.arrangement.arranged(each[None, :, None]) for each in (q, k))
    mass = block_mass(q, k, search.arrangement, scale=1.0)
    assert search.cheapest(search.kept(mass), 0.99).windows == ((6, 9, 6),)


def test_the_least_over_the_batch_counts():
    own, everything = (kinds_of_heads()[window] for window in (TILE, WHOLE))
    search = Search(laid_out())
    two = [heads_of([label]) for label in (own, everything)]
    q, k = (search.arrangement.arranged(torch.cat(x)) for x in zip(*two, strict=True))
    mass = block_mass(q, k, search.arrangement, scale=1.0)
    assert search.cheapest(search.kept(mass[:1]), 0.9).windows == (TILE,)
    assert search.cheapest(search.kept(mass), 0.9).windows == (WHOLE,)


def test_what_is_required_is_counted():
    """Text costs and keeps the same with every window, and so does the first frame where tiles hold one alone."""
    search = Search(laid_out(Grid(frames=3, height=6, width=4), (1, 3, 4), after=5))
    assert search.arrangement.keys.count == 7
    needed = required(search.arrangement)
    assert (search.masks >= needed).all() and search.masks[-1].all()
    label = torch.cat([torch.zeros(72), torch.ones(5)]).long()
    q, k = attends(label)
    q[:, :72] = 0
    q, k = (search.arrangement.arranged(x) for x in (q, k))
    mass = block_mass(q, k, search.arrangement, scale=1.0)
    for window, got in zip(search.windows, search.kept(mass), strict=True):
        keep = SlidingTiles(windows=(window,)).keep(search.arrangement, 1) | needed
        torch.testing.assert_close(got, recall(q, k, keep, search.arrangement, scale=1.0)[0])


def test_where_nothing_keeps_the_target_and_where_nothing_is_known_the_video_is_whole():
    search = Search(laid_out())
    kept = torch.full((len(search.windows), 2), 0.99)
    kept[:, 1] = torch.nan
    assert search.cheapest(kept, 1.0).windows == (WHOLE, WHOLE)
    assert search.cheapest(kept, 0.9).windows == (TILE, WHOLE)


def test_of_windows_with_as_many_blocks_the_one_that_keeps_most():
    search = Search(laid_out(Grid(frames=6, height=6, width=6), (2, 2, 3)))
    frames, rows = (search.windows.index(window) for window in ((6, 2, 3), (2, 6, 3)))
    assert search.blocks[frames] == search.blocks[rows]
    kept = torch.zeros(len(search.windows), 2)
    kept[frames], kept[rows] = torch.tensor([0.92, 0.91]), torch.tensor([0.91, 0.92])
    assert search.cheapest(kept, 0.9).windows == ((6, 2, 3), (2, 6, 3))


def test_candidates_some_at_a_time_are_all_at_once(monkeypatch):
    search = Search(laid_out())
    mass = torch.rand(2, 3, 45, 45)
    mass /= mass.sum((-1, -2), keepdim=True)
    whole = search.kept(mass)
    assert whole.shape == (len(search.windows), 3)
    monkeypatch.setattr(window_tuning, "SCORES", 1)
    torch.testing.assert_close(search.kept(mass), whole)


# -- the policy and the table


def tuned():
    heads = Heads(windows=((2, 3, 2), (6, 9, 10)), densities=(0.125, 1.0), recalls=(0.91, 1.0))
    sites = {"blocks.0.attn1": heads, "blocks.10.attn1": dataclasses.replace(heads, windows=((6, 3, 2), (2, 3, 2)))}
    values = {"model": "M", "recall": 0.9, "precision": "int8_qk_fp8_pv", "dense_steps": 0.25, "prompts": 1, "steps": 8}
    return WindowTuning(**values, grid=GRID, tile=TILE, sites=sites)


def test_the_file_is_what_a_policy_loads(tmp_path):
    made, file = tuned(), tmp_path / "windows" / "tuned.toml"
    tuning.write(made, file)
    assert Policy.load(file) == made.policy("tuned")
    assert "recall=0.9, 1 prompts of 8 steps" in file.read_text()
    assert dict(made.policy().windows.sites)["blocks.10.attn1"] == ((6, 3, 2), (2, 3, 2))


def test_the_table_tells_layers_and_the_whole():
    shown = str(tuned())
    assert "wanted recall=0.9" in shown and "Grid (6, 9, 10) in tiles of (2, 3, 2)." in " ".join(shown.split())
    (line,) = (line for line in shown.splitlines() if "blocks.0.attn1" in line)
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["56.2%", "0.9550", "0.9100", "2", "1"]
    assert "56.2% of all blocks are computed in sparse steps" in shown and "first 25% of the steps are dense" in shown


# -- in a pipeline


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8, of which even a tiny video has some."""
    monkeypatch.setattr(masked.BACKENDS[0], "blocks", lambda call, gaps: (8, 8))


def tune(pipe, *, name="wan", seeds=(0,), steps=4, **options):
    calls = [lambda seed=seed: tiny_pipelines.run(name, pipe, steps=steps, seed=seed) for seed in seeds]
    return window_tuning.tune(
        pipe, calls, **{"recall": 0.8, "precision": "exact", "block": 8, "dense_steps": 0.25} | options
    )


@pytest.mark.parametrize("target", [0.5, 0.6])
def test_the_windows_are_the_cheapest_that_keep_the_target_in_every_call(target):
    """By `recall`, window by window, on the q and k of all prompts, branches and steps that were looked at."""
    pipe = tiny_pipelines.build("wan")
    told, seen = [], defaultdict(list)
    with videoattn.fast_attention(pipe, "exact") as (session,):
        sites = [patch.site.name for patch in session.patches if patch.site.kind == "full"]

        def see(plan, q, k, v, mask, kv_len, scale):
            if plan.call.kind == "full":
                place = sum(map(len, seen.values())) % len(sites)
                seen[sites[place]].append((session.step, q, k))

        runner.observers.append(see)
        for seed in (0, 1):
            tiny_pipelines.run("wan", pipe, steps=4, seed=seed)
        runner.observers.remove(see)
    made = tune(pipe, seeds=(0, 1), recall=target, block=2, samples=2, progress=lambda: told.append(1))
    assert list(made.sites) == sites and (made.prompts, made.steps, len(told)) == (2, 4, 2)
    grid = session.step.grid
    assert (made.grid, made.model) == (grid, "WanTransformer3DModel")

    arrangement = arrange(Tokens(grid=grid), "tiles", CPU, block_q=2, block_k=2)
    windows, needed = candidates(grid, made.tile), required(arrangement)
    masks = SlidingTiles(windows=windows).keep(arrangement, len(windows))[0] | needed
    assert len({window for heads in made.sites.values() for window in heads.windows}) > 1
    for site, heads in made.sites.items():
        looked = [(q, k) for step, q, k in seen[site] if step.index in (1, 2)]  # of the steps 1, 2, 3
        assert len(looked) == 2 * 2 * 2  # prompts, branches, steps
        costs, least = [], []
        for mask in masks:
            every = [recall(*map(arrangement.arranged, qk), mask[None, None], arrangement) for qk in looked]
            costs.append(int(mask.sum()))
            least.append(torch.cat(every).amin(0))
        for head, window in enumerate(heads.windows):
            at = windows.index(window)
            able = [cost for cost, got in zip(costs, least, strict=True) if got[head] >= target]
            assert costs[at] == min(able)
            assert heads.recalls[head] == pytest.approx(float(least[at][head]), abs=1e-5)
            assert heads.densities[head] == pytest.approx(costs[at] / needed.numel())
    assert not runner.observers


def test_a_tuned_policy_runs(small_blocks, tmp_path):
    pipe = tiny_pipelines.build("wan")
    host = tiny_pipelines.run("wan", pipe, steps=4)
    made = tune(pipe, recall=0.5)
    assert made.density < 0.9
    tuning.write(made, tmp_path / "tuned.toml")
    videoattn.enable_fast_attention(pipe, Policy.load(tmp_path / "tuned.toml"), backend="sdpa_masked")
    out = tiny_pipelines.run("wan", pipe, steps=4)
    assert out.isfinite().all() and not torch.allclose(out, host, rtol=1e-3, atol=1e-3)
    shown = videoattn.report(pipe)
    assert shown.shares == {"sparse[sliding_tiles, a window a head] exact": 0.75, "exact": 0.25}
    (kept,) = session_of(pipe.transformer).kept  # of all layers
    assert kept.density == pytest.approx(made.density)


def test_everything_kept_is_the_host(small_blocks):
    pipe = tiny_pipelines.build("wan")
    host = tiny_pipelines.run("wan", pipe)
    made = tune(pipe, recall=1.0)
    assert made.density == 1.0
    videoattn.enable_fast_attention(pipe, made.policy(), backend="sdpa_masked")
    out = tiny_pipelines.run("wan", pipe)
    assert (out - host).norm() <= 1e-3 * host.norm()


def test_windows_apply_to_another_size_in_tokens(small_blocks):
    pipe = tiny_pipelines.build("wan")
    made = tune(pipe, recall=0.5)
    videoattn.enable_fast_attention(pipe, made.policy(), backend="sdpa_masked")
    out = tiny_pipelines.run("wan", pipe, height=64, width=64, steps=4)
    assert out.isfinite().all()
    assert "sparse[sliding_tiles, a window a head] exact" in videoattn.report(pipe).shares


def test_text_behind_the_video_is_kept(small_blocks):
    pipe = tiny_pipelines.build("cogvideox")
    made = tune(pipe, name="cogvideox", recall=0.5)
    videoattn.enable_fast_attention(pipe, made.policy(), backend="sdpa_masked")
    assert tiny_pipelines.run("cogvideox", pipe, steps=4).isfinite().all()
    assert "sparse[sliding_tiles, a window a head] exact" in videoattn.report(pipe).shares


def test_nothing_is_looked_at_in_dense_steps():
    pipe = tiny_pipelines.build("wan")
    looked = []

    class Meter(window_tuning._Meter):
        def see(self, site, step, *tensors):
            before = dict(self.kept)
            super().see(site, step, *tensors)
            if any(self.kept[name] is not before.get(name) for name in self.kept):
                looked.append(step.index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_tuning, "_Meter", Meter)
        tune(pipe, steps=6, dense_steps=0.4, samples=1)
        assert set(looked) == {3}
        looked.clear()
        tune(pipe, steps=6, dense_steps=0.0, samples=9)
        assert set(looked) == set(range(6))


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 1.1}, "wanted a recall in 0..1, got 1.1"),
        ({"recall": -0.1}, "wanted a recall in 0..1, got -0.1"),
        ({"recall": float("nan")}, "wanted a recall in 0..1, got nan"),
        ({"samples": 0}, "wanted samples, rows and a block of 1 at least, got 0, 1024 and 8"),
        ({"rows": 0}, "got 3, 0 and 8"),
        ({"dense_steps": 2}, "Policy.dense_steps: wanted a share from 0 to 1, got 2"),
        ({"precision": "int3"}, "precision: wanted one of exact"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        window_tuning.tune(None, [], **{"recall": 0.9, "block": 8} | options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mochi", {}),  # no grid is known
        ("wan", {"dense_steps": 1.0}),
        ("wan", {"seeds": ()}),
    ],
)
def test_nothing_to_look_at(name, options):
    with pytest.raises(ValueError, match="wanted self-attention over a video whose grid is known, .* got none"):
        tune(tiny_pipelines.build(name), name=name, **options)


def test_videos_of_two_sizes():
    pipe = tiny_pipelines.build("wan")
    sizes = {"steps": 1, "height": 48}, {"steps": 1, "height": 64}
    calls = [lambda size=size: tiny_pipelines.run("wan", pipe, **size) for size in sizes]
    with pytest.raises(ValueError, match="wanted videos of one size, got Grid"):
        window_tuning.tune(pipe, calls, recall=0.9, dense_steps=0.0, block=8)
    assert not runner.observers


@pytest.mark.parametrize("wrong", ["0.9", "recall", "recall=two", "recall=1.5", "recall=nan", "cosine=0.9", "=0.9"])
def test_a_target_that_says_nothing(wrong):
    with pytest.raises(ValueError, match="windows: wanted recall= and a number in 0..1"):
        window_tuning.parse_recall(wrong)


# -- the command


SMALL = ["--steps", "2", "--height", "48", "--width", "64", "--frames", "9"]


def test_the_command_writes_a_policy_and_shows_the_table(tmp_path, capsys):
    folder, out = tmp_path / "wan", tmp_path / "tuned.toml"
    tiny_pipelines.build("wan").save_pretrained(folder)
    command = ["tune", str(folder), "--prompts", "a red cube", "two dots", "--windows", "recall=0.7", *SMALL]
    options = ["--block", "8", "--precision", "exact", "--dense-steps", "0.5", "--samples", "1", "--out", str(out)]
    assert cli.main([*command, *options]) == 0
    printed = capsys.readouterr().out
    assert "wanted recall=0.7" in printed and "of all blocks are computed in sparse steps" in printed
    assert f"Policy.load({str(out)!r})" in printed
    policy = Policy.load(out)
    assert (policy.decision.precision, policy.dense_steps) == ("exact", 0.5)
    assert [site for site, _ in policy.windows.sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    video = ["--prompt", "x", *SMALL, "--preset", str(out), "--out", str(tmp_path / "v.mp4")]
    assert cli.main(["generate", str(folder), *video]) == 0
    assert "policy tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "0.9"], "windows: wanted recall= and a number in 0..1, got '0.9'"),
        (
            ["--windows", "recall=0.9", "--target", "cosine=0.9"],
            "argument --target: not allowed with argument --windows",
        ),
        (["--windows", "recall=0.9", "--precision", "int3"], "argument --precision: invalid choice: 'int3'"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["tune", "no-model", "--prompt", "x", *arguments])
    assert left.value.code == cli.WRONG_USE
    assert message in capsys.readouterr().err
