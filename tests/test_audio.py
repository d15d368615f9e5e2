"""CLAP's audio tower, its features and the resampler: stored reference arrays, analytic answers, refused input."""
import json
import shutil

import numpy as np
import pytest
from conftest import CASES, GOLDEN, golden_config, relative_error
from mindspore import Tensor
from waveforms import SECONDS, waveform

import layers
import musicldm
from weights import InputError


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "audio.npz") as file:
        return dict(file)


def test_features_equal_the_reference(expected):
    features = musicldm.clap_features(golden_config(), [waveform(seconds, 48000) for seconds in SECONDS])
    assert features.shape == (len(SECONDS), 1, 1001, 64) and features.dtype == np.float32
    assert relative_error(features[:, :, ::25], expected["features"]) < 1e-6


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_vectors_and_scores_equal_the_reference(expected, params):
    audio, prompts = [waveform(seconds, 48000) for seconds in SECONDS], CASES["batch"]["prompt"]
    vectors = musicldm.encode_audio(golden_config(), audio, params, 48000)
    assert relative_error(vectors, expected["audio_embeds"]) < expected["from_float64"] and vectors.dtype == np.float32
    scores = musicldm.score(golden_config(), prompts, audio, params, 48000)
    assert relative_error(scores, expected["cosines"]) < 2e-5 and scores.dtype == np.float32


def test_forms_and_lengths_of_audio(params):
    cfg, audio = golden_config(), np.stack([waveform(12, 16000), waveform(12, 16000)[::-1]])
    vectors = musicldm.encode_audio(cfg, audio, params)
    assert vectors.shape == (2, 24) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.array_equal(vectors[1:], musicldm.encode_audio(cfg, audio[1], params))
    assert np.array_equal(vectors, musicldm.encode_audio(cfg, [audio[0], audio[1].astype(np.float64)], params))
    heard = musicldm.resample(audio, 16000, 48000)[:, :480000]
    assert relative_error(musicldm.encode_audio(cfg, heard, params, 48000), vectors) < 1e-6
    tiled = np.tile(waveform(2.5, 48000), 4)  # what is repeated and what is already there sound the same
    assert np.array_equal(*(musicldm.encode_audio(cfg, x, params, 48000) for x in (tiled, tiled[:120000])))


RATES = [(16000, 48000), (48000, 16000), (44100, 48000), (48000, 44100), (22050, 16000), (11, 7)]


@pytest.mark.parametrize("rate, new_rate", RATES)
def test_resampling_keeps_a_sine_of_the_pass_band(rate, new_rate):
    samples, nyquist = 4000, min(rate, new_rate) / 2
    for frequency in np.array([0.01, 0.5, 0.91]) * nyquist:
        y = musicldm.resample(np.sin(2 * np.pi * frequency / rate * np.arange(samples)), rate, new_rate)
        assert y.shape == (-(-samples * new_rate // rate),) and y.dtype == np.float64
        wanted = np.sin(2 * np.pi * frequency / new_rate * np.arange(len(y)))
        middle = slice(len(y) // 4, -len(y) // 4)  # silence begins at the ends
        assert np.abs(y - wanted)[middle].max() < 2e-6


@pytest.mark.parametrize("rate, new_rate", [rates for rates in RATES if rates[0] > rates[1]])
def test_resampling_silences_what_the_new_rate_cannot_hold(rate, new_rate):
    for frequency in (new_rate / 2, 0.51 * new_rate, 0.6 * new_rate, 0.499 * rate):
        if frequency < rate / 2:
            y = musicldm.resample(np.cos(2 * np.pi * frequency / rate * np.arange(4000)), rate, new_rate)
            assert np.abs(y[len(y) // 4:-len(y) // 4]).max() < 1e-6  # 120 dB


def test_mel_bands_are_triangles_of_area_1_that_share_edges():
    extractor = golden_config()["feature_extractor"]
    filters = musicldm.mel_filters(48000, 2 ** 18, extractor["frequency_min"], extractor["frequency_max"],
                                   extractor["feature_size"])
    hertz = np.arange(len(filters)) * 48000 / 2 ** 18
    assert np.allclose(filters.sum(0) * hertz[1], 1, atol=1e-3)
    assert hertz[filters.any(1)][[0, -1]] == pytest.approx([50, 14000], abs=0.2)
    centres = hertz[filters.argmax(0)]
    between = (hertz > centres[0]) & (hertz < centres[-1])
    assert np.allclose((filters / filters.max(0)).sum(1)[between], 1, atol=0.02)
    linear = centres < 1000  # Slaney's scale is linear below 1000 Hz, and geometric above
    assert np.ptp(np.diff(centres[linear])) < 0.4 and np.ptp(np.diff(np.log(centres[~linear]))) < 1e-3


def test_stretching_keeps_the_ends_and_constants():
    x = np.random.default_rng(0).standard_normal((2, 7, 3))
    assert np.allclose(musicldm.stretch(x, 7), x, atol=1e-12)
    assert np.allclose(musicldm.stretch(x, 11)[:, [0, 5, 10]][:, ::2], x[:, [0, -1]], atol=1e-5)
    assert np.allclose(musicldm.stretch(np.full((1, 1001, 2), -3.0), 1024), -3)


def test_odd_rates_take_the_nearest_ratio():
    """One that is near: a filter for 191,999 Hz would have hundreds of thousands of taps."""
    t = np.arange(191999) / 191999
    odd = musicldm.resample(np.sin(2 * np.pi * 440 * t), 191999, 16000)
    assert len(odd) == 16000 and np.allclose(odd[200:-200], np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)[200:-200],
                                             atol=0.02)


@pytest.mark.parametrize("size, window, shift", [(16, 4, 2), (16, 8, 4), (8, 8, 0), (12, 4, 0), (10, 5, 2)])
def test_windows(size, window, shift):
    rows, inverse, places, bias = (x.asnumpy() for x in layers.windows(size, window, shift))
    image = np.roll(np.arange(size * size).reshape(size, size), (-shift, -shift), (0, 1))
    wanted = [image[y:y + window, x:x + window].ravel() for y in range(0, size, window) for x in range(0, size, window)]
    assert np.array_equal(rows.reshape(-1, window ** 2), wanted)
    assert np.array_equal(rows[inverse], np.arange(size * size))
    y, x = np.divmod(np.array(wanted), size)
    near = (np.abs(y[:, :, None] - y[:, None]) < window) & (np.abs(x[:, :, None] - x[:, None]) < window)
    assert np.array_equal(bias[:, 0], np.where(near, 0, -100))
    offsets = [np.broadcast_to(place[0, :, None] - place[0], (window ** 2,) * 2) + window - 1 for place in (y, x)]
    assert np.array_equal(places, np.ravel_multi_index(offsets, (2 * window - 1,) * 2).ravel())


def test_patch_merging():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 36, 3)).astype(np.float32), rng.standard_normal((6, 12)).astype(np.float32)
    p = {"norm": {"weight": Tensor(np.ones(12, np.float32)), "bias": Tensor(np.zeros(12, np.float32))},
         "reduction": {"weight": Tensor(weight)}}
    image = x.reshape(2, 6, 6, 3).astype(np.float64)
    four = np.concatenate([image[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1).reshape(2, 9, 12)
    four = (four - four.mean(-1, keepdims=True)) / np.sqrt(four.var(-1, keepdims=True) + 1e-5)
    y = layers.patch_merging(Tensor(x.reshape(2, 6, 6, 3)), p).asnumpy()
    assert relative_error(y.reshape(2, 9, 6), four @ weight.T) < 2e-6


@pytest.mark.parametrize("audio, rate, message", [
    (np.zeros(0), 16000, r"audio has the shape \(0,\)"), ([], 16000, r"audio has the shape \(0,\)"),
    ([np.ones(5), np.ones(0)], 16000, r"audio has the shape \(0,\)"),
    (np.ones((1, 2, 3)), 16000, r"audio has the shape \(1, 2, 3\)"), (0.5, 16000, r"audio has the shape \(\)"),
    (np.ones(5, np.int16), 16000, "int16; valid: floating-point samples"),
    (None, 16000, "object; valid: floating-point"), ("loud", 16000, "has the shape"),
    ([[1.0], [[1.0], 2.0]], 16000, "audio is not an array"),
    ([np.ones(5), np.array([1, np.nan])], 16000, "audio holds NaN or Inf"), (np.full(5, np.inf), 16000, "NaN or Inf"),
    (np.ones(5), 16000.5, "sampling_rate is 16000.5; valid: an integer from 1000 to 192000"),
    (np.ones(5), 0, "sampling_rate is 0"), (np.ones(5), True, "sampling_rate is True"),
])
def test_unusable_audio(audio, rate, message):
    with pytest.raises(InputError, match=message) as error:
        musicldm.score(golden_config(), "a", audio, None, rate)
    assert "\n" not in str(error.value)


def test_unusable_prompts_are_refused_before_the_audio():
    with pytest.raises(InputError, match="prompt is"):
        musicldm.score(golden_config(), [], None, None)


@pytest.mark.parametrize("override, message", [
    ("feature_extractor.hop_length=0", "feature_extractor.hop_length is 0; valid: above 0"),
    ("feature_extractor.feature_size=32", "feature_size is 32; valid: num_mel_bins, 64"),
    ("feature_extractor.sampling_rate=200000", "sampling_rate is 200000; valid: 1000 to 192000"),
    ("feature_extractor.frequency_max=24001", "frequency_max and half the sampling_rate"),
    ("feature_extractor.frequency_min=14000", "frequency_max and half the sampling_rate"),
    ("feature_extractor.nb_max_samples=491520", "nb_max_samples is 491520; valid: below 1024 frames"),
    ("text_encoder.audio_config.num_attention_heads=[1, 1, 3, 2]", "num_attention_heads must have"),
    ("text_encoder.audio_config.depths=[1, 1, 2]", "num_attention_heads must have"),
    ("text_encoder.audio_config.hidden_size=64", "hidden_size is 64"),
    ("text_encoder.audio_config.window_size=7", "spec_size is 256"),
    ("text_encoder.audio_config.spec_size=288", "spec_size is 288"),
])
def test_impossible_architectures(override, message):
    with pytest.raises(InputError, match=message):
        golden_config(override)


def test_another_feature_extractor_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
    path = folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": "fusion"}))
    with pytest.raises(InputError, match="truncation is 'fusion'; implemented: 'rand_trunc'"):
        musicldm.load_config(musicldm.DEFAULT_CONFIG, folder)
    path.unlink()
    with pytest.raises(InputError, match="missing: .*preprocessor_config.json"):
        musicldm.load_config(musicldm.DEFAULT_CONFIG, folder)
