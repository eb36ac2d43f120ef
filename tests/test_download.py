"""Downloading: a server on this machine plays the Hugging Face hub. A download ends with the right bytes where
huggingface_hub finds them too, or with one error that says what to do. No secret is ever sent.
"""

import hashlib
import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load, save

import hipa
from clip import Tokenizer

REPO, COMMIT = "org/name", "0123456789abcdef0123456789abcdef01234567"
INDEX, CONFIG = "the index", "unet/config.json"
MERGES, SPECIAL = "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"
UNET, HALF = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server.hub
        name = self.path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        name = INDEX if name == f"/api/models/{REPO}/revision/main?blobs=true" else name
        hub.asked.append(name)
        hub.headers += str(self.headers)
        data = hub.index() if name == INDEX else hub.files.get(name)
        if name in hub.faults:
            hub.faults[name](self, data)
        else:
            self.answer(200 if data else 404, data or b"")

    def answer(self, status, data=b"", length=None, location=""):
        self.send_response(status)
        self.send_header("Content-Length", length or len(data))
        self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(data)


class Hub(SimpleNamespace):
    """`files` {name: bytes}; `faults` {name: what is done instead}; what was `asked` for, and with which `headers`."""

    def index(self):
        """What the hub says of a repository. Only large files have a sha256."""
        siblings = []
        for name, data in self.files.items():
            large = {"lfs": {"sha256": hashlib.sha256(data).hexdigest()}} if name.endswith(".safetensors") else {}
            siblings.append({"rfilename": name, "size": len(data), **large})
        return json.dumps({"sha": COMMIT, "siblings": siblings}).encode()

    def private_file(self, data):
        hipa.write_file(path := self.refs.parent.parent.parent / "private", data)
        return path

    def arrived(self):
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def hub(sd15_like, tmp_path, monkeypatch):
    """A hub that has the small checkpoint. The cache is empty. The machine is full of secrets."""
    files = {path.relative_to(sd15_like).as_posix(): path.read_bytes() for path in sd15_like.rglob("*.*")}
    cache = tmp_path / "cache" / "models--org--name"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(files=files, faults={}, asked=[], headers="", folder=cache / "snapshots" / COMMIT, refs=cache / "refs")
    server.hub = hub
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.delenv("HF_HOME", raising=False)
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(cache.parent), "no_proxy": "*"}
    for name, value in (env | {"HOME": str(tmp_path), "HF_TOKEN": "secret"}).items():
        monkeypatch.setenv(name, value)
    hipa.write_file(tmp_path / ".netrc", b"default login secret password secret")
    hipa.write_file(tmp_path / ".cache" / "huggingface" / "token", b"secret")
    yield hub
    server.shutdown()
    server.server_close()
    assert not any(word in hub.headers for word in ("secret", "Authorization", "Cookie"))


def is_refused(*words):
    """Looking for the checkpoint ends in an error with each of `words`."""
    with pytest.raises(hipa.UserError) as caught:
        hipa.find_checkpoint(REPO)
    assert all(word in str(caught.value) for word in words) and "secret" not in str(caught.value), caught.value


def test_a_whole_checkpoint(hub):
    """Exactly its files arrive, huggingface_hub finds them, and from then on nobody is asked."""
    hub.files["tokenizer/added_tokens.json"] = b"{}"
    expected = dict(hub.files)
    hub.files |= {"unet/diffusion_pytorch_model.bin": b"a pickle", "safety_checker/model.safetensors": b"large"}
    assert hipa.find_checkpoint(REPO) == hub.folder and hub.arrived() == expected
    assert sorted(hub.asked) == sorted([INDEX, *expected])
    cache = hub.refs.parent.parent
    assert huggingface_hub.snapshot_download(REPO, cache_dir=cache, local_files_only=True) == str(hub.folder)
    assert huggingface_hub.try_to_load_from_cache(REPO, UNET, cache_dir=cache) == str(hub.folder / UNET)
    hub.asked.clear()
    assert hipa.find_checkpoint(REPO) == hub.folder and not hub.asked


@pytest.mark.parametrize("name, place", [
    ("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("", ".cache/huggingface/hub"),
])  # fmt: skip
def test_the_cache_is_where_huggingface_hub_has_it(hub, tmp_path, monkeypatch, name, place):
    for other in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    if name:
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / place / "models--org--name"
    hipa.write_file(folder / "refs" / "main", b"0123")
    for part in ("text_encoder", "unet", "vae"):
        hipa.write_file(folder / "snapshots" / "0123" / part / "model.safetensors", b"")
    assert hipa.find_checkpoint(REPO) == folder / "snapshots" / "0123" and not hub.asked
    script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()
    assert Path(theirs) == tmp_path / place


@pytest.mark.parametrize("there", [(UNET, HALF), (UNET,), (HALF,)], ids=["both", "full only", "half only"])
@pytest.mark.parametrize("half, best", [(True, HALF), (False, UNET)])
def test_each_precision_has_its_file(hub, half, best, there):
    """Where that is missing, the other one is taken. Never both."""
    full = hub.files.pop(UNET)
    both = {UNET: full, HALF: save({key: tensor.half() for key, tensor in load(full).items()})}
    hub.files |= {name: both[name] for name in there}
    hipa.find_checkpoint(REPO, half)
    assert both.keys() & hub.arrived().keys() == {best if best in there else there[0]}


@pytest.mark.parametrize("layout", ["official", "transformers 5"])
def test_a_downloaded_sd21_pads_as_the_official_one(hub, tmp_path, layout):
    """Its tokenizer_config.json says end-of-text, but its special_tokens_map.json wins. What transformers 5 saves has
    neither this file nor vocab.json nor merges.txt: no repository needs all files."""
    from transformers import CLIPTokenizer

    hub.files[SPECIAL] = json.dumps(json.loads(hub.files[SPECIAL]) | {"pad_token": "!"}).encode()
    if layout == "transformers 5":
        for name in [name for name in hub.files if name.startswith("tokenizer/")]:
            hipa.write_file(tmp_path / name, hub.files.pop(name))
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "saved")
        hub.files |= {f"tokenizer/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        assert not hub.files.keys() & {MERGES, SPECIAL}
    folder = hipa.find_checkpoint(REPO) / "tokenizer"
    expected = CLIPTokenizer.from_pretrained(folder)(["a cat"], padding="max_length", max_length=77)["input_ids"]
    assert Tokenizer.load(folder)(["a cat"]).tolist() == expected and expected[0][-1] == 0  # "!"


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_several_at_once(hub, monkeypatch, pool):
    """Each has all files in the end, and nothing else is left."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.05) or fsync(file))  # so that they do meet
    fork = {"mp_context": multiprocessing.get_context("fork")} if pool is ProcessPoolExecutor else {}
    with pool(4, **fork) as executor:
        assert list(executor.map(hipa.find_checkpoint, [REPO] * 4)) == [hub.folder] * 4
    assert hub.arrived() == hub.files and os.listdir(hub.refs) == ["main"]


FAULTS = {  # what the hub does
    "401": lambda hub, data: hub.answer(401),
    "404": lambda hub, data: hub.answer(404),
    "no HTTP": lambda hub, data: hub.wfile.write(b"\0\r\n"),
    "the connection is cut": lambda hub, data: hub.answer(200, data[: len(data) // 2], len(data)),
    "a login page": lambda hub, data: hub.answer(200, b"<!DOCTYPE html><html>Sign in</html>"),
    "to this machine": lambda hub, data: hub.answer(302, location=f"file://{hub.server.hub.private_file(data)}"),
    "wrong bytes": lambda hub, data: hub.answer(200, data[:-1] + b"!"),
    "a commit that is a path": lambda hub, data: hub.answer(200, b'{"sha": "../../../out", "siblings": []}'),
}


@pytest.mark.parametrize("name, fault", [
    (name, fault) for name, faults in {INDEX: list(FAULTS), MERGES: list(FAULTS)[:6], UNET: list(FAULTS)[:7]}.items()
    for fault in faults
])  # fmt: skip
def test_a_download_that_fails(hub, name, fault):
    """The error names the tool that can log in and resume. Whole files stay, nothing else does; next time, only what is
    missing is fetched. refs/main is written last."""
    hub.faults[name] = FAULTS[fault]
    is_refused(f"hf download {REPO}", fault if fault.isdigit() else "")
    there = hub.arrived()
    assert there.items() <= hub.files.items() and there.keys() == set(hub.asked) - {INDEX, name}
    assert not hub.refs.exists()
    hub.faults.clear()
    hub.asked.clear()
    assert hipa.find_checkpoint(REPO) == hub.folder and hub.arrived() == hub.files
    assert sorted(hub.asked) == sorted([INDEX, *(hub.files.keys() - there.keys())])


def test_what_others_tools_began_is_completed(hub):
    """huggingface_hub writes refs/main first: if it was interrupted then, files are missing. They are fetched."""
    hipa.write_file(hub.refs / "main", COMMIT.encode())
    hipa.write_file(hub.folder / CONFIG, hub.files[CONFIG])
    assert hipa.find_checkpoint(REPO) == hub.folder and hub.arrived() == hub.files and CONFIG not in hub.asked


def test_settings_and_tokenizer_alone(hub):
    """For tools/convert.py. Later, only the weights are fetched."""
    assert hipa.find_checkpoint(REPO, weights=False) == hub.folder
    assert hub.arrived() == {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    hub.asked.clear()
    assert hipa.find_checkpoint(REPO, weights=False) == hub.folder and not hub.asked
    assert hipa.find_checkpoint(REPO) == hub.folder and hub.arrived() == hub.files
    assert all(name == INDEX or name.endswith(".safetensors") for name in hub.asked)


@pytest.mark.parametrize("name, value", [
    ("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_ENDPOINT", "nonsense"), ("HF_ENDPOINT", "http://a b"),
    ("HF_HUB_CACHE", "~/.netrc"), ("HF_HUB_CACHE", "~/.netrc/hub"),
])  # fmt: skip
def test_no_network_and_no_cache(hub, monkeypatch, name, value):
    """Nobody listens at the hub's address, or it is none. A file stands where the cache should be."""
    monkeypatch.setenv(name, value)
    is_refused(f"{REPO} cannot be downloaded" if name == "HF_ENDPOINT" else ".netrc")


@pytest.mark.parametrize("config", [None, b'{"cross_attention_dim": 2048, "addition_embed_type": "text_time"}'])
def test_no_stable_diffusion(hub, config):
    """It is refused before its gigabytes are here."""
    hub.files.pop(CONFIG) if config is None else hub.files.update({CONFIG: config})
    is_refused(CONFIG, "Stable Diffusion 1.x or 2.x" if config else "")
    assert not any(name.endswith(".safetensors") for name in hub.asked)
