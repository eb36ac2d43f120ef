"""Loading: a bad file of a checkpoint ends in one UserError that names it, whatever bytes are in it. Nothing is ever
unpickled, weights are mapped and not copied, and the file of the right precision is found.
"""

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file

import hipa
import sample
from conftest import ROOT, run_sample
from lora import LORA_NAME, add_lora, lora_bytes

TEXT, UNET, VAE = "text_encoder/config.json", "unet/config.json", "vae/config.json"
TEXT_WEIGHTS, UNET_WEIGHTS = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
INDEX, SCHEDULE, TOKENIZER = "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
VOCAB, MERGES, SPECIAL = "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"


@pytest.fixture
def folder(sd15_like, tmp_path):
    """A copy of the small checkpoint, to be damaged."""
    return shutil.copytree(sd15_like, tmp_path / "model")


def safetensors(header, length=None):
    """The bytes of a safetensors file with no data: the header's length, the header."""
    return struct.pack("<Q", length or len(header)) + header


def put(name, tensor):
    return lambda path: save_file(load_file(path) | {name: tensor}, path)


DAMAGED = "cut or damaged"
BAD = {  # what is wrong: the file, its new content (bytes), settings (a dict) or what is done to it, words of the error
    "a git-LFS pointer": (UNET_WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "a web page": (UNET_WEIGHTS, b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "cut by one byte": (UNET_WEIGHTS, lambda path: os.truncate(path, path.stat().st_size - 1), DAMAGED),
    "a header of 100 GB": (UNET_WEIGHTS, safetensors(b"{}", length=10**11), DAMAGED),
    "a tensor too many": (VAE_WEIGHTS, put("surplus", torch.zeros(1)), "surplus"),
    "a shape that would broadcast": (UNET_WEIGHTS, put("conv_in.bias", torch.zeros(1)), "conv_in.bias"),
    "SDXL": (UNET, {"addition_embed_type": "text_time"}, "Stable Diffusion 1.x or 2.x"),
    "no betas": (SCHEDULE, b'{"beta_schedule": "scaled_linear"}', "beta_start"),
    "a pad token that is none": (SPECIAL, {"pad_token": "nowhere"}, "nowhere"),
    "a token too many": (VOCAB, {"more": 10**6}),
    "a token without a number": (VOCAB, {"a</w>": "x"}),
    "no merges": (MERGES, Path.unlink),
} | {
    f"{key} = {str(value)[:5]}": (file, {key: value})
    for file, key, values in [
        (UNET, "attention_head_dim", [7, 0, [3], "x", None]), (UNET, "sample_size", [0, "x", None, [8, 8], 0.5]),
        (UNET, "norm_num_groups", [-1, 7, "x"]), (UNET, "block_out_channels", [3, [24, 2**40, 72], []]),
        (UNET, "cross_attention_dim", [2**63, 64]), (UNET, "in_channels", [9]),
        (VAE, "scaling_factor", [0, "x", None]), (VAE, "latent_channels", [8]),
        (TEXT, "num_attention_heads", [7, 0]), (TEXT, "layer_norm_eps", ["x"]),
        (SCHEDULE, "beta_end", [1.5, "x"]), (SCHEDULE, "num_train_timesteps", [2**63, "x", 0]),
        (TOKENIZER, "model_max_length", ["x"]),
    ]
    for value in values
} | {
    f"{file}: {content and content[:6]}": (file, content or Path.unlink)
    for file in (INDEX, TEXT, UNET, VAE, SCHEDULE, TOKENIZER)
    for content in (None, b"{", b"<html>", b"\xff\xfe{}", b"[]", b"null", b"[" * 10**5)
}  # fmt: skip


def damage(path, change):
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change).encode()
    path.write_bytes(change) if isinstance(change, bytes) else change(path)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file(folder, what):
    """The error names the file, or the part of the checkpoint where something does not fit."""
    file, change, *words = BAD[what]
    damage(folder / file, change)
    with pytest.raises(hipa.UserError) as caught:
        hipa.load(folder)
    assert all(word in str(caught.value) for word in (str(folder / file.split("/")[0]), *words)), caught.value


@pytest.mark.parametrize("file, change, word", [
    (UNET, {"\x1b[31mkey\n": "on"}, "key"), (UNET_WEIGHTS, safetensors(b"{}"), "conv_in.weight"),
    (VAE_WEIGHTS, put("decoder.conv_out.bias", torch.full((3,), torch.nan)), "not finite"),
    (UNET, lambda path: damage(path, {"in_channels": 9})
        or put("conv_in.weight", torch.zeros(24, 9, 3, 3))(path.parents[1] / UNET_WEIGHTS), "inpainting UNets"),
], ids=["an escape sequence", "hundreds of tensors too few", "NaN", "an inpainting UNet"])  # fmt: skip
def test_the_command_line_says_it_in_one_line(folder, tmp_path, capsys, file, change, word):
    damage(folder / file, change)
    code, out, err = run_sample(["a cat", "--model", folder, "--out", tmp_path / "out", "--steps", 1], capsys)
    assert code == 2 and not out and len(err) == 1 and word in err[0] and err[0].isprintable() and len(err[0]) < 1100


class Payload:
    """Unpickling this creates a folder in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "ckpt", "pt"])
@pytest.mark.parametrize("module", [torch, pickle], ids=["torch", "pickle"])
def test_nothing_is_unpickled(folder, tmp_path, monkeypatch, suffix, module):
    """Under no name, neither as weights nor as adaptors. The payload does run where it is unpickled."""
    monkeypatch.chdir(tmp_path)
    (folder / UNET_WEIGHTS).unlink()
    path = (folder / UNET_WEIGHTS).with_suffix(f".{suffix}")
    torch.save(Payload(), path) if module is torch else path.write_bytes(pickle.dumps(Payload()))
    model = SimpleNamespace(unet=torch.nn.Module(), text_encoder=torch.nn.Module())
    for read in (lambda: hipa.load(folder), lambda: sample.apply_lora(model, path)):
        with pytest.raises(hipa.UserError, match="pickle"):
            read()
    assert not Path("payload-ran").exists()
    with open(path, "rb") as file:
        torch.load(file, weights_only=False) if module is torch else pickle.load(file)
    assert Path("payload-ran").exists()


JUNK = [b"", b"\x00", b"\xff" * 8, b"[" * 3000, b'{"a":' * 3000, b"-1", b"1e999", b"null", b'"', b"\x1b[31m\x07", b"<",
        b"\x80\x02", "猫".encode(), b"NaN", b"{}", b"[]"]  # fmt: skip


def scramble(data, rng):
    """Bytes changed, cut, doubled, or replaced by junk; in half of the cases near the beginning, where headers are."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(len(data), 300)))
        end = at + rng.randrange(20)
        new = [bytes([rng.randrange(256)]), rng.choice(JUNK), 2 * data[at:end], data[at + 1 : end]]
        data = data[:at] + rng.choice([b"", *(piece + data[end:] for piece in new)])
    return data


def use(model):
    return model.encode_text(["a cat and a dog"]), model.decode(torch.zeros(1, 4, 8, 8)), sample.picture_size(model)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of TIFF
@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, count", [("weights", 60), ("texts", 20), ("pictures", 60), ("adaptors", 30)])
def test_any_bytes(folder, kind, count, rounds):
    """The damage does no harm, or ends in a UserError that names the file or the part it is in."""
    model = hipa.load(folder)
    pictures = [folder / f"a.{suffix}" for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm")]
    for path in pictures:
        Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    add_lora(model.unet, 1)
    hipa.write_file(lora := folder / LORA_NAME, lora_bytes(model.unet))
    paths, read = {
        "weights": ([folder / TEXT_WEIGHTS], lambda path: hipa.read_weights(model.text_encoder, path, torch.float32)),
        "texts": ([*folder.rglob("*.json"), folder / MERGES], lambda _: use(hipa.load(folder))),
        "pictures": (pictures, lambda path: sample.read_mask(path, (8, 8))),
        "adaptors": ([lora], lambda path: sample.apply_lora(model, path)),
    }[kind]
    rng, refused = random.Random(0), 0
    for _ in range(count * rounds):
        path = rng.choice(sorted(paths))
        data = path.read_bytes()
        path.write_bytes(scramble(data, rng))
        try:
            read(path)
        except hipa.UserError as error:
            assert str(folder) in str(error)
            refused += 1
        path.write_bytes(data)
    assert refused > count * rounds / 10  # the damage is felt


@pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")
@pytest.mark.parametrize("version", ["0.4.0.dev0", "0.8.1", "0.9.0", "0.42.1", None])
@pytest.mark.parametrize("side", [8, 32, 64, 96])
def test_the_side_in_old_configs(folder, version, side):
    """Before 0.9, diffusers did not read it and always drew 64 x 64 latents; smaller numbers were wrong. As it says."""
    settings = json.loads((folder / UNET).read_text()) | {"sample_size": side, "_diffusers_version": version}
    (folder / UNET).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    assert hipa.load(folder).side == theirs.unet.config.sample_size * theirs.vae_scale_factor


def test_settings_of_training_are_no_matter(folder):
    """Those of diffusers' EMAModel, which it saves with the averaged network."""
    ema = EMAModel(UNet2DConditionModel.from_pretrained(folder / "unet").parameters()).state_dict()
    settings = {key: value for key, value in ema.items() if key != "shadow_params"}
    assert len(settings) > 5
    damage(folder / UNET, settings)
    assert hipa.load(folder).side == 32


def test_the_checkpoint_says_its_guidance(folder):
    """If it does not, it is 7.5; at one step always none."""
    assert (hipa.load(folder).guidance, hipa.load("emoji").guidance) == (7.5, 2)
    (folder / INDEX).write_text('{"_guidance": 3}')
    assert [hipa.load(folder).guidance_at(steps) for steps in (1, 2)] == [1, 3]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_copy_of_the_embedded_model(tmp_path, capsys, steps):
    """It has the same guidance and adaptors: the pixels are the same."""
    shutil.copytree(ROOT / "emoji", tmp_path / "copy", ignore=shutil.ignore_patterns("*.p*", "evaluator", "features"))
    pixels = []
    for model in ("emoji", tmp_path / "copy"):
        _, out, _ = run_sample(["a cat", "--model", model, "--out", tmp_path, "--steps", steps], capsys)
        pixels.append(np.asarray(Image.open(out[0])))
    assert (pixels[0] == pixels[1]).all()


def test_a_tokenizer_without_a_length(folder):
    """The text encoder's number of places is the limit then."""
    (folder / TOKENIZER).write_text('{"model_max_length": 1e30}')
    assert hipa.load(folder).encode_text(["a cat"]).shape[:2] == (1, 77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_precision_has_its_file(folder, dtype):
    """Half precision takes *.fp16.safetensors, here filled with 1/2. Where only this is, it serves float32 too."""
    for file in (TEXT_WEIGHTS, UNET_WEIGHTS, VAE_WEIGHTS):
        half = {key: torch.full_like(tensor, 0.5).half() for key, tensor in load_file(folder / file).items()}
        save_file(half, (folder / file).with_suffix(".fp16.safetensors"))
    full = dtype == torch.float32
    for only in (False, True):
        model = hipa.load(folder, dtype=dtype)
        for net in (model.text_encoder, model.unet, model.vae):
            assert all((weight == 0.5).all() for weight in net.parameters()) == (only or not full)
        assert model.unet.conv_in.weight.dtype == model.vae.decoder.conv_out.weight.dtype == model.dtype == dtype
        assert model.unet.conv_out.weight.dtype == torch.float32  # its rounding errors would grow 14.6 times
        for file in (TEXT_WEIGHTS, UNET_WEIGHTS, VAE_WEIGHTS):
            (folder / file).unlink(missing_ok=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
def test_weights_are_mapped_not_copied(tmp_path):
    """100 MB, used to the last, take none of the process's own memory; changed, they leave the file alone."""

    def memory():  # bytes of its own, mapped files not counted
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    path, net = tmp_path / "large.safetensors", torch.nn.Linear(5000, 5000, device="meta")
    save_file({"weight": torch.zeros(5000, 5000), "bias": torch.zeros(5000)}, path)
    before = memory()
    hipa.read_weights(net, path, torch.float32)
    assert net.weight.count_nonzero() == 0 and memory() - before < 25e6
    net.weight.data[:] = 1
    assert load_file(path)["weight"].count_nonzero() == 0
