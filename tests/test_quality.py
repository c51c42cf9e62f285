"""Video and attention metrics: against formulas written out, and against the mistakes that public code makes."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

import videoattn
from videoattn import quality

RANDOM = np.random.default_rng(0)
CLIP = RANDOM.uniform(0.2, 0.8, (5, 16, 20, 3))


def by_hand(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


def test_psnr_is_pooled_and_per_frame():
    noisy = CLIP + RANDOM.uniform(-0.02, 0.02, CLIP.shape) * np.array([1, 2, 3, 9, 4])[:, None, None, None]
    found = quality.compare_videos(noisy, CLIP)
    frames = [by_hand(a, b) for a, b in zip(noisy, CLIP, strict=True)]
    assert found.psnr == pytest.approx(by_hand(noisy, CLIP))
    assert found.psnr_frames == pytest.approx(tuple(frames))
    assert found.psnr_mean == pytest.approx(np.mean(frames))
    assert (found.worst_frame, found.psnr_worst) == (3, pytest.approx(min(frames)))
    assert found.psnr < found.psnr_mean and not found.identical
    assert 0 < found.ssim_worst < found.ssim < 1
    assert "at frame 3" in str(found)


def test_identical_videos_are_called_so():
    found = quality.compare_videos(CLIP, CLIP.copy())
    assert found.identical and str(found) == "identical"
    assert found.psnr == found.psnr_mean == found.psnr_worst == found.flicker_psnr == float("inf")
    assert found.ssim == pytest.approx(1.0) and found.motion == 1.0


def test_one_identical_frame_does_not_hide_the_others():
    noisy = CLIP + RANDOM.normal(0, 0.02, CLIP.shape)
    noisy[2] = CLIP[2]
    found = quality.compare_videos(noisy, CLIP)
    assert not found.identical
    assert found.psnr_frames[2] == float("inf")
    assert found.psnr_mean == pytest.approx(np.mean([by_hand(noisy[t], CLIP[t]) for t in (0, 1, 3, 4)]))


def test_bytes_do_not_wrap_around():
    """Differences of uint8 taken in uint8 never fall below 28 dB; ours must see the true 14.8 dB."""
    video, reference = np.full((2, 16, 16, 3), 40, np.uint8), np.full((2, 16, 16, 3), 10, np.uint8)
    video[1], reference[1] = 10, 80
    truth = by_hand(video / 255.0, reference / 255.0)
    assert quality.compare_videos(video, reference).psnr == pytest.approx(truth)


def test_every_form_of_a_video_is_the_same_video():
    video = (CLIP * 255).round().astype(np.uint8)
    reference = np.clip(video.astype(int) + RANDOM.integers(-9, 10, video.shape), 0, 255).astype(np.uint8)
    wanted = quality.compare_videos(video, reference)
    forms = [
        [Image.fromarray(frame) for frame in video],
        video / 255.0,
        torch.from_numpy(video / 255.0),
        torch.from_numpy(video / 255.0).permute(0, 3, 1, 2),
    ]
    for form in forms:
        assert quality.compare_videos(form, reference).psnr == pytest.approx(wanted.psnr, abs=1e-3)


def test_a_frozen_video_is_seen():
    """A cache that freezes motion keeps every frame close to its reference and the motion gone."""
    still = np.repeat(CLIP.mean(0, keepdims=True), 5, axis=0)
    found = quality.compare_videos(still, CLIP)
    assert found.motion < 0.01
    assert (
        quality.compare_videos(CLIP, still).motion != quality.compare_videos(CLIP, still).motion
    )  # NaN: nothing moves


@pytest.mark.parametrize(
    "video, said",
    [
        (CLIP[:4], "one shape"),
        (CLIP * 255, "0..1"),
        (CLIP * np.nan, "0..1"),
        (CLIP[None], "one video"),
    ],
)
def test_what_is_no_pair_of_videos_is_refused(video, said):
    with pytest.raises(ValueError, match=said):
        quality.compare_videos(video, CLIP)


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 x 11"):
        quality.compare_videos(CLIP[:, :10], CLIP[:, :10])


def test_attention_error_sees_zeroed_rows_and_a_wrong_scale():
    reference = torch.randn(1, 2048, 8, 64, generator=torch.Generator().manual_seed(0))
    zeroed = reference.clone()
    zeroed[:, 100:104] = 0
    error = quality.attention_error(zeroed, reference)
    assert error.worst_cosine == pytest.approx(0, abs=1e-6) and error.rel_l1 < 0.003 and error.finite
    assert error.max_abs == pytest.approx(float(reference[:, 100:104].abs().max()))
    scaled = quality.attention_error(1.05 * reference, reference)
    assert (scaled.rel_l2, scaled.rel_l1) == (pytest.approx(0.05, rel=1e-4), pytest.approx(0.05, rel=1e-4))
    assert scaled.worst_cosine == pytest.approx(1.0)
    zeroed[0, 0, 0, 0] = float("nan")
    assert not quality.attention_error(zeroed, reference).finite
    with pytest.raises(ValueError, match="shape"):
        quality.attention_error(reference[:, 1:], reference)


def test_the_noise_floor_runs_two_exact_backends_and_puts_things_back():
    pipe = tiny_pipelines.build("wan")
    before = dict(pipe.transformer.attn_processors)
    used = []

    def generate():
        video = tiny_pipelines.run("wan", pipe, output_type="pt")[0]
        used.append({site.backend for site in videoattn.report(pipe).sites})
        return video

    found = quality.noise_floor(pipe, generate)
    assert used == [{"sdpa"}, {"sdpa_math"}]
    assert found.psnr > 60
    assert all(processor is before[name] for name, processor in pipe.transformer.attn_processors.items())
