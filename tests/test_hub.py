"""Weights by hub id: the real huggingface_hub against a server on the loopback."""
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

import weights

pytest.importorskip("huggingface_hub")
MUSICLDM = pathlib.Path(__file__).parents[1] / "musicldm.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that a download needs: what a repository holds, and its files."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder, path = self.server.folder, self.path.partition("?")[0]
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/some/music/tree/{COMMIT}"):
            self.answer(json.dumps([{"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                                    for name, file in files.items()]).encode())
        elif path.startswith("/api/models/some/music"):
            self.answer(json.dumps({"id": "some/music", "sha": COMMIT,
                                    "siblings": [{"rfilename": name} for name in files]}).encode())
        elif path.removeprefix(f"/some/music/resolve/{COMMIT}/") in files:
            name = path.removeprefix(f"/some/music/resolve/{COMMIT}/")
            if self.command == "GET":
                self.server.fetched.append(name)
            self.answer(files[name].read_bytes(), breaks=name == self.server.broken)
        else:
            self.answer(b"", 404)

    def answer(self, data, status=200, breaks=False):
        start = int(self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")[0])
        self.send_response(206 if start else status)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hash(data):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:(start + len(data)) // 2 if breaks else None])
        self.close_connection = breaks

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A server of a copy of the golden checkpoint, `folder`; `fetched` are the files that were asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = pathlib.Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "repository"))
    server.fetched, server.broken, server.handle_error = [], None, lambda *args: None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """A function that runs the command line on the hub id in a new process, with one cache for all."""
    def start(*arguments, hub_id="some/music", **environment):
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache"),
                       "HF_HUB_DISABLE_TELEMETRY": "1", "MS_COMPILER_CACHE_ENABLE": "0", **environment}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            [sys.executable, MUSICLDM, "--weights", hub_id, "--prompt", "a", "--seconds", "0.04", "--steps", "1",
             "--guidance", "1", "--out", tmp_path / "a.wav", *arguments],
            env={**kept, **environment}, capture_output=True, text=True)
    return start


def twins(folder):
    """Beside every file of weights one in float16, as save_pretrained(variant="fp16") names it, and pickles."""
    for model, name in weights.MODELS.items():
        path = folder / model / f"{name}.safetensors"
        save_file({key: x.astype(np.float16) if x.dtype == np.float32 else x for key, x in load_file(path).items()},
                  path.with_name(f"{name}.fp16.safetensors"))
        (folder / model / "pytorch_model.bin").write_bytes(b"?")


def test_what_is_needed_is_fetched_once_and_quiet_is_quiet(hub, run, tmp_path):
    twins(hub.folder)
    (hub.folder / "README.md").write_text("weights")
    first = run("--quiet")
    assert (first.returncode, first.stdout, first.stderr) == (0, "", "")
    wanted = {str(path.relative_to(GOLDEN / "checkpoint")) for path in (GOLDEN / "checkpoint").rglob("*.*")}
    assert set(hub.fetched) == wanted and len(hub.fetched) == len(wanted)
    sound = (tmp_path / "a.wav").read_bytes()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # all is cached
        again = run("--quiet", **environment)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
        assert (tmp_path / "a.wav").read_bytes() == sound and len(hub.fetched) == len(wanted)
    shown = run()
    assert shown.returncode == 0 and "Fetching" in shown.stderr


def test_files_of_the_variant_where_there_are_no_others(hub, run):
    twins(hub.folder)
    for model in ("unet", "vocoder"):
        (hub.folder / model / f"{weights.MODELS[model]}.safetensors").unlink()
    done = run("--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert {name for name in hub.fetched if name.endswith("safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "vocoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}


def test_a_broken_transfer_is_one_line_and_the_next_run_completes_it(hub, run, tmp_path):
    hub.broken = "unet/diffusion_pytorch_model.safetensors"
    broken = run("--quiet")
    assert broken.returncode == 2 and not (tmp_path / "a.wav").exists()
    last = broken.stderr.splitlines()[-1]
    assert last.startswith("musicldm: error: weights: cannot fetch 'some/music': ")
    offline = run("--quiet", HF_HUB_OFFLINE="1")  # with half of the files
    assert offline.returncode == 2 and offline.stderr.startswith("musicldm: error: weights: ")
    assert len(offline.stderr.splitlines()) == 1
    hub.broken = None
    done = run("--quiet")
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "a.wav").exists()


def test_what_is_not_there_is_one_line(hub, run):
    for change in ({"hub_id": "no/such"}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        failed = run("--quiet", **change)
        assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith("musicldm: error: weights: cannot")
        assert not hub.fetched


def test_another_pipeline_is_refused(hub, run):
    index = hub.folder / "model_index.json"
    index.write_text(index.read_text().replace("MusicLDMPipeline", "AudioLDMPipeline"))
    failed = run("--quiet")
    assert failed.returncode == 2 and "'AudioLDMPipeline'; valid: a MusicLDMPipeline" in failed.stderr
