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
    "model", ["/nowhere/model", "sd16", "a/b/c", "a b/c", "../emoj", "https://huggingface.co/a/b", "x" * 5000]
)
def test_no_such_model(model):
    refuses(model, "no model", repr(model), "a folder", "Hugging Face id", "sd15")


def test_a_path_object_that_leads_nowhere(monkeypatch):
    """A relative one of two parts looks like a Hugging Face id; offline, that is not asked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses(Path("/nowhere/model"), "no model")
    refuses(Path("nowhere/model"), "nowhere/model", "not in the cache", "HF_HUB_OFFLINE")


def test_a_file_in_place_of_a_folder(folder):
    refuses(folder / UNET, UNET, "is a file", "checkpoint folder")


def test_an_empty_folder(tmp_path):
    refuses(tmp_path, str(tmp_path), "tokenizer")


# -------------------------------------------------------------------------------------------------------- weight files
PAYLOAD_RAN = "payload-ran"


class Payload:
    """Unpickling this creates a file in the working directory."""

    def __reduce__(self):
        return os.mkdir, (PAYLOAD_RAN,)


@pytest.fixture
def harmless(tmp_path, monkeypatch):
    """The test is to end without the payload having run."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(PAYLOAD_RAN).exists()


def test_the_payload_does_run_when_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert Path(PAYLOAD_RAN).exists()


@pytest.mark.parametrize("file", [TEXT, UNET, VAE])
def test_missing_weights(folder, file):
    (folder / file).unlink()
    refuses(folder, file, "is missing")


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
def test_only_a_pickle_is_there(folder, harmless, suffix):
    (folder / UNET).unlink()
    torch.save({"w": Payload()}, (folder / UNET).with_suffix(f".{suffix}"))
    refuses(folder, f"unet/diffusion_pytorch_model.{suffix}", "pickle", f"get {Path(UNET).name}")


@pytest.mark.parametrize("protocol", ["torch", 0, 2, 3, 4, 5])
def test_a_pickle_named_safetensors(folder, harmless, protocol):
    if protocol == "torch":
        torch.save({"w": Payload()}, folder / UNET)
    else:
        (folder / UNET).write_bytes(pickle.dumps({"w": Payload(), "x": "x" * 100}, protocol))
    refuses(folder, UNET, "pickle" if protocol in ("torch", 2) else "damaged")


@pytest.mark.parametrize("where", [0, 1, 7, 8, 9, 200, 0.3, 0.9, -1])
def test_a_truncated_file(folder, where):
    """Cut at a byte, at a fraction of its length, or short of its last byte. At 0: an empty file."""
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: int(where * len(data)) if isinstance(where, float) else where])
    refuses(folder, UNET, "truncated or damaged", "download again")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:19da7aaa\nsize 3438167540\n"
CONTENTS = {
    "an HTML page": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "HTML page", "download again"),
    "an indented HTML page": (b"\n\n  <html></html>" + b" " * 99, "HTML page", "download again"),
    "a git-LFS pointer": (LFS, "git-LFS pointer", "git lfs pull"),
    "some text": (b"Not found\n" * 9, "damaged", "download again"),
    "zeros": (bytes(1000), "damaged", "download again"),
    "a header of 2^64 - 1 bytes": (safetensors(b"{}", length=2**64 - 1), "damaged", "download again"),
    "a header of 100 GB": (safetensors(b"{}", length=10**11), "damaged", "download again"),
    "a header that is no JSON": (safetensors(b"{" * 100), "damaged", "download again"),
    "a header nested deeply": (safetensors(b'{"a":' * 10**5), "damaged", "download again"),
    "a header that is no UTF-8": (safetensors(b'{"\xff": 1}'), "damaged", "download again"),
    "overlapping tensors": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "damaged"),
    "a hole between tensors": (safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "damaged"),
    "offsets past the end": (safetensors({"a": tensor(0, 400)}, bytes(12)), "damaged"),
    "offsets backwards": (safetensors({"a": tensor(8, 0)}, bytes(12)), "damaged"),
    "an unknown dtype": (safetensors({"a": tensor(0, 8, "F31")}, bytes(8)), "damaged"),
    "a shape whose product overflows": (
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}}, bytes(8)),
        "damaged",
    ),
    "no tensors": (safetensors({}), "does not fit", "conv_in.weight", "more missing"),
}


@pytest.mark.parametrize("data, words", [(data, words) for data, *words in CONTENTS.values()], ids=CONTENTS)
def test_something_else_in_the_weight_file(folder, data, words):
    (folder / UNET).write_bytes(data)
    refuses(folder, UNET, *words)


def test_a_folder_in_place_of_the_weight_file(folder):
    (folder / UNET).unlink()
    (folder / UNET).mkdir()
    refuses(folder, UNET)


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
def change(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def test_a_missing_tensor(folder):
    change(folder / UNET, lambda weights: weights.pop("conv_in.bias"))
    refuses(folder, UNET, "does not fit its config.json", "conv_in.bias missing")


def test_an_extra_tensor(folder):
    change(folder / VAE, lambda weights: weights.update(surplus=torch.zeros(1)))
    refuses(folder, VAE, "does not fit its config.json", "surplus not known")


def test_a_tensor_of_the_wrong_shape(folder):
    """Also one that would broadcast."""
    change(folder / UNET, lambda weights: weights.update({"conv_in.bias": torch.zeros(1)}))
    refuses(folder, UNET, "does not fit its config.json", "conv_in.bias of the wrong shape")


def test_many_missing_tensors(folder):
    """The first five are named, the rest counted."""
    change(folder / TEXT, lambda weights: [weights.pop(key) for key in sorted(weights)[:8]])
    refuses(folder, TEXT, "and 3 more missing")


# ------------------------------------------------------------------------------------------------------------- configs
CONFIGS = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("file", CONFIGS)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>", b"\xff\xfe{}", b"[]", b"null", b"3"], ids=lambda content: repr(content)[2:-1]
)
def test_a_broken_config(folder, file, content):
    (folder / file).write_bytes(content)
    refuses(folder, file, "JSON")


@pytest.mark.parametrize("file", CONFIGS)
def test_a_missing_config(folder, file):
    (folder / file).unlink()
    refuses(folder, file, "is missing", "diffusers checkpoint")


@pytest.mark.parametrize(
    "file, settings",
    {
        "SDXL": ("unet/config.json", {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}),
        "class embeddings": ("unet/config.json", {"class_embed_type": "timestep"}),
        "another activation": ("unet/config.json", {"act_fn": "gelu"}),
        "another kind of block": ("unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}),
        "two transformer layers": ("unet/config.json", {"transformer_layers_per_block": [1, 2, 1]}),
        "a setting of the future": ("unet/config.json", {"warp_drive": 9}),
        "a VAE without quant_conv": ("vae/config.json", {"use_quant_conv": False}),
        "latents shifted (SD3)": ("vae/config.json", {"shift_factor": 0.1}),
        "another text encoder": ("text_encoder/config.json", {"model_type": "t5"}),
        "another text activation": ("text_encoder/config.json", {"hidden_act": "relu"}),
        "another schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
        "another prediction": ("scheduler/scheduler_config.json", {"prediction_type": "sample"}),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_that_is_not_supported(folder, file, settings):
    """It would change the maths, so it is named and refused, never ignored."""
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | settings))
    refuses(folder, file, next(iter(settings)), "not supported")


def test_a_config_of_another_size(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 64}))
    refuses(folder, UNET, "does not fit its config.json", "of the wrong shape")


# ----------------------------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("missing", [["."], ["vocab.json"], ["merges.txt"], ["tokenizer_config.json"]])
def test_a_missing_tokenizer(folder, missing):
    for name in missing:
        path = folder / "tokenizer" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuses(folder, str(folder / "tokenizer"), "no readable tokenizer")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 0}'])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_broken_tokenizer(folder, name, content):
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / name).write_text(content)
    refuses(folder, str(folder / "tokenizer"), "no readable tokenizer")


@pytest.mark.parametrize("no_limit", [10**30, None])
def test_a_tokenizer_without_a_length(folder, no_limit):
    """transformers writes 10^30 for "no limit", or nothing; the text encoder's number of places is the limit then."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config | ({"model_max_length": no_limit} if no_limit else {})))
    assert hipa.load(folder).encode(["a cat"]).shape[:2] == (1, 77)


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
