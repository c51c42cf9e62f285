"""The benchmark of tiles against slices, on few and small clips."""

import pytest
import torch
from PIL import Image

from videoattn.benchmarks import results, tiling


def test_psnr_is_of_frames_in_0_to_1():
    black, grey = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), -0.8)
    assert tiling.psnr(grey, black) == pytest.approx(20)  # 0.1 of 1
    assert tiling.psnr(black, black) == pytest.approx(150)


@pytest.mark.parametrize(("model", "size"), [("tiny-animatediff", (2, 224, 224)), ("tiny-wan", (5, 288, 272))])
def test_slices_are_exact_and_tiles_are_not(model, size, monkeypatch, tmp_path):
    monkeypatch.setitem(tiling.SIZES, model, size)
    arguments = ["--only", model, "--scenes", "1", "--device", "cpu", "--sheet", str(tmp_path)]
    assert tiling.main([*arguments, "--commit", "0" * 40, "--results", str(tmp_path)]) == 0
    value = {row["metric"]: float(row["value"]) for row in results.read(tmp_path / "tiling.csv")}
    assert value["psnr 8 slices against whole"] > 90 > value["psnr tiles against whole"] > 15
    assert value["psnr whole against drawn"] > 30
    assert value["peak 8 slices"] < value["peak whole"] and value["peak tiles"] < value["peak whole"]
    assert Image.open(tmp_path / f"{model}.png").size == (3 * size[2], size[1])
