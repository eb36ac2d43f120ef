"""The command line: a mistake ends in one line and exit code 2 with nothing written; else each picture has a name of
its own, says how it was made, and does not depend on what is made beside it. Pictures of any kind go in.

Most tests call `sample.run` in this process; the last ones start the real command.
"""

import errno
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import hipa
import sample
from conftest import run_sample

SAMPLE = Path(sample.__file__)
SIDE = 32  # of the small checkpoint's pictures


@pytest.fixture
def cli(sd15_like, tmp_path, capsys, monkeypatch):
    """Runs the command line in tmp_path: small checkpoint, one step, into out/ -> code, out, err (lines), paths."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code, out, err = run_sample(["--model", sd15_like, "--out", "out", "--steps", 1, *argv], capsys)
        return SimpleNamespace(code=code, out=out, err=err, paths=[Path(line) for line in out if line.endswith(".png")])

    return call


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def alike(a, b):
    """Equal but for rounding: another batch size may sum in another order."""
    return np.abs(pixels(a) - pixels(b)).max() <= 1


def parameters(path):
    return Image.open(path).text["parameters"]


def photo(width, height, mode="RGB"):
    """Colours that run to the right and down, so that a turned picture shows"""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2).astype("uint8")
    return Image.fromarray(rgb).convert(mode)


# ----------------------------------------------------------------------------------------------------------- bad input
FILES = {
    "taken": b"precious", "cut.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0", "text.png": b"a cat",
    "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n",  # Pillow would start Ghostscript
    "bomb.ppm": b"P6 12000 12000 255\n", "larger.ppm": b"P6 90000 90000 255\n",  # of the first, Pillow only warns
    "empty.txt": b" \n\n\t\n", "bytes.txt": bytes(range(256)), "cut.json": b"{", "list.json": b"[]",
    "number.json": b'{"annotations": [1]}', "no-captions.json": b'{"annotations": [{"image_id": 1}]}',
    "empty.json": b'{"annotations": []}', "null.json": b'{"annotations": [{"image_id": 1, "caption": null}]}',
    "lines.jsonl": b'{"text": "a cat"}', "table.csv": b"text\na cat\n",
    "empty.safetensors": b"\2\0\0\0\0\0\0\0{}", "model.ckpt": b"PK\3\4",
}  # fmt: skip
VALUES = {
    "--steps": ["0", "1001", "2.5"], "--seed": ["-1", 2**64, "9" * 5000], "-n": ["0", 9 * 10**18], "--batch": ["0"],
    "--size": ["63", "64x63", "0", "64x0", "64x", "-64", "a", "9" * 5000, "99992"],
    "--guidance": ["nan", "inf", "-1", "x"], "--dtype": ["float2"], "--device": ["cuda", "mps"],
    "--strength": ["0", "1.01", "nan", "-0.5"], "--scale": ["0", "1", "2.5", "65"], "--lora": ["missing", "."],
    "--stepz": ["3"],
}  # fmt: skip
BAD = {  # the command line -> words of the message
    '"a cat" --model no-such-model': "no model 'no-such-model'",
    "--prompts lines.jsonl": "prompts are in a .txt file",
    '"a cat" --negative dog': "--negative says what guidance leads away from",
    '"a cat" --negative dog --steps 2 --guidance 1': "--negative says",
    '"a cat" --model taken': "taken: it is cut or damaged",
    '"a cat" --model empty.safetensors': "empty.safetensors is one file: python tools/convert.py",
    '"a cat" --model model.ckpt': "model.ckpt: it is a pickle",
    '"a cat" --image photo.png --mask lines.jsonl': "cannot identify",
    '"a cat" --model .': "model_index.json: No such file",
    '"a cat" "a dog"': "a dog",
    "": "give one prompt or --prompts",
    "--image photo.png": "give one prompt or --prompts",
    '"a cat" --prompts empty.txt': "give one prompt or --prompts",
    "--prompts missing.txt": "missing.txt: No such file",
    "--prompts .": ".: Is a directory",
    '"a cat" --image missing.png': "missing.png: No such file",
    '"a cat" --image photo.png --mask cut.png': "cut.png: ",
    '"a cat" --strength 0.5': "need --image",
    '"a cat" --mask photo.png': "need --image",
    '"a cat" --scale 2': "need --image",
    "--image photo.png --scale 2 --mask photo.png": "--scale goes with neither",
    "--image photo.png --scale 2 --size 64": "--scale goes with neither",
}
BAD |= {f'"a cat" --image photo.png {name}={v}': name.strip("-") for name, values in VALUES.items() for v in values}
BAD |= {f'"a cat" --out {path}': f"error: {path}: " for path in ("taken", "taken/x", "/proc/x")}
TEXTS = [name for name in FILES if name.endswith(("txt", "json", "jsonl", "csv"))]
BAD |= {f"--prompts {name}": f"{name}: " for name in TEXTS}
BAD |= {f'"" --image {name}': f"{name}: " for name in FILES if name not in TEXTS}
BAD['"" --image page.eps'] = "cannot identify"


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:70])
def test_bad_input(cli, tmp_path, monkeypatch, line):
    """One line that says what is wrong, exit code 2, nothing written, and no model loaded before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if "--model" not in line and "--size=6" not in line:  # which sizes are possible, the model knows
        monkeypatch.setattr(hipa, "load", lambda *_: pytest.fail("a model is loaded"))
    photo(40, 30).save("photo.png")
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    before = files(tmp_path)
    result = cli(*shlex.split(line))
    assert result.code == 2 and result.out == [] and len(result.err) == 1, result
    assert "error: " in result.err[0] and BAD[line] in result.err[0]
    assert files(tmp_path) == before


def test_no_picture_of_nan(cli, sd15_like, tmp_path):
    """A damaged network must not end in a black PNG."""
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"decoder.conv_out.bias": torch.full((3,), float("nan"))}, path)
    result = cli("a cat", "--model", model)
    assert result.code == 2 and "not finite" in result.err[-1] and not files(tmp_path / "out")


def test_a_full_disk(cli, tmp_path, monkeypatch):
    """Neither an empty picture nor half of one is left."""
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    result = cli("a cat")
    assert (result.code, len(result.err)) == (2, 1) and "No space left" in result.err[0]
    assert not files(tmp_path)


# -------------------------------------------------------------------------------------------------- names and metadata
@pytest.mark.parametrize("prompt, name", [
    ("", "picture"), ("a\0cat", "a-cat"), ("🐱🏳️‍🌈", "picture"), ("一只猫", "一只猫"), ("قطة", "قطة"),
    ("a \udcff cat", "a-cat"), ("a\ncat", "a-cat"), ("../../etc/passwd", "etc-passwd"), ("/etc/x", "etc-x"),
    (r"..\con:", "con"), ("word " * 500, "word-" * 11 + "word"), ("é" * 500, "é" * 30), ("a" * 59 + "é", "a" * 59),
])  # fmt: skip
def test_names_are_safe(prompt, name):
    """At most 60 bytes, not characters, and no half characters: file systems count bytes."""
    assert sample.slug(prompt) == name


@pytest.mark.parametrize("prompt", ["", "a\0 \udcff\n../cat", "cat " * 75 + "horse " * 925], ids=len)
def test_any_prompt_gives_a_picture(cli, tmp_path, prompt):
    """One that is too long is cut, with one warning, not one for each picture."""
    result = cli(prompt, "-n", "2")
    assert result.code == 0 and len(result.err) == ("horse" in prompt)
    assert all(line.startswith("warning: ") and "horse" in line for line in result.err)
    assert len(result.paths) == 3 and files(tmp_path).keys() == {path.absolute() for path in result.paths}


def test_nothing_is_overwritten(cli, tmp_path, monkeypatch):
    """Numbers go on after the highest there is, whatever the file is."""
    cli("a cat")
    before = files(tmp_path)
    assert cli("a cat").out == ["out/00002-0-a-cat.png"]
    Path("out/00041-notes.txt").write_text("")
    assert cli("a dog").out == ["out/00042-0-a-dog.png"]
    with monkeypatch.context() as patch:  # another process took the numbers after this one had looked
        patch.setattr(os, "listdir", lambda folder: [])
        sample.save(photo(4, 4), Path("out"), "0-a-cat", "")
    assert Image.open("out/00003-0-a-cat.png").size == (4, 4)
    assert before.items() <= files(tmp_path).items() and len(files(tmp_path)) == 5


def test_the_picture_says_how_it_was_made(cli, sd15_like, tmp_path):
    """Guidance is by default that of model_index.json, else 7.5, and at one step none. A negative prompt counts."""
    own = shutil.copytree(sd15_like, tmp_path / "own")
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps(index | {"_guidance": 2.5}))
    argvs = ["--steps 2", "--steps 2 --guidance 1", "--steps 2 --negative dog", "--steps 1", f"--steps 2 --model {own}"]
    paths = [cli("a cat, 猫", "--seed", "7", *argv.split()).paths[0] for argv in argvs]
    for path, scale in zip(paths, ("7.5", "1", "7.5", "1", "2.5")):
        prompt, *negative, rest = parameters(path).split("\n")
        assert prompt == "a cat, 猫" and negative == ["Negative prompt: dog"] * (path == paths[2])
        assert {f"CFG scale: {scale}", "Seed: 7", f"Size: {SIDE}x{SIDE}"} <= set(rest.split(", "))
    assert {"Steps: 2", f"Model: {own}"} <= set(rest.split(", "))
    assert not alike(paths[0], paths[1]) and not alike(paths[0], paths[2])


# ---------------------------------------------------------------------------------------------------- several pictures
def test_three_pictures_and_their_grid(cli):
    """Picture k is made from seed + k, whatever the batch. Grids are about square, and white where nothing is."""
    *pictures, grid = cli("a cat", "-n", "3", "--seed", "5").paths
    assert [path.name for path in pictures] == [f"0000{k + 1}-{5 + k}-a-cat.png" for k in range(3)]
    assert grid.name == "00004-grid-a-cat.png"
    sheet = pixels(grid)
    cells = [sheet[y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert sheet.shape == (2 * SIDE, 2 * SIDE, 3) and (cells[3] == 255).all()
    assert all((cell == pixels(path)).all() for cell, path in zip(cells, pictures))
    sizes = [sample.grid([Image.new("1", (8, 4))] * count).size for count in (1, 2, 4, 5, 10)]
    assert sizes == [(8, 4), (16, 4), (16, 8), (24, 8), (32, 12)]
    in_twos = cli("a cat", "-n", "3", "--seed", "5", "--batch", "2").paths
    assert all(alike(a, b) for a, b in zip(pictures, in_twos))
    assert alike(pictures[1], cli("a cat", "--seed", "6").paths[0]) and not alike(pictures[0], pictures[1])


def test_a_file_of_prompts(cli):
    """One a line, empty lines and a byte order mark apart; each has its grid; the seeds go on counting."""
    Path("prompts.txt").write_text("\ufeffa cat\r\n\n  a dog  \n猫\n", "utf-8")
    paths = cli("--prompts", "prompts.txt", "-n", "2", "--batch", "3").paths
    names = ["0-a-cat", "1-a-cat", "grid-a-cat", "2-a-dog", "3-a-dog", "grid-a-dog", "4-猫", "5-猫", "grid-猫"]
    assert [path.stem.partition("-")[2] for path in paths] == names
    assert [parameters(path).split("\n")[0] for path in paths[::3]] == ["a cat", "a dog", "猫"]
    assert alike(paths[3], cli("a dog", "--seed", "2").paths[0])


@pytest.mark.parametrize("end", ["\f", "\x85", "\u2028", "\u2029", "\x1c", "\v"])
def test_only_line_ends_end_a_prompt(tmp_path, end):
    """str.splitlines() would also split at these."""
    (tmp_path / "prompts.txt").write_bytes(f"a cat{end}on a mat\r\na dog\rb\n".encode())
    assert sample.read_prompts(tmp_path / "prompts.txt") == [f"a cat{end}on a mat", "a dog", "b"]


def test_a_long_job_goes_on_where_it_stopped(cli):
    """The same command makes only what is missing, beside other files, and the grids of what it makes."""
    Path("prompts.txt").write_text("a cat\na dog\na horse\n")
    job = ("--prompts", "prompts.txt", "-n", "2", "--batch", "1", "--seed", "3")
    whole = cli(*job)
    before = {path.name: path.read_bytes() for path in whole.paths}
    for path in whole.paths[4:6]:
        path.unlink()
    Path("out/notes.png").write_text("no picture")
    again = cli(*job)
    assert [path.name.split("-", 1)[1] for path in again.paths] == ["6-a-dog.png", "grid-a-dog.png"]
    assert [path.read_bytes() for path in again.paths] == [
        before[f"0000{k}"] for k in ("5-6-a-dog.png", "6-grid-a-dog.png")
    ]
    assert len(again.err) == 1 and "5 of the 6 pictures are in out already" in again.err[0]
    assert len(cli(*job, "--steps", "2").paths) == 9  # other pictures
    assert cli(*job).out == []


def test_one_bad_picture_of_many(cli, monkeypatch):
    """It is named and left out; the others are made; the exit code is 2."""
    Path("prompts.txt").write_text("a cat\na dog\na horse\n")

    def sampled(model, prompts, seeds, size, **_):
        return torch.stack([torch.full((3, 8, 8), torch.nan if p == "a dog" else 0.0) for p in prompts])

    monkeypatch.setattr(hipa, "sample", sampled)
    result = cli("--prompts", "prompts.txt")
    assert [path.name for path in result.paths] == ["00001-0-a-cat.png", "00002-2-a-horse.png"]
    assert result.code == 2 and "'a dog' with seed 1" in result.err[-1] and "not finite" in result.err[-1]


def test_grids_have_at_most_a_hundred_pictures(cli, monkeypatch):
    monkeypatch.setattr(hipa, "sample", lambda model, prompts, seeds, **_: torch.zeros(len(seeds), 3, 8, 8))
    assert Image.open(cli("a cat", "-n", "100", "--batch", "50").paths[-1]).size == (80, 80)
    assert len(cli("a dog", "-n", "101", "--batch", "101").paths) == 101


def test_a_coco_captions_file(tmp_path):
    """The first caption of each image, as FID-5k is measured; others are left out, line breaks become spaces."""
    captions = [(9, "a cat"), (4, "a\n dog "), (9, "another cat"), (4, "x"), (5, "a horse")]
    annotations = [{"image_id": image, "id": k, "caption": text} for k, (image, text) in enumerate(captions)]
    for name in ("captions.json", "CAPTIONS.JSON"):
        (tmp_path / name).write_text(json.dumps({"info": {}, "annotations": annotations}))
        assert sample.read_prompts(tmp_path / name) == ["a cat", "a dog", "a horse"]


@pytest.mark.parametrize("size, expected", [("48x32", (48, 32)), ("20x12", (20, 12)), ("4", (4, 4))])
def test_sizes(cli, size, expected):
    """Width first; also latents of odd sides, which the UNet's halvings do not divide. The largest seed."""
    assert Image.open(cli("a cat", "--size", size, "--seed", 2**62).paths[0]).size == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_about_the_same_picture(cli, dtype):
    photo(SIDE, SIDE).save("photo.png")
    full, half = (cli("a cat", "--image", "photo.png", "--dtype", d).paths[0] for d in ("float32", dtype))
    assert np.abs(pixels(full) - pixels(half)).mean() < 8


# ------------------------------------------------------------------------------------------------ starting from a file
def test_three_jobs(cli):
    """Edited and inpainted to its own size, 45 x 37, and enlarged; each says what it was made from."""
    photo(45, 37).save("photo.png")
    mask = np.zeros((37, 45), "uint8")
    mask[10:20, 20:] = 255
    Image.fromarray(mask).save("mask.png")
    [edited] = cli("a cat", "--image", "photo.png", "--strength", "0.5").paths
    first, second, grid = cli("a cat", "--image", "photo.png", "--mask", "mask.png", "-n", "2").paths
    [enlarged] = cli("--image", "photo.png", "--scale", "3").paths
    source = np.asarray(photo(45, 37))
    assert pixels(edited).shape == source.shape and not np.array_equal(pixels(edited), source)
    for picture in (pixels(first), pixels(second)):
        assert np.array_equal(picture[mask == 0], source[mask == 0]), "to the bit"
        assert (picture[mask > 0] - source[mask > 0]).any()
    assert not alike(first, second) and pixels(grid).shape == (37, 90, 3)
    assert pixels(enlarged).shape == (111, 135, 3)
    reduced = np.asarray(Image.open(enlarged).resize((45, 37), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(reduced - source).mean() < 8, "reduced, it is the given picture again"
    words = [parameters(path) for path in (edited, first, enlarged)]
    assert "Image: photo.png, Denoising strength: 0.5" in words[0] and "Size: 44x36" in words[0]
    assert "Denoising strength: 0.9, Mask: mask.png" in words[1]
    assert words[2].startswith("\nSteps: 1") and "Denoising strength: 0.3, Scale: 3" in words[2]


@pytest.mark.parametrize("size, expected", [
    ((32, 32), (32, 32)), ((45, 37), (44, 36)), ((24, 24), (24, 24)), ((1024, 768), (36, 28)), ((10, 8), (36, 28)),
    ((1, 5000), (4, 2264)),
])  # fmt: skip
def test_size_to_work_at(sd15_like, size, expected):
    """About the picture's own if that is half to twice the model's area, 32 x 32; else that area in its shape."""
    model, picture = hipa.load(sd15_like), Image.new("1", size)
    assert sample.picture_size(model, image=picture) == expected
    assert sample.picture_size(model, (40, 24), picture) == (40, 24)


KINDS = (
    """RGB.png L.png 1.png P.png LA.png RGBA.png RGB.jpg CMYK.jpg YCbCr.jpg CMYK.tif P.gif RGB.webp RGB.bmp RGB.ppm"""
)


@pytest.mark.parametrize("name", KINDS.split())
def test_kinds_of_pictures(tmp_path, name):
    made = photo(40, 30, name.split(".")[0])
    made.save(tmp_path / name, quality=95)
    read, _ = sample.read_picture(tmp_path / name)
    assert read.mode == "RGB" and read.size == (40, 30)
    error = np.abs(np.asarray(read).astype(int) - np.asarray(made.convert("RGB"))).mean()
    assert error == 0 if name.endswith("png") else error < 8


def test_transparency_is_white(cli):
    """Which is said, because the result has none."""
    half = photo(40, 30, "RGBA")
    half.paste((0, 255, 0, 0), (0, 0, 20, 30))
    half.save("half.png")
    read, alpha = (np.asarray(picture) for picture in sample.read_picture(Path("half.png")))
    assert (read[:, :20] == 255).all() and np.array_equal(read[:, 20:], pixels("half.png")[:, 20:])
    assert not alpha[:, :20].any() and (alpha[:, 20:] == 255).all()
    Image.new("P", (4, 3)).save("palette.png", transparency=0)  # its only colour, black, is transparent
    assert np.asarray(sample.read_picture(Path("palette.png"))[0]).min() == 255
    photo(40, 30, "RGBA").save("whole.png")
    said = [cli("a cat", "--image", name).err for name in ("half.png", "whole.png")]
    assert len(said[0]) == 1 and "partly transparent" in said[0][0] and not said[1]


@pytest.mark.parametrize("left, hole", [("photo", "erased"), ("black", "erased"), ("white", "left")])
def test_a_mask_with_transparent_parts(tmp_path, left, hole):
    """An erased hole is to be painted, whatever colours are below it; but white that was drawn on nothing is, too."""
    mask = photo(40, 30, "RGBA") if left == "photo" else Image.new("RGBA", (40, 30), left)
    mask.paste((255, 0, 255, 0), (0, 0, 20, 30))
    mask.save(tmp_path / "mask.png")
    read = np.asarray(sample.read_mask(tmp_path / "mask.png", (40, 30)))
    assert (read[:, :20] == (255 if hole == "erased" else 0)).all()
    assert (read[:, 20:] == (255 if hole == "left" else 0)).all()


def test_a_mask_without_white(cli):
    """It is refused, because nothing would be painted."""
    photo(40, 30).save("photo.png")
    Image.new("L", (40, 30), 100).save("mask.png")
    result = cli("a cat", "--image", "photo.png", "--mask", "mask.png")
    assert result.code == 2 and "mask.png: nothing in it is white" in result.err[0] and not result.paths


SRGB, P3 = [(0.64, 0.33), (0.3, 0.6), (0.15, 0.06)], [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)]
D65 = (0.3127, 0.329)


def to_xyz(primaries):
    """Linear RGB of these chromaticities (x, y) -> XYZ, where RGB (1, 1, 1) is D65: a matrix (3, 3)"""
    columns, (x, y) = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T, D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def profile(primaries):
    """The bytes of an ICC profile: sRGB's with other primaries, for the white D50 (by Bradford's matrix)"""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    cones = bradford @ [0.96422, 1, 0.82521] / (bradford @ to_xyz(primaries).sum(axis=1))
    matrix = np.linalg.inv(bradford) @ np.diag(cones) @ bradford @ to_xyz(primaries)
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T):  # in the table of tags: name, offset, size
        offset = int.from_bytes(data[data.index(name, 128) + 4 :][:4], "big") + 8
        data[offset : offset + 12] = np.round(column * 65536).astype(">i4").tobytes()
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_a_profile(tmp_path, mode):
    """Phones write Display P3. The expected values: P3 -> linear -> XYZ -> sRGB, as colour science has it."""
    colours = Image.fromarray(np.array([[[204, 102, 102], [102, 153, 102]]], "uint8"))
    for name, primaries in (("srgb.png", SRGB), ("p3.png", P3)):
        colours.convert(mode).save(tmp_path / name, icc_profile=profile(primaries))
    srgb, p3 = (np.asarray(sample.read_picture(tmp_path / name)[0]).astype(int) for name in ("srgb.png", "p3.png"))
    v = np.asarray(colours) / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    linear = (linear @ to_xyz(P3).T @ np.linalg.inv(to_xyz(SRGB)).T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(srgb - np.asarray(colours)).max() <= 1
    assert np.abs(p3 - expected).max() <= 2 < 10 < np.abs(p3 - np.asarray(colours)).max()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "CMYK"])
def test_a_profile_of_another_kind(tmp_path, mode):
    """Programs keep a photo's profile when they make it grey: it is no reason to refuse it, and grey stays grey."""
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo(40, 30, "L").convert(mode).save(path, icc_profile=profile(P3))
    read = np.asarray(sample.read_picture(path)[0]).astype(int)
    assert np.abs(read - read.mean(axis=2, keepdims=True)).max() <= 2


@pytest.mark.filterwarnings("ignore:.*only the first")
def test_the_first_of_several_pictures(cli):
    """An animation has others, which is said. So has a phone's photo (a preview, depth), of which nothing is lost."""
    frames = [photo(40, 30), photo(40, 30).rotate(180)]
    for name in ("film.gif", "film.png", "film.webp", "phone.jpg"):
        kind = {"format": "MPO"} if name == "phone.jpg" else {"lossless": True} if name == "film.webp" else {}
        frames[0].save(name, save_all=True, append_images=frames[1:], **kind)
        assert np.abs(np.asarray(sample.read_picture(Path(name))[0]).astype(int) - pixels(name)).max() <= 1
        err = cli("a cat", "--image", name).err
        assert len(err) == (name != "phone.jpg") and all("only the first of its 2 pictures" in line for line in err)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits(tmp_path, name):
    """The upper 8 of them count; Pillow alone would cut everything above 255 to white."""
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype("uint16")
    Image.fromarray(values).save(tmp_path / name)
    read = np.asarray(sample.read_picture(tmp_path / name)[0])[..., 0]
    assert np.abs(read - values / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """As viewers show it, which is what the camera's owner saw."""
    exif, upright, turn = Image.Exif(), photo(40, 30), Image.Transpose
    exif[0x0112] = orientation
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90,
        turn.TRANSVERSE, turn.ROTATE_270][orientation - 1]  # fmt: skip
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "photo.png", exif=exif)
    assert sample.read_picture(tmp_path / "photo.png")[0] == upright


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "LA"])
@pytest.mark.parametrize("size", [(40, 30), (400, 300), (7, 5)])
def test_mask_of_any_mode_and_size(tmp_path, mode, size):
    """It is stretched over the picture, and then black or white."""
    half = np.tile(np.where(np.arange(size[0]) * 2 < size[0], 0, 255).astype("uint8"), (size[1], 1))
    Image.fromarray(half).convert(mode).save(tmp_path / "mask.png")
    mask = np.asarray(sample.read_mask(tmp_path / "mask.png", (40, 30)))
    assert mask.shape == (30, 40) and set(np.unique(mask)) == {0, 255}
    assert not mask[:, :19].any() and (mask[:, 23:] == 255).all()


# ---------------------------------------------------------------------------------------------------- the real command
def test_in_a_notebook(sd15_like, tmp_path, monkeypatch):
    """`%run sample.py`, in a thread, without real files for stdout and stderr. Warnings are then shown as before."""
    out, err, shown = io.StringIO(), io.StringIO(), warnings.showwarning
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["sample.py", "a cat", "--model", str(sd15_like), "--out", str(tmp_path)])
    thread = threading.Thread(target=runpy.run_path, args=(str(SAMPLE),), kwargs={"run_name": "__main__"})
    thread.start()
    thread.join()
    assert out.getvalue() == f"{tmp_path / '00001-0-a-cat.png'}\n" and "rror" not in err.getvalue()
    assert Image.open(out.getvalue().strip()).size == (SIDE, SIDE)
    assert warnings.showwarning is shown


@pytest.mark.parametrize("end", ["Ctrl-C", "a closed pipe"])
def test_the_command_ends_early(sd15_like, tmp_path, end):
    """Without a traceback; the pictures that were announced are whole. A closed pipe: `sample.py … | head -0`."""
    reader, writer = os.pipe()
    argv = [sys.executable, SAMPLE, "猫", "--model", sd15_like, "--out", tmp_path, "-n", "10000", "--batch", "1"]
    awake = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # it is ignored in the background
    process = subprocess.Popen(argv, stdout=writer, stderr=subprocess.PIPE, text=True, preexec_fn=awake)
    os.close(writer)
    with open(reader, encoding="utf-8") as out:
        if end == "Ctrl-C":
            path = out.readline().strip()
            process.send_signal(signal.SIGINT)
            assert path.endswith("00001-0-猫.png") and Image.open(path).convert("RGB").size == (SIDE, SIDE)
    _, err = process.communicate()
    assert process.returncode == (130 if end == "Ctrl-C" else 2)
    assert "Traceback" not in err and "Exception" not in err


def test_help(cli):
    result = cli("--help")
    assert result.code == 0 and not result.err
    assert all(word in "".join(result.out) for word in ("--strength", "--guidance", 'python sample.py "a cat"'))
