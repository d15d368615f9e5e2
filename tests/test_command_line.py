"""The command line from its arguments to the files, every mistake it answers, and the README's commands."""
import contextlib
import os
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import GOLDEN

import musicldm
from weights import InputError

ROOT = pathlib.Path(musicldm.__file__).parent
TINY = ["--weights", str(GOLDEN / "checkpoint"), "--seconds", "0.32", "--steps", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_only_the_prompt_is_needed():
    args = musicldm.parse_arguments(["--prompt", "a"])
    assert args.set == [] and musicldm.read_prompts(args) == ["a"]


def test_the_longest_clip_in_every_format():
    audio = np.random.default_rng(0).standard_normal((1, 600 * 16000)).astype(np.float32) * 0.1
    for ending in musicldm.FORMATS:
        path = pathlib.Path(f"long{ending}")
        musicldm.write_audio([path], audio, 16000)
        assert soundfile.info(path).frames == audio.shape[1]


@pytest.mark.parametrize("ending", ["flac", "ogg"])
def test_several_prompts_number_themselves(ending, capsys):
    pathlib.Path("prompts.txt").write_text("drums\n\n1984\n", encoding="utf-8")
    assert musicldm.main(["--prompt", "pads", "--prompts-file", "prompts.txt", *TINY, "--negative-prompt", "7", "--quiet",
                          "--out", f"x.{ending}"]) == 0
    assert files() == ["prompts.txt", f"x_1.{ending}", f"x_2.{ending}", f"x_3.{ending}"]
    assert all(len(soundfile.read(f"x_{i}.{ending}")[0]) == 5120 for i in (1, 2, 3))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments, message", [
    ([], "no prompt; valid: --prompt TEXT"),
    (["--prompt", "a", "--step", "3"], "unrecognized arguments: --step 3"),
    (["--prompt", "a", "--steps", "2.5"], "sampling.num_inference_steps is 2.5; valid: an integer"),
    (["--prompt", "a", "--steps", "many"], "sampling.num_inference_steps is 'many'"),
    (["--prompt", "a", "--guidance", "nan"], "guidance_scale is 'nan'; valid: a finite number"),
    (["--prompt", "a", "--guidance", ".nan"], "guidance_scale is nan; valid: a finite number"),
    (["--prompt", "a", "--seed", "-1"], "sampling.seed is -1; valid: 0 or more"),
    (["--prompt", "a", "--seconds", "0"], "audio_length_in_s is 0; valid: 0.04 to 600"),
    (["--prompt", "a", "--device", "TPU"], "device is 'TPU'; valid: auto, Ascend, CPU, GPU"),
    (["--prompt", "a", "--device", "Ascend"], "device: this MindSpore has no Ascend; valid: auto, CPU"),
    (["--prompt", "a", "--dtype", "int8"], "dtype is 'int8'; valid: float32, float16, bfloat16"),
    (["--prompt", "a", "--set", "sampling.sede=3"], "unknown config key 'sampling.sede': did you mean 'sampling.seed'?"),
    (["--prompt", "a", "--set", "seed"], "override 'seed'; valid: key=value"),
    (["--prompt", "a", "--set", "unet=3", "--set", "unet.norm_eps=1"], "unet is 3; valid: a mapping"),
    (["--prompt", "a", "--seed", "2024-99-99"], "override 'sampling.seed=2024-99-99'"),
    (["--prompt", "a", "--guidance", "1" + "0" * 400], "valid: a finite number"),
    (["--prompt", "a", "--set", "unet.attention_head_dim=[1,2]"], "unet.attention_head_dim has 2 entries"),
    (["--prompt", "a", "--set", "unet.attention_head_dim=5"], "valid: divisors of [12, 8, 12, 16]"),
    (["--prompt", "a", "--set", "unet.block_out_channels=[]"], "unet.block_out_channels is []; valid: a list"),
    (["--prompt", "a", "--set", "vocoder.upsample_rates=[0,8,4]"], "vocoder.upsample_rates is [0, 8, 4]; valid: above 0"),
    (["--prompt", "a", "--set", "unet.norm_num_groups=5"], "unet.norm_num_groups is 5; valid: a divisor"),
    (["--prompt", "a", "--set", "unet.down_block_types=[DownBlock2D]"], "unet.down_block_types has 1 entries"),
    (["--prompt", "a", "--set", "schedule.beta_start=-1"], "schedule.beta_start"),
    (["--prompt", "a", "--set", "schedule.steps_offset=2000"], "steps_offset 0 or 1"),
    (["--prompt", "a", "--out", "a" * 250 + ".wav"], "the file name is too long"),
    (["--prompt", "a", "--weights", "a" * 5000], "weights: no folder"),
    (["--prompt", "a", "--set", "a=[1"], "override 'a=[1'"),
    (["--prompt", "a", "--set", "unet.norm_eps.x=1"], "unet.norm_eps is {'x': 1}; valid: a finite number"),
    (["--prompt", "a", "--set", "vocoder.upsample_rates=[5,x]"], "vocoder.upsample_rates is [5, 'x']; valid: a list"),
    (["--prompt", "a", "--config", "none.yaml"], "config: cannot read none.yaml"),
    (["--prompt", "a", "--config", "bad.yaml"], "config: cannot read bad.yaml"),
    (["--prompt", "a", "--config", "list.yaml"], "the configuration is [1]; valid: a mapping"),
    (["--prompt", "a", "--weights", "nowhere"], "weights: no folder 'nowhere'; valid: a folder in diffusers' layout"),
    (["--prompts-file", "none.txt"], "--prompts-file none.txt:"),
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
    before = files()
    assert musicldm.main([*TINY, *arguments]) == 2
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
        musicldm.write_audio([pathlib.Path("a.wav")], np.zeros((1, 5120), np.float32), 16000)
    assert files() == ["a.wav"] and pathlib.Path("a.wav").read_text() == "old"


def test_an_output_folder_that_cannot_be_written(capsys):
    if os.access("/proc", os.W_OK) or not pathlib.Path("/proc").is_dir():
        folder = pathlib.Path("/proc")
    else:
        folder = pathlib.Path("locked")
        folder.mkdir(mode=0o500)
    assert musicldm.main(["--prompt", "a", *TINY, "--out", str(folder / "a.wav")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_and_exits_130():
    command = [sys.executable, str(ROOT / "musicldm.py"), "--prompt", "a", *TINY, "--steps", "999"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130 and "Traceback" not in rest and "interrupted" in rest
    assert files() == []


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line.split(" && ")[-1] for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_readme_names_the_test_command():
    assert sum("-m pytest" in command for command in readme_commands()) == 1


def test_readme_counts_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+) \|", text, re.M)
    counts = {name: int(count) for name, count in rows}
    assert counts == {name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
                      for name in ("musicldm.py", "layers.py", "weights.py", "config.yaml")}


def test_readme_main_command():
    """The whole architecture on random weights, as the README's first command runs it."""
    command = shlex.split(next(command for command in readme_commands() if "--weights random" in command))
    result = subprocess.run([sys.executable, str(ROOT / command[1]), *command[2:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the weights are random: the result is noise" in result.stdout
    audio, rate = soundfile.read(command[command.index("--out") + 1])
    assert rate == 16000 and len(audio) == round(float(command[command.index("--seconds") + 1]) * 16000)
    assert 0.01 < audio.std() < 0.9 and np.abs(audio).max() <= 1


def test_readme_python(params, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert len(code.strip().splitlines()) <= 7
    load, generate = musicldm.load_config, musicldm.generate
    small = {"audio_length_in_s": 0.32, "num_inference_steps": 2}
    monkeypatch.setattr(musicldm, "load_config", lambda *_, **__: load(musicldm.DEFAULT_CONFIG, GOLDEN / "checkpoint"))
    monkeypatch.setattr(musicldm, "generate", lambda *given, **options: generate(*given, **{**options, **small}))
    exec(code, {})
    assert [name for name in files() if name.endswith(".wav")]
