"""A plan's figures are those of hand counts, of the real run, of the shapes that the models make, and of measured peaks."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_pipelines
import torch

from videoattn import cli
from videoattn.benchmarks import find_shapes, profile_truth
from videoattn.profiling import cards
from videoattn.profiling.counts import Counts
from videoattn.profiling.described import Size, describe
from videoattn.profiling.plan import Plan, plan
from videoattn.profiling.scopes import Scopes
from videoattn.profiling.summary import ATTENTIONS

ROOT = Path(__file__).parents[1]
TINY_WAN = ROOT / "examples" / "models" / "tiny-wan"
REAL = {"wan-1.3b": (480, 832, 81), "animatediff": (512, 512, 16), "svd-xt": (576, 1024, 25)}


@pytest.fixture(scope="module")
def planned() -> dict[str, Plan]:
    return {name: plan(name, *size) for name, size in REAL.items()}


@pytest.mark.parametrize("case", profile_truth.MODELS)
def test_flops_of_a_denoiser_are_those_of_its_formulas(planned, case):
    name, size, by_hand = profile_truth.MODELS[case]
    assert size == REAL[name]
    (denoiser,) = planned[name].denoisers
    assert denoiser.flops == pytest.approx(by_hand, rel=0.01)
    assert denoiser.flops == by_hand  # and not only within the bar


@pytest.mark.parametrize("name", REAL)
def test_attention_calls_are_those_of_shapes_toml(planned, name):
    (denoiser,) = planned[name].denoisers
    size = "x".join(map(str, REAL[name]))
    fields = ("kind", "batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype")
    wanted = Counter()
    for shape, used_by in find_shapes.read().items():
        wanted[tuple(getattr(shape, field) for field in fields)] += used_by.get(f"{name} {size}", 0)
    found = Counter(tuple(getattr(call, field) for field in fields) for call in denoiser.attention)
    assert found == +wanted
    assert sum(call.flops for call in denoiser.attention) == denoiser.attention_flops


@pytest.mark.parametrize("name", REAL)
def test_activations_are_those_that_a_gpu_measured(planned, name):
    """benchmarks/results/forward_memory.csv: what one forward allocates at its peak."""
    case = f"{name} {'x'.join(map(str, REAL[name]))}"
    with (ROOT / "benchmarks/results/forward_memory.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["case"], row["metric"]) == (case, "peak_unpatched")]
    assert rows
    (denoiser,) = planned[name].denoisers
    assert denoiser.activations_bytes / 2**30 == pytest.approx(float(rows[-1]["value"]), rel=0.02)


def test_lengths_move_through_the_levels(planned):
    (unet,) = planned["animatediff"].denoisers
    assert unet.lengths()["spatial"] == tuple((n, n) for n in (4096, 1024, 256, 64, 256, 1024, 4096))
    assert unet.lengths()["temporal"] == ((16, 16),)
    (transformer,) = planned["wan-1.3b"].denoisers
    assert transformer.lengths() == {"full": ((32760, 32760),), "cross": ((32760, 512),)}


def test_the_whole_is_the_sum_of_its_parts(planned):
    made = planned["wan-1.3b"]
    by_name = {part.name: part for part in made.parts}
    assert by_name.keys() == {"text_encoder", "transformer", "vae.decode"} and not made.unplanned
    assert by_name["transformer"].calls == 2 * made.steps == 100
    assert by_name["text_encoder"].calls == 2
    assert {part.name: part.calls for part in planned["animatediff"].parts}["unet"] == 50  # guidance in one call
    shares = made.categories()
    assert sum(share.flops for share in shares) == made.flops == sum(p.calls * p.flops for p in made.parts)
    assert sum(share.bytes for share in shares) == made.bytes
    assert sum(share.ms for share in shares) == pytest.approx(made.ms)
    assert shares[0].name == "full 3-D self-attention"
    transformer = by_name["transformer"]
    assert made.attention_share() == pytest.approx(transformer.attention_flops / transformer.flops)
    attention = 100 * sum(row.ms for row in transformer.rows if row.operator in ATTENTIONS)
    assert made.without_attention() == pytest.approx(made.ms / (made.ms - attention))
    assert by_name["transformer"].weights_bytes == pytest.approx(2 * 1.42e9, rel=0.01)  # bf16
    heaviest = max(made.parts, key=lambda part: part.activations_bytes)
    assert made.peak_bytes() == made.weights_bytes() + heaviest.activations_bytes


def test_floors_are_the_longer_of_products_and_copies(planned):
    card = cards.read("h200")
    (transformer,) = planned["wan-1.3b"].denoisers
    for row in transformer.rows:
        assert row.ms >= 1e3 * max(row.flops / card.flops["bfloat16"], row.bytes / card.copy_bandwidth) * 0.999
    rows = {(row.module, row.operator): row for row in transformer.rows}
    full = rows["transformer.blocks.*.attn1", "full"]
    assert full.ms == pytest.approx(1e3 * 30 * 4 * 32760**2 * 1536 / 801e12)
    norm = rows["transformer.blocks.*.norm1", "normalisation"]
    assert norm.ms == pytest.approx(1e3 * norm.bytes / 4.24e12)


# ---- from configs on disk


def real_flops(pipe, **arguments) -> dict[str, int]:
    counts = Counts()
    with torch.no_grad(), Scopes(pipe.components, counts, pipe), counts:
        pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np")
    flops: dict[str, int] = {}
    for (stage, _, _), row in counts.rows().items():
        flops[stage] = flops.get(stage, 0) + row.flops
    return {stage: count for stage, count in flops.items() if count and stage != "pipeline"}


def planned_flops(made: Plan) -> dict[str, int]:
    assert not made.unplanned
    return {part.name: part.calls * part.flops for part in made.parts}


def test_the_plan_of_a_folder_is_what_its_generation_does():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(TINY_WAN, dtype={"vae": torch.float32, "default": torch.bfloat16})
    pipe.set_progress_bar_config(disable=True)
    made = plan(str(TINY_WAN), height=32, width=48, frames=5, steps=2)
    size = {"height": 32, "width": 48, "num_frames": 5}
    assert planned_flops(made) == real_flops(pipe, prompt="a red cube", num_inference_steps=2, **size)
    modules = pipe.transformer, pipe.vae, pipe.text_encoder
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    assert made.weights_bytes() == sum(tensor.nbytes for tensor in tensors)


def saved(pipe, folder: Path) -> str:
    """A pipeline as it lies on disk, without weights."""
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return str(folder)


@pytest.mark.parametrize("name", ["animatediff", "svd", "wan21_i2v"])
def test_every_part_of_other_families_is_planned(name, tmp_path):
    pipe = tiny_pipelines.build(name)
    call = tiny_pipelines.inputs(name, pipe)
    made = plan(saved(pipe, tmp_path), call["height"], call["width"], call["num_frames"], steps=2)
    del call["generator"], call["output_type"]
    assert planned_flops(made) == real_flops(pipe, **call)


def test_two_denoisers_share_the_steps(tmp_path):
    pipe = tiny_pipelines.build("wan22")
    made = plan(saved(pipe, tmp_path), 32, 32, 5, steps=4)
    pipe.scheduler.set_timesteps(4)
    first = int((pipe.scheduler.timesteps >= pipe.config.boundary_ratio * 1000).sum())
    assert 0 < first < 4
    calls = {part.name: part.calls for part in made.denoisers}
    assert calls == {"transformer": 2 * first, "transformer_2": 2 * (4 - first)}
    assert made.weights_bytes() == sum({part.component: part.weights_bytes for part in made.parts}.values())


def test_what_cannot_be_planned_is_said():
    made = plan("cosmos-7b", 64, 64, 9, steps=1)
    nowhere = "benchmarks/models.toml does not describe "
    assert dict(made.unplanned) == {"text_encoder": nowhere + "it", "vae.decode": nowhere + "the VAE"}
    assert "not planned: vae.decode" in str(made)
    assert describe("wan-i2v-14b").encoders() == ("text_encoder", "image_encoder")  # the latter is not described
    assert describe("ltx2").others() == ("audio_vae", "connectors", "vocoder")
    assert describe("animatediff").encoders() == ("text_encoder",)  # an image encoder is for IP-Adapters only


def test_a_part_that_needs_values_is_not_dropped(monkeypatch):
    from diffusers import AutoencoderKLWan

    def decode(self, z, return_dict=True):
        return z * float(z.sum())

    monkeypatch.setattr(AutoencoderKLWan, "decode", decode)
    made = plan(str(TINY_WAN), 32, 32, 5, steps=1)
    ((name, why),) = made.unplanned
    assert name == "vae.decode" and why.startswith("did not run on the meta device: ")
    assert {part.name for part in made.parts} == {"text_encoder", "transformer"}


def test_parts_are_built_without_memory():
    model = describe("wan-14b")
    assert {tensor.device.type for tensor in model.built("transformer").parameters()} == {"meta"}
    assert sum(tensor.numel() for tensor in model.built("transformer").parameters()) > 14e9


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wan-9000b",), "wanted a folder, a hub id .owner/name. or one of wan-1.3b, .*; got 'wan-9000b'"),
        (("wan-1.3b", 488), "height: wan-1.3b takes multiples of 16, got 488"),
        (("wan-1.3b", 480, 830), "width: wan-1.3b takes multiples of 16, got 830"),
        (("wan-1.3b", 480, 832, 80), "frames: wan-1.3b takes multiples of 4 and 1 more, got 80"),
        (("allegro", 720, 1280, 89), "frames: allegro takes multiples of 4, got 89"),
        (("wan-5b", 720), "height: wan-5b takes multiples of 32, got 720"),
        (("animatediff", 512, 512, 40), "frames: animatediff takes at most 32, got 40"),
        (("animatediff", 0), "height: animatediff takes multiples of 8, got 0"),
        (("latte", 512, 512, 8), "latte does not run at 512x512, 8 frames"),
        (("wan-1.3b", None, None, None, 0), "steps: wanted at least 1, got 0"),
        ((str(ROOT / "tests"),), "model_index.json: wanted the config of a diffusers pipeline"),
    ],
)
def test_wrong_use_says_what_is_wanted(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_a_hub_id_that_is_not_on_this_disk_is_not_fetched():
    with pytest.raises(ValueError, match="nobody/no-such-model: wanted its configs on this disk"):
        plan("nobody/no-such-model")


def test_a_folder_with_another_denoiser(tmp_path):
    (tmp_path / "unet").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="wanted a denoiser of .*WanTransformer3DModel.*; got UNet2DConditionModel"):
        plan(str(tmp_path))
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: wanted JSON"):
        plan(str(tmp_path))


def test_cards(tmp_path):
    assert cards.names() == ("h200",)
    card = cards.read("H200")
    assert card.name == "NVIDIA H200" and card.source
    assert card.ceiling("bfloat16") == (801e12, "bfloat16") and card.ceiling("float16") == (801e12, "float16")
    assert card.ceiling("float32") == (801e12, "bfloat16")  # a floor all the same
    report = tmp_path / "report.json"
    ceilings = {"flops": {"float32": 1e12}, "copy_bandwidth": 1e11, "l2_bytes": 0}
    report.write_text(json.dumps({"device": "cpu", "ceilings": ceilings}))
    other = cards.read(str(report))
    assert (other.name, other.ceiling("bfloat16"), other.copy_bandwidth) == ("cpu", (1e12, "float32"), 1e11)
    with pytest.raises(ValueError, match="card: wanted one of h200 or a .json file, got 'a100'"):
        cards.read("a100")
    for text in ("[]", "{", '{"flops": 3}', '{"gpu": "x", "flops": {"bfloat16": 0}, "copy_bandwidth": 1}'):
        report.write_text(text)
        with pytest.raises(ValueError, match="wanted"):
            cards.read(str(report))


# ---- forms


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new" / "plan.json"
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2"]
    assert cli.main(["plan", str(TINY_WAN), *size, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for piece in (
        "32x48, 5 frames, 2 steps, on NVIDIA H200",
        "VAE decode",
        "WanTransformer3DModel",
        "full attention, 6 calls",
    ):
        assert piece in printed
    assert max(map(len, printed.splitlines())) <= 120
    read = json.loads(out.read_text())
    made = plan(str(TINY_WAN), 32, 48, 5, 2)
    assert read["schema"] == "videoattn.plan/1" and read["card"]["name"] == "NVIDIA H200"
    assert (read["flops"], read["bytes"], read["floor_ms"]) == (made.flops, made.bytes, made.ms)
    assert read["lengths"]["transformer"]["full"] == [[12, 12]]
    assert [part["name"] for part in read["parts"]] == [part.name for part in made.parts]
    assert Size(height=read["height"], width=read["width"], frames=read["frames"]) == Size(
        height=32, width=48, frames=5
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "wan-1.3b", "--height", "481"])
    assert stopped.value.code == 2
    assert "height: wan-1.3b takes multiples of 16, got 481" in capsys.readouterr().err
