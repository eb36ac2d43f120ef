"""Downloading a checkpoint: two servers on this machine play the Hugging Face hub and the storage it redirects to.

A download ends with the right bytes under the right names, where huggingface_hub finds them too, or with one line that
says what to do. A download that was interrupted is continued. No token is sent anywhere.
"""

import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import socketserver
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, load_file, save

import hipa

REPO, COMMIT = "org/name", "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"
SMALL = "unet/config.json"
INDEX = "the index"


# ----------------------------------------------------------------------------------------------------- the two servers
class Handler(http.server.BaseHTTPRequestHandler):
    """Gives the hub's index, or redirects to the storage, or gives a file. Commits the faults planned for the file."""

    protocol_version = "HTTP/1.0"  # the connection ends with the answer, also where that is cut short

    def do_GET(self):
        play, role = self.server.play, "hub" if self.server is self.server.play.hub else "storage"
        found = re.fullmatch(
            rf"/(?:api/models/{REPO}/revision/main\?blobs=true|{REPO}/resolve/{COMMIT}/(.+))", self.path
        )
        name = found and (found[1] or INDEX)
        play.requests.append((role, name, dict(self.headers)))
        redirects = role == "hub" and name in play.files and name.endswith(".safetensors")
        fault = None if redirects and not play.at_hub else next(play.faults.get(name, iter(())), None)
        if fault == "garbage":
            self.wfile.write(b"\x00not HTTP at all\r\n\r\n")
        elif isinstance(fault, int):
            self.answer(fault)
        elif isinstance(fault, bytes):
            self.answer(200, fault)
        elif redirects:
            self.answer(302, Location=play.location or play.address(play.storage) + self.path)
        elif name == INDEX or name in play.files:
            self.serve(play.index() if name == INDEX else play.files[name], fault)
        else:
            self.answer(404)

    def serve(self, data, fault):
        status, extra = 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and fault != "ignore range":
            if int(asked[1]) >= len(data):
                return self.answer(416)
            status, extra = 206, {"Content-Range": f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"}
            data = data[int(asked[1]) :]
        if fault == "wrong bytes":
            data = bytes(byte ^ 1 for byte in data)
        if fault == "cut chunked":
            return self.answer(status, b"ffffff\r\n" + data[:1000], **extra, **{"Transfer-Encoding": "chunked"})
        self.answer(status, data[: len(data) // 2] if fault == "cut" else data, len(data), **extra)

    def answer(self, status, body=b"<html>an answer</html>", length=None, **headers):
        self.send_response(status)
        if "Transfer-Encoding" not in headers:
            headers["Content-Length"] = len(body) if length is None else length
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Play:
    """Both servers. `files` {name: bytes}; `digests` {name: sha256 that the hub states}, by default the right one;
    `faults` {name: iterator of what to do wrong}, for weights at the storage unless `at_hub`; `location` is where the
    hub redirects to, by default the storage; `requests` [(role, name, headers)]."""

    def __init__(self, folder):
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}
        self.digests, self.faults, self.requests = {}, {}, []
        self.at_hub, self.location = False, None
        self.hub, self.storage = (socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) for _ in range(2))
        for server in (self.hub, self.storage):
            server.play, server.daemon_threads = self, True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def index(self):
        """What the hub says of a repository. Only large files have an "lfs"."""
        siblings = []
        for name, data in self.files.items():
            digest = self.digests.get(name, hashlib.sha256(data).hexdigest())
            lfs = {"lfs": {"sha256": digest, "size": len(data)}} if name.endswith(".safetensors") else {}
            siblings.append({"rfilename": name, "size": len(data)} | lfs)
        return json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()

    def address(self, server):
        return f"http://127.0.0.1:{server.server_address[1]}"

    def asked(self, role, name):
        """The Range of each request for a file."""
        return [headers.get("Range") for r, n, headers in self.requests if (r, n) == (role, name)]

    def close(self):
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and none of the caller's settings. Nobody listens at the hub's port. No waiting."""
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socketserver.TCPServer(("127.0.0.1", 0), None) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.server_address[1]}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hipa, "time", SimpleNamespace(sleep=lambda seconds: None))
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


def refuses(*words, model=REPO):
    """Loading ends in a UserError of one line that holds each of `words`."""
    with pytest.raises(hipa.UserError) as caught:
        hipa.load(model)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def same_weights(model, folder):
    saved = load_file(folder / UNET)
    return all(torch.equal(weight, saved[key]) for key, weight in model.unet.state_dict().items())


def arrived(play, cache):
    """The UNet is there, byte for byte, and no partial file."""
    return (snapshot(cache) / UNET).read_bytes() == play.files[UNET] and not list(cache.rglob("*.part"))


# --------------------------------------------------------------------------------------------------------- all is well
def test_a_whole_checkpoint(play, cache, sd15_like, monkeypatch):
    """It loads and equals the original, huggingface_hub finds it, and from then on nobody is asked."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    assert same_weights(hipa.load(REPO), sd15_like)
    assert files(snapshot(cache)) == {snapshot(cache) / name for name in hipa.files_of(play.files)}
    assert arrived(play, cache)
    assert play.asked("hub", INDEX) == play.asked("storage", UNET) == play.asked("hub", SMALL) == [None]
    assert try_to_load_from_cache(REPO, UNET, cache_dir=cache) == str(snapshot(cache) / UNET)
    assert snapshot_download(REPO, cache_dir=cache, local_files_only=True) == str(snapshot(cache))
    play.requests.clear()
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert same_weights(hipa.load(REPO), sd15_like)
    assert play.requests == []


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
    assert [(role, name) for role, name, _ in play.requests] == [("hub", INDEX), ("hub", UNET), ("storage", UNET)]


def test_a_tokenizer_in_one_file(play, cache, tmp_path):
    """What transformers 5 saves has tokenizer.json, and neither vocab.json nor merges.txt."""
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(play.files.pop(f"tokenizer/{name}"))
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    play.files |= {f"tokenizer/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert hipa.load(REPO).tokenizer(["a cat"]).shape == (1, 77)
    assert (snapshot(cache) / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("there", [(UNET, HALF), (UNET,), (HALF,)], ids=["both", "full only", "half only"])
@pytest.mark.parametrize("dtype, wanted", [(torch.float16, HALF), (torch.float32, UNET)])
def test_each_dtype_fetches_the_file_of_its_precision(play, cache, dtype, wanted, there):
    """Where that is missing it fetches the other one. It never fetches both."""
    full = play.files.pop(UNET)
    half = save({key: tensor.half() for key, tensor in load(full).items()})
    play.files |= {name: {UNET: full, HALF: half}[name] for name in there}
    assert hipa.load(REPO, dtype=dtype).dtype == dtype
    expected = wanted if wanted in there else there[0]
    assert [name for name in (UNET, HALF) if (snapshot(cache) / name).exists()] == [expected]


# ------------------------------------------------------------------------------------------------ interrupted, damaged
@pytest.mark.parametrize(
    "faults",
    [["cut"], ["cut", "ignore range"], ["cut", "cut", "cut"], ["cut chunked"], ["garbage"], [429], [500, 503]],
    ids=str,
)
def test_faults_that_pass(play, cache, faults):
    """A connection is cut; the whole file comes where its rest was asked for; an answer is no HTTP; a server is busy.

    After a few tries the right bytes are there. After a cut only the rest is asked for.
    """
    play.faults[UNET] = iter(faults)
    hipa.load(REPO)
    assert arrived(play, cache)
    if faults[0] == "cut":
        assert play.asked("storage", UNET)[:2] == [None, f"bytes={len(play.files[UNET]) // 2}-"]


@pytest.mark.parametrize("fault", ["cut chunked", "garbage", 429, 500, 503])
@pytest.mark.parametrize("name", [UNET, SMALL, INDEX])
def test_faults_that_stay(play, cache, fault, name):
    """A few tries, then one line. The file does not appear under its name."""
    play.faults[name] = itertools.repeat(fault)
    url = "/api/models/org/name" if name == INDEX else name
    refuses("cannot download", url, "--model emoji", *([f"HTTP {fault}"] if isinstance(fault, int) else []))
    assert 2 <= len(play.asked("storage" if name == UNET else "hub", name)) <= 6
    assert not (snapshot(cache) / name).exists()


def leave_partial(cache, data):
    """Writes what a run that was killed leaves."""
    part = snapshot(cache) / f"{UNET}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data)


def test_an_earlier_run_is_continued(play, cache):
    leave_partial(cache, play.files[UNET][:1000])
    hipa.load(REPO)
    assert play.asked("storage", UNET) == ["bytes=1000-"] and arrived(play, cache)


def test_a_partial_file_that_is_longer_than_the_whole(play, cache):
    """The server has nothing past the file's end (416): the download starts over."""
    leave_partial(cache, play.files[UNET] + b"more")
    hipa.load(REPO)
    assert arrived(play, cache)


@pytest.mark.parametrize("stale", [False, True], ids=["wrong bytes", "partial file of another version"])
def test_the_sha256_tells(play, cache, stale):
    """What was there before is checked too. The partial file is removed, and the next run starts afresh."""
    if stale:
        leave_partial(cache, b"\x01" * 1000)
    else:
        play.faults[UNET] = iter(["wrong bytes"])
    refuses("sha256", UNET, "try again")
    assert not (snapshot(cache) / UNET).exists() and not list(cache.rglob("*.part"))
    hipa.load(REPO)
    assert arrived(play, cache)


def test_a_pinned_hash_wins_over_the_hubs(play, cache, monkeypatch):
    """So a mirror cannot serve other official weights, with a hash to match."""
    pinned = hipa.SHA256[hipa.SHORT_NAMES["sd15"]]
    assert len(pinned) == 4 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in pinned.values())
    monkeypatch.setitem(hipa.SHA256, REPO, {UNET: pinned[UNET]})
    refuses("sha256", pinned[UNET])
    monkeypatch.setitem(hipa.SHA256, REPO, {UNET: hashlib.sha256(play.files[UNET]).hexdigest()})
    play.digests[UNET] = "0" * 64
    hipa.load(REPO)
    assert arrived(play, cache)


def test_a_full_disk(play, cache, monkeypatch):
    """Asking again would not help: one try, and the message says what is wrong."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    refuses("cannot download", "No space left on device")
    monkeypatch.undo()
    assert len(play.asked("hub", INDEX)) == 1


def test_fetch_alone(play, tmp_path):
    """Without a digest and a repository, as COCO's captions are downloaded."""
    path = tmp_path / "folder" / "file"
    url = f"{play.address(play.storage)}/{REPO}/resolve/{COMMIT}/"
    hipa.fetch(url + SMALL, path)
    assert path.read_bytes() == play.files[SMALL]
    with pytest.raises(hipa.UserError, match="HTTP 404$"):
        hipa.fetch(url + "missing", tmp_path / "missing")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/vocab.json", UNET])
def test_a_login_page_that_answers_for_the_hub(play, cache, name):
    """With 200 and HTML, for a file whose checksum nobody knows. It is not kept, and the next run asks anew."""
    play.at_hub, play.faults[name] = True, iter([b"<!DOCTYPE html><html>Sign in</html>"])
    if name == UNET:
        play.digests[name] = None
    refuses(name, "login page")
    assert not (snapshot(cache) / name).exists() and not list(cache.rglob("*.part"))
    hipa.load(REPO)


def test_several_at_once(play, cache):
    """Four processes want the same model: the first one downloads, the others wait, and all have it."""
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            code = 1
            try:
                hipa.load(REPO)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert arrived(play, cache) and play.asked("storage", UNET) == [None]


@pytest.mark.parametrize("headers", [{"Location": "http://[::1"}, {"Content-Length": "abc"}], ids=str)
def test_odd_answers(play, cache, monkeypatch, headers):
    """An address that is none, a length that is none: one line."""
    status = 302 if "Location" in headers else 200
    monkeypatch.setattr(Handler, "serve", lambda self, *_: self.answer(status, b"", None, **headers))
    monkeypatch.setattr(Handler, "answer", odd_answer(Handler.answer))
    refuses("cannot download")


def odd_answer(answer):
    def send(self, status, body=b"", length=None, **headers):
        return answer(self, status, body, headers.pop("Content-Length", length), **headers)

    return send


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("name", [INDEX, SMALL, UNET])
def test_refused_by_the_hub(play, status, name):
    """Asking again would not help: one request. The message names the tool that can log in."""
    play.at_hub, play.faults[name] = True, itertools.repeat(status)
    refuses(f"HTTP {status}", "/api/models/org/name" if name == INDEX else name, f"hf download {REPO}")
    assert len(play.asked("hub", name)) == 1


BAD_INDEX = {
    "a login page": b"<!DOCTYPE html><html>Sign in</html>",
    "no UTF-8": b'{"sha": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "no commit": json.dumps({"siblings": []}).encode(),
    "no files": json.dumps({"sha": COMMIT}).encode(),
    "files of another kind": json.dumps({"sha": COMMIT, "siblings": ["a"]}).encode(),
    "a commit that is a path": json.dumps({"sha": "../../../outside", "siblings": []}).encode(),
}


@pytest.mark.parametrize("answer", BAD_INDEX.values(), ids=BAD_INDEX)
def test_an_index_that_is_none(play, cache, tmp_path, answer):
    """One line says so, nothing is kept, and the next run asks anew."""
    play.faults[INDEX] = iter([answer])
    refuses(play.address(play.hub), "does not answer as the Hugging Face hub", "login page")
    assert not snapshot(cache).exists() and [path.name for path in tmp_path.iterdir()] == ["cache"]
    hipa.load(REPO)


@pytest.mark.parametrize("missing", [UNET, SMALL, "model_index.json", "tokenizer/merges.txt"])
def test_a_repository_of_something_else(play, cache, missing):
    """Without one of the files it is refused before anything large is fetched. Pickles are no weights."""
    play.files["unet/diffusion_pytorch_model.bin"] = b""
    del play.files[missing]
    refuses(REPO, "no complete Stable Diffusion checkpoint", ".safetensors")
    assert [name for _, name, _ in play.requests] == [INDEX]


def test_a_redirect_to_a_file_of_this_machine(play, cache, tmp_path):
    """It is not followed: a hub has no business here."""
    (tmp_path / "private").write_bytes(b"private")
    play.location = f"file://{tmp_path}/private"
    refuses("text_encoder/model.safetensors", "HTTP 302")
    assert not any(path.read_bytes() == b"private" for path in files(cache))


@pytest.mark.parametrize("fault", [None, 401, 500, "garbage"])
def test_no_token_leaves(play, monkeypatch, capfd, fault):
    """Neither in a request nor in a message."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    play.faults[SMALL] = itertools.repeat(fault)
    message = ""
    try:
        hipa.load(REPO)
    except hipa.UserError as error:
        message = str(error)
    assert bool(message) == bool(fault) and play.requests
    assert "hf_secret" not in message + "".join(capfd.readouterr()) + repr(play.requests)
    assert not any(headers.keys() & {"Authorization", "Cookie"} for _, _, headers in play.requests)


# ---------------------------------------------------------------------------------------------------------- no network
@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_asks_nobody(play, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    refuses(REPO, "not in the cache", "HF_HUB_OFFLINE")
    assert play.requests == []


@pytest.mark.parametrize("endpoint", [None, "nonsense", "http://", "http://a b", "ftp://127.0.0.1:1"])
def test_no_network(cache, monkeypatch, endpoint):
    """Nobody listens at the hub's address, or it is no address."""
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refuses("cannot download", REPO, (endpoint or "refused").rstrip("/"), "--model emoji")


@pytest.mark.parametrize("inside", ["", "hub"])
def test_a_cache_that_cannot_be_written(play, tmp_path, monkeypatch, inside):
    """A file stands in its place, or in that of a folder above it."""
    (tmp_path / "taken").write_text("precious")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "taken" / inside))
    refuses(str(tmp_path / "taken"))
