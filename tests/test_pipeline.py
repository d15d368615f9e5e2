"""generate() against the reference pipeline's stored results, and what it promises its callers."""
import copy

import numpy as np
import pytest
from conftest import CASES, case_config, case_options, golden_config, reference, relative_error

import musicldm
from weights import InputError


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_equal_to_the_reference(name, params):
    cfg, expected, steps = case_config(name), reference(name), []
    audio = musicldm.generate(cfg, CASES[name]["prompt"], params, **case_options(name),
                              callback=lambda step, timestep, latents: steps.append(latents))
    assert relative_error(musicldm.encode_prompt(cfg, params, CASES[name]["prompt"]), expected["prompt_embeds"]) < 1e-5
    for step, (latents, wanted) in enumerate(zip(steps, expected["step_latents"], strict=True)):
        assert relative_error(latents, wanted) < 2e-5, f"step {step}"
    assert relative_error(musicldm.decode_latents(cfg, params, steps[-1]), expected["mel"]) < 3e-5
    assert audio.dtype == np.float32 and np.abs(audio).max() <= 1
    assert relative_error(audio, expected["audio"]) < 2e-4


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_each_prompt_of_a_batch_equals_itself_alone(params):
    cfg, options = golden_config(), {"num_inference_steps": 3, "audio_length_in_s": 0.44, "eta": 1.0, "seed": 7}
    prompts = CASES["batch"]["prompt"]
    together = musicldm.generate(cfg, prompts, params, **options)
    for prompt, wanted in zip(prompts[1:], together[1:]):
        assert relative_error(musicldm.generate(cfg, prompt, params, **options)[0], wanted) < 2e-4
    assert relative_error(together[0], together[1]) > 1e-2


def test_same_seed_same_music_other_seed_other_music(params):
    cfg, options = golden_config(), {"num_inference_steps": 2, "audio_length_in_s": 0.32, "output_type": "latent"}
    first, second, other = (musicldm.generate(cfg, "a", params, **options, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.1)


def test_seed_noise_is_unit_normal_and_each_step_has_its_own():
    draws = np.stack([musicldm.standard_normal(5, draw, ["a", "b", "a"], (8, 100, 16)) for draw in range(4)])
    assert np.allclose(draws.mean((2, 3, 4)), 0, atol=0.03) and np.allclose(draws.std((2, 3, 4)), 1, atol=0.03)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    different = draws[:, ::2].reshape(8, -1)  # each step, and each repetition of a prompt
    assert np.abs(np.corrcoef(different) - np.eye(8)).max() < 0.05


@pytest.mark.parametrize("seconds, samples", [(0.04, 640), (0.32, 5120), (0.325, 5200), (2.01, 32160), (10.24, 163840)])
def test_every_sample_asked_for_is_there(seconds, samples):
    count, (channels, height, width) = musicldm.clip_size(golden_config(), seconds)
    assert (count, channels, width) == (samples, 8, 4) and (height - 1) * 640 < samples <= height * 640


def test_output_types_and_length(params):
    cfg, options = golden_config(), {"num_inference_steps": 2, "audio_length_in_s": 0.3}
    shapes = [musicldm.generate(cfg, "a", params, output_type=kind, **options).shape for kind in ("latent", "mel", "np")]
    assert shapes == [(1, 8, 8, 4), (1, 32, 16), (1, 4800)]


def test_nothing_passed_in_is_changed(params):
    cfg, before = golden_config(), copy.deepcopy(golden_config())
    tensors = [params["unet"]["conv_in"]["weight"], params["vocoder"]["upsampler.0"]["weight"],
               params["text_encoder"]["text_model"]["embeddings"]["word_embeddings"]["weight"]]
    values, latents = [x.asnumpy().copy() for x in tensors], np.ones((1, 8, 8, 4), np.float32)
    prompts = ["a"]
    options = {"num_inference_steps": 2, "audio_length_in_s": 0.32, "latents": latents, "output_type": "latent"}
    changed = musicldm.generate(cfg, prompts, params, **options, callback=lambda step, timestep, x: x.fill(9))
    assert np.array_equal(changed, musicldm.generate(cfg, prompts, params, **options))
    assert cfg == before and prompts == ["a"] and (latents == 1).all()
    assert all(np.array_equal(x.asnumpy(), value) for x, value in zip(tensors, values))


def test_callback_sees_every_callback_steps_and_may_stop_the_run(params):
    cfg, options, seen = golden_config(), {"num_inference_steps": 5, "audio_length_in_s": 0.32}, []
    musicldm.generate(cfg, "a", params, **options, callback_steps=2, output_type="latent",
                      callback=lambda step, timestep, latents: seen.append((step, timestep)))
    assert seen == [(0, 801), (2, 401), (4, 1)]

    def stop(step, timestep, latents):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        musicldm.generate(cfg, "a", params, **options, callback=stop)


def test_a_result_that_is_not_finite_is_an_error(params):
    broken = {**params, "vocoder": {**params["vocoder"]}}
    bias = params["vocoder"]["conv_post"]["bias"]
    broken["vocoder"]["conv_post"] = {**params["vocoder"]["conv_post"], "bias": bias * float("nan")}
    with pytest.raises(InputError, match="NaN or Inf"):
        musicldm.generate(golden_config(), "a", broken, num_inference_steps=2, audio_length_in_s=0.32)


ONE_PROMPT = (1, 8, 8, 4)


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "prompt is"), (3, {}, "prompt is"), (["a", None], {}, "prompt is"), (b"a", {}, "prompt is"),
    ("\ud800", {}, "surrogate"),
    ("a", {"step": 3}, "unknown option 'step': did you mean 'eta'|unknown option 'step'"),
    ("a", {"guidence_scale": 3}, "did you mean 'guidance_scale'.*audio_length_in_s.*callback"),
    ("a", {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; valid: an integer"),
    ("a", {"num_inference_steps": True}, "num_inference_steps is True; valid: an integer"),
    ("a", {"num_inference_steps": 0}, "valid: 1 to 999"), ("a", {"num_inference_steps": 1000}, "valid: 1 to 999"),
    ("a", {"guidance_scale": float("nan")}, "guidance_scale is nan; valid: a finite number"),
    ("a", {"guidance_scale": -1}, "guidance_scale is -1"), ("a", {"guidance_scale": None}, "guidance_scale is None"),
    ("a", {"eta": 1.5}, "valid: 0 to 1"), ("a", {"seed": -1}, "seed is -1; valid: 0 or more"),
    ("a", {"audio_length_in_s": 0}, "valid: 0.04 to 600"), ("a", {"audio_length_in_s": -1}, "valid: 0.04 to 600"),
    ("a", {"audio_length_in_s": float("nan")}, "finite"), ("a", {"audio_length_in_s": 0.039}, "valid: 0.04 to 600"),
    ("a", {"audio_length_in_s": 601}, "valid: 0.04 to 600"), ("a", {"callback_steps": 0}, "1 or more"),
    ("a", {"callback": 3}, "callback is 3"), ("a", {"output_type": "pt"}, "valid: np, mel, latent"),
    ("a", {"negative_prompt": ["a", "b"]}, "negative_prompt is a list of 2; valid: one text, or one for each of the 1"),
    ("a", {"negative_prompt": 5}, "negative_prompt is 5"), ("a", {"negative_prompt": [None]}, "negative_prompt is"),
    ("a", {"latents": np.zeros((1, 8, 9, 4))}, r"latents has the shape \(1, 8, 9, 4\); valid: \(1, 8, 8, 4\)"),
    ("a", {"latents": np.full(ONE_PROMPT, np.inf)}, "latents holds NaN or Inf"),
    ("a", {"latents": "loud"}, "latents is not an array of numbers"),
    ("a", {"noise": np.zeros((3, *ONE_PROMPT)), "num_inference_steps": 4}, "noise has the shape"),
])
def test_unusable_arguments(prompt, options, message):
    with pytest.raises(InputError, match=message) as error:
        musicldm.generate(golden_config(), prompt, None, **{"audio_length_in_s": 0.32, **options})
    assert "\n" not in str(error.value)


def test_ddim_recovers_the_clean_signal_from_analytic_noise():
    schedule = golden_config()["schedule"]
    alphas, rng = musicldm.alphas_cumprod(schedule).astype(np.float64), np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 50))
    for steps in (1, 6, 7, 10, 999):
        timesteps = musicldm.scheduler_timesteps("ddim", steps, schedule)
        assert len(timesteps) == steps and timesteps[-1] == 1 and timesteps[0] <= 1000
        x = alphas[timesteps[0]] ** 0.5 * clean + (1 - alphas[timesteps[0]]) ** 0.5 * noise
        states = list(musicldm.ddim(lambda x, t: noise, x, timesteps, alphas, final_alpha=1.0))
        left = alphas[0] if steps == 999 else 1.0  # 999 steps are one apart, and end at timestep 0
        assert np.allclose(states[-1], left ** 0.5 * clean + (1 - left) ** 0.5 * noise, atol=1e-9)
        if steps > 1:  # on the way, it is the forward process at the next timestep with the same noise
            t = timesteps[0] - 1000 // steps
            assert np.allclose(states[0], alphas[t] ** 0.5 * clean + (1 - alphas[t]) ** 0.5 * noise, atol=1e-9)


def test_ddim_with_eta_1_has_the_ddpm_posterior():
    """Ho et al., 2020, equations 6 and 7: with eta 1, step 1000 / 1000, the mean and variance of q(x_s | x_t, x_0)."""
    alphas = musicldm.alphas_cumprod(golden_config()["schedule"]).astype(np.float64)
    t, clean, x = 500, 0.3, 1.7
    eps = (x - alphas[t] ** 0.5 * clean) / (1 - alphas[t]) ** 0.5
    low, high = (next(musicldm.ddim(lambda x, t: eps, x, [t] * 1000, alphas, final_alpha=1.0, eta=1.0, noise=iter([z])))
                 for z in (0.0, 1.0))
    beta = 1 - alphas[t] / alphas[t - 1]
    mean = (alphas[t - 1] ** 0.5 * beta * clean + (1 - beta) ** 0.5 * (1 - alphas[t - 1]) * x) / (1 - alphas[t])
    assert np.isclose(low, mean) and np.isclose((high - low) ** 2, (1 - alphas[t - 1]) / (1 - alphas[t]) * beta)
