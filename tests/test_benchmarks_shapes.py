# videoattn
"""shapes.toml is what the models do, and the attention benchmark makes those very tensors."""

import pytest
import torch

from videoattn.benchmarks import attention, find_shapes, models, timing


@pytest.mark.parametrize("name", ["wan-1.3b", "modelscope", "cogvideox-5b"])
def test_the_file_holds_what_the_denoiser_calls(name):
    stored = find_shapes.read()
    for size in models.spec(name)["sizes"]:
        user = f"{name} {'x'.join(map(str, size))}"
        assert {s: used[user] for s, used in stored.items() if user in used} == dict(find_shapes.find(name, size))


def test_the_calls_of_wan_are_as_counted_by_hand():
    """480p, 81 frames: 21 latent frames of 30 x 52 patches; 30 layers, each with self- and text attention."""
    found = {shape.kind: (shape, count) for shape, count in find_shapes.find("wan-1.3b").items()}
    full, count = found["full"]
    assert count == 30
    assert (full.batch, full.heads, full.q_len, full.kv_len, full.head_dim) == (1, 12, 21 * 30 * 52, 21 * 30 * 52, 128)
    assert (full.layout, full.strides, full.mask, full.dtype) == ("BNHD", "contiguous", "none", "bfloat16")
    assert found["cross"][0].kv_len == 512


def test_a_mask_is_read_with_its_padding():
    (joint,) = [s for s, used in find_shapes.read().items() if "hunyuan 720x1280x129" in used and s.kind == "joint"]
    assert (joint.mask, joint.mask_shape) == ("prefix", (1, 1, 1, joint.kv_len))
    assert joint.kv_len - joint.kv_valid == 256 - 60


def test_every_family_and_the_reference_rows_are_there():
    shapes = find_shapes.read()
    assert len(shapes) >= 60
    users = {user.split()[0] for used in shapes.values() for user in used}
    assert users == set(models.names()) - {"wan-14b-8l"}
    assert {s.kind for s in shapes} == {"full", "joint", "spatial", "temporal", "cross", "text", "audio"}
    for reference in find_shapes.reference_rows():
        assert reference in shapes
    assert {s.layout for s in find_shapes.reference_rows()} == {"BNHD", "BHND"}


def test_written_rows_read_back(tmp_path):
    rows = find_shapes.read()
    find_shapes.write(rows, tmp_path / "shapes.toml")
    assert find_shapes.read(tmp_path / "shapes.toml") == rows
    assert (tmp_path / "shapes.toml").read_text() == find_shapes.SHAPES.read_text()


@pytest.mark.parametrize("change", [{}, {"layout": "BHND BHND BNHD"}, {"strides": "k:96 v:96"}])
def test_a_problem_lies_in_memory_as_its_row_says(change):
    problem = attention.Problem(tiny(**change), torch.device("cpu"))
    q, k, v, mask, kv_len = problem.inputs(0)
    assert (q.shape, k.shape, v.shape) == ((2, 24, 3, 16), (2, 24, 3, 16), (2, 24, 3, 16))
    assert mask is None and kv_len is None
    read = [find_shapes._layout(x.transpose(1, 2)) for x in (q, k, v)]
    layouts = change.get("layout", "BNHD BNHD BNHD").split()
    pitches = [0, 96, 96] if "strides" in change else [0, 0, 0]
    assert read == list(zip(layouts, pitches, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mask": "prefix", "mask_shape": (2, 1, 1, 24), "kv_valid": 9},
        {"mask": "additive", "mask_shape": (2, 3, 1, 24), "kv_valid": 9},
        {"kind": "joint", "mask": "bool", "mask_shape": (1, 1, 24, 24), "kv_valid": 20},
        {"kind": "text", "mask": "bool", "mask_shape": (2, 3, 24, 24), "kv_valid": 9},
    ],
)
def test_every_backend_is_measured_and_checked_on_every_kind_of_mask(change):
    problem = attention.Problem(tiny(**change), torch.device("cpu"))
    compared = attention.measure(problem, 0.02, attention.accepting(problem.call()))
    assert {"sdpa", "sdpa_math"} <= set(compared) or change.get("kind") == "text"
    assert all(result.error < 1e-5 for result in compared.values())
    row = attention.row("case", problem.shape, "sdpa_math", compared["sdpa_math"])
    assert row["tflops"] * row["median_ms"] == pytest.approx(4 * 2 * 3 * 24 * 24 * 16 / 1e9)
    assert row["gbs"] * row["median_ms"] == pytest.approx(4 * 2 * 24 * 3 * 16 * 4 / 1e6)


def test_a_wrong_kernel_fails_the_run(monkeypatch):
    problem = attention.Problem(tiny(), torch.device("cpu"))
    monkeypatch.setattr(
        attention.Problem, "planned", lambda self, backend, decision: lambda q, k, v, mask, kv_len: 1.02 * v
    )
    with pytest.raises(timing.WrongOutput):
        attention.measure(problem, 0.02, attention.accepting(problem.call()))


def tiny(**change):
    base = {"kind": "full", "batch": 2, "heads": 3, "kv_heads": 3, "q_len": 24, "kv_len": 24, "head_dim": 16}
    return find_shapes.Shape(**{**base, "dtype": "float32", "layout": "BNHD", "kv_valid": 24, **change})
