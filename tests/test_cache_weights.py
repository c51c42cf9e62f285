"""Which steps run, with which weights the others are guessed, and what a calibration keeps: numbers, no pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from videoattn.caches import calibration, keysteps, timetable
from videoattn.caches.calibration import Calibration, Recorder
from videoattn.caches.past import Past
from videoattn.caches.settings import Settings
from videoattn.caches.weights import Fitted, Polynomial, error

STEPS = 12


def scheduler_of(cls, steps=STEPS, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def outputs(degree, at, seed=0):
    """Vectors [N, 50] whose elements are polynomials of the steps' places."""
    generator = np.random.default_rng(seed)
    return sum(generator.normal(size=(1, 50)) * at[:, None] ** power for power in range(degree + 1))


# --- weights ---


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_polynomials_are_exact_up_to_their_degree(terms):
    at = np.linspace(1, 0.1, STEPS) ** 2
    made = outputs(terms - 1, at)
    rule = Polynomial(terms=terms, at=at)
    known = [1, 4, 5][-terms:]
    for wanted in (0, 3, 7):
        np.testing.assert_allclose(rule.weights(known, wanted) @ made[known], made[wanted], atol=1e-9)


def test_a_held_output_has_the_weight_one():
    assert Polynomial(terms=1, at=np.arange(5.0)).weights([2], 4).tolist() == [1.0]


def test_fitted_weights_have_the_least_error():
    made = np.random.default_rng(0).normal(size=(6, 40)).cumsum(0)
    gram = made @ made.T
    rule = Fitted(terms=2, gram=gram)
    weights = rule.weights([1, 3], 4)
    least = np.linalg.lstsq(made[[1, 3]].T, made[4], rcond=None)[0]
    np.testing.assert_allclose(weights, least, rtol=1e-3)
    missed = ((weights @ made[[1, 3]] - made[4]) ** 2).sum() / (made[4] ** 2).sum()
    np.testing.assert_allclose(error(gram, [1, 3], weights, 4), missed, rtol=1e-6)
    assert error(gram, [1, 3], np.array([0.0, 1.0]), 4) > missed


# --- key steps ---


@pytest.mark.parametrize(("total", "count"), [(25, 13), (50, 25), (9, 3), (12, 11), (12, 12)])
def test_uniform_key_steps(total, count):
    keys = keysteps.uniform(total, count)
    assert len(keys) == count and keys[0] == 0 and keys[-1] == total - 1
    gaps = np.diff(keys)
    assert gaps.max() - gaps.min() <= 1


def cosines(places):
    places = np.array(places, np.float64)
    return np.cos(places[:, None] - places[None, :])


def test_the_search_runs_where_features_have_moved_away():
    cosine = cosines([0, 0.1, 0.2, 0.6, 0.65, 0.7, 0.75, 0.8])
    assert keysteps.similar(cosine, np.cos(0.3)) == [0, 3, 7]
    assert keysteps.similar(cosine, np.cos(0.15)) == [0, 2, 3, 7]
    assert keysteps.similar(cosine, 0.9999999) == list(range(8))


@pytest.mark.parametrize("count", range(2, 13))
def test_as_many_key_steps_as_asked_for(count):
    generator = np.random.default_rng(count)
    for places in (generator.uniform(0, 0.2, 12).cumsum(), np.zeros(12), np.linspace(0, 1, 12)):
        keys = keysteps.similar_count(cosines(places), count)
        assert len(keys) == count and keys[0] == 0 and keys[-1] == 11


def test_the_least_error_is_the_least_of_all_choices():
    import itertools

    made = np.random.default_rng(3).normal(size=(9, 30)).cumsum(0)
    gram = made @ made.T
    rule, shares = Fitted(terms=2, gram=gram), np.linspace(1, 2, 9)

    def cost(keys):
        total = 0.0
        for step in set(range(9)) - set(keys):
            known = [key for key in keys if key < step][-2:]
            total += shares[step] * error(gram, known, rule.weights(known, step), step)
        return total

    found = keysteps.least_error(gram, rule, range(9), 5, corrected=False, shares=shares)
    best = min(cost([0, *middle, 8]) for middle in itertools.combinations(range(1, 8), 3))
    assert len(found) == 5 and cost(found) == pytest.approx(best)
    assert keysteps.least_error(gram, rule, range(2, 9), 4, corrected=True, shares=shares)[0] == 2


# --- schedulers ---


def test_influence_of_a_step_of_flow_euler_is_its_length():
    scheduler = scheduler_of(FlowMatchEulerDiscreteScheduler, shift=3.0)
    np.testing.assert_allclose(timetable.influence(scheduler), np.diff(scheduler.sigmas.numpy()), rtol=1e-4)
    assert scheduler.step_index is None  # untouched


@pytest.mark.parametrize(
    "make",
    [
        lambda: scheduler_of(DDIMScheduler, clip_sample=False),
        lambda: scheduler_of(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda: scheduler_of(UniPCMultistepScheduler),
    ],
)
def test_influence_is_what_a_change_does(make):
    """Against two whole runs that differ in one step's output."""
    scheduler = make()
    told = timetable.influence(scheduler)
    for changed in (0, 5, STEPS - 1):
        ends = []
        for change in (0.0, 0.01):
            own = make()
            sample = torch.full((1, 2, 3), 0.1)
            for index, timestep in enumerate(own.timesteps):
                output = torch.full_like(sample, 0.05 + change * (index == changed))
                sample = own.step(output, timestep, sample, return_dict=False)[0]
            ends.append(sample)
        np.testing.assert_allclose((ends[1] - ends[0]).mean().item() / 0.01, told[changed], rtol=2e-2, atol=1e-4)


def test_no_influence_where_steps_draw_noise():
    state = torch.get_rng_state()
    assert timetable.influence(scheduler_of(EulerAncestralDiscreteScheduler)) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", range(1, 9))
def test_samplers_of_few_steps_are_refused(steps):
    reason = timetable.refuses(scheduler_of(FlowMatchEulerDiscreteScheduler, steps))
    assert reason == f"wanted a sampler of at least 9 steps, got {steps}"


def test_samplers_of_two_calls_a_step_are_refused():
    assert "HeunDiscreteScheduler calls the network 2 times a step" in timetable.refuses(
        scheduler_of(HeunDiscreteScheduler)
    )
    assert timetable.refuses(scheduler_of(DDIMScheduler)) is None


def test_coordinates():
    flow, ddim = scheduler_of(FlowMatchEulerDiscreteScheduler), scheduler_of(DDIMScheduler)
    np.testing.assert_allclose(timetable.coordinates(flow), flow.sigmas[:-1].numpy())
    np.testing.assert_allclose(timetable.coordinates(ddim), ddim.timesteps.numpy())
    kept = ddim.alphas_cumprod[ddim.timesteps].double().numpy()
    np.testing.assert_allclose(timetable.coordinates(ddim, "sigma"), np.sqrt((1 - kept) / kept))
    np.testing.assert_allclose(timetable.coordinates(ddim, "log_snr"), np.log((1 - kept) / kept) / 2)
    np.testing.assert_allclose(timetable.coordinates(flow, "timestep"), flow.timesteps.numpy())


# --- sums of the past ---


@pytest.mark.parametrize("which", timetable.COORDINATES)
def test_a_first_step_of_pure_noise_has_a_coordinate(which):
    """No signal is kept there, and its noise level would be infinite: a line through it would be no number."""
    ddim = scheduler_of(DDIMScheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    at = timetable.coordinates(ddim, which)
    assert ddim.alphas_cumprod[ddim.timesteps[0]] == 0 and np.isfinite(at).all()
    line = Polynomial(terms=2, at=at).weights([0, 1], 2)
    assert np.isfinite(line).all() and line.sum() == pytest.approx(1)


def test_a_correction_puts_right_what_was_guessed_wrong():
    """Outputs on a line, one of which is held: with flow Euler the latents are then where a full run leads."""
    scheduler = scheduler_of(FlowMatchEulerDiscreteScheduler)
    at, influence = timetable.coordinates(scheduler), timetable.influence(scheduler)
    made = torch.from_numpy(outputs(1, at))
    past, hold, line = Past(), Polynomial(terms=1, at=at), Polynomial(terms=2, at=at)
    past.add(0, [made[0]], keep=2)
    guessed = past.guess(1, hold)[0]
    assert torch.equal(guessed, made[0])
    correction = past.correction(2, line, influence, most=10.0)
    weights = correction | {2: 1.0 + correction.get(2, 0.0)}
    given = past.sum_of(weights, own=(2, made[2]))
    torch.testing.assert_close(
        influence[1] * guessed + influence[2] * given, influence[1] * made[1] + influence[2] * made[2]
    )
    assert past.correction(2, line, np.array([1.0, 100.0, 1.0]), most=10.0) == {}


def test_sums_are_made_in_fp32_and_kept_in_the_outputs_dtype():
    past = Past()
    tensors = [torch.randn(1000).bfloat16() for _ in range(2)]
    for step, tensor in enumerate(tensors):
        past.add(step, [tensor], keep=2)
    made = past.sum_of({0: -0.6, 1: 1.6})
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, (-0.6 * tensors[0].float() + 1.6 * tensors[1].float()).bfloat16())
    assert past.nbytes == 2 * 2000


# --- calibrations ---


def recorded(steps=range(STEPS), branches=("0", "1"), elements=300):
    recorder, generator = Recorder({"model": "A", "steps": STEPS}), torch.Generator().manual_seed(0)
    made = {branch: torch.randn(STEPS, elements, generator=generator).cumsum(0) for branch in branches}
    for step in steps:
        for branch in branches:
            recorder.add(branch, step, [made[branch][step]])
    return recorder, made


def test_a_calibration_holds_the_mean_products_of_branches():
    recorder, made = recorded()
    found = recorder.calibration()
    products = sum((x.double() @ x.double().T).numpy() for x in made.values())
    np.testing.assert_allclose(found.gram, products / np.diag(products).mean(), rtol=1e-6)
    assert found.ran == range(STEPS)
    np.testing.assert_allclose(np.diag(found.cosine), 1.0)


def test_a_calibration_of_a_part_of_the_steps_and_of_a_branch_that_ends():
    recorder, _ = recorded(range(5, 9))
    assert recorder.calibration().ran == range(5, 9)
    recorder.add("0", 9, [torch.ones(300)])
    assert recorder.calibration().ran == range(5, 10)  # the other branch has stopped: guidance was turned off
    recorder.add("0", 11, [torch.ones(300)])
    assert recorder.calibration() is None  # a step is missing


def test_large_outputs_are_sampled(monkeypatch):
    monkeypatch.setattr(calibration, "SAMPLED", 100)
    recorder, _ = recorded(elements=5000)
    assert all(len(x) <= 100 for samples in recorder._samples.values() for x in samples.values())


def test_toml_there_and_back(tmp_path):
    recorder, _ = recorded(range(3, STEPS))
    recorder.key["first_step"] = 3
    found, path = recorder.calibration(), tmp_path / "new" / "calibration.toml"
    other = Calibration(key={"model": "it's", "first_step": 0}, ran=range(3), gram=np.eye(3))
    assert calibration.load(path) == []
    calibration.save(path, [found, other])
    again, second = calibration.load(path)
    assert again.key == found.key and again.ran == found.ran
    np.testing.assert_allclose(again.gram, found.gram, rtol=1e-7)
    assert second.key == other.key
    np.testing.assert_allclose(second.gram, np.eye(3), atol=1e-9)


@pytest.mark.parametrize("text", ["not toml", "other = 1", "[[calibration]]\nmodel = 'A'\n"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "calibration.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="calibration: wanted a file that step rehash wrote, got"):
        calibration.load(path)


# --- settings ---


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "wanted one of steps, similarity and threshold, got none"),
        ({"steps": 5, "similarity": 0.9}, ValueError, "got \\['steps', 'similarity'\\]"),
        ({"steps": 2}, ValueError, "steps: wanted 3 or more"),
        ({"steps": (0, -1)}, ValueError, "steps: wanted indices from 0, got"),
        ({"steps": 5.0}, TypeError, "steps: wanted an int, or indices of steps, got float"),
        ({"similarity": 1.5}, ValueError, "similarity: wanted a cosine between 0 and 1, got 1.5"),
        ({"threshold": 0, "point": "first_block"}, ValueError, "threshold: wanted a relative change above 0, got 0"),
        ({"threshold": 0.1}, ValueError, "threshold: wanted point 'first_block'"),
        ({"threshold": 0.1, "point": "first_block", "mode": "fit"}, ValueError, "wanted mode hold or extrapolate"),
        ({"steps": 5, "mode": "guess"}, ValueError, "mode: wanted one of hold, .*, got 'guess'"),
        ({"steps": 5, "keys": "odd"}, ValueError, "keys: wanted one of uniform, similarity, error, got 'odd'"),
        ({"steps": 5, "point": "mid"}, ValueError, "point: wanted one of output, late_block, first_block, got 'mid'"),
        ({"steps": 5, "coordinate": "x"}, ValueError, "coordinate: wanted one of sigma, log_snr, timestep, got 'x'"),
        ({"steps": 5, "mode": "correct", "point": "late_block"}, ValueError, "mode 'correct': wanted point 'output'"),
        ({"similarity": 0.9, "keys": "uniform"}, ValueError, "similarity: wanted keys 'similarity', got 'uniform'"),
    ],
)
def test_wrong_settings(given, error, message):
    with pytest.raises(error, match=message):
        Settings(**given)
