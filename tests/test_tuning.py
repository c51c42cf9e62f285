"""`videoattn tune`: what is measured of each layer, what is chosen by it, and the file that a policy reads."""

import math

import pytest
import tiny_pipelines
import torch

import videoattn
from videoattn import cli, runner, tuning
from videoattn.call import Step
from videoattn.policy import Policy
from videoattn.testing import make_hard_qkv, make_qkv
from videoattn.tuning import OFFERED, STUDIED, Error, Target, Tuning

GOOD, FAIR, BAD = (Error(cosine=c, rel_l1=1 - c, rel_l2=1 - c) for c in (0.9999, 0.995, 0.9))


def errors(**given):
    return {STUDIED: BAD, "int8_qk_fp8_pv": FAIR, "int8_qk_16bit_pv": GOOD, "exact": GOOD, **given}


def tuned(target, **parts):
    """A Tuning whose site names are the keywords and whose values are a list of errors, one a part."""
    found = {(site, part): given for site, every in parts.items() for part, given in enumerate(every)}
    ranges = max(map(len, parts.values()))
    return Tuning(model="M", target=Target.parse(target), prompts=1, steps=6, ranges=ranges, errors=found)


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("cosine=0.99", "int8_qk_fp8_pv"),
        ("cosine=0.998", "int8_qk_16bit_pv"),
        ("cosine=1", "exact"),
        ("rel_l1=0.01", "int8_qk_fp8_pv"),
        ("rel_l2=0.001", "int8_qk_16bit_pv"),
    ],
)
def test_the_fastest_that_keeps_the_target_is_chosen(target, chosen):
    assert tuned(target, a=[errors()]).chosen("a", 0) == chosen


def test_int4_is_never_chosen():
    assert tuned("cosine=0.5", a=[errors(**{STUDIED: GOOD})]).chosen("a", 0) == "int8_qk_fp8_pv"


@pytest.mark.parametrize("wrong", ["cosine", "cosine=two", "cosine=1.5", "psnr=0.9", "=0.9", "cosine=nan"])
def test_a_target_that_says_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="target: wanted one of cosine, rel_l1, rel_l2"):
        Target.parse(wrong)


def test_the_file_is_what_a_policy_loads(tmp_path):
    made = tuned("cosine=0.998", a=[errors(), errors(int8_qk_fp8_pv=GOOD)], b=[errors(int8_qk_16bit_pv=BAD), errors()])
    file = tmp_path / "tuned.toml"
    tuning.write(made, file)
    policy = Policy.load(file)
    assert policy == made.policy("tuned")
    assert dict(policy.tuned.sites) == {
        "a": ("int8_qk_16bit_pv", "int8_qk_fp8_pv"),
        "b": ("exact", "int8_qk_16bit_pv"),
    }


def test_a_part_that_was_not_seen_stays_exact():
    made = tuned("cosine=0.99", a=[errors()], b=[errors(), errors()])
    assert dict(made.policy().tuned.sites)["a"] == ("int8_qk_fp8_pv", "exact")


def test_the_worst_counts_in_each_metric():
    a, b = Error(cosine=0.9, rel_l1=0.1, rel_l2=0.3), Error(cosine=0.8, rel_l1=0.2, rel_l2=0.1)
    assert a.worse(b) == b.worse(a) == Error(cosine=0.8, rel_l1=0.2, rel_l2=0.3)


def test_what_was_not_a_number_once_is_not_chosen():
    seen = BAD.worse(Error(cosine=math.nan, rel_l1=math.nan, rel_l2=math.nan))
    for target in ("cosine=0", "rel_l1=1", "rel_l2=1"):
        assert not Target.parse(target).kept_by(seen) and not Target.parse(target).kept_by(seen.worse(GOOD))


def test_the_table_names_the_steps_that_a_policy_has_in_each_part():
    made = tuned("cosine=0.99", a=[errors()] * 3)
    made = Tuning(**{**vars(made), "steps": 20})
    policy = made.policy().tuned
    parts = [policy.range_of(Step(index=index, total=20)) for index in range(20)]
    spans = [f"{parts.index(part)}-{19 - parts[::-1].index(part)}" for part in range(3)]
    assert all(span in str(made) for span in spans) and spans == ["0-6", "7-13", "14-19"]


def test_precisions_err_in_the_order_of_their_bits():
    found = tuning.measure(*make_qkv(2, 40, 300, 4, 64, kv_heads=2, seed=1))
    order = sorted(found, key=lambda each: found[each].rel_l2)
    assert order == ["exact", "int8_qk_16bit_pv", "int8_qk_fp8_pv", STUDIED]
    assert found["exact"].rel_l2 < 1e-5
    assert 1e-3 < found["int8_qk_16bit_pv"].rel_l2 < 0.02
    assert 0.02 < found["int8_qk_fp8_pv"].rel_l2 < 0.05


def test_what_lies_beyond_a_rows_length_changes_nothing():
    q, k, v = make_hard_qkv("heavy tails", 2, 70, 2, 32)
    lengths = torch.tensor([50, 1], dtype=torch.int32)
    found = tuning.measure(q, k, v, kv_len=lengths)
    for x in (k, v):
        x[0, 50:], x[1, 1:] = 1e4, -1e4
    assert tuning.measure(q, k, v, kv_len=lengths) == found


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi", "animatediff"])  # of ours, one the generic way, a UNet
def test_every_self_attention_layer_is_looked_at_in_every_part(name):
    pipe = tiny_pipelines.build(name)
    calls = [lambda seed=seed: tiny_pipelines.run(name, pipe, steps=4, seed=seed) for seed in (0, 1)]
    told = []
    made = tuning.tune(pipe, calls, target=Target.parse("cosine=0.998"), ranges=2, progress=lambda: told.append(1))
    kinds = Policy().kinds
    with videoattn.fast_attention(pipe, "exact") as sessions:
        sites = [patch.site.name for session in sessions for patch in session.patches if patch.site.kind in kinds]
    assert list(made.errors) == [(site, part) for site in dict.fromkeys(sites) for part in (0, 1)]
    assert (made.prompts, made.ranges, len(told)) == (2, 2, 2)
    assert all(set(found) == {STUDIED, *OFFERED} for found in made.errors.values())
    assert all(found["exact"].cosine > 0.99999 > found[STUDIED].cosine for found in made.errors.values())
    assert not runner.observers


def test_nothing_is_left_on_the_pipeline_and_the_video_is_the_same():
    pipe = tiny_pipelines.build("wan")
    before = tiny_pipelines.run("wan", pipe)
    processors, during = list(pipe.transformer.attn_processors.values()), []
    tuning.tune(pipe, [lambda: during.append(tiny_pipelines.run("wan", pipe))], target=Target.parse("cosine=0.9"))
    assert torch.equal(during[0], before)
    assert list(pipe.transformer.attn_processors.values()) == processors
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_nothing_is_left_where_a_generation_raises():
    pipe = tiny_pipelines.build("wan")

    def broken():
        tiny_pipelines.run("wan", pipe, num_inference_steps=1)
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        tuning.tune(pipe, [broken], target=Target.parse("cosine=0.9"))
    assert not runner.observers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_no_generation_and_no_range_are_refused():
    pipe = tiny_pipelines.build("wan")
    with pytest.raises(ValueError, match="wanted self-attention without a mask, got none"):
        tuning.tune(pipe, [], target=Target.parse("cosine=0.9"))
    with pytest.raises(ValueError, match="wanted at least one range and one sample, got 0 and 2"):
        tuning.tune(pipe, [], target=Target.parse("cosine=0.9"), ranges=0)


def test_a_tuned_policy_runs_where_no_kernel_quantises():
    pipe = tiny_pipelines.build("wan")
    made = tuning.tune(pipe, [lambda: tiny_pipelines.run("wan", pipe)], target=Target.parse("rel_l1=0.1"), ranges=2)
    exact = tiny_pipelines.run("wan", pipe)
    videoattn.enable_fast_attention(pipe, made.policy())
    assert torch.equal(tiny_pipelines.run("wan", pipe), exact)
    shown = str(videoattn.report(pipe))
    assert "policy tuned" in shown and "int8_qk_fp8_pv" in shown and "no GPU" in shown


def test_the_command_writes_a_policy_and_shows_the_table(tmp_path, capsys):
    folder, out = tmp_path / "wan", tmp_path / "tuned.toml"
    tiny_pipelines.build("wan").save_pretrained(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\n\ntwo dots\n")
    small = ["--steps", "2", "--height", "32", "--width", "32", "--frames", "5", "--ranges", "1", "--samples", "1"]
    command = ["tune", str(folder), "--prompts", str(prompts), "--target", "rel_l2=0.05", *small, "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "worst rel_l2 by precision" in printed and STUDIED in printed and "2 prompts of 2 steps" in out.read_text()
    assert Policy.load(out).tuned.ranges == 1
    assert (
        cli.main(
            [
                "generate",
                str(folder),
                "--prompt",
                "x",
                *small[:8],
                "--preset",
                str(out),
                "--out",
                str(tmp_path / "v.mp4"),
            ]
        )
        == 0
    )
    assert "policy tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--out", "tuned.json"], "--out: wanted a file that ends in .toml"),
        (["--prompt", "x", "--target", "psnr=30"], "target: wanted one of cosine, rel_l1, rel_l2"),
        ([], "needs a prompt, got none"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(arguments, message, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "wan"
    tiny_pipelines.build("wan").save_pretrained(folder)
    monkeypatch.setattr(tuning, "tune", None)
    with pytest.raises(SystemExit) as left:
        cli.main(["tune", str(folder), *arguments])
    assert left.value.code == cli.WRONG_USE
    assert message in capsys.readouterr().err
