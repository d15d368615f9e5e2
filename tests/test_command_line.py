"""The command line from its arguments to the files, every mistake it answers, and the README's commands."""
import contextlib
import fcntl
import io
import itertools
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import mindspore
import numpy as np
import pytest
import soundfile
from conftest import ENVIRONMENT, GOLDEN, free_port, golden_config
from PIL import Image

import musicldm
import weights
from weights import InputError

ROOT = pathlib.Path(musicldm.__file__).parent
TINY = ["--weights", str(GOLDEN / "checkpoint"), "--seconds", "0.32", "--steps", "2"]
KEPT = ["--prompt", "a", *TINY, "--quiet", "--out"]


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line.split(" && ")[-1] for block in blocks for line in block.splitlines()]


def in_a_process(line, folder):
    """A command of the README in a new folder -> (its arguments, what it printed)."""
    python = pathlib.Path(sys.executable)
    here = {".venv/bin/python": [python], "musicldm.py": [ROOT / "musicldm.py"],
            "msrun": [python.parent / "msrun", "--log_dir", "log", "--master_port", free_port()],
            "tests/golden/checkpoint": [GOLDEN / "checkpoint"]}
    command = [str(part) for word in shlex.split(line) for part in here.get(word, [word])]
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_bytes(LINES)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={
        **ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "cache"), "PATH": f"{python.parent}:{ENVIRONMENT['PATH']}"})
    assert done.returncode == 0, done.stdout  # msrun starts "python" by this name
    return command, done.stdout


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    return tmp_path


@pytest.mark.parametrize("text, number", [
    ("010", 10), ("0", 0), ("+7", 7), ("1e3", 1000), ("2.50E1", 25), ("1_000", 1000), ("12", 12), ("300.0", 300)])
def test_numbers_are_what_people_mean(text, number):
    args = musicldm.parse_arguments(["--seed", text, "--guidance", text])
    sampling = musicldm.load_config(weights="random", overrides=args.set)["sampling"]
    assert sampling["seed"] == sampling["guidance_scale"] == number and type(sampling["seed"]) is int


def tiny(*arguments):
    """TINY's flags but for those among the arguments, then these."""
    pairs = zip(TINY[::2], TINY[1::2])
    return [*itertools.chain(*(pair for pair in pairs if pair[0] not in arguments)), *arguments]


def files():
    return sorted(path.name for path in pathlib.Path().iterdir())


def test_one_prompt_one_file(capsys):
    assert musicldm.main(["--prompt", "a slow blues", *TINY, "--seed", "3"]) == 0
    audio, rate = soundfile.read("musicldm.wav")
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, GOLDEN / "checkpoint")
    expected = musicldm.generate(cfg, "a slow blues", audio_length_in_s=0.32, num_inference_steps=2, seed=3)
    assert rate == 16000 and np.abs(audio - expected[0]).max() <= 2 ** -15 and files() == ["musicldm.wav"]
    out, err = capsys.readouterr()
    assert "2 steps, guidance 2, eta 0, seed 3" in out and "musicldm.wav  0.32 s" in out
    assert err.splitlines()[-1].startswith("step 2/2  ")


def test_a_file_that_is_there_is_not_replaced(capsys):
    pathlib.Path("x_2.wav").write_text("old")
    for seed in ("1", "2"):
        assert musicldm.main(["--prompt", "a", "--prompt", "b", *TINY, "--seed", seed, "--out", "x.wav"]) == 0
    names = ["x-2_1.wav", "x-2_2.wav", "x-3_1.wav", "x-3_2.wav"]
    assert files() == [*names, "x_2.wav"] and pathlib.Path("x_2.wav").read_text() == "old"
    out = capsys.readouterr().out
    assert [re.search(f"{name}  0.32 s  seed (.)", out)[1] for name in names] == ["1", "1", "2", "2"]


def test_a_random_seed_is_another_each_time():
    seeds = {musicldm.parse_arguments(["--seed", "random"]).set[0] for _ in range(5)}
    assert len(seeds) == 5 and all(re.fullmatch(r"sampling\.seed=\d+", seed) for seed in seeds)


def test_help_says_what_every_flag_does_and_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        musicldm.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = weights.read_yaml(musicldm.DEFAULT_CONFIG)
    for flag, (key, metavar, meaning) in musicldm.SHORTCUTS.items():
        section, _, name = key.rpartition(".")
        default = (defaults[section] if section else defaults)[name]
        assert f"{flag} {metavar} {meaning}" + ("" if default is None else f" (default {default})") in text
    assert all(name in text for name in musicldm.SCHEDULERS) and "--scheduler pndm --steps 20" in text


def test_only_the_prompt_is_needed():
    args = musicldm.parse_arguments(["--prompt", "a"])
    assert args.set == [] and musicldm.read_prompts(args) == {1: "a"}


def test_the_longest_clip_in_every_format():
    audio = np.random.default_rng(0).standard_normal(600 * 16000).astype(np.float32) * 0.1
    for ending in musicldm.FORMATS:
        path = pathlib.Path(f"long{ending}")
        musicldm.write_files({path: musicldm.audio_bytes(audio, 16000, ending)})
        assert soundfile.info(path).frames == len(audio)


@pytest.mark.parametrize("ending", ["flac", "ogg"])
def test_several_prompts_number_themselves(ending, capsys):
    assert musicldm.main(["--prompt", "pads", "--prompt", "1984", *TINY, "--negative-prompt", "7", "--quiet",
                          "--out", f"x.{ending}"]) == 0
    assert files() == [f"x_1.{ending}", f"x_2.{ending}"]
    assert all(len(soundfile.read(f"x_{i}.{ending}")[0]) == 5120 for i in (1, 2))
    assert capsys.readouterr() == ("", "")


def written(*arguments):
    """The samples of the one file that a quiet run with these arguments writes."""
    assert musicldm.main([*TINY, "--quiet", "--out", "alone.wav", *arguments]) == 0
    audio, _ = soundfile.read("alone.wav")
    os.remove("alone.wav")
    return audio


def assert_same(path, expected, bound=2 ** -15):
    """Equal but for the rounding to 16 bits, or for a bound."""
    audio, rate = soundfile.read(path)
    assert rate == 16000 and len(audio) == len(expected) and np.abs(audio - expected).max() <= bound


def test_negative_prompts_one_for_each_prompt():
    assert musicldm.main(["--prompt", "a", "--prompt", "b", "--negative-prompt", "drums", "--negative-prompt", "pads",
                          *TINY, "--quiet", "--out", "x.wav"]) == 0
    expected = [written("--prompt", prompt, "--negative-prompt", away)
                for prompt, away in (("a", "drums"), ("b", "pads"))]
    for i in (0, 1):
        assert_same(f"x_{i + 1}.wav", expected[i])
    assert np.abs(expected[0] - written("--prompt", "a", "--negative-prompt", "pads")).max() > 2 ** -10


def test_takes_are_ranked_within_their_prompt(capsys, params):
    prompts = ["drums", "pads"]
    assert musicldm.main(["--prompt", "drums", "--prompt", "pads", *TINY, "--waveforms", "2", "--seed", "5",
                          "--out", "x.wav"]) == 0
    lines = re.findall(r"^(\S+)  0.32 s  seed (\d+)  score (\S+)$", capsys.readouterr().out, re.M)
    assert files() == [path for path, _, _ in lines] == ["x_1_1.wav", "x_1_2.wav", "x_2_1.wav", "x_2_2.wav"]
    seeds, scores = [seed for _, seed, _ in lines], [float(score) for _, _, score in lines]
    assert sorted(seeds[:2]) == sorted(seeds[2:]) == ["5", "6"] and seeds != ["5", "6"] * 2  # or nothing was sorted
    assert scores[0] >= scores[1] and scores[2] >= scores[3]
    for i, (path, seed, score) in enumerate(lines):
        assert_same(path, written("--prompt", prompts[i // 2], "--seed", seed))
        cosine = musicldm.score(golden_config(), prompts[i // 2], soundfile.read(path)[0], params)
        assert abs(cosine[0, 0] - float(score)) < 1e-3


LINES = b"\xef\xbb\xbfdrums\r\n\r\n \t\npads\n  drums \n1984\nbass"  # a byte order mark, CRLF, blank lines, no end
NAMES = ["x_00001_seed3.wav", "x_00004_seed3.wav", "x_00005_seed4.wav", "x_00006_seed3.wav", "x_00007_seed3.wav"]
FROM_FILE = ["--prompts-file", "p", *TINY, "--seed", "3", "--quiet", "--out", "x.wav"]


def test_lines_may_end_as_they_did_on_any_system():
    pathlib.Path("p").write_bytes(b"drums\rpads\r\rslow \xe2\x80\xa8 piano\r\nbass\n")
    prompts = musicldm.read_prompts(musicldm.parse_arguments(["--prompts-file", "p"]))
    assert prompts == {1: "drums", 2: "pads", 4: "slow \u2028 piano", 5: "bass"}


def test_standard_output_may_lack_a_files_letters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert musicldm.main(["--prompt", "a", "--prompt", "b", *TINY, "--out", "\u97f3\u00e9.wav"]) == 0
    assert files() == ["\u97f3\u00e9_1.wav", "\u97f3\u00e9_2.wav"]
    lines = stream.buffer.getvalue().decode("cp1252")
    assert "\\u97f3\u00e9_1.wav  0.32 s" in lines and "\\u97f3\u00e9_2.wav  0.32 s" in lines


def test_a_prompts_file_names_files_by_line_and_seed_and_resumes(capsys):
    pathlib.Path("p").write_bytes(LINES)
    assert musicldm.main(FROM_FILE) == 0
    assert files() == ["p", *NAMES]
    alone = {name: soundfile.read(name)[0] for name in NAMES}
    for name, prompt, seed in zip(NAMES, ["drums", "pads", "drums", "1984"], "3343"):
        assert np.array_equal(alone[name], written("--prompt", prompt, "--seed", seed))

    kept, missing = NAMES[:1] + NAMES[3:], NAMES[1:3]
    for name in kept:
        pathlib.Path(name).write_text("old")
        os.utime(name, (1000, 1000))
    for name in missing:
        os.remove(name)
    capsys.readouterr()
    again = [argument for argument in FROM_FILE if argument != "--quiet"]
    assert musicldm.main([*again, "--batch", "4", "--resume"]) == 0  # one batch, which lacks two
    told = capsys.readouterr().out
    assert [name for name in NAMES if name in told] == missing
    assert all(pathlib.Path(name).read_text() == "old" and os.stat(name).st_mtime == 1000 for name in kept)
    for name in missing:
        assert_same(name, alone[name], 2e-4)  # the bar of waveforms: a batch's other sizes round otherwise


def test_what_precedes_a_failure_is_kept(monkeypatch, capsys):
    pathlib.Path("p").write_bytes(LINES)
    generate = musicldm.generate

    def fails_later(*given, **options):
        if pathlib.Path(NAMES[0]).exists():
            raise InputError("the latents hold NaN")
        return generate(*given, **options)

    monkeypatch.setattr(musicldm, "generate", fails_later)
    assert musicldm.main(FROM_FILE) == 2 and "the latents hold NaN" in capsys.readouterr().err
    assert files() == ["p", NAMES[0]] and len(soundfile.read(NAMES[0])[0]) == 5120


@pytest.mark.parametrize("rank, names", [("0", NAMES[:2] + NAMES[4:]), ("1", NAMES[2:4]), ("2", [])])
def test_each_process_takes_whole_batches(rank, names, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("RANK_ID", rank)
    monkeypatch.setenv("RANK_SIZE", "2" if rank != "2" else "3")
    monkeypatch.setattr(musicldm, "generate", lambda *_, seed, **__: np.zeros((len(seed), 5120), np.float32))
    pathlib.Path("p").write_bytes(LINES if rank != "2" else b"drums")
    assert musicldm.main([*FROM_FILE, "--batch", "2"]) == 0 and files() == ["p", *names]


def test_the_scheduler_process_of_msrun_does_nothing(monkeypatch, capsys):
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    assert musicldm.main(["--prompt", "a", *TINY]) == 0 and files() == [] and capsys.readouterr() == ("", "")


def test_a_process_of_msrun_without_a_rank_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.delenv("RANK_ID", raising=False)
    assert musicldm.main(["--prompt", "a", *TINY]) == 2 and files() == []
    assert "RANK_ID is not set; valid" in capsys.readouterr().err


def run_on_several(home):
    in_a_process(next(line for line in readme_commands() if line.startswith("msrun")), home / "msrun")
    return {path.name: path.read_bytes() for path in (home / "msrun").glob("*.wav")}


@pytest.mark.beside([run_on_several])
def test_msrun_writes_the_same_bytes_as_one_process(beside):
    """As the README runs it."""
    several = beside(run_on_several)
    pathlib.Path("p").write_bytes(LINES)
    assert len(several) == 5 and musicldm.main(["--prompts-file", "p", *TINY, "--quiet"]) == 0
    assert several == {name: pathlib.Path(name).read_bytes() for name in several}


def keep_graphs(home):
    for name in ("first.wav", "second.wav"):
        in_a_process(shlex.join([".venv/bin/python", "musicldm.py", *KEPT, name]), home / "kept")
    return home / "kept"


@pytest.mark.beside([keep_graphs])
def test_kept_graphs_give_the_same_bytes(beside):
    """Two processes with one cache folder against this process, which keeps no graphs."""
    folder = beside(keep_graphs)
    graphs, = (folder / "cache" / "musicldm").iterdir()
    assert graphs.suffix == "" and list(graphs.rglob("*.mindir"))
    assert musicldm.main([*KEPT, "wanted.wav"]) == 0
    wanted = pathlib.Path("wanted.wav").read_bytes()
    assert [(folder / name).read_bytes() == wanted for name in ("first.wav", "second.wav")] == [True, True]


def test_the_graphs_used_last_stay_on_disk_and_leftovers_do_not(elsewhere, monkeypatch):
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", "")  # MindSpore's own switch, MS_COMPILER_CACHE_ENABLE, is off here
    cache = pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "musicldm"

    def graphs():
        return {path.read_text() for path in cache.rglob("graph")}

    for name in ("killed.part", "running.part"):
        (cache / name).mkdir(parents=True)
        (cache / name / "graph").write_text(name)
    lock = os.open(cache / "running.part", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for i, plan in enumerate([*range(musicldm.KEPT), 0, musicldm.KEPT, musicldm.KEPT + 1]):
        with musicldm.kept_graphs(plan):
            graph = pathlib.Path(os.environ["MS_COMPILER_CACHE_PATH"]) / "graph"
            assert not graph.exists() or (plan, graph.read_text()) == (0, "0")
            graph.write_text(str(plan))
        os.utime(graph.parent if graph.exists() else max(cache.iterdir(), key=os.path.getmtime), (i, i))
    os.close(lock)
    assert graphs() == {"running.part", "0", *map(str, range(3, musicldm.KEPT + 2))}
    with pytest.raises(KeyError), musicldm.kept_graphs("fails"):
        raise KeyError
    assert len(list(cache.iterdir())) == musicldm.KEPT and len(graphs()) == musicldm.KEPT  # the other run has ended


def test_without_room_for_graphs_none_are_kept(elsewhere, monkeypatch):
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    with small_files_only(), musicldm.kept_graphs("a plan"):
        assert os.environ["MS_COMPILER_CACHE_ENABLE"] == "0"
    assert list((pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "musicldm").iterdir()) == []


def test_graphs_are_kept_for_the_same_plan_alone():
    def plan(*arguments):
        return repr(musicldm.what_graphs_follow_from(musicldm.planned(musicldm.parse_arguments(tiny(*arguments)))))

    soundfile.write("a.wav", np.ones(16000) * 0.1, 16000)
    pathlib.Path("x_2.wav").touch()
    base = ["--prompt", "a", "--out", "x.wav"]
    same = [[*base, *more] for more in ([], ["--seed", "5"], ["--steps", "3"], ["--guidance", "3"])]
    same += [["--prompt", "b", *base[2:]], [*base, "--prompt", "b", "--resume"]]  # the other file is there
    assert len({plan(*arguments) for arguments in same}) == 1
    others = [["--seconds", "0.4"], ["--guidance", "1"], ["--loop"], ["--waveforms", "2"], ["--prompt", "b"],
              ["--prompt", "b", "--batch", "2"], ["--negative-prompt", "many words " * 9],
              ["--dtype", "float16"], ["--set", "unet.norm_eps=1.0e-4"], ["--audio-prompt", "a.wav"],
              ["--prompt", "b", "--interpolate", "3"], ["--scheduler", "dpm"]]
    assert len({plan(*base, *more) for more in ([], *others)}) == 1 + len(others)


def test_interpolation_runs_from_one_prompt_to_the_other():
    ends = ["--prompt", "drums", "--prompt", "pads"]
    assert musicldm.main([*ends, "--interpolate", "3", *TINY, "--seed", "3", "--quiet", "--out", "x.wav"]) == 0
    assert files() == ["x_1.wav", "x_2.wav", "x_3.wav"]
    first, last = written(*ends[:2], "--seed", "3"), written(*ends[2:], "--seed", "3")
    assert_same("x_1.wav", first)
    assert_same("x_3.wav", last)
    middle, _ = soundfile.read("x_2.wav")
    assert min(np.abs(middle - end).max() for end in (first, last)) > 2 ** -10


def test_an_audio_prompt_alone_and_with_a_text(params):
    t = np.arange(44100) / 44100
    soundfile.write("heard.flac", 0.3 * np.sin(2 * np.pi * np.stack([220 * t, 331 * t], axis=1)), 44100)
    cfg, given = golden_config(), ["--audio-prompt", "heard.flac"]
    audio, rate = musicldm.read_audio(cfg, "heard.flac")
    heard = musicldm.encode_audio(cfg, audio, params, rate)[0]
    text, results = musicldm.encode_prompt(cfg, "drums", params)[0], []
    for arguments, vector in (([], heard), (["--prompt", "drums"], text + heard),
                              (["--prompt", "drums", "--audio-prompt-weight", "0.25"], 3 * text + heard)):
        expected = musicldm.generate(cfg, None, params, prompt_embeds=vector[None] / np.linalg.norm(vector),
                                     audio_length_in_s=0.32, num_inference_steps=2)[0]
        results.append(written(*given, *arguments))
        assert np.abs(results[-1] - expected).max() < 2e-4  # the bar of waveforms: the vectors' last bits differ
    assert min(np.abs(x - y).max() for x, y in itertools.combinations(results, 2)) > 2e-3


@pytest.mark.parametrize("arguments, line, evaluations", [
    (["--scheduler", "dpm"], "0.32 s, dpm, 2 steps", 2), (["--scheduler", "heun"], "0.32 s, heun, 2 steps", 3),
    (["--loop", "--seconds", "0.9"], "0.96 s, ddim, 2 steps", 2)])
def test_other_schedulers_and_loops(arguments, line, evaluations, capsys):
    assert musicldm.main(tiny("--prompt", "drums", *arguments)) == 0
    out, err = capsys.readouterr()
    assert line in out and f"musicldm.wav  {line[:6]}" in out
    assert f"step {evaluations}/{evaluations}" in err.splitlines()[-1] and files() == ["musicldm.wav"]
    assert soundfile.info("musicldm.wav").frames == float(line[:4]) * 16000


def test_spectrograms_stand_beside_the_audio():
    assert musicldm.main(["--prompt", "drums", "--prompt", "pads", *TINY, "--out", "x.wav", "--spectrogram", "s.png",
                          "--quiet"]) == 0
    assert files() == ["s_1.png", "s_2.png", "x_1.wav", "x_2.wav"]
    bands = golden_config()["vocoder"]["model_in_dim"]
    pictures = [np.asarray(Image.open(f"s_{i}.png").convert("RGB")) for i in (1, 2)]
    assert all(picture.shape == (4 * bands + 16, 400, 3) for picture in pictures)
    assert not np.array_equal(*pictures)


def test_a_spectrogram_has_low_bands_below_and_time_to_the_right():
    mel = np.zeros((500, 16), np.float32)
    mel[:100, 0] = 5
    picture = np.asarray(Image.open(io.BytesIO(musicldm.spectrogram_bytes(mel, 5.0))).convert("RGB"))
    assert picture.shape == (4 * 16 + 16, 500, 3)
    loud = (picture[:64] == musicldm.COLOURS[-1]).all(-1)
    quiet = (picture[:64] == musicldm.COLOURS[0]).all(-1)
    assert loud[60:, :100].all() and loud.sum() == 4 * 100 and quiet.sum() == loud.size - loud.sum()
    caption = picture[64:]
    assert (caption == 255).all(-1).mean() > 0.5 and (caption < 128).all(-1).sum() > 100


@pytest.mark.parametrize("arguments, message", [
    ([], "no prompt; valid: --prompt TEXT"),
    (["--prompt", "a", "--step", "3"], "unknown option '--step': did you mean '--steps'"),
    (["--prompt", "slow", "sad", "piano"], "'sad piano' belongs to no option; valid: a prompt in quotes"),
    (["--prompt", "a", "--steps", "2.5"], "sampling.num_inference_steps is 2.5; valid: an integer"),
    (["--prompt", "a", "--steps", "many"], "sampling.num_inference_steps is 'many'"),
    (["--prompt", "a", "--guidance", "nan"], "guidance_scale is 'nan'; valid: a finite number"),
    (["--prompt", "a", "--guidance", ".nan"], "guidance_scale is '.nan'; valid: a finite number"),
    (["--prompt", "a", "--seed", "-1"], "sampling.seed is -1; valid: 0 or more"),
    (["--prompt", "a", "--seconds", "0"], "audio_length_in_s is 0; valid: 0.04 to 600"),
    (["--prompt", "a", "--device", "TPU"], "device is 'TPU'; valid: auto, Ascend, CPU, GPU"),
    (["--prompt", "a", "--device", "Ascend"], "device: this MindSpore has no Ascend; valid: auto, CPU"),
    (["--prompt", "a", "--dtype", "int8"], "dtype is 'int8'; valid: float32, float16, bfloat16, hf32"),
    (["--prompt", "a", "--set", "sampling.sede=3"],
     "unknown config key 'sampling.sede': did you mean 'sampling.seed'?"),
    (["--prompt", "a", "--set", "seed"], "override 'seed'; valid: key=value"),
    (["--prompt", "a", "--set", "unet=3", "--set", "unet.norm_eps=1"], "unet is 3; valid: a mapping"),
    (["--prompt", "a", "--seed", "2024-99-99"], "sampling.seed is '2024-99-99'; valid: an integer"),
    *[(["--prompt", "a", "--seconds", text], f"audio_length_in_s is {text!r}; valid: a finite number")
      for text in ("1:30", "yes", "off", "0x10", "~", "2,5", "{}", "[1]", "'1'")],
    (["--prompt", "a", "--seconds", "1e999"], "audio_length_in_s is inf; valid: a finite number"),
    (["--prompt", "a", "--steps", "yes"], "num_inference_steps is 'yes'; valid: an integer"),
    (["--prompt", "a", "--device", "no"], "device is 'no'; valid: auto"),
    (["--prompt", "a", "--scheduler", "null"], "sampling.scheduler is 'null'; valid: ddim"),
    *[(["--prompt", "a", flag, "1", flag, "1"], f"{flag} is given 2 times; valid: once")
      for flag in ("--seed", "--seconds", "--guidance", "--waveforms", "--batch", "--out", "--spectrogram",
                   "--interpolate", "--audio-prompt", "--config")],
    (["--prompt", "a", "--loop", "--loop"], "--loop is given 2 times"),
    (["--prompt", "a", "--seed=1", "--set", "sampling.seed=2"], "sampling.seed is given 2 times; valid: once"),
    (["--prompt", "a", "--repaint", "1:2", "--set", "sampling.repaint=[[3,4]]"], "sampling.repaint is given 2 times"),
    (["--prompt", "a", "--out", "a" * 300 + ".wav"], "the file name is too long; valid: up to 240 bytes"),
    (["--prompt", "a", "--prompt", "b", *["--negative-prompt", "c"] * 3],
     "negative_prompt is a list of 3; valid: one, or a list of 2"),
    (["--prompt", "a", "--guidance", "1" + "0" * 400], "valid: a finite number"),
    (["--prompt", "a", "--set", "unet.attention_head_dim=[1,2]"], "unet.attention_head_dim has 2 entries"),
    (["--prompt", "a", "--set", "unet.attention_head_dim=5"], "valid: divisors of [12, 8, 16]"),
    (["--prompt", "a", "--set", "unet.block_out_channels=[]"], "unet.block_out_channels is []; valid: a list"),
    (["--prompt", "a", "--set", "vocoder.upsample_rates=[0,8,4]"],
     "vocoder.upsample_rates is [0, 8, 4]; valid: above 0"),
    (["--prompt", "a", "--set", "unet.norm_num_groups=5"], "unet.norm_num_groups is 5; valid: a divisor"),
    (["--prompt", "a", "--set", "unet.down_block_types=[DownBlock2D]"], "unet.down_block_types has 1 entries"),
    (["--prompt", "a", "--set", "unet.up_block_types=[UpBlock2D, UpBlock, CrosAttnUpBlock2D]"],
     "valid: UpBlock2D or CrossAttnUpBlock2D"),
    (["--prompt", "a", "--set", "vocoder.resblock_kernel_sizes=[4, 7]"], "[4, 7]; valid: odd numbers"),
    (["--prompt", "a", "--set", "vae.in_channels=2"], "vae.in_channels is 2; valid: 1"),
    (["--prompt", "a", "--set", "schedule.beta_start=-1"], "schedule.beta_start"),
    (["--prompt", "a", "--set", "schedule.steps_offset=2000"], "steps_offset 0 or 1"),
    (["--prompt", "a", "--out", "a" * 250 + ".wav"], "the file name is too long"),
    (["--prompt", "a", "--weights", "a" * 5000], "weights: no folder"),
    (["--prompt", "a", "--set", "a=[1"], "override 'a=[1'"),
    (["--prompt", "a", "--set", "unet.norm_eps.x=1"], "unet.norm_eps is a mapping of x; valid: a finite number"),
    (["--prompt", "a", "--set", "vocoder.upsample_rates=[5,x]"], "vocoder.upsample_rates is [5, 'x']; valid: a list"),
    (["--prompt", "a", "--config", "none.yaml"], "config: cannot read none.yaml"),
    (["--prompt", "a", "--config", "bad.yaml"], "config: cannot read bad.yaml"),
    (["--prompt", "a", "--config", "list.yaml"], "the configuration is [1]; valid: a mapping"),
    (["--prompt", "a", "--weights", "nowhere"], "weights: no folder 'nowhere'; valid: a folder in diffusers' layout"),
    (["--prompts-file", "none.txt"], "--prompts-file none.txt:"),
    (["--prompts-file", "latin1.txt"], "--prompts-file latin1.txt, line 3: 'utf-8' codec can't decode byte 0xe9"),
    (["--prompts-file", "empty.txt"], "no prompt; valid: --prompt TEXT"),
    (["--prompts-file", "blank.txt", "--audio-prompt", "noise.wav"], "no prompt; valid: --prompt TEXT"),
    (["--prompts-file", "folder.wav"], "--prompts-file folder.wav:"),
    (["--prompt", "a", "--prompts-file", "blank.txt"], "--prompt stands beside --prompts-file"),
    (["--prompt", "a", "--interpolate", "3"],
     "--interpolate 3 stands beside --prompt 1 times and --waveforms 1; valid: 2 or more, beside --prompt twice"),
    (["--prompts-file", "two.txt", "--interpolate", "3"], "--interpolate 3 stands beside --prompt 0 times"),
    *[(["--prompt", "a", flag, value], f"argument {flag}: {value!r}; valid: 1 to 9999")
      for flag in ("--interpolate", "--batch") for value in ("0", "x", "10000", "2.5")],
    (["--prompt", "a", "--waveforms", "0"],
     "error: --waveforms: sampling.num_waveforms_per_prompt is 0; valid: 1 to 1000"),
    (["--prompt", "a", "--waveforms", "2", "--set", "sampling.seed=[1]"],
     "error: seed is a list of 1; valid: one, or a list of 2"),
    (["--prompt", "a", "--scheduler", "dmp"], "--scheduler: sampling.scheduler is 'dmp'; valid: ddim, dpm"),
    (["--prompt", "a", "--scheduler", "dpm", "--eta", "1"],
     "--eta: sampling.eta is 1; valid with the scheduler dpm: 0"),
    (["--prompt", "a", "--audio-prompt-weight", "2"], "sampling.audio_prompt_weight is 2; valid: 0 to 1"),
    *[(["--audio-prompt", name], f"audio_prompt: cannot read {name!r}: ")
      for name in ("none.wav", "blank.txt", "folder.wav", "samples.raw")],
    (["--audio-prompt", "silent.wav"], "audio_prompt: audio has the shape (0,)"),
    (["--prompt", "a", "--spectrogram", "a.jpg"], "--spectrogram a.jpg: unknown format '.jpg'; valid endings: .png"),
    (["--prompt", "a", "--spectrogram", "no/a.png"], "--spectrogram no/a.png: valid is a file name in a folder"),
    (["--prompt", "a", "--spectrogram", ""], "unknown format ''; valid endings: .png"),
    (["--prompt", "a", "--out", ""], "unknown format ''; valid endings:"),
    (["--prompt", "a", "--out", "a.xyz"], "unknown format '.xyz'; valid endings: .wav, .flac, .ogg"),
    (["--prompt", "a", "--out", "a"], "unknown format ''; valid endings:"),
    (["--prompt", "a", "--out", "no/a.wav"], "--out no/a.wav: valid is a file name in a folder that exists"),
    (["--prompt", "a", "--out", "folder.wav"], "--out folder.wav: valid is a file name"),
    (["--prompt", "a", "--set", "sampling.output_type=mel"], "the command line writes audio"),
])
def test_mistakes_take_one_line_and_leave_nothing(arguments, message, capsys):
    pathlib.Path("bad.yaml").write_text("a: [1\nb: 2")
    pathlib.Path("list.yaml").write_text("[1]")
    pathlib.Path("folder.wav").mkdir()
    for name, content in (("latin1.txt", b"a\n\ncaf\xe9\n"), ("empty.txt", b""), ("blank.txt", b"\n \r\n\t"),
                          ("two.txt", b"a\nb"), ("samples.raw", bytes(400))):
        pathlib.Path(name).write_bytes(content)
    soundfile.write("noise.wav", np.random.default_rng(0).uniform(-1, 1, 100), 16000)
    soundfile.write("silent.wav", np.zeros(0), 16000)
    before = files()
    assert musicldm.main(tiny(*arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("musicldm: error: ") and message in error[0]
    assert files() == before


@contextlib.contextmanager
def small_files_only():
    """A limit on the size of files fails as a full disk does: with an OSError while writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_found_before_the_work(capsys):
    with small_files_only():
        assert musicldm.main(["--prompt", "a", *TINY]) == 2
    assert "--out musicldm.wav: cannot be written: File too large" in capsys.readouterr().err and files() == []


def test_a_disk_that_fills_up_during_the_work_leaves_the_old_file():
    pathlib.Path("a.wav").write_text("old")
    with pytest.raises(InputError, match="cannot be written: File too large"), small_files_only():
        musicldm.write_files({pathlib.Path("b.wav"): b"fits", pathlib.Path("a.wav"): bytes(2000)})
    assert files() == ["a.wav"] and pathlib.Path("a.wav").read_text() == "old"


def test_audio_that_is_not_finite_is_not_written(monkeypatch, capsys):
    monkeypatch.setattr(musicldm, "hifigan", lambda *_: mindspore.Tensor(np.full((1, 5152), np.nan, np.float32)))
    assert musicldm.main(["--prompt", "a", *TINY]) == 2
    assert "NaN or Inf in the audio" in capsys.readouterr().err and files() == []


def test_an_output_folder_that_cannot_be_written(capsys):
    if os.access("/proc", os.W_OK) or not pathlib.Path("/proc").is_dir():
        folder = pathlib.Path("/proc")
    else:
        folder = pathlib.Path("locked")
        folder.mkdir(mode=0o500)
    assert musicldm.main(["--prompt", "a", *TINY, "--out", str(folder / "a.wav")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_and_exits_130():
    command = [sys.executable, str(ROOT / "musicldm.py"), *tiny("--prompt", "a", "--steps", "999")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130 and "Traceback" not in rest and "interrupted" in rest
    assert files() == []


def test_ctrl_c_before_anything_has_begun_ends_it_at_once():
    """Python's own exception would crash MindSpore's import."""
    with subprocess.Popen([sys.executable, musicldm.__file__, "--prompt", "a", "--out", "x.wav", *TINY], text=True,
                          stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode in (-signal.SIGINT, 130) and "Error" not in error and files() == []


def test_a_reader_that_leaves_ends_the_run_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, ROOT / "musicldm.py", "--prompt", "a", *TINY], stdout=writer,
                            stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 141 and result.stderr == "" and files() == []


def test_a_standard_output_that_takes_nothing_is_told_in_a_line():
    with open(os.devnull, "rb") as unwritable:
        result = subprocess.run([sys.executable, ROOT / "musicldm.py", "--prompt", "a", *TINY], stdout=unwritable,
                                stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and files() == []
    assert result.stderr == "musicldm: error: standard output cannot be written: Bad file descriptor\n"


def test_readme_names_the_test_command():
    assert sum("-m pytest" in command for command in readme_commands()) == 1


def test_readme_counts_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+) \|", text, re.M)
    counts = {name: int(count) for name, count in rows}
    assert counts == {name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
                      for name in ("musicldm.py", "layers.py", "weights.py", "config.yaml")}


def test_readme_pictures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with Image.open(ROOT / re.search(r"!\[.*?\]\((\S+?)\)", text).group(1)) as picture:
        assert picture.size == (1024, 4 * 64 + 16)


def run_first_command(home):
    line = next(line for line in readme_commands() if "--prompt" in line)
    return (*in_a_process(line, home / "readme"), home / "readme")


@pytest.mark.beside([run_first_command])
def test_readme_main_command(beside):
    command, said, folder = beside(run_first_command)
    assert re.search("^weights .*demo, device CPU, float32; 10.24 s, ddim, 50 steps", said)
    audio, rate = soundfile.read(folder / command[command.index("--out") + 1])
    assert rate == 16000 and len(audio) == 163840
    assert 0.02 < audio.std() < 0.5 and np.abs(audio).max() <= 1


IN_A_PACKAGE = """
import sys
from copied import musicldm, weights
cfg = musicldm.load_config(weights=sys.argv[1])
print(musicldm.encode_prompt(cfg, "a", weights.load_params(cfg)).tobytes().hex())
"""


def test_the_files_work_in_a_package(params, elsewhere):
    package = elsewhere / "copied"
    package.mkdir()
    for name in ("musicldm.py", "layers.py", "weights.py", "config.yaml"):
        shutil.copy(ROOT / name, package)
    done = subprocess.run([sys.executable, "-c", IN_A_PACKAGE, str(GOLDEN / "checkpoint")], stdout=subprocess.PIPE,
                          text=True, check=True)
    assert done.stdout.strip() == musicldm.encode_prompt(golden_config(), "a", params).tobytes().hex()


def test_readme_python(params, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(first.strip().splitlines()) <= 7 and len(second.strip().splitlines()) == 4
    load, generate = musicldm.load_config, musicldm.generate
    small = {"audio_length_in_s": 0.32, "num_inference_steps": 2}
    monkeypatch.setattr(musicldm, "load_config", lambda *_, **__: load(musicldm.DEFAULT_CONFIG, GOLDEN / "checkpoint"))
    monkeypatch.setattr(musicldm, "generate", lambda *given, **options: generate(*given, **{**options, **small}))
    pathlib.Path("path/to").mkdir(parents=True)
    exec(first + second, {})
    assert files() == ["path", "piano.wav"] and pathlib.Path("path/to/new/model_index.json").is_file()
