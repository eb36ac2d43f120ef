"""Whatever is wrong with a checkpoint, `hipa.load` says in one line which file it is and what to do about it.

Also: nothing in a checkpoint can run code, loading makes no copy of the weights, and both precisions are found.
"""

import faulthandler
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hipa

TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(sd15_like, tmp_path):
    """A copy of the small checkpoint, to be damaged."""
    return shutil.copytree(sd15_like, tmp_path / "model")


def refuses(model, *words, dtype=torch.float32):
    """Loading ends in a UserError of one line that holds each of `words`."""
    with pytest.raises(hipa.UserError) as caught:
        hipa.load(model, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def safetensors(header, data=b"", length=None):
    """A safetensors file's bytes: the header's length, the header (a dict, or bytes), the data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------------------------- no checkpoint
@pytest.mark.parametrize(
    "model", ["/nowhere/model", "sd16", "a/b/c", "a b/c", "../emoj", "https://example.com/a/b", "x" * 500]
)
def test_no_such_model(model):
    for place in (model, Path(model)) if model[0] == "/" else (model,):
        refuses(place, "no model", repr(model), "a checkpoint folder", "Hugging Face id", "sd15")


def test_a_relative_path_that_leads_nowhere(monkeypatch):
    """One of two parts looks like a Hugging Face id; offline, that is not asked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses(Path("nowhere/model"), "nowhere/model", "not in the cache", "HF_HUB_OFFLINE")


def test_a_file_and_an_empty_folder(folder, tmp_path):
    refuses(folder / UNET, UNET, "no model", "a checkpoint folder")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", str(tmp_path / "empty"), "tokenizer")


# -------------------------------------------------------------------------------------------------------- weight files
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:19da7aaa\nsize 3438167540\n"
BROKEN = "truncated or damaged"
CONTENTS = {
    "an HTML page": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "HTML page", "download again"),
    "an indented HTML page": (b"\n\n  <html></html>" + b" " * 99, "HTML page", "download again"),
    "a git-LFS pointer": (LFS, "git-LFS pointer", "git lfs pull"),
    "some text": (b"Not found\n" * 9, BROKEN, "download again"),
    "zeros": (bytes(1000), BROKEN),
    "a header of 2^64 - 1 bytes": (safetensors(b"{}", length=2**64 - 1), BROKEN),
    "a header of 100 GB": (safetensors(b"{}", length=10**11), BROKEN),
    "a header that is no JSON": (safetensors(b"{" * 100), BROKEN),
    "a header nested deeply": (safetensors(b'{"a":' * 10**5), BROKEN),
    "a header that is no UTF-8": (safetensors(b'{"\xff": 1}'), BROKEN),
    "overlapping tensors": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), BROKEN),
    "a hole between tensors": (safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), BROKEN),
    "offsets past the end": (safetensors({"a": tensor(0, 400)}, bytes(12)), BROKEN),
    "offsets backwards": (safetensors({"a": tensor(8, 0)}, bytes(12)), BROKEN),
    "an unknown dtype": (safetensors({"a": tensor(0, 8, "F31")}, bytes(8)), BROKEN),
    "a shape whose product overflows": (
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}}, bytes(8)), BROKEN,
    ),
    "no tensors": (safetensors({}), "does not fit its config.json", "is missing", " more do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("data, words", [(data, words) for data, *words in CONTENTS.values()], ids=CONTENTS)
def test_something_else_in_the_weight_file(folder, data, words):
    (folder / UNET).write_bytes(data)
    refuses(folder, UNET, *words)


@pytest.mark.parametrize("where", [0, 1, 7, 8, 9, 200, 0.3, 0.9, -1])
def test_a_truncated_file(folder, where):
    """Cut at a byte, at a fraction of its length, or short of its last byte. At 0: an empty file."""
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: int(where * len(data)) if isinstance(where, float) else where])
    refuses(folder, UNET, BROKEN, "download again")


def test_no_weight_file(folder):
    (folder / UNET).unlink()
    refuses(folder, UNET, "is missing")
    (folder / UNET).mkdir()
    refuses(folder, UNET)


class Payload:
    """Unpickling this creates a folder in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


PICKLES = {f"protocol {n}": pickle.dumps({"w": Payload(), "x": "x" * 100}, n) for n in (0, 2, 3, 4, 5)}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "ckpt", "pt"])
@pytest.mark.parametrize("kind", ["torch", *PICKLES])
def test_a_pickle(folder, tmp_path, monkeypatch, suffix, kind):
    """It is refused unread, under its own name or that of the weights. The payload does run where it is unpickled."""
    monkeypatch.chdir(tmp_path)
    path = (folder / UNET).with_suffix(f".{suffix}")
    (folder / UNET).unlink()
    torch.save({"w": Payload()}, path) if kind == "torch" else path.write_bytes(PICKLES[kind])
    named = suffix != "safetensors" or kind != "protocol 0"  # which has no mark at its beginning
    refuses(folder, path.name, "pickle" if named else BROKEN, ".safetensors")
    assert not Path("payload-ran").exists()
    with open(path, "rb") as file:
        torch.load(file, weights_only=False) if kind == "torch" else pickle.load(file)
    assert Path("payload-ran").exists()


@pytest.mark.parametrize("length", [640, 640 + 65536, 0x4B50, 0x3C20])
def test_a_good_file_whose_first_bytes_look_like_something_else(tmp_path, length):
    r"""A file begins with its header's length, and 640 reads `\x80\x02` as a pickle, 0x4B50 `PK` as a zip, and
    0x3C20 ` <` as HTML. Only what follows tells."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(safetensors(json.dumps({"a": tensor(0, 8)}).encode().ljust(length), bytes(8)))
    assert hipa.read_weights(path)["a"].tolist() == [0, 0]


def test_200_random_changes_of_a_header(sd15_like, tmp_path):
    """One to three bytes of the header changed: refused, or loaded where the change means nothing. Never a hang."""
    config = hipa.read_config(hipa.CLIPTextConfig, sd15_like / "text_encoder" / "config.json")
    data = (sd15_like / TEXT).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "model.safetensors"
    rng = random.Random(0)
    refused = 0
    faulthandler.dump_traceback_later(60, exit=True)  # a hang inside C ends the run, with a traceback
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(damaged)
        with torch.device("meta"):
            net = hipa.CLIPTextModel(config)
        try:
            hipa.assign_weights(net, hipa.read_weights(path), path, torch.float32)
        except hipa.UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    faulthandler.cancel_dump_traceback_later()
    assert 150 < refused <= 200


# --------------------------------------------------------------------------------------------- weights that do not fit
MISFITS = {  # the file, the change of its tensors, and what the message says of it
    "a tensor is missing": (UNET, lambda w: w.pop("conv_in.bias"), "conv_in.bias is missing"),
    "a tensor too many": (VAE, lambda w: w.update(surplus=torch.zeros(1)), "surplus is not known"),
    "another shape, also one that would broadcast": (
        UNET, lambda w: w.update({"conv_in.bias": torch.zeros(1)}), "conv_in.bias is of another shape",
    ),
    "several": (TEXT, lambda w: [w.pop(key) for key in sorted(w)[:8]], "is missing, and 7 more do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("file, edit, words", MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit(folder, file, edit, words):
    """The first difference is named, the others are counted."""
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file)
    refuses(folder, file, "does not fit its config.json", words)


def test_a_config_of_another_size(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 64}))
    refuses(folder, UNET, "does not fit its config.json", "of another shape")


# ----------------------------------------------------------------------------------------------- configs and tokenizer
CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("file", CONFIGS)
def test_a_broken_config(folder, file):
    """What config.json may say is in test_official_configs.py."""
    for content in (b"", b"{", b"<html>", b"\xff\xfe{}", b"[]", b"null", b"3"):
        (folder / file).write_bytes(content)
        refuses(folder, file, "JSON")
    (folder / file).unlink()
    refuses(folder, file, "is missing", "diffusers checkpoint")


@pytest.mark.parametrize("missing", [".", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_tokenizer(folder, missing):
    path = folder / "tokenizer" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuses(folder, str(folder / "tokenizer"), "no readable tokenizer")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_broken_tokenizer(folder, name):
    (folder / "tokenizer" / "vocab.json").unlink()
    for content in ("", "{", "[]", "null", '{"a": 0}'):
        (folder / "tokenizer" / name).write_text(content)
        refuses(folder, str(folder / "tokenizer"), "no readable tokenizer")


@pytest.mark.parametrize("no_limit", [{"model_max_length": 10**30}, {}], ids=["10^30", "nothing"])
def test_a_tokenizer_without_a_length(folder, no_limit):
    """transformers writes 10^30 for "no limit", or nothing. The text encoder's number of places is the limit then."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config | no_limit))
    assert hipa.load(folder).encode_text(["a cat"]).shape[:2] == (1, 77)


# --------------------------------------------------------------------------------------------------- precision, memory
def write_half(folder, value=None):
    """Adds `*.fp16.safetensors` beside each weight file, with every tensor filled with `value` where one is given."""
    for file in (TEXT, UNET, VAE):
        weights = {key: tensor.half() for key, tensor in load_file(folder / file).items()}
        if value is not None:
            weights = {key: tensor.fill_(value) for key, tensor in weights.items()}
        save_file(weights, (folder / file).with_suffix(".fp16.safetensors"))


def test_each_dtype_takes_the_file_of_its_precision(folder):
    write_half(folder, 0.5)
    full, half = hipa.load(folder), hipa.load(folder, dtype=torch.float16)
    assert full.dtype == torch.float32 and not (full.unet.conv_in.weight == 0.5).any()
    for net in (half.text_encoder, half.unet, half.vae):
        assert all((weight == 0.5).all() for weight in net.parameters())
    assert half.unet.time_embedding.linear_1.weight.dtype == half.vae.quant_conv.weight.dtype == torch.float16
    assert half.unet.conv_out.weight.dtype == torch.float32  # its rounding errors would grow 14.65 times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_only_file_serves_every_dtype(folder, dtype):
    """fp16 weights load as float32, say, and with the same values."""
    write_half(folder)
    for file in (TEXT, UNET, VAE):
        (folder / file).unlink()
    saved = load_file((folder / UNET).with_suffix(".fp16.safetensors"))["conv_in.weight"]
    weight = hipa.load(folder, dtype=dtype).unet.conv_in.weight
    assert weight.dtype == dtype and torch.equal(weight, saved.to(dtype))


def memory():
    """Bytes this process holds of its own, mapped files not counted."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
def test_weights_are_mapped_not_copied(tmp_path):
    """200 MB of weights, used to the last, take none of the process's own memory."""
    size = 200 * 2**20
    with open(tmp_path / "big.safetensors", "wb") as file:
        file.write(safetensors({"weight": tensor(0, size)}))
        file.truncate(file.tell() + size)  # zeros that take no room on the disk
    before = memory()
    net = torch.nn.Module()
    net.weight = torch.nn.Parameter(torch.empty(size // 4, device="meta"))
    hipa.assign_weights(net, hipa.read_weights(tmp_path / "big.safetensors"), "big.safetensors", torch.float32)
    assert net.weight.count_nonzero() == 0
    assert memory() - before < size / 4


def test_the_networks_take_the_tensors_themselves(sd15_like):
    weights = hipa.read_weights(sd15_like / UNET)
    with torch.device("meta"):
        net = hipa.UNet2DConditionModel(hipa.read_config(hipa.UNetConfig, sd15_like / "unet" / "config.json"))
    hipa.assign_weights(net, weights, UNET, torch.float32)
    assert net.conv_in.weight.data_ptr() == weights["conv_in.weight"].data_ptr()


def test_weights_are_never_written_back(folder):
    """The map is private: changing a loaded weight leaves the file as it was."""
    before = (folder / UNET).read_bytes()
    hipa.load(folder).unet.conv_in.weight.fill_(7)
    assert (folder / UNET).read_bytes() == before
