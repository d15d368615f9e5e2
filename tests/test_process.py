"""What calls share in one process: threads, forks, and the memory of compiled graphs."""
import functools
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ENVIRONMENT, golden_config

import musicldm
import weights

SHORT = {"audio_length_in_s": 0.32, "num_inference_steps": 2}


def in_a_process(script, home=None):
    """What a fresh Python prints that runs a script, in which `params` are loaded."""
    begin = "import os, musicldm, weights\nfrom conftest import golden_config\ncfg = golden_config()\n"
    paths = os.pathsep.join(str(pathlib.Path(module.__file__).parent) for module in (musicldm, sys.modules[__name__]))
    result = subprocess.run([sys.executable, "-c", begin + "params = weights.load_params(cfg)\n" + script], text=True,
                            stdout=subprocess.PIPE, env={**ENVIRONMENT, "PYTHONPATH": paths}, timeout=120, check=True)
    return result.stdout.splitlines()


def test_threads_get_the_same_bytes_as_one_after_the_other(params):
    cfg, half = golden_config(), golden_config("dtype=float16")
    mel = np.random.default_rng(0).standard_normal((1, 32, 16)).astype(np.float32)
    calls = [lambda: musicldm.generate(cfg, "a", params, **SHORT), lambda: musicldm.generate(cfg, "b", params, **SHORT),
             lambda: musicldm.encode_prompt(cfg, ["slow blues", "many words " * 5], params),
             lambda: musicldm.encode_audio(cfg, mel[0, 0], params), lambda: musicldm.vocode(cfg, mel, params),
             lambda: musicldm.decode_latents(cfg, mel.reshape(1, 8, 16, 4), params),
             lambda: weights.load_params(half)["vocoder"]["conv_post"]["weight"].asnumpy()]
    wanted = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda call: call(), calls * 4))
    assert all(np.array_equal(result, expected) for result, expected in zip(results, wanted * 4))


CALLING_BACK = """
import numpy
latents, options = numpy.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(numpy.float32), %r
musicldm.SIZES, inside = 1, []  # so that the callback forgets the graph that runs
result = musicldm.generate(cfg, "a", params, **options, output_type="latent", callback=lambda *_: inside.append(
    musicldm.decode_latents(cfg, latents, params)))
print(result.tobytes().hex(), *(mel.tobytes().hex() for mel in inside))
""" % SHORT


call_back = functools.partial(in_a_process, CALLING_BACK)


@pytest.mark.beside([call_back])
def test_a_callback_may_call_back_in_even_when_that_forgets_the_graphs(params, beside):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    wanted = musicldm.generate(golden_config(), "a", params, **SHORT, output_type="latent").tobytes().hex()
    mel = musicldm.decode_latents(golden_config(), latents, params).tobytes().hex()
    assert beside(call_back)[0].split() == [wanted, mel, mel]


FORKED = """
def child():
    if os.fork() == 0:
        try:
            print(musicldm.encode_prompt(cfg, "a", params).tobytes().hex(), flush=True)
        except weights.InputError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
child()
print(musicldm.encode_prompt(cfg, "a", params).tobytes().hex(), flush=True)
child()
"""


fork = functools.partial(in_a_process, FORKED)


@pytest.mark.beside([fork])
def test_a_fork_computes_if_its_parent_has_not_and_is_refused_otherwise(params, beside):
    before, parent, after = beside(fork)
    assert before == parent == musicldm.encode_prompt(golden_config(), "a", params).tobytes().hex()
    assert after.startswith("this process was forked from one that had computed with MindSpore; valid: to fork before")


MANY_SIZES = """
import numpy, re
musicldm.SIZES, peaks = 2, []
for size in (8, 9, 10, 11, 12, 8):
    mel = musicldm.decode_latents(cfg, numpy.ones((1, 8, size, 4), numpy.float32), params)
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000)
    if size == 8:
        print(mel.tobytes().hex())
print(peaks[-1] - peaks[1])
"""


decode_many_sizes = functools.partial(in_a_process, MANY_SIZES)


@pytest.mark.beside([decode_many_sizes])
def test_memory_does_not_grow_with_the_number_of_lengths(beside):
    """A size of this VAE takes 27 MB of graphs, of which some are oneDNN's to keep, up to a number."""
    first, again, megabytes = beside(decode_many_sizes)
    assert first == again and float(megabytes) < 4 * 27 / 2
