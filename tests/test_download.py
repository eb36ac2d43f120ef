"""Downloading a checkpoint: two servers on this machine play the Hugging Face hub and the storage it redirects to.

A download ends with the right bytes under the right names, where huggingface_hub finds them too, or with one line that
says what to do. What arrived is gone on with; the token goes to the hub alone.
"""

import contextlib
import hashlib
import http.server
import itertools
import re
import shutil
import socketserver
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

import hipa

REPO = "org/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"
SMALL = "unet/config.json"


# ----------------------------------------------------------------------------------------------------- the two servers
class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub or as the storage, with the next of the faults planned for the file that is asked for."""

    def do_GET(self):
        play, name = self.server.play, re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path)[1]
        role = "hub" if self.server is play.hub else "storage"
        play.requests.append((role, name, dict(self.headers)))
        hub_redirects = role == "hub" and name.endswith(".safetensors") and name in play.files
        fault = None if hub_redirects and not play.at_hub else next(play.faults.get(name, iter(())), None)
        if fault == "garbage":
            self.wfile.write(b"\x00not HTTP at all\r\n\r\n")
        elif isinstance(fault, int) or name not in play.files:
            self.answer(fault or 404, b"<html>refused</html>")
        elif hub_redirects:
            etag = play.etags.get(name) or hashlib.sha256(play.files[name]).hexdigest()
            location = play.location or play.address(play.storage) + self.path
            self.answer(302, **{"X-Linked-Etag": f'"{etag}"', "Location": location})
        else:
            self.serve(play.files[name], fault)

    def serve(self, data, fault):
        status, extra = 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and fault != "ignore range":
            start = int(asked[1])
            if start >= len(data):
                return self.answer(416)
            status, extra = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        if fault == "wrong bytes":
            data = bytes(byte ^ 1 for byte in data)
        if fault == "cut chunked":
            return self.answer(status, b"ffffff\r\n" + data[:1000], **extra, **{"Transfer-Encoding": "chunked"})
        self.answer(status, data[: len(data) // 2] if fault == "cut" else data, length=len(data), **extra)

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        if self.server is self.server.play.hub:
            self.send_header("X-Repo-Commit", self.server.play.commit)
        if "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    protocol_version = "HTTP/1.0"  # the connection ends with the answer, also where that was cut short

    def log_message(self, *_):
        pass


class Play:
    """Both servers. `files` {name: bytes}; `faults` {name: iterator of what to do wrong}, at the storage for weights
    unless `at_hub`; `etags` {name: a sha256 the hub is to claim}; `location` where it is to redirect to, if not to the
    storage; `requests` [(role, name, headers)]."""

    def __init__(self, folder):
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}
        self.faults, self.etags, self.requests, self.commit = {}, {}, [], COMMIT
        self.at_hub, self.location = False, None
        self.hub, self.storage = (socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) for _ in range(2))
        for server in (self.hub, self.storage):
            server.play, server.daemon_threads = self, True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def address(self, server):
        return f"http://127.0.0.1:{server.server_address[1]}"

    def asked(self, role, name):
        """The headers of each request for a file."""
        return [headers for r, n, headers in self.requests if (r, n) == (role, name)]

    def close(self):
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and none of the caller's settings. The hub is a port where nobody listens."""
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socketserver.TCPServer(("127.0.0.1", 0), None) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.server_address[1]}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HIPA_RETRY_SECONDS", "0")
    return tmp_path / "cache"


@pytest.fixture
def play(sd15_like, cache, monkeypatch):
    play = Play(sd15_like)
    monkeypatch.setenv("HF_ENDPOINT", play.address(play.hub))
    yield play
    play.close()


def snapshot(cache):
    return cache / "models--org--name" / "snapshots" / COMMIT


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def refuses(*words, model=REPO, **options):
    with pytest.raises(hipa.UserError) as caught:
        hipa.load(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def same_weights(model, folder):
    saved = load_file(folder / UNET)
    return all(torch.equal(weight, saved[key]) for key, weight in model.unet.state_dict().items())


# --------------------------------------------------------------------------------------------------------- all is well
def test_a_whole_checkpoint(play, cache, sd15_like):
    """It loads, equals the original, leaves no partial file, and the second time asks nobody."""
    assert same_weights(hipa.load(REPO), sd15_like)
    assert files(snapshot(cache)) == {snapshot(cache) / name for name in play.files}
    assert play.asked("storage", UNET) and play.asked("hub", SMALL)
    play.requests.clear()
    assert same_weights(hipa.load(REPO), sd15_like)
    assert play.requests == []


def test_huggingface_hub_finds_it_too(play, cache):
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    hipa.load(REPO)
    assert try_to_load_from_cache(REPO, UNET, cache_dir=cache) == str(snapshot(cache) / UNET)
    assert snapshot_download(REPO, cache_dir=cache, local_files_only=True) == str(snapshot(cache))


@pytest.mark.parametrize(
    "variable, hub", {"HF_HUB_CACHE": ".", "HF_HOME": "hub", "HOME": ".cache/huggingface/hub"}.items()
)
def test_what_huggingface_hub_downloaded_is_used(sd15_like, cache, monkeypatch, tmp_path, variable, hub):
    """Its cache holds blobs named by hash, and snapshots of links to them. No server is running."""
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path))
    folder = snapshot(tmp_path / hub)
    for file in files(sd15_like):
        blob = folder.parent.parent / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = folder / file.relative_to(sd15_like)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(COMMIT)
    assert same_weights(hipa.load(REPO), sd15_like)


def test_an_incomplete_cache_is_completed(play, cache, sd15_like):
    """Only what is missing is fetched."""
    hipa.load(REPO)
    (snapshot(cache) / UNET).unlink()
    play.requests.clear()
    assert same_weights(hipa.load(REPO), sd15_like)
    assert {name for role, name, _ in play.requests if role == "storage"} == {UNET}


def test_a_tokenizer_in_one_file(play, cache, tmp_path):
    """What transformers 5 saves has tokenizer.json, and neither vocab.json nor merges.txt."""
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(play.files.pop(f"tokenizer/{name}"))
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    play.files |= {f"tokenizer/{p.name}": p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    assert hipa.load(REPO).tokenizer(["a cat"]).shape == (1, 77)
    assert (snapshot(cache) / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("there", [(UNET, HALF), (UNET,), (HALF,)], ids=["both", "full only", "half only"])
def test_each_dtype_fetches_the_file_of_its_precision(play, cache, dtype, there):
    """And falls back to the other one; never both."""
    weights = load(play.files[UNET])
    available = {UNET: play.files.pop(UNET), HALF: save({key: tensor.half() for key, tensor in weights.items()})}
    play.files |= {name: available[name] for name in there}
    assert hipa.load(REPO, dtype=dtype).dtype == dtype
    wanted = HALF if dtype == torch.float16 else UNET
    expected = wanted if wanted in there else there[0]
    assert [name for name in (UNET, HALF) if (snapshot(cache) / name).exists()] == [expected]


# ------------------------------------------------------------------------------------------------ interrupted, damaged
def test_a_cut_connection_is_gone_on_with(play, cache, sd15_like):
    play.faults[UNET] = iter(["cut"])
    assert same_weights(hipa.load(REPO), sd15_like)
    half = len(play.files[UNET]) // 2
    assert [headers.get("Range") for headers in play.asked("storage", UNET)] == [None, f"bytes={half}-"]
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]


def leave_partial(cache, data):
    """What a run that was killed leaves."""
    part = snapshot(cache) / f"{UNET}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data)


def test_an_earlier_run_is_gone_on_with(play, cache):
    leave_partial(cache, play.files[UNET][:1000])
    hipa.load(REPO)
    assert [headers.get("Range") for headers in play.asked("storage", UNET)] == ["bytes=1000-"]
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]


def test_a_partial_file_that_is_longer_than_the_whole(play, cache):
    """The server has nothing past its end (416): the download starts over."""
    leave_partial(cache, play.files[UNET] + b"more")
    hipa.load(REPO)
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]


@pytest.mark.parametrize(
    "faults",
    [["cut", "ignore range"], ["cut", "cut", "cut"], ["cut chunked"], ["garbage"], [429], [500, 503], ["cut", 500]],
    ids=str,
)
def test_faults_that_pass(play, cache, faults):
    """A server that sends the whole file where the rest was asked for (200 for a Range), that answers nonsense, or that
    is busy: a few tries, and the right bytes."""
    play.faults[UNET] = iter(faults)
    hipa.load(REPO)
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("fault", ["cut chunked", "garbage", 429, 500, 503])
@pytest.mark.parametrize("name", [UNET, SMALL])
def test_faults_that_stay(play, cache, fault, name):
    """A few tries, then one line; the file does not appear under its name."""
    play.faults[name] = itertools.repeat(fault)
    refuses("cannot download", name, "--model emoji", *([f"HTTP {fault}"] if isinstance(fault, int) else []))
    assert 2 <= len(play.asked("storage" if name == UNET else "hub", name)) <= 6
    assert not (snapshot(cache) / name).exists()


def test_wrong_bytes_of_the_right_size(play, cache):
    """The sha256 tells: the partial file is removed, and the next run starts afresh."""
    play.faults[UNET] = iter(["wrong bytes"])
    refuses("sha256", UNET, "try again")
    assert not (snapshot(cache) / UNET).exists() and not list(cache.rglob("*.part"))
    hipa.load(REPO)
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]


def test_a_partial_file_of_another_version(play, cache):
    """What was there already is checked too, not only what arrived."""
    leave_partial(cache, b"\x01" * 1000)
    refuses("sha256", UNET)
    assert not list(cache.rglob("*.part"))


def test_official_weights_are_pinned(play):
    """sd15's hashes stand in hipa.py: a mirror that serves other weights, with a hash to match, is caught."""
    refuses("sha256", hipa.SHA256[hipa.SHORT_NAMES["sd15"]]["text_encoder/model.safetensors"], model="sd15")


def test_the_pinned_hash_wins_over_the_hubs(play, cache, monkeypatch):
    monkeypatch.setitem(hipa.SHA256, REPO, {UNET: hashlib.sha256(play.files[UNET]).hexdigest()})
    play.etags[UNET] = "0" * 64
    hipa.load(REPO)
    assert (snapshot(cache) / UNET).read_bytes() == play.files[UNET]


def test_a_full_disk(play, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hipa, "write_body", full)
    refuses("no space left", str(cache))


def test_a_commit_that_is_a_path(play, cache, tmp_path):
    """The hub names the snapshot's folder; it cannot name one outside the cache."""
    play.commit = "../../../outside"  # of cache/models--org--name/snapshots
    with contextlib.suppress(hipa.UserError):
        hipa.load(REPO)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_a_redirect_to_a_file_of_this_machine(play, cache, tmp_path):
    """It is not followed: a hub has no business here."""
    (tmp_path / "private").write_bytes(b"private")
    play.location = f"file://{tmp_path}/private"
    refuses("text_encoder/model.safetensors", "redirected", "file:")
    assert not any(path.read_bytes() == b"private" for path in files(cache))


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("name", ["model_index.json", SMALL, UNET])
def test_refused_by_the_hub(play, status, name):
    """Asking again would not help: one request per file."""
    play.at_hub = True
    play.faults |= {n: itertools.repeat(status) for n in ({UNET, HALF} if name == UNET else {name})}
    refuses(f"HTTP {status}", Path(name).stem.split(".")[0], "name right", "HF_TOKEN")
    assert len(play.asked("hub", name)) == 1


def test_no_such_repo(play, monkeypatch):
    play.files.clear()
    refuses("no/such", "HTTP 404", "name right", model="no/such")


@pytest.mark.parametrize("token", ["hf_secret", "hf_secret\n"], ids=["plain", "with a newline, as from a file"])
def test_the_token_goes_to_the_hub_only(play, monkeypatch, capfd, token):
    monkeypatch.setenv("HF_TOKEN", token)
    hipa.load(REPO)
    seen = {(role, headers.get("Authorization")) for role, _, headers in play.requests}
    assert seen == {("hub", "Bearer hf_secret"), ("storage", None)}
    assert "hf_secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("fault", [401, 500, "garbage", "cut chunked"])
def test_the_token_is_in_no_message(play, monkeypatch, capfd, fault):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    play.faults[SMALL] = itertools.repeat(fault)
    with pytest.raises(hipa.UserError) as caught:
        hipa.load(REPO)
    assert "hf_secret" not in str(caught.value) + "".join(capfd.readouterr())


# ---------------------------------------------------------------------------------------------------------- no network
@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_asks_nobody(play, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    refuses(REPO, "not in the cache", "HF_HUB_OFFLINE")
    assert play.requests == []


def test_offline_uses_the_cache(play, monkeypatch, sd15_like):
    hipa.load(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same_weights(hipa.load(REPO), sd15_like)


def test_no_network(cache):
    """Nobody listens at the hub's address."""
    refuses("cannot download", REPO, "refused", "--model emoji or a local folder")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://a b", "ftp://127.0.0.1:1"])
def test_an_endpoint_that_is_no_address(cache, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refuses("HF_ENDPOINT", endpoint.rstrip("/"))
