"""Variation, repainting and continuation of music, against diffusers' parts and the music itself."""
import numpy as np
import pytest
import soundfile
from conftest import GOLDEN, golden_config, relative_error
from waveforms import waveform

import musicldm
from weights import InputError

MUSIC = waveform(0.4, 16000)[:5120]  # 8 rows of latents, of 640 samples
SHORT = {"num_inference_steps": 2, "init_audio": MUSIC}
FADE = 320
TINY = ["--weights", str(GOLDEN / "checkpoint"), "--steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def golden():
    """The stored arrays of make_golden.py's music_in()."""
    with np.load(GOLDEN / "music_in.npz") as file:
        return dict(file)


@pytest.fixture
def music(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("music.wav", MUSIC, 16000, "FLOAT")
    return "music.wav"


def same(a, b):
    """The places where two waveforms (samples,) are the same, as (first, last + 1) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], a == b, [0]))))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2) if last - first > 10]


@pytest.mark.parametrize("name, options", [
    *[(f"{name}.variation", {"strength": 0.5}) for name in musicldm.SCHEDULERS],
    *[(f"{name}.repainted", {"repaint": [[0.08, 0.2]]}) for name in ("ddim", "dpm")]])
def test_every_step_equals_the_reference(name, options, golden, params):
    states = []
    musicldm.generate(golden_config(), "a slow blues", params, scheduler=name.split(".")[0], num_inference_steps=4,
                      init_audio=MUSIC, latents=golden["in_latents"], noise=golden["in_noise"], output_type="latent",
                      callback=lambda i, timestep, x: states.append(x), **options)
    for state, wanted in zip(states, golden[name], strict=True):
        assert relative_error(state, wanted) < 2e-5


def test_strength_1_is_generation_and_a_little_is_the_music_again(params):
    cfg, options = golden_config(), {**SHORT, "num_inference_steps": 200, "output_type": "latent"}
    short = {"num_inference_steps": 2, "audio_length_in_s": 0.32}
    assert np.array_equal(musicldm.generate(cfg, "a", params, **short, init_audio=MUSIC, strength=1.0),
                          musicldm.generate(cfg, "a", params, **short))
    latents = musicldm.generate(cfg, "a", params, **options, strength=0.005)
    assert relative_error(latents, musicldm.encode_latents(cfg, MUSIC, params)) < 0.2


@pytest.mark.parametrize("scheduler", musicldm.SCHEDULERS)
def test_what_is_not_repainted_is_the_music(scheduler, params):
    eta = float(scheduler == "ddim")
    audio, = musicldm.generate(golden_config(), "a", params, **SHORT, scheduler=scheduler, eta=eta,
                               repaint=[[0.0, 0.05], [0.1, 0.2]])
    assert same(audio, MUSIC) == [(800, 1600), (3200, 5120)]


def test_the_join_is_a_crossfade_within_the_part(params):
    options = {**SHORT, "strength": 1.0, "latents": np.zeros((1, 8, 8, 4)), "output_type": "np"}
    share = musicldm.share_of_new(5120, 16000, [[0.1, 0.2]], False)
    assert share[1600 + FADE:3200 - FADE].min() == 1 and share[:1600].max() == share[3200:].max() == 0
    assert np.allclose(np.diff(share[1599:1600 + FADE + 1]), 1 / (FADE + 1), atol=1e-6)
    assert np.array_equal(share[1600:3200], share[1600:3200][::-1])
    audio, = musicldm.generate(golden_config(), "a", params, **options, repaint=[[0.1, 0.2]])
    step = np.abs(np.diff(audio))
    assert step[[1599, 3199]].max() < step.max()


def test_a_loop_is_repainted_over_its_seam(params):
    music = waveform(0.96, 16000)[:15360]
    audio, = musicldm.generate(golden_config(), "a", params, **{**SHORT, "init_audio": music}, loop=True,
                               repaint=[[0.9, 0.05]])
    assert same(audio, music) == [(800, 14400)]


def test_a_loop_of_music_holds_no_silence(params):
    """A loop comes in steps of 0.16 s here: 1.08 s would be rounded to 1.12 s."""
    music = waveform(1.08, 16000)[:17280]
    options = {**SHORT, "init_audio": music, "loop": True, "repaint": [[0.9, 0.05]]}
    short, = musicldm.generate(golden_config(), "a", params, **options)
    long, = musicldm.generate(golden_config(), "a", params, **options, audio_length_in_s=0.9)
    assert len(short) == len(long) == 15360 and same(long, music[:15360]) == [(800, 14400)]


@pytest.mark.parametrize("seconds", [0.5, -0.5])
def test_extension_keeps_the_music_and_goes_on_from_it(seconds, params):
    cfg, calls = golden_config("unet.sample_size=8"), []
    options = {**SHORT, "num_inference_steps": 4, "extend": seconds}  # of which strength 0.6 leaves 2
    audio = musicldm.generate(cfg, ["a", "b"], params, **options, output_type="np",
                              callback=lambda i, *_: calls.append(i))
    assert audio.shape == (2, 5120 + 8000) and calls == list(range(8))  # four windows of 0.32 s, half of them known
    assert not np.array_equal(audio[0], audio[1])
    for waveform in audio:
        ahead = 1 if seconds > 0 else -1
        kept, new = waveform[::ahead][:5120], waveform[::ahead][5120:]
        assert same(kept, MUSIC[::ahead]) == [(0, 5120 - FADE)]
        assert new.std() > 0.01 and not np.array_equal(new[:2560], new[2560:5120])
    alone = musicldm.generate(cfg, "a", params, **options)
    assert relative_error(alone, audio[:1]) < 2e-4


@pytest.mark.parametrize("seconds", [0.48, -0.48])
def test_extension_with_little_strength_is_a_repetition(seconds, params):
    """Of the music, as the VAE and the vocoder give it back: here three half windows, each after the half before."""
    cfg, ahead, errors = golden_config("unet.sample_size=8"), 1 if seconds > 0 else -1, []
    for steps, strength in ((200, 0.005), (2, 1.0)):
        heard = MUSIC[::ahead]
        for i in range(3):
            repeated = np.tile(MUSIC[::ahead], 2)[2560 * i:2560 * (i + 1)]
            known = np.concatenate((heard[-2560:], repeated))[::ahead]
            latents = musicldm.encode_latents(cfg, known, params)
            back = musicldm.vocode(cfg, musicldm.decode_latents(cfg, latents, params), params)[0, :5120][::ahead]
            calls = []
            audio, = musicldm.generate(cfg, "a", params, num_inference_steps=steps, init_audio=MUSIC, strength=strength,
                                       extend=seconds * (i + 1) / 3, callback=lambda i, *_: calls.append(i))
            heard = audio[::ahead]
            new, wanted = (x[FADE:-FADE] for x in (heard[-2560:], back[2560:]))
            errors.append((new - wanted).std() / wanted.std())
            assert calls == list(range((i + 1) * round(steps * strength)))
    assert max(errors[:3]) < 0.2 and min(errors[3:]) > 0.8


def test_a_long_piece_goes_on_from_its_end(params):
    """What stands after it is the repetition of its last window, not of its begin."""
    cfg, options = golden_config("unet.sample_size=8"), {"num_inference_steps": 200, "strength": 0.005, "extend": 0.16}
    other = waveform(0.7, 16000)[:5120]
    short, long = (musicldm.generate(cfg, "a", params, **options, init_audio=audio)[0]
                   for audio in (MUSIC, np.concatenate((other, MUSIC))))
    assert np.array_equal(short[-2560:], long[-2560:])


def test_lengths(params):
    """The file's own, after it came to 16 kHz, or the shorter one asked for."""
    cfg, options = golden_config(), {"num_inference_steps": 2, "repaint": [[0.3, 0.32]]}
    longer, = musicldm.generate(cfg, "a", params, **options, init_audio=np.tile(MUSIC, 3), audio_length_in_s=0.32)
    stereo = np.stack([musicldm.resample(MUSIC, 16000, 32000)] * 2, axis=1)
    other, = musicldm.generate(cfg, "a", params, **options, init_audio=(stereo, 32000))
    assert np.array_equal(longer[:4800], MUSIC[:4800])
    assert np.array_equal(other[:4800], musicldm.resample(stereo[:, 0], 32000, 16000)[:4800].astype(np.float32))


def test_takes_are_ranked_as_they_are_heard(params):
    cfg = golden_config()
    options = {**SHORT, "repaint": [[0.1, 0.2]], "negative_prompt": "low quality", "audio_prompt": MUSIC, "seed": 5}
    takes = musicldm.generate(cfg, "a", params, **options, num_waveforms_per_prompt=2)
    alone = [musicldm.generate(cfg, "a", params, **{**options, "seed": seed})[0] for seed in (5, 6)]
    heard = musicldm.encode_audio(cfg, MUSIC, params)
    vector = musicldm.prompt_vectors(cfg, "a", params, heard)
    scores = musicldm.encode_audio(cfg, np.stack(alone), params) @ vector[0]
    order = np.argsort(-scores)
    # the bar of waveforms: a batch's other sizes round otherwise; the two takes are 0.7 apart
    assert np.abs(takes - np.stack(alone)[order]).max() < 2e-4


def test_the_command_line_is_generate(music, params):
    cfg, long = golden_config("unet.sample_size=8"), waveform(1.08, 16000)[:17280]
    soundfile.write("long.wav", long, 16000, "FLOAT")
    given = ["--init-audio", music, *TINY]
    for name, arguments, options in (
            ("a", [*given, "--strength", "0.5"], {"strength": 0.5}),
            ("b", [*given, "--repaint", "0.1:0.2", "--repaint", "0.28:0.32"], {"repaint": [[0.1, 0.2], [0.28, 0.32]]}),
            ("c", [*given, "--extend", "-0.3", "--set", "unet.sample_size=8"], {"extend": -0.3}),
            ("d", [*(word.replace(music, "long.wav").replace("0.32", "0.9") for word in given), "--loop", "--repaint",
                   "0.9:0.05"], {"init_audio": long, "loop": True, "repaint": [[0.9, 0.05]], "audio_length_in_s": 0.9})):
        assert musicldm.main(["--prompt", "a", *arguments, "--out", f"{name}.wav"]) == 0
        wanted, = musicldm.generate(cfg, "a", params, **{**SHORT, **options})
        written, _ = soundfile.read(f"{name}.wav")
        assert len(written) == len(wanted) and np.abs(written - wanted).max() <= 2 ** -15


def test_batches_and_resume_and_processes_give_the_same_files(music, monkeypatch, capsys):
    arguments = ["--prompt", "a", "--prompt", "b", "--init-audio", music, "--repaint", "0.1:0.2", *TINY]
    assert musicldm.main([*arguments, "--out", "one.wav"]) == musicldm.main([*arguments, "--batch", "2", "--out",
                                                                             "two.wav"]) == 0
    read = lambda name: [soundfile.read(f"{name}_{i}.wav")[0] for i in (1, 2)]
    assert np.allclose(read("one"), read("two"), atol=2 ** -13)
    before = [open(f"one_{i}.wav", "rb").read() for i in (1, 2)]
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("RANK_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK_ID", rank)
        assert musicldm.main([*arguments, "--resume", "--out", "each.wav"]) == 0
    assert before == [open(f"each_{i}.wav", "rb").read() for i in (1, 2)]
    assert musicldm.main([*arguments, "--out", "each.wav"]) == 2
    assert capsys.readouterr().err == "musicldm: error: each_2.wav is there; valid under msrun: a new --out, or --resume\n"


def test_what_is_clipped_or_does_nothing_is_told(music, capsys):
    soundfile.write("loud.wav", 3 * MUSIC / np.abs(MUSIC).max(), 16000, "FLOAT")
    assert musicldm.main(["--prompt", "a", "--init-audio", "loud.wav", "--repaint", "0.1:0.2", "--guidance", "1",
                          "--negative-prompt", "b", *TINY]) == 0
    clipped, nothing = capsys.readouterr().err.splitlines()
    assert "warning: --init-audio reaches 3.00" in clipped and "warning: --negative-prompt does nothing" in nothing


@pytest.mark.parametrize("options, message", [
    ({"strength": 0.0}, "strength is 0.0; valid: 0.001 to 1"), ({"strength": 1.5}, "strength is 1.5; valid"),
    ({"strength": float("nan")}, "finite"),
    ({"init_audio": None, "strength": 0.5}, "strength stands without init_audio"),
    ({"init_audio": None, "repaint": [[0.1, 0.2]]}, "repaint stands without"),
    ({"init_audio": None, "extend": 1.0}, "extend stands without"),
    ({"repaint": [[0.2, 0.1]]}, "the part 0.2:0.1; valid: .*0.32 s, the start first"),
    ({"repaint": [[0.1, 0.1]]}, "the part 0.1:0.1"), ({"repaint": [[0.1, 0.4]]}, "the part 0.1:0.4"),
    ({"repaint": [[-0.1, 0.2]]}, "the part -0.1:0.2"), ({"repaint": [[0.0, 0.32]]}, "the whole of init_audio"),
    ({"repaint": [[0.0, 0.2], [0.1, 0.3]]}, "0.1:0.3, which overlaps another"),
    ({"repaint": [[0.0, 0.2], [0.2, 0.32]]}, "the whole"), ({"repaint": [0.1, 0.2]}, r"valid: a list of parts, each"),
    ({"repaint": [[0.1]]}, "valid: a list of parts"), ({"repaint": "0.1:0.2"}, "valid: a list of parts"),
    ({"extend": 0.0}, "extend is 0; valid: seconds"), ({"audio_prompt": np.zeros(5120)}, "audio_prompt is silent"),
    ({"extend": 600.0}, "extend is 600 beside 0.32 s; valid: up to 600 s in all"),
    ({"extend": 1.0, "repaint": [[0.1, 0.2]]}, "repaint .* stands beside extend"),
    ({"extend": 1.0, "loop": True}, "loop True stands beside extend"),
    ({"extend": 1.0, "output_type": "mel"}, "output_type 'mel' stands beside extend"),
    ({"extend": 1.0, "latents": np.zeros((1, 8, 8, 4))}, "latents or noise stand beside extend"),
    ({"strength": 0.4}, "strength 0.4 leaves none of 2 steps; valid: more steps, or a strength from 0.5 to 1"),
    ({"init_audio": np.zeros(5120)}, "init_audio is silent"),
    ({"init_audio": MUSIC[:100]}, "init_audio has 0.00625 s; valid: 0.04 s or more"),
    ({"init_audio": (np.ones(700 * 1000), 1000)}, "init_audio has more than 600 s; valid: audio_length_in_s"),
    ({"init_audio": "no.wav"}, "init_audio: cannot read"),
    ({"init_audio": np.full(5120, np.nan)}, "init_audio: audio holds NaN"),
    ({"init_audio": MUSIC, "audio_length_in_s": 700}, "valid: 0.04 to 600"),
    ({"init_audio": MUSIC, "audio_length_in_s": 0.4}, "init_audio has 0.32 s; valid: up to that; extend"),
    ({"init_audio": 32768 * MUSIC}, "init_audio: audio reaches [0-9.e+]*; valid: samples in"),
])
def test_mistakes(options, message, monkeypatch):
    monkeypatch.setattr(musicldm.checkpoints, "load_params", None)
    with pytest.raises(InputError, match=message):
        musicldm.generate(golden_config("unet.sample_size=8"), "a", **{**SHORT, **options})


@pytest.mark.parametrize("arguments, message", [
    (["--repaint", "4-8"], "valid: seconds, such as 4:8"),
    (["--repaint", "0.1:0.2", "--strength", "0"], "strength is 0"),
    (["--extend", "1"], "states no sample_size"), (["--strength", "0.1"], "leaves none of 2 steps"),
    (["--init-audio", "again.wav"], "--init-audio is given 2 times"),
])
def test_mistakes_on_the_command_line(arguments, message, music, capsys):
    assert musicldm.main(["--prompt", "a", "--init-audio", music, *arguments, *TINY]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
