"""Every scheduler against diffusers' stored states, against exact solutions, and inside generate()."""
import numpy as np
import pytest
from conftest import CASES, GOLDEN, golden_config, relative_error

import musicldm
from weights import InputError

SCHEDULE = golden_config()["schedule"]
ALPHAS = musicldm.alphas_cumprod(SCHEDULE).astype(np.float64)
MEAN, DEVIATION = 0.7, 0.5  # of the normal signals whose noise `exact_noise` predicts
RUNS = [(name, steps, eta) for name in musicldm.SCHEDULERS for steps in (1, 2, 4, 10, 25)
        for eta in ((0, 1) if name == "ddim" else (0,))]


@pytest.fixture(scope="module")
def golden():
    """The stored arrays of make_golden.py's schedulers()."""
    with np.load(GOLDEN / "schedulers.npz") as file:
        return dict(file)


def sampled(scheduler, steps, eps_fn, x, noise=(), eta=0.0):
    timesteps = musicldm.scheduler_timesteps(scheduler, steps, SCHEDULE)
    sample = musicldm.make_scheduler(scheduler, SCHEDULE, steps, eta, iter(noise))
    return timesteps, list(sample(eps_fn, x, timesteps))


def analytic_noise(x, t):  # make_golden.py's
    return (0.6 * np.sin(x) + 0.5 * np.cos(t / 100) * x).astype(np.float32)


@pytest.mark.parametrize("name, steps, eta", RUNS)
def test_timesteps_and_every_state_equal_the_reference(name, steps, eta, golden):
    x = golden["in_x"].copy()
    timesteps, states = sampled(name, steps, analytic_noise, x, golden["in_noise"], float(eta))
    assert np.array_equal(timesteps, golden[f"{name}.{steps}.{eta}.timesteps"]) and np.array_equal(x, golden["in_x"])
    for i, (state, wanted) in enumerate(zip(states, golden[f"{name}.{steps}.{eta}.states"], strict=True)):
        assert relative_error(state, wanted) < 2e-6, f"evaluation {i}"


@pytest.mark.parametrize("name", [name for name in musicldm.SCHEDULERS if name != "pndm"])
def test_velocities_equal_the_reference(name, golden):
    """diffusers' PNDM combines velocities, ours noises, as the paper does: they differ."""
    def predict(x, t):
        return musicldm.noise_of_velocity(analytic_noise(x, t), x, ALPHAS[t]).astype(np.float32)

    states = sampled(name, 10, predict, golden["in_x"], golden["in_noise"])[1]
    for i, (state, wanted) in enumerate(zip(states, golden[f"{name}.velocity"], strict=True)):
        assert relative_error(state, wanted) < 4e-6, f"evaluation {i}"


def exact_noise(x, t):
    return (1 - ALPHAS[t]) ** 0.5 * (x - ALPHAS[t] ** 0.5 * MEAN) / (ALPHAS[t] * DEVIATION ** 2 + 1 - ALPHAS[t])


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpm", 2), ("heun", 2), ("pndm", 2), ("lms", 2)])
def test_error_falls_with_the_order_of_the_method(name, order):
    """For normal signals the flow keeps (x - its mean) / its deviation (Song et al., 2021, equation 13)."""
    deviations, errors = (ALPHAS * DEVIATION ** 2 + 1 - ALPHAS) ** 0.5, []
    for steps in (100, 200):
        timesteps = musicldm.scheduler_timesteps("ddim" if name == "dpm" else name, steps, SCHEDULE)  # the last is 1
        x = np.array([-1.3, 0.2, 1.9])
        *_, landed, _ = musicldm.make_scheduler(name, SCHEDULE, steps, 0.0, None)(exact_noise, x, timesteps)
        if name in ("lms", "heun", "euler"):  # from sigma's scale
            landed = landed * ALPHAS[1] ** 0.5
        lengths = (x - ALPHAS[timesteps[0]] ** 0.5 * MEAN) / deviations[timesteps[0]]
        errors.append(np.abs(landed - (ALPHAS[1] ** 0.5 * MEAN + deviations[1] * lengths)).max())
    assert errors[1] < 0.02 and errors[1] < errors[0] * 0.6 ** order


@pytest.mark.parametrize("name, eta", [("ddim", 1.0), ("euler_ancestral", 0.0)])
def test_fresh_noise_keeps_the_distribution(name, eta):
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(20000) for _ in range(501))
    x = sampled(name, 500, exact_noise, next(noise), noise, eta)[1][-1]
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - DEVIATION) < 0.02


def in_generate(cfg, params, golden, **options):
    """The mel of the guided case, of four steps and the stored noise."""
    case = CASES["guided"]
    return musicldm.generate(cfg, case["prompt"], params, audio_length_in_s=case["height"] * 0.04,
                             num_inference_steps=4, output_type="mel", negative_prompt=case["negative_prompt"],
                             latents=golden["in_latents"], noise=golden["in_latent_noise"], **options)


@pytest.mark.parametrize("name", musicldm.SCHEDULERS)
def test_in_generate_equal_to_the_reference_pipeline(name, golden, params):
    calls = []
    mel = in_generate(golden_config(f"sampling.scheduler={name}"), params, golden,
                      callback=lambda i, timestep, x: calls.append((i, timestep)))
    assert relative_error(mel, golden[f"{name}.mel"]) < 3e-5
    assert calls == list(enumerate(golden[f"{name}.4.0.timesteps"]))


def test_velocities_in_generate_equal_the_reference_pipeline(golden, params):
    mel = in_generate(golden_config("schedule.prediction_type=v_prediction"), params, golden)
    assert relative_error(mel, golden["velocity.mel"]) < 1e-4  # the noise of a velocity is x but for a little, at first


def test_fresh_noise_follows_from_the_seed(params):
    options = {"num_inference_steps": 2, "audio_length_in_s": 0.32, "output_type": "latent",
               "scheduler": "euler_ancestral", "latents": np.zeros((1, 8, 8, 4))}
    first, second, other = (musicldm.generate(golden_config(), "a", params, **options, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("name", musicldm.SCHEDULERS)
def test_the_most_steps_are_the_last_that_stay_within_the_schedule(name):
    cfg = golden_config("schedule.num_train_timesteps=40")
    longest = 38 if name == "dpm" else 39
    options = {"scheduler": name, "num_inference_steps": longest}
    assert musicldm.checked_options(cfg, options, 1)["num_inference_steps"] == longest
    for steps in range(1, longest + 2):
        timesteps = musicldm.scheduler_timesteps(name, steps, cfg["schedule"])
        assert (timesteps[0] < 40) == (steps <= longest) and timesteps[-1] >= 1
    with pytest.raises(InputError, match=f"is {longest + 1}; valid with the scheduler {name} .*: up to {longest}"):
        musicldm.checked_options(cfg, {**options, "num_inference_steps": longest + 1}, 1)


def test_mistakes():
    with pytest.raises(InputError, match="is .plms.; valid: ddim, dpm, pndm, lms, heun, euler, euler_ancestral$"):
        musicldm.generate(golden_config(), "a", scheduler="plms")
    with pytest.raises(InputError, match="sampling.eta is 0.5; valid with the scheduler heun: 0"):
        musicldm.generate(golden_config(), "a", scheduler="heun", eta=0.5)


def test_command_line_takes_a_scheduler_and_counts_its_evaluations(tmp_path, capsys):
    assert musicldm.main(["--prompt", "a", "--weights", str(GOLDEN / "checkpoint"), "--seconds", "0.32", "--steps", "3",
                          "--scheduler", "heun", "--out", str(tmp_path / "a.wav")]) == 0
    out, err = capsys.readouterr()
    assert "heun, 3 steps" in out and err.splitlines()[-1].startswith("step 5/5  ")
