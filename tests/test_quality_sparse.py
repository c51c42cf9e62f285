"""The quality study of selectors: its runs, its rows on a CPU, and what the plot makes of them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from videoattn.backend import validate_backend
from videoattn.benchmarks import quality_sparse, results
from videoattn.call import Call, Grid
from videoattn.policy import EXACT, PRESETS, Sparse
from videoattn.selection.arrangement import Tokens, arrange
from videoattn.selection.selector import label, required

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import plot_quality

STEPS, DENSE_STEPS = 25, 0.2
RUNS = quality_sparse.runs(STEPS, DENSE_STEPS)
SPARSE = {case: run for case, run in RUNS.items() if isinstance(run.policy.decision, Sparse)}
GRID = Grid(frames=9, height=22, width=22)
SIZES = {"batch": 8, "q_len": 4356, "kv_len": 4356, "heads": 4, "kv_heads": 4, "head_dim": 64}
CALL = Call(
    kind="full", layout="BNHD", dtype=torch.float32, device=torch.device("cpu"), tokens=Tokens(grid=GRID), **SIZES
)
ENVIRONMENT = {**dict.fromkeys(results.ENVIRONMENT, "x"), "gpu": "NVIDIA H100"}


def figures(case, **metrics):
    return [{"case": case, "metric": metric, "value": value, "unit": ""} for metric, value in metrics.items()]


# --- runs ---


def test_every_selector_and_every_control_runs():
    named = {label(run.policy.decision.selector).split()[0] for run in SPARSE.values()}
    assert named >= {"pooled", "xattention", "sliding_tiles", "radial", "bands", "sharded", "random"}
    assert {run.policy.decision.selector.order for case, run in SPARSE.items() if case.startswith("random")} == {
        run.policy.decision.selector.order for run in SPARSE.values()
    }
    curves = {
        case: run.policy.decision.remainder for case, run in SPARSE.items() if ": " in case and "fast" not in case
    }
    assert all(remainder == ("remainder" in case) for case, remainder in curves.items())
    assert {case.replace(", remainder", "") for case, remainder in curves.items() if remainder} == {
        case for case, remainder in curves.items() if not remainder
    }
    assert {run.policy.decision.keep_steps for run in SPARSE.values()} == {1, *quality_sparse.KEPT}
    assert RUNS["fast"].policy.decision == PRESETS["fast"].decision
    assert RUNS["noise floor"].policy.decision == EXACT


def test_no_gate_is_on_but_the_dense_steps():
    for case, run in SPARSE.items():
        policy = run.policy
        _, _, dense_steps = case.partition("dense steps: ")
        assert policy.dense_steps == float(dense_steps or DENSE_STEPS)
        assert (policy.min_steps, policy.min_tokens, policy.dense_layers) == (0, 0, ())
        assert run.steps == STEPS


@pytest.mark.parametrize(("steps", "fewer"), [(25, [24, 23, 21, 17, 13]), (8, [7, 6, 4]), (2, [1])])
def test_fewer_steps_go_down_to_half(steps, fewer):
    assert quality_sparse.fewer(steps) == fewer


@pytest.mark.parametrize("block_q", [64, 128, 192])
def test_fixed_masks_of_the_video_span_densities(block_q):
    for curve, (least, most) in {"sliding tiles": (0.2, 0.4), "sharded": (0.4, 0.5), "radial": (0.7, 0.8)}.items():
        found = []
        for selector in quality_sparse.curves()[curve].values():
            blocks = {"block_q": block_q, "block_k": min(block_q, 128)}
            if selector.order == "tiles":
                blocks["block_q"] = blocks["block_k"]
            arrangement = arrange(Tokens(grid=GRID), selector.order, torch.device("cpu"), **blocks)
            found.append((selector.keep(arrangement, 4) | required(arrangement)).float().mean().item())
        assert 0.1 < min(found) < least and most < max(found) < 0.9


def test_a_run_takes_the_first_backend_that_computes_it():
    pooled = SPARSE["pooled: 0.2"]
    assert quality_sparse.backend_for(pooled, CALL)[0] == "sdpa_masked"
    named, why = quality_sparse.backend_for(SPARSE["fast"], CALL)
    assert named is None and "triton_hopper_sparse_int8_fp8" in why
    assert quality_sparse.backend_for(RUNS["fewer steps: 24"], CALL)[0] == "sdpa"
    assert quality_sparse.backend_for(RUNS["noise floor"], CALL)[0] == "sdpa_math"


def test_torch_backend_is_registered():
    validate_backend("sdpa_masked")


# --- rows ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(rows, folder) of a run of two steps of one small clip, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quality_sparse")
    only = [
        "pooled: 0.2",
        "random, morton: 0.1",
        "random, morton: 0.5",
        "pooled, remainder: 0.2",
        "fast in 16 bits",
        "fewer",
    ]
    size = ["--device", "cpu", "--size", "small", "--prompts", "1", "--steps", "2", "--dense-steps", "0.5"]
    told = ["--results", str(folder), "--sheet", str(folder / "sheet.png"), "--commit", "0" * 40]
    assert quality_sparse.main([*size, *told, "--only", *only]) == 0
    torch.set_num_threads(threads)
    return results.read(folder / "quality_sparse.csv"), folder


def test_rows_of_a_small_run(small):
    rows, _ = small
    found = {(row["case"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    assert float(found["dense", "tokens"]["value"]) == 5 * 6 * 6
    for case in ("pooled: 0.2", "random, morton: 0.1", "fast in 16 bits", "fast in 16 bits, lists kept: 2 steps"):
        assert 0 < float(found[case, "density"]["value"]) <= 1
        assert found[case, "density"]["unit"] == "of the key blocks, sdpa_masked"
        assert float(found[case, "psnr_worst_db"]["value"]) <= float(found[case, "psnr_mean_db"]["value"])
        assert 0 < float(found[case, "ssim_mean"]["value"]) <= 1
    assert float(found["fewer steps: 1", "time"]["value"]) == 0.5
    without, with_it = (float(found[f"pooled{name}: 0.2", "psnr_mean_db"]["value"]) for name in ("", ", remainder"))
    assert without != with_it


def test_sheet_of_a_small_run(small):
    _, folder = small
    assert (folder / "sheet.png").stat().st_size > 0


def test_more_density_is_nearer_to_dense(small):
    found = plot_quality.points(small[1] / "quality_sparse.csv")
    (low, below), (high, above) = plot_quality.curves(found, "psnr_mean_db")["random, morton"]
    assert low < high and below < above


# --- tables and plots ---


def test_random_control_is_interpolated_in_its_best_order_of_tokens():
    points = {
        "random, morton: 0.1": {"density": 0.2, "psnr_mean_db": 20.0},
        "random, morton: 0.5": {"density": 0.6, "psnr_mean_db": 30.0},
        "random, raster: 0.1": {"density": 0.3, "psnr_mean_db": 24.0},
        "random, raster: 0.5": {"density": 0.5, "psnr_mean_db": 30.0},
        "pooled: 0.35": {"density": 0.4, "psnr_mean_db": 29.0},
        "pooled: 0.1": {"density": 0.1, "psnr_mean_db": 19.0},
    }
    assert quality_sparse.random_at(points, 0.22) == pytest.approx(20.5)
    assert quality_sparse.random_at(points, 0.4) == pytest.approx(27.0)
    assert quality_sparse.random_at(points, 0.7) is None
    (over,) = quality_sparse.over_random(points, ())
    assert (over["case"], over["value"]) == ("pooled: 0.35", pytest.approx(2.0))
    assert "29.00" in quality_sparse.table(points).splitlines()[5]
    assert not quality_sparse.over_random(points, {"pooled: 0.35"})  # whose control has the remainder too
    points |= {case.replace(":", ", remainder:"): {**of, "psnr_mean_db": 28.0} for case, of in points.items()}
    assert quality_sparse.random_at(points, 0.4, remainder=True) == pytest.approx(28.0)


def test_runs_side_by_side_are_compared_in_the_end(tmp_path):
    more = figures("pooled: 0.2", density=0.4, psnr_mean_db=29.0)
    for rows in (
        figures("random, raster: 0.1", density=0.2, psnr_mean_db=20.0),
        figures("random, raster: 0.5", density=0.6, psnr_mean_db=30.0) + more,
    ):
        results.append_figures("quality_sparse", rows, {**ENVIRONMENT, "commit": "0" * 40}, tmp_path)
    assert quality_sparse.main(["--tally", "--results", str(tmp_path), "--commit", "0" * 40]) == 0
    last = results.read(tmp_path / "quality_sparse.csv")[-1]
    assert (last["case"], last["metric"], float(last["value"])) == ("pooled: 0.2", "over_random_db", 4.0)
    assert last["gpu"] == ENVIRONMENT["gpu"]


def test_plot_takes_the_newest_figures_of_a_card(tmp_path):
    rows = figures("pooled: 0.2", density=0.3, psnr_mean_db=20.0) + figures(
        "pooled: 0.1", density=0.2, psnr_mean_db=10.0
    )
    results.append_figures("quality_sparse", rows, ENVIRONMENT, tmp_path)
    results.append_figures("quality_sparse", figures("pooled: 0.2", psnr_mean_db=25.0), ENVIRONMENT, tmp_path)
    path = results.append_figures(
        "quality_sparse", figures("fast", density=0.4), {**ENVIRONMENT, "gpu": "cpu"}, tmp_path
    )
    assert set(plot_quality.points(path)) == {"fast"}
    found = plot_quality.points(path, "NVIDIA H100")
    assert plot_quality.curves(found, "psnr_mean_db") == {"pooled": [(0.2, 10.0), (0.3, 25.0)]}
    with pytest.raises(ValueError, match="wanted figures of A100"):
        plot_quality.points(path, "A100")


def test_plot_has_a_colour_for_every_curve_and_a_line_for_every_time():
    for case in SPARSE:
        assert plot_quality.selector_of(case.partition(": ")[0]) in plot_quality.COLOURS
    with pytest.raises(ValueError, match="curve: wanted"):
        plot_quality.selector_of("magic")
    found = {"fewer steps: 24": {"time": 0.96, "psnr_mean_db": 40.0}, "noise floor": {"psnr_mean_db": 50.0}}
    assert plot_quality.controls(found, "psnr_mean_db") == {0.96: 40.0}


def test_plot_is_drawn_in_true_colour(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    dense = {"tokens": 4356.0, "prompts": 16.0, "steps": 25.0, "dense_steps": 0.2}
    fewer = {"time": 0.96, "psnr_mean_db": 40.0, "ssim_mean": 0.99}
    case = {"density": 0.3, "psnr_mean_db": 30.0, "ssim_mean": 0.9}
    plot_quality.plot({"dense": dense, "fewer steps: 24": fewer, "fast": case, "pooled: 0.2": case}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode in ("RGB", "RGBA") and np.asarray(picture).std() > 0
