"""generate() against the reference pipeline's stored results, and what it promises its callers."""
import copy
import inspect
import itertools
import re

import mindspore
import numpy as np
import pytest
import soundfile
from conftest import (CASES, GOLDEN, case_config, case_options, float32_distance, golden_config, reference,
                      relative_error)
from waveforms import waveform

import layers
import musicldm
import weights
from weights import InputError

SHORT = {"audio_length_in_s": 0.32, "num_inference_steps": 2}


def rounding(stage):
    """How far two results of a stage may be from each other that are equal but for rounding.

    Each may be ten times as far from the exact one as the reference's own float32 is from its float64.
    """
    return 2 * 10 * float32_distance(stage)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_equal_to_the_reference(name, params):
    cfg, expected, steps = case_config(name), reference(name), []
    audio = musicldm.generate(cfg, CASES[name]["prompt"], params, **case_options(name),
                              callback=lambda step, timestep, latents: steps.append(latents))
    assert relative_error(musicldm.encode_prompt(cfg, CASES[name]["prompt"], params), expected["prompt_embeds"]) < 1e-5
    for step, (latents, wanted) in enumerate(zip(steps, expected["step_latents"], strict=True)):
        assert relative_error(latents, wanted) < 2e-5, f"step {step}"
    assert relative_error(musicldm.decode_latents(cfg, steps[-1], params), expected["mel"]) < 3e-5
    assert audio.dtype == np.float32 and np.abs(audio).max() <= 1
    assert relative_error(audio, expected["audio"]) < 2e-4


@pytest.mark.parametrize("dtype, latents_within, audio_within", [("float32", 2e-5, 2e-4), ("float16", 1e-2, None)])
def test_the_way_of_other_devices(dtype, latents_within, audio_within, ascend):
    """Native convolutions, weights as they are, latents left on the device: what Ascend gets, run here on the CPU."""
    cfg, expected = case_config("guided"), reference("guided")
    cfg["dtype"] = dtype
    for part in (cfg["text_encoder"]["text_config"], cfg["unet"], cfg["vae"], cfg["vocoder"]):
        part["compiled_for"] = "this test"  # MindSpore takes a graph again that it has for the same arguments
    params, run = weights.load_params(cfg), {**case_options("guided"), "prompt": CASES["guided"]["prompt"]}
    latents = musicldm.generate(cfg, params=params, **run, output_type="latent")
    assert relative_error(latents, expected["step_latents"][-1]) < latents_within
    if audio_within:
        mel = musicldm.decode_latents(cfg, latents, params)
        assert relative_error(mel, expected["mel"]) < 3e-5
        audio = musicldm.vocode(cfg, mel, params)[:, :expected["audio"].shape[1]]
        assert relative_error(audio, expected["audio"]) < audio_within


TAKES = CASES["batch"]["prompt"][::2]  # the other one's audio would be ranked the same


@pytest.fixture(scope="module")
def alone(params):
    """Latents and waveform of both prompts with the seeds 0 to 3: {(prompt, seed): [latents, waveform]}."""
    return {(prompt, seed): [musicldm.generate(golden_config(), prompt, params, **SHORT, eta=1.0, seed=seed,
                                               output_type=kind)[0] for kind in ("latent", "np")]
            for prompt in TAKES for seed in range(4)}


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_takes_count_up_the_seed_and_each_equals_itself_alone(params, alone):
    together = musicldm.generate(golden_config(), TAKES, params, **SHORT, eta=1.0, seed=2, num_waveforms_per_prompt=2,
                                 output_type="latent")
    for latents, run in zip(together, itertools.product(TAKES, (2, 3)), strict=True):
        assert relative_error(latents, alone[run][0]) < 2e-5
    assert all(relative_error(x, y) > 1e-2 for x, y in itertools.combinations(together, 2))


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_takes_are_ranked_within_their_prompt(params, alone):
    cfg, seeds = golden_config(), [1, 0, 2, 3]
    ranked = musicldm.generate(cfg, TAKES, params, **SHORT, eta=1.0, seed=seeds, num_waveforms_per_prompt=2)
    wanted = []
    for prompt, own in zip(TAKES, (seeds[:2], seeds[2:])):
        scores = musicldm.score(cfg, prompt, [alone[prompt, seed][1] for seed in own], params)[0]
        assert abs(scores[0] - scores[1]) > 1e-3  # rounding cannot swap them
        wanted += [(prompt, own[i]) for i in np.argsort(-scores)]
    assert [seed for _, seed in wanted] == [0, 1, 2, 3]
    for audio, run in zip(ranked, wanted, strict=True):
        assert relative_error(audio, alone[run][1]) < 2e-4


def test_rank_compares_the_takes_of_one_prompt_alone(monkeypatch):
    angles = np.array([50, 10, 20, 5, 95, 40])  # the second prompt, at 90 degrees, is nearer to a take of the first
    heard = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    monkeypatch.setattr(musicldm, "encode_audio", lambda cfg, params, audio, rate: heard)
    order, scores = musicldm.rank(golden_config(), np.eye(2), np.zeros((6, 9)), None)
    assert order.tolist() == [1, 2, 0, 4, 5, 3]
    assert np.allclose(scores, np.cos(np.radians([10, 20, 50, 5, 50, 85])))


@pytest.mark.parametrize("seed, prompts, takes, seeds", [
    (5, ["a", "b"], 1, [5, 5]), (5, ["a", "b"], 2, [5, 6, 5, 6]), (0, ["a", "b", "a"], 2, [0, 1, 0, 1, 2, 3]),
    ([3, 1, 3, 1], ["a", "a"], 2, [3, 1, 3, 1]),
])
def test_seeds_of_takes(seed, prompts, takes, seeds):
    assert musicldm.take_seeds(seed, prompts, takes) == seeds


def test_same_seed_same_music_other_seed_other_music(params):
    cfg, options = golden_config(), {"num_inference_steps": 2, "audio_length_in_s": 0.32, "output_type": "latent"}
    first, second, other = (musicldm.generate(cfg, "a", params, **options, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.allclose(first, other, atol=0.1)


def test_seed_noise_is_unit_normal_and_each_step_has_its_own():
    draws = np.stack([musicldm.standard_normal([5, 6, 5], draw, (8, 100, 16)) for draw in range(4)])
    assert np.allclose(draws.mean((2, 3, 4)), 0, atol=0.03) and np.allclose(draws.std((2, 3, 4)), 1, atol=0.03)
    assert np.array_equal(draws[:, 0], draws[:, 2])
    different = draws[:, :2].reshape(8, -1)  # each step, and each seed
    assert np.abs(np.corrcoef(different) - np.eye(8)).max() < 0.05


@pytest.mark.parametrize("seconds, samples", [(0.04, 640), (0.32, 5120), (0.325, 5200), (2.01, 32160), (10.24, 163840)])
def test_every_sample_asked_for_is_there(seconds, samples):
    count, (channels, height, width) = musicldm.clip_size(golden_config(), seconds)
    assert (count, channels, width) == (samples, 8, 4) and (height - 1) * 640 < samples <= height * 640


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_what_stands_beside_a_text_does_not_change_its_vector(params):
    texts = ["a slow blues", "", "a", "drums " * 20]
    together = musicldm.encode_prompt(golden_config(), [*texts, "a slow blues"], params)
    wanted = np.concatenate([musicldm.encode_prompt(golden_config(), text, params) for text in [*texts, texts[0]]])
    assert np.array_equal(together, wanted) and len(np.unique(together, axis=0)) == len(texts)


def test_vectors_stand_for_the_texts_they_were_made_of(params):
    cfg, (prompt, negative), options = golden_config(), ("a slow blues", "drums"), {**SHORT, "output_type": "latent"}
    vectors = musicldm.encode_prompt(cfg, [prompt, negative], params)
    toward, away = {"prompt_embeds": vectors[:1]}, {"negative_prompt_embeds": vectors[1:].tolist()}
    wanted = musicldm.generate(cfg, prompt, params, negative_prompt=negative, **options)
    for text, others in ((prompt, away), (None, {**toward, "negative_prompt": negative}), (None, {**toward, **away})):
        assert np.array_equal(musicldm.generate(cfg, text, params, **others, **options), wanted)
    assert not np.allclose(wanted, musicldm.generate(cfg, None, params, **toward, **options), atol=1e-3)


@pytest.fixture
def sound(tmp_path):
    """The same sound in every form that audio_prompt takes, and its mono samples: 1 s at 16 kHz, and at 44.1 kHz."""
    mono = {rate: np.round(waveform(1, rate).astype(np.float64) * 2 ** 15) / 2 ** 15 for rate in (16000, 44100)}
    stereo = np.stack([mono[44100] + 0.125, mono[44100] - 0.125], axis=1)
    for name, samples, rate in (("a.wav", mono[16000], 16000), ("a.flac", mono[16000], 16000),
                                ("b.wav", stereo, 44100)):
        soundfile.write(tmp_path / name, samples, rate)
    forms = {16000: [tmp_path / "a.wav", str(tmp_path / "a.flac"), mono[16000], (mono[16000], 16000)],
             44100: [tmp_path / "b.wav", soundfile.read(tmp_path / "b.wav"), (stereo.astype(np.float32), 44100)]}
    return mono, forms


def test_audio_prompts(sound, params):
    cfg, text = golden_config(), musicldm.encode_prompt(golden_config(), ["a", "drums"], params)
    for rate, mono in sound[0].items():
        heard = musicldm.encode_audio(cfg, mono, params, rate)
        for form in sound[1][rate]:
            audio, own_rate = musicldm.read_audio(cfg, form)
            read = musicldm.encode_audio(cfg, audio, params, own_rate)
            assert np.array_equal(musicldm.prompt_vectors(cfg, None, params, read), heard)
    assert np.abs(heard - text).max() > 0.1
    for weight, wanted in ((0, text), (1, heard), (0.5, text + heard), (0.2, 4 * text + heard)):
        mixed = musicldm.prompt_vectors(cfg, ["a", "drums"], params, heard, weight)
        wanted = np.broadcast_to(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), mixed.shape)
        assert relative_error(mixed, wanted) < 1e-6
    options = {**SHORT, "output_type": "latent"}
    for prompt, weight in ((None, 0.5), ("a", 0.5), ("a", 0.2)):
        vector = musicldm.prompt_vectors(cfg, prompt, params, heard, weight)
        assert np.array_equal(
            musicldm.generate(cfg, prompt, params, audio_prompt=(mono, rate), audio_prompt_weight=weight, **options),
            musicldm.generate(cfg, None, params, prompt_embeds=vector, **options))


def test_interpolation_goes_along_the_great_circle():
    start, other = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    for end in (other, start + other / 100):
        start, end = start / np.linalg.norm(start), end / np.linalg.norm(end)
        way = musicldm.interpolate(start, end, 5)
        assert way.dtype == np.float32 and np.allclose(way[[0, -1]], [start, end], atol=1e-6)
        assert np.allclose(np.linalg.norm(way, axis=1), 1, atol=1e-6)
        assert np.allclose(np.linalg.norm(np.diff(way, axis=0), axis=1), np.linalg.norm(way[1] - way[0]), rtol=1e-3)
        assert np.allclose(way[2] * np.linalg.norm(start + end), start + end, atol=1e-5)  # halfway is the mean
    assert np.array_equal(musicldm.interpolate(start, start, 3), [start] * 3)
    assert np.array_equal(musicldm.interpolate(start, end, 1), [start])


@pytest.mark.parametrize("seconds, samples", [(0.04, 2560), (0.39, 5120), (0.41, 7680), (10.24, 163840), (60, 960000)])
def test_loops_are_rounded_to_the_coarsest_level(seconds, samples):
    assert musicldm.clip_size(golden_config(), seconds, loop=True) == (samples, (8, samples // 640, 4))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_shifted_loop_is_the_same_loop_later(eta, params):
    cfg, rng, results = golden_config("sampling.loop=true"), np.random.default_rng(0), []
    latents, noise = rng.standard_normal((1, 8, 24, 4)), rng.standard_normal((2, 1, 8, 24, 4))
    for shift in (0, 8, 16):  # the UNet's coarsest level has a row for 4 of the latents, a latent row 640 samples
        steps = []
        audio = musicldm.generate(cfg, "a", params, audio_length_in_s=0.9, num_inference_steps=2, eta=eta,
                                  latents=np.roll(latents, shift, 2), noise=np.roll(noise, shift, 3),
                                  callback=lambda step, timestep, x: steps.append(x))
        results.append((np.roll(steps[-1], -shift, 2), np.roll(audio, -640 * shift, 1)))
    for shifted in results[1:]:
        assert relative_error(shifted[0], results[0][0]) < rounding("step_latents")
        assert relative_error(shifted[1], results[0][1]) < rounding("audio")
    assert audio.shape == (1, 24 * 640)


def test_a_loop_three_times_over_is_the_loop_of_three(params):
    """Attention has no positions, and convolutions see the same beyond the end as after it."""
    latents, options = np.random.default_rng(0).standard_normal((1, 8, 8, 4)), {"num_inference_steps": 2, "loop": True}
    once, thrice = (musicldm.generate(golden_config(), "a", params, **options, audio_length_in_s=0.32 * times,
                                      latents=np.tile(latents, (1, 1, times, 1))) for times in (1, 3))
    assert relative_error(thrice, np.tile(once, 3)) < rounding("audio")


def test_a_loop_of_one_moment_never_changes_not_even_where_it_joins(params):
    cfg, latents = golden_config(), np.random.default_rng(0).standard_normal((1, 8, 1, 4)).repeat(24, axis=2)
    mel = musicldm.decode_latents(cfg, latents, params, loop=True)
    assert relative_error(mel, np.tile(mel[:, 48:49], (96, 1))) < rounding("mel")
    frames = musicldm.vocode(cfg, mel, params, loop=True).reshape(96, 160)
    assert relative_error(frames, np.tile(frames[48], (96, 1))) < rounding("audio")
    assert np.abs(np.diff(frames)).max() > 0.1
    unlooped = musicldm.vocode(cfg, np.ones((1, 32, 16), np.float32), params)
    frames = unlooped[0, :32 * 160].reshape(32, 160)
    assert np.abs(frames[0] - frames[16]).max() > 1e-2


def test_a_prepared_unet_gives_the_same_and_is_not_saved(params, tmp_path):
    cfg, options = golden_config(), {"num_inference_steps": 2, "audio_length_in_s": 0.32, "output_type": "latent"}
    prepared = {**params, "unet": musicldm.prepared(cfg, params["unet"])}
    twice = {**params, "unet": musicldm.prepared(cfg, prepared["unet"])}
    results = [musicldm.generate(cfg, "a", tree, **options) for tree in (params, prepared, twice)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    wrong = r"wrong shape: .*unet.conv_in.weight \(\d+, 12, 8\) instead of \(12, 8, 3, 3\)"
    with pytest.raises(InputError, match=wrong):
        weights.save_params(cfg, prepared, tmp_path / "saved")


def test_vocoding_by_windows_equals_the_whole(params, monkeypatch):
    cfg, mel = golden_config(), np.random.default_rng(0).standard_normal((2, 32, 16)).astype(np.float32)
    wholes = [musicldm.vocode(cfg, mel, params, loop) for loop in (False, True)]
    assert [whole.shape for whole in wholes] == [(2, 32 * 160 + 32), (2, 32 * 160)]
    shifted = musicldm.vocode(cfg, np.roll(mel, 7, 1), params, loop=True)
    assert relative_error(np.roll(shifted, -7 * 160, 1), wholes[1]) < rounding("audio")
    for loop in (False, True):  # two windows, and six
        assert relative_error(musicldm.vocode(cfg, mel, params, loop, window=31), wholes[loop]) < rounding("audio")
    monkeypatch.setattr(musicldm, "hifigan_reach", lambda vocoder: 7)
    assert relative_error(musicldm.vocode(cfg, mel, params, window=31), wholes[0]) > 1e-3


def test_no_sample_depends_on_frames_out_of_reach(params):
    cfg, mel = golden_config(), np.random.default_rng(0).standard_normal((1, 32, 16)).astype(np.float32)
    changed = mel.copy()
    changed[:, 16] += 500
    change = np.abs(musicldm.vocode(cfg, changed, params)[0] - musicldm.vocode(cfg, mel, params)[0])
    # what shares a tile with a changed frame may be rounded otherwise
    frames = np.flatnonzero(change > rounding("audio")) // 160
    assert 8 < max(16 - frames[0], frames[-1] - 16) <= musicldm.hifigan_reach(cfg["vocoder"]) <= 12


def test_output_types_and_length(params):
    cfg, options = golden_config(), {"num_inference_steps": 2, "audio_length_in_s": 0.3}
    shapes = [musicldm.generate(cfg, "a", params, output_type=kind, **options).shape
              for kind in ("latent", "mel", "np")]
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
    with pytest.raises(weights.NotFinite, match="NaN or Inf in the audio"):
        musicldm.generate(golden_config(), "a", broken, **SHORT)


@pytest.mark.parametrize("device, broken, named, called", [
    ("CPU", 1, 1, []), ("CPU", 3, 3, [0]), ("Ascend", 2, 4, [0]), ("Ascend", 5, 5, [0, 3])])
def test_a_step_that_goes_wrong_is_named(device, broken, named, called, params, monkeypatch):
    """On a CPU at once; elsewhere when the latents are read, every third step here and at the end."""
    calls, steps, guided_prediction = itertools.count(1), [], musicldm.guided_prediction
    params = {**params, "unet": musicldm.prepared(golden_config(), params["unet"])}
    monkeypatch.setattr(weights, "use_device", lambda cfg: device)
    monkeypatch.setattr(weights, "card", lambda cfg: None)
    monkeypatch.setattr(musicldm, "guided_prediction", lambda *given: guided_prediction(*given) * (
        float("nan") if next(calls) == broken else 1.0))
    with pytest.raises(weights.NotFinite, match=f"NaN or Inf in the latents after step {named} of 5"):
        musicldm.generate(golden_config(), "a", params, num_inference_steps=5, audio_length_in_s=0.32,
                          callback=lambda step, timestep, latents: steps.append(step), callback_steps=3)
    assert steps == called


def test_a_clip_beyond_memory_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(weights, "load_params", None)
    with pytest.raises(weights.OutOfMemory, match="64 at once with latents of 15000 x 16 .*; valid: a shorter") as error:
        musicldm.generate(musicldm.load_config(weights="random"), ["a"] * 64, audio_length_in_s=600)
    estimate, free = map(float, re.findall(r"\d+\.\d", str(error.value)))
    assert estimate > max(free, 64 * 2 * 15000 * 16 * 128 * 4 / 1e9)  # one activation of the UNet's first level


def test_two_configurations_share_arrays(params):
    bias = params["unet"]["conv_out"]["bias"]
    other = {**params, "unet": {**params["unet"], "conv_out": {**params["unet"]["conv_out"], "bias": bias + 1}}}
    mixed, cfg = {**params, "unet": other["unet"]}, golden_config()
    first, changed, again = (musicldm.generate(cfg, "a", tree, **SHORT, output_type="latent", guidance_scale=2.0)
                             for tree in (params, mixed, params))
    assert mixed["vae"] is params["vae"] and np.array_equal(first, again)
    assert not np.allclose(first, changed, atol=0.1)


def test_the_signature_holds_the_configurations_options():
    parameters = inspect.signature(musicldm.generate).parameters.values()
    named = {parameter.name: parameter.default for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
    assert set(golden_config()["sampling"]) < set(named) and set(named.values()) == {None}


@pytest.mark.parametrize("name, places", [
    ("generate", "prompt, params"), ("encode_prompt", "prompts, params"), ("encode_audio", "audio, params, sampling_rate"),
    ("prompt_vectors", "prompts, params, audio_embeds, weight"), ("score", "prompts, audio, params, sampling_rate"),
    ("encode_latents", "audio, params, sampling_rate"), ("decode_latents", "latents, params, loop"),
    ("vocode", "mel, params, loop, window")])
def test_parameters_in_the_second_place_are_refused(name, places, params):
    with pytest.raises(InputError) as error:
        getattr(musicldm, name)(golden_config(), params, "a")
    assert str(error.value) == f"{name} got the parameters second; valid: {name}(cfg, {places})"


def test_numbers_of_numpy_are_numbers(params):
    options = {"audio_length_in_s": 0.96, "num_inference_steps": 2, "guidance_scale": 2.5, "loop": True, "seed": 7}
    kinds = {int: np.int64, float: np.float32, bool: np.bool_}
    options["audio_length_in_s"] = float(np.float32(0.96))
    same = {name: kinds[type(value)](value) for name, value in options.items()}
    assert np.array_equal(musicldm.generate(golden_config(), "a", params, **same, output_type=np.str_("latent")),
                          musicldm.generate(golden_config(), "a", params, **options, output_type="latent"))


ONE_PROMPT, UNIT = (1, 8, 8, 4), np.eye(1, 24)


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "prompt is"), (3, {}, "prompt is"), (["a", None], {}, "prompt is"), (b"a", {}, "prompt is"),
    ("\ud800", {}, "surrogate"), ("caf\udcc3\udca9", {}, "is not Unicode text; valid .*: a UTF-8 locale"),
    ("a", {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; valid: an integer"),
    ("a", {"num_inference_steps": True}, "num_inference_steps is True; valid: an integer"),
    ("a", {"num_inference_steps": 0}, "valid: 1 to 999"), ("a", {"num_inference_steps": 1000}, "valid: 1 to 999"),
    ("a", {"guidance_scale": float("nan")}, "guidance_scale is nan; valid: a finite number"),
    ("a", {"guidance_scale": -1}, "guidance_scale is -1"),
    ("a", {"eta": 1.5}, "valid: 0 to 1"), ("a", {"seed": -1}, "seed is -1; valid: 0 or more"),
    ("a", {"audio_length_in_s": 0}, "valid: 0.04 to 600"), ("a", {"audio_length_in_s": -1}, "valid: 0.04 to 600"),
    ("a", {"audio_length_in_s": float("nan")}, "finite"), ("a", {"audio_length_in_s": 0.039}, "valid: 0.04 to 600"),
    ("a", {"audio_length_in_s": 601}, "valid: 0.04 to 600"), ("a", {"callback_steps": 0}, "1 or more"),
    ("a", {"callback": 3}, "callback is 3"), ("a", {"output_type": "pt"}, "valid: np, mel, latent"),
    ("a", {"negative_prompt": ["a", "b"]}, "negative_prompt is a list of 2; valid: one, or a list of 1"),
    ("a", {"negative_prompt": 5}, "negative_prompt is 5"), ("a", {"negative_prompt": [None]}, "negative_prompt is"),
    ("a", {"latents": np.zeros((1, 8, 9, 4))}, r"latents has the shape \(1, 8, 9, 4\); valid: \(1, 8, 8, 4\)"),
    ("a", {"latents": np.full(ONE_PROMPT, np.inf)}, "latents holds NaN or Inf"),
    ("a", {"latents": "loud"}, "latents is not an array of numbers"),
    ("a", {"noise": np.zeros((3, *ONE_PROMPT)), "num_inference_steps": 4}, "noise has the shape"),
    ("a", {"latents": np.zeros(ONE_PROMPT), "num_waveforms_per_prompt": 2}, r"\(1, 8, 8, 4\); valid: \(2, 8, 8, 4\)"),
    ("a", {"num_waveforms_per_prompt": 0}, "per_prompt is 0; valid: 1 to 1000"),
    ("a", {"num_waveforms_per_prompt": 1.5}, "per_prompt is 1.5; valid: an integer"),
    ("a", {"seed": [1, 2]}, "seed is a list of 2; valid: one, or a list of 1"), ("a", {"seed": []}, "a list of 0"),
    (["a", "b"], {"seed": [1, 2, 3], "num_waveforms_per_prompt": 2}, "seed is a list of 3; valid: one, or a list of 4"),
    ("a", {"seed": [-1]}, "seed is -1"), ("a", {"loop": 1}, "loop is 1; valid: true or false"),
    (None, {}, "prompt is None; .*audio_prompt or prompt_embeds"),
    (np.zeros(3), {}, "prompt is array"), ({"a": 1}, {}, "prompt is a mapping of a"),
    ("a", {"negative_prompt": "\ud800"}, "^negative_prompt .* surrogate"), ("a", {"seed": -10 ** 5000}, "a value of the"),
    ("a", {"latents": np.zeros(ONE_PROMPT, complex)}, "latents is not an array of numbers"),
    ("a", {"init_audio": np.ones(5120), "repaint": np.zeros((2, 3))}, "repaint is .*; valid: a list of parts"),
    ("a", {"audio_prompt": ([[0.1], [0.2, 0.3]], 16000)}, "audio_prompt: audio"),
    ("a", {"audio_prompt": np.zeros((5, 0))}, r"audio_prompt has the shape \(5, 0\)"),
    ("a", {"audio_prompt": "\udc80"}, "audio_prompt: cannot read"), ("a", {"audio_prompt": "x\ny"}, "no such file"),
    (None, {"prompt_embeds": 2 * UNIT}, "^prompt_embeds has a row of length 2; valid: rows of length 1"),
    (None, {"prompt_embeds": np.eye(1, 23)}, r"^prompt_embeds has the shape \(1, 23\); valid: \(n, 24\)"),
    (None, {"prompt_embeds": UNIT[0]}, r"the shape \(24,\)"),
    (None, {"prompt_embeds": UNIT[:0]}, r"the shape \(0, 24\)"),
    (None, {"prompt_embeds": UNIT * np.nan}, "^prompt_embeds holds NaN or Inf"),
    ("a", {"prompt_embeds": UNIT}, "prompt_embeds stands beside a prompt"),
    (None, {"prompt_embeds": UNIT, "audio_prompt": np.ones(9)}, "stands beside a prompt or an audio_prompt"),
    ("a", {"negative_prompt_embeds": 0.9 * UNIT}, "^negative_prompt_embeds has a row of length 0.9"),
    ("a", {"negative_prompt_embeds": np.eye(2, 24)}, r"has the shape \(2, 24\); valid: \(1, 24\)"),
    ("a", {"negative_prompt_embeds": UNIT, "negative_prompt": ""}, "stands beside a negative_prompt"),
    (None, {"audio_prompt": "no.wav"}, "audio_prompt: cannot read 'no.wav': there is no such file"),
    (10001 * "a", {}, "has 10001 characters; valid: up to 10000"), ("a", {"latents": 10 ** 400}, "latents is not an arr"),
    ("a", {"guidance_scale": 1e20}, "valid: 0 to 1000"),
    (None, {"audio_prompt": __file__}, "audio_prompt: cannot read .*test_pipeline.py"),
    ("a", {"audio_prompt": GOLDEN}, "audio_prompt: cannot read .*golden"),
    ("a", {"audio_prompt": np.full(9, np.nan)}, "audio holds NaN or Inf"),
    ("a", {"audio_prompt": np.zeros(0)}, r"audio has the shape \(0,\)"),
    ("a", {"audio_prompt": (np.ones(9, np.int16), 16000)}, "int16; valid: floating-point"),
    ("a", {"audio_prompt": (np.ones(9), 44100.0)}, "sampling_rate is 44100.0; valid: an integer"),
    ("a", {"audio_prompt": np.ones((1, 5120))}, r"audio_prompt has the shape \(1, 5120\); valid: \(samples,\)"),
    ("a", {"audio_prompt": np.ones(9), "audio_prompt_weight": 1.1}, "audio_prompt_weight is 1.1; valid: 0 to 1"),
])
def test_unusable_arguments(prompt, options, message, monkeypatch):
    monkeypatch.setattr(weights, "load_params", None)  # it is too early to load any
    with pytest.raises(InputError, match=message) as error:
        musicldm.generate(golden_config(), prompt, None, **{"audio_length_in_s": 0.32, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cfg, params, message", [
    (None, None, "cfg is None"), ("config.yaml", None, "cfg is 'config.yaml'; valid: a dict with sampling, "),
    ({"unet": {}}, None, "cfg is a mapping of unet"), (golden_config(), {"unet": {}}, "params is a mapping of unet; valid"),
    (golden_config(), "demo", "params is 'demo'; valid: a dict with text_encoder, unet, vae, vocoder"),
    ({name: x for name, x in golden_config().items() if name != "dtype"}, None, "cfg lacks dtype; valid: what load"),
    ({**golden_config(), "sampling": {}}, None, "cfg lacks sampling.audio_length_in_s, "),
    ({**golden_config(), "dtype": "float64"}, None, "dtype is 'float64'; valid: float32"),
    ({**golden_config(), "unet": {**golden_config()["unet"], "norm_num_groups": 7}}, None, "norm_num_groups is 7"),
    (golden_config("vocoder.upsample_initial_channel=64"), weights.random_params(golden_config(), 0),
     r"params: .* of the wrong shape: vocoder.conv_pre.weight \(.*\) instead of"),
    (golden_config(), {name: {} for name in weights.MODELS}, "params: .* missing"),
    ({**golden_config(), "dtype": "float16"}, weights.random_params(golden_config(), 0),
     r"params hold Float32 in text_encoder.logit_scale_a, and cfg computes in Float16; valid: of one dtype")])
def test_what_is_no_configuration_and_no_parameters(cfg, params, message):
    with pytest.raises(InputError, match=message):
        musicldm.generate(cfg, "a", params)


def test_ddim_recovers_the_clean_signal_from_analytic_noise():
    schedule = golden_config()["schedule"]
    alphas, rng = musicldm.alphas_cumprod(schedule).astype(np.float64), np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 50))
    for steps in (1, 6, 7, 10, 999):
        timesteps = musicldm.scheduler_timesteps("ddim", steps, schedule)
        assert len(timesteps) == steps and timesteps[-1] == 1 and timesteps[0] <= 1000
        x = alphas[timesteps[0]] ** 0.5 * clean + (1 - alphas[timesteps[0]]) ** 0.5 * noise
        states = list(musicldm.ddim(lambda x, t: noise, x, timesteps, alphas, steps=steps, final_alpha=1.0))
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
    low, high = (next(musicldm.ddim(lambda x, t: eps, x, [t], alphas, steps=1000, final_alpha=1.0, eta=1.0,
                                    noise=iter([z]))) for z in (0.0, 1.0))
    beta = 1 - alphas[t] / alphas[t - 1]
    mean = (alphas[t - 1] ** 0.5 * beta * clean + (1 - beta) ** 0.5 * (1 - alphas[t - 1]) * x) / (1 - alphas[t])
    assert np.isclose(low, mean) and np.isclose((high - low) ** 2, (1 - alphas[t - 1]) / (1 - alphas[t]) * beta)
