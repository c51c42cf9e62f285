"""The one line, its undoing, and the report: what a user sees."""

import inspect

import pytest
import torch
from tiny_pipelines import build, denoisers, run

import videoattn
from videoattn import Policy, Sparse
from videoattn.reports import Report
from videoattn.session import session_of


def kinds(report, attribute):
    return {(row.kind, getattr(row, attribute)) for row in report.sites}


def test_it_returns_the_pipeline_that_it_was_given():
    pipe = build("wan")
    assert videoattn.enable_fast_attention(pipe) is pipe
    assert session_of(pipe.transformer).policy.name == "balanced"
    assert videoattn.enable_fast_attention(pipe, "fast") is pipe
    assert session_of(pipe.transformer).policy.name == "fast"
    assert videoattn.disable_fast_attention(pipe) is pipe
    assert session_of(pipe.transformer) is None


def test_no_public_function_swallows_unknown_keywords():
    with pytest.raises(ValueError, match="WanPipeline takes no num_inferense_steps"):  # its keywords are the pipeline's
        videoattn.profile(build("wan"), num_inferense_steps=2)
    for name in {*videoattn.__all__} - {"profile"}:
        made = getattr(videoattn, name)
        parameters = inspect.signature(made).parameters.values()
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters), name


def test_everything_public_is_documented():
    for name in videoattn.__all__:
        assert getattr(videoattn, name).__doc__, name


@pytest.mark.parametrize(
    # Videos as small as these stay dense in "fast".
    ("preset", "asked"),
    [("balanced", "int8_qk_fp8_pv"), ("fast", "int8_qk_fp8_pv")],
)
@pytest.mark.parametrize("name", ["wan", "cogvideox", "latte"])
def test_without_a_gpu_presets_compute_exactly_and_say_what_they_would_do(name, preset, asked):
    pipe = build(name)
    videoattn.enable_fast_attention(pipe, "exact")
    exact = run(name, pipe)
    videoattn.enable_fast_attention(pipe, preset)
    assert torch.equal(run(name, pipe), exact)
    report = videoattn.report(pipe)
    large = {"full", "joint", "spatial"}
    for row in report.sites:
        assert row.backend == "sdpa"
        assert row.decision == (asked if row.kind in large else "exact")
        assert row.why == (f"{asked} -> exact: no GPU" if row.kind in large else "")
    text = str(report)
    assert f"policy {preset}" in text
    assert f"{asked} -> exact: no GPU" in text


def test_exact_has_nothing_to_explain():
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    run("wan", pipe)
    report = videoattn.report(pipe)
    assert {(row.decision, row.backend, row.why) for row in report.sites} == {("exact", "sdpa", "")}
    assert "no GPU" not in str(report)
    assert report.refused == report.notes == ()


def test_the_report_counts_what_ran():
    """Two layers, two steps, two branches of guidance: eight calls of each kind, and twice that after two runs."""
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    for runs in (1, 2):
        run("wan", pipe)
        report = videoattn.report(pipe)
        assert (report.generations, report.denoiser_calls) == (runs, 4 * runs)
        assert kinds(report, "calls") == {("full", 8 * runs), ("cross", 8 * runs)}
    assert kinds(report, "shape") == {("full", (1, 36, 36, 2, 12)), ("cross", (1, 36, 32, 2, 12))}
    assert [row.name for row in report.sites] == [f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)]
    assert {row.adapter for row in report.sites} == {"wan"}
    videoattn.enable_fast_attention(pipe, "exact")
    assert videoattn.report(pipe).denoiser_calls == 0


def test_a_site_shows_the_shapes_of_its_own_heads_only():
    """Levels of a UNet differ in heads or width; each site stands with its own."""
    pipe = videoattn.enable_fast_attention(build("text_to_video_sd"), "exact")
    run("text_to_video_sd", pipe)
    sites = {site.name: site for _, site in session_of(pipe.unet).adapter.sites(pipe.unet)}
    report = videoattn.report(pipe)
    assert {row.name for row in report.sites} == sites.keys()
    for row in report.sites:
        assert row.shape[-2:] == (sites[row.name].heads, sites[row.name].head_dim)


def test_each_shape_has_its_row():
    pipe = videoattn.enable_fast_attention(build("wan"), "exact")
    run("wan", pipe)
    run("wan", pipe, num_frames=5)
    full = [row.shape for row in videoattn.report(pipe).sites if row.name == "blocks.0.attn1"]
    assert full == [(1, 36, 36, 2, 12), (1, 24, 24, 2, 12)]


def test_before_the_first_call_the_report_says_what_is_planned():
    pipe = videoattn.enable_fast_attention(build("hunyuan_video"))
    report = videoattn.report(pipe)
    assert isinstance(report, Report)
    assert (report.generations, report.denoiser_calls) == (0, 0)
    assert {(row.shape, row.calls, row.backend, row.why) for row in report.sites} == {(None, 0, "", "not called yet")}
    assert kinds(report, "decision") == {("joint", "int8_qk_fp8_pv"), ("text", "exact")}
    assert kinds(report, "adapter") == {("joint", "hunyuan_video"), ("text", "generic")}
    assert "not called yet" in str(report)


def test_one_key_needs_no_attention():
    """SVD's cross-attention to a single image token is that token's value."""
    pipe = videoattn.enable_fast_attention(build("svd"), "exact")
    run("svd", pipe)
    report = videoattn.report(pipe)
    cross = [row for row in report.sites if row.kind == "cross"]
    assert cross and all(row.why == "needs no attention call" and row.calls == 0 for row in cross)
    assert all(row.calls > 0 for row in report.sites if row.kind != "cross")


def test_what_is_refused_stands_in_the_report():
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
    )
    videoattn.enable_fast_attention(model, "exact")
    report = videoattn.report(model)
    reason = "SanaLinearAttnProcessor3_0 calls no attention that can be routed"
    assert report.refused == tuple((f"transformer_blocks.{i}.attn1", reason) for i in (0, 1))
    assert {row.adapter for row in report.sites if row.name.endswith("attn1")} == {"untouched"}
    text = " ".join(str(report).split())
    assert "untouched" in text and "SanaLinearAttnProcessor3_0" in text


def test_a_report_of_two_denoisers_names_both():
    pipe = videoattn.enable_fast_attention(build("wan22"), "exact")
    run("wan22", pipe)
    report = videoattn.report(pipe)
    assert len(report.sites) == 8
    assert report.denoiser_calls == 4
    assert report.generations == 1


def test_rows_that_read_alike_are_one_line():
    pipe = videoattn.enable_fast_attention(build("wan", layers=3), "exact")
    run("wan", pipe)
    lines = [line for line in str(videoattn.report(pipe)).splitlines() if " sdpa " in line]
    assert len(lines) == 2
    assert all(" 3 " in line for line in lines)
    assert "1 x 36 x 36 x 2 x 12" in lines[0]


def test_a_policy_of_ones_own_is_followed():
    policy = Policy(name="mine", decision=Sparse(), kinds=("cross",), exact_layers=("blocks.0.*",))
    pipe = videoattn.enable_fast_attention(build("wan"), policy)
    run("wan", pipe)
    report = videoattn.report(pipe)
    decisions = {row.name: row.decision for row in report.sites}
    assert decisions == {
        "blocks.0.attn1": "exact",
        "blocks.0.attn2": "exact",
        "blocks.1.attn1": "exact",
        "blocks.1.attn2": "sparse[pooled] exact",
    }
    assert "policy mine" in str(report)


def test_the_context_manager_hands_out_its_sessions():
    pipe = build("wan22")
    with videoattn.fast_attention(pipe, "fast", backend="sdpa_math") as sessions:
        assert [session_of(model) for _, model in denoisers(pipe)] == list(sessions)
        assert {(session.policy.name, session.backend) for session in sessions} == {("fast", "sdpa_math")}
        run("wan22", pipe)
        assert {row.backend for row in videoattn.report(pipe).sites} == {"sdpa_math"}
    with pytest.raises(ValueError, match="report: wanted a pipeline with fast attention enabled"):
        videoattn.report(pipe)
