"""The command line: a mistake ends in one line and exit code 2 with nothing written; else each picture has a name of
its own, says how it was made, and does not depend on what is drawn beside it.

Most tests call `sample.run` in this process; the last few start the real command.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hipa
import sample
from conftest import run_sample
from vae import grid

SAMPLE = Path(sample.__file__)
SIDE = 32  # of the small checkpoint's pictures


@pytest.fixture
def cli(sd15_like, tmp_path, capsys):
    """Runs the command line with the small checkpoint, one step, into tmp_path/out unless told otherwise.

    -> `code`, `out` and `err` (lines), `paths` of the pictures.
    """

    def call(*argv, steps=1):
        argv = ["--model", sd15_like, "--out", tmp_path / "out", *(["--steps", steps] if steps else []), *argv]
        code, out, err = run_sample(argv, capsys)
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


# ----------------------------------------------------------------------------------------------------------- bad input
VALUES = {
    "--steps": ["0", "1001", "2.5"], "--size": ["63", "64x63", "0", "64x0", "-64", "a", "9" * 5000, "99992"],
    "--seed": ["-1", 2**64, "9" * 5000], "-n": ["0", 9 * 10**18],
    "--batch": ["0"], "--guidance": ["nan", "inf", "-1", "x"],
    "--dtype": ["float2"], "--device": ["cuda", "mps"],
}  # fmt: skip
BAD = {
    f"{option} {value}"[:20]: (["a cat", f"{option}={value}"], option.strip("-"))
    for option, values in VALUES.items()
    for value in values
} | {
    "an unknown option": (["a cat", "--stepz", "3"], "--stepz"),
    "no prompt": ([], "give one prompt or --prompts"),
    "a prompt and --prompts": (["a cat", "--prompts", "prompts.txt"], "give one prompt or --prompts"),
    "two prompts": (["a cat", "a dog"], "a dog"),
    "an unknown model": (["a cat", "--model", "no-such-model"], "no-such-model"),
    "a file for a model": (["a cat", "--model", SAMPLE], "no model"),
    "a folder of something else": (["a cat", "--model", "."], "config.json is missing"),
    "no prompts file": (["--prompts", "missing.txt"], "missing.txt: No such file"),
    "a folder for a prompts file": (["--prompts", "."], ": Is a directory"),
    "a file in place of the folder": (["a cat", "--out", "taken"], "cannot write to the folder taken"),
    "a folder inside a file": (["a cat", "--out", "taken/x"], "cannot write to the folder taken/x"),
    "a folder nobody can write": (["a cat", "--out", "/proc/x"], "cannot write to the folder /proc/x"),
}


@pytest.mark.parametrize("argv, word", BAD.values(), ids=BAD)
def test_bad_input(cli, tmp_path, monkeypatch, argv, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("precious")
    before = files(tmp_path)
    result = cli(*argv)
    assert result.code == 2 and result.out == [] and len(result.err) == 1, result
    assert "error: " in result.err[0] and word in result.err[0]
    assert files(tmp_path) == before


PROMPT_FILES = {
    "neither text": [
        ("p.txt", bytes(range(256))), ("p.json", b"{"), ("p.json", b"[]"), ("p.json", b'{"annotations": [1]}'),
        ("p.json", b'{"annotations": [{"image_id": 1}]}'),
        ("p.json", b'{"annotations": [{"image_id": 1, "caption": null}]}'),
    ],
    "no prompts": [("p.txt", b""), ("p.txt", b" \n\n\t\n"), ("p.json", b'{"annotations": []}')],
}  # fmt: skip


@pytest.mark.parametrize("word", PROMPT_FILES)
def test_a_bad_prompts_file(cli, tmp_path, word):
    for name, content in PROMPT_FILES[word]:
        (tmp_path / name).write_bytes(content)
        result = cli("--prompts", tmp_path / name)
        assert result.code == 2 and len(result.err) == 1 and f"{name} " in result.err[0] and word in result.err[0]
        assert not files(tmp_path / "out")


def test_no_picture_of_nan(cli, sd15_like, tmp_path):
    """A damaged network must not end in a black PNG."""
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"decoder.conv_out.bias": torch.full((3,), float("nan"))}, path)
    result = cli("a cat", "--model", model)
    assert result.code == 2 and "not finite" in result.err[-1] and not files(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    "prompt, name",
    {
        "plain": ("a cat", "a-cat"),
        "empty": ("", "picture"),
        "NUL": ("a\0cat", "a-cat"),
        "emoji": ("🐱🏳️‍🌈", "picture"),
        "CJK": ("一只猫", "一只猫"),
        "right to left": ("قطة", "قطة"),
        "lone surrogate": ("a \udcff cat", "a-cat"),
        "several lines": ("a\ncat", "a-cat"),
        "a path": ("../../etc/passwd", "etc-passwd"),
        "an absolute path": ("/etc/x", "etc-x"),
        "a Windows path": (r"..\con:", "con"),
    }.values(),
)
def test_any_prompt_gives_a_picture_with_a_safe_name(cli, tmp_path, prompt, name):
    result = cli(prompt)
    assert result.code == 0 and result.err == []
    assert result.out == [str(tmp_path / "out" / f"0001-0-{name}.png")]
    assert list(files(tmp_path)) == result.paths and Image.open(result.paths[0]).size == (SIDE, SIDE)


@pytest.mark.parametrize("text", ["word " * 500, "猫" * 500, "é" * 500, "a" * 59 + "é", "x" * 5000])
def test_a_long_prompt_gives_a_short_name(text):
    """At most 60 bytes, not characters, and no half characters: file systems count bytes."""
    name = sample.slug(text)
    assert 50 < len(name.encode()) <= 60 and text.replace(" ", "-").startswith(name)


def test_a_prompt_of_1000_words_is_cut_with_a_warning(cli):
    result = cli("cat " * 75 + "horse " * 925, "-n", "2")
    assert result.code == 0 and len(result.paths) == 3
    assert len(result.err) == 1  # not one for each picture
    assert re.fullmatch(r"warning: prompt longer than 75 tokens; dropped:.*horse", result.err[0])


# -------------------------------------------------------------------------------------------------- names and metadata
def test_nothing_is_overwritten(cli, tmp_path):
    """Numbers go on after the highest there is, whatever the file is."""
    first = cli("a cat").paths
    before = files(tmp_path)
    assert cli("a cat").paths == [tmp_path / "out" / "0002-0-a-cat.png"] != first
    (tmp_path / "out" / "0041-notes.txt").write_text("")
    assert cli("a dog").paths == [tmp_path / "out" / "0042-0-a-dog.png"]
    assert before.items() <= files(tmp_path).items()


def test_a_name_taken_in_the_meantime(tmp_path):
    """Two runs at once: the file that the other one wrote first stays."""
    numbers = sample.next_numbers(tmp_path)
    taken = tmp_path / "0001-x.png"
    taken.write_text("precious")
    path = sample.save(Image.new("RGB", (4, 4)), tmp_path, numbers, "x", "")
    assert path.name == "0002-x.png" and taken.read_text() == "precious"


def test_the_picture_says_how_it_was_made(cli, sd15_like):
    path = cli("a cat, 猫", "--seed", "7", "--steps", "2", "--guidance", "3.5", "--negative", "a dog").paths[0]
    prompt, negative, rest = parameters(path).split("\n")
    assert (prompt, negative) == ("a cat, 猫", "Negative prompt: a dog")
    for part in ("Steps: 2", "CFG scale: 3.5", "Seed: 7", f"Size: {SIDE}x{SIDE}", f"Model: {sd15_like}"):
        assert part in rest.split(", ")


@pytest.mark.parametrize(
    "name, steps, expected",
    [
        (None, 1, "1"), (None, 2, "7.5"), ("sd15", 2, "7.5"), ("emoji", 2, "2"), ("emoji", 1, "1"),
        ("sd-turbo", None, "1"), ("sd-turbo", 2, "1"),
    ],
)  # fmt: skip
def test_guidance_and_steps_by_default(cli, sd15_like, monkeypatch, name, steps, expected):
    """Guidance is the model's own, known by its short name, else 7.5; with one step it is none. sd-turbo: one step."""
    if name:
        monkeypatch.setitem(hipa.SHORT_NAMES, name, sd15_like)
    made = cli("a cat", "--model", name or sd15_like, "--lora", "none", steps=steps)
    assert f"Steps: {steps or 1}, " in parameters(made.paths[0])
    assert f"CFG scale: {expected}, " in parameters(made.paths[0])


def test_the_negative_prompt_and_guidance_count(cli):
    guided = [("--steps", "2", *extra) for extra in ((), ("--negative", "a dog and a cat"), ("--guidance", "1"))]
    plain, negative, unguided = (cli("a cat", *argv).paths[0] for argv in guided)
    assert not alike(plain, negative) and not alike(plain, unguided)


# ---------------------------------------------------------------------------------------------------- several pictures
def test_three_pictures_and_their_grid(cli):
    """Two columns; the place that is left stays white."""
    *pictures, grid = cli("a cat", "-n", "3", "--seed", "5").paths
    assert [path.name for path in pictures] == [f"000{k + 1}-{5 + k}-a-cat.png" for k in range(3)]
    assert grid.name == "0004-grid-a-cat.png"
    sheet = pixels(grid)
    cells = [sheet[y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert sheet.shape == (2 * SIDE, 2 * SIDE, 3) and (cells[3] == 255).all()
    assert all((cell == pixels(path)).all() for cell, path in zip(cells, pictures, strict=False))


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (9, 3, 3), (10, 4, 3)])
def test_grids_are_about_square(count, columns, rows):
    assert grid([Image.new("RGB", (8, 4))] * count).size == (8 * columns, 4 * rows)


def test_picture_k_is_drawn_from_seed_plus_k_whatever_the_batch(cli):
    together = cli("a cat", "-n", "3", "--seed", "5", "--batch", "4").paths[:3]
    in_twos = cli("a cat", "-n", "3", "--seed", "5", "--batch", "2").paths[:3]
    alone = [cli("a cat", "--seed", seed).paths[0] for seed in (5, 6, 7)]
    for a, b, c in zip(together, in_twos, alone, strict=True):
        assert alike(a, b) and alike(a, c)
    assert not alike(alone[0], alone[1])


def test_the_largest_seed(cli):
    """2^63 - 1, and the one after it."""
    assert len(cli("a cat", "--seed", 2**63 - 1, "-n", "2").paths) == 3


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_file_of_prompts(cli, tmp_path, start):
    """One a line, empty lines apart; the seeds go on counting, so a batch may hold several prompts."""
    (tmp_path / "prompts.txt").write_text(f"{start}a cat\r\n\n  a dog  \n猫\n", "utf-8")
    paths = cli("--prompts", tmp_path / "prompts.txt").paths
    assert [path.name for path in paths] == ["0001-0-a-cat.png", "0002-1-a-dog.png", "0003-2-猫.png"]
    assert [parameters(path).split("\n")[0] for path in paths] == ["a cat", "a dog", "猫"]
    assert alike(paths[1], cli("a dog", "--seed", "1").paths[0])


def test_each_prompt_of_a_file_has_its_grid(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    names = [path.name for path in cli("--prompts", tmp_path / "prompts.txt", "-n", "2", "--batch", "3").paths]
    assert [name.partition("-")[2].removesuffix(".png") for name in names] == [
        *("0-a-cat", "1-a-cat", "grid-a-cat", "2-a-dog", "3-a-dog", "grid-a-dog")
    ]


def test_a_coco_captions_file(cli, tmp_path):
    """The first caption of each image, as FID-5k is measured; others are left out, line breaks become spaces."""
    captions = [(9, "a cat"), (4, "a\n dog "), (9, "another cat"), (4, "x"), (5, "a horse")]
    annotations = [{"image_id": image, "id": k, "caption": text} for k, (image, text) in enumerate(captions)]
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "annotations": annotations}))
    paths = cli("--prompts", tmp_path / "captions.json").paths
    assert [parameters(path).split("\n")[0] for path in paths] == ["a cat", "a dog", "a horse"]


# ----------------------------------------------------------------------------------------------------- sizes, terminal
@pytest.mark.parametrize("size, expected", [("48x32", (48, 32)), ("64", (64, 64)), ("20x12", (20, 12)), ("4", (4, 4))])
def test_sizes(cli, size, expected):
    """Width first; also latents of odd sides, which the UNet's halvings do not divide."""
    assert Image.open(cli("a cat", "--size", size).paths[0]).size == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_about_the_same_picture(cli, dtype):
    full, half = (cli("a cat", "--dtype", d).paths[0] for d in ("float32", dtype))
    assert np.abs(pixels(full) - pixels(half)).mean() < 8


def test_show_draws_in_half_blocks(cli):
    """Each line of text is two lines of the picture, and its path follows."""
    *drawn, path = cli("a cat", "--size", "16x8", "--show").out
    colours = [re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line) for line in drawn]
    top_and_bottom = np.array(colours, int).reshape(4, 16, 2, 3).transpose(0, 2, 1, 3).reshape(8, 16, 3)
    assert (top_and_bottom == pixels(path)).all() and all(line.endswith("\x1b[0m") for line in drawn)


def test_only_paths_go_where_no_terminal_is(cli, monkeypatch):
    """Even if the terminal has colours: the output is piped."""
    monkeypatch.setenv("COLORTERM", "truecolor")
    result = cli("a cat", "-n", "2")
    assert len(result.out) == len(result.paths) == 3 and all(path.exists() for path in result.paths)


# ---------------------------------------------------------------------------------------------------- the real command
@pytest.fixture
def command(sd15_like, tmp_path):
    def start(*argv, stdout=subprocess.PIPE, **env):
        return subprocess.Popen(
            [sys.executable, SAMPLE, "--model", sd15_like, "--out", tmp_path / "out", *argv],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest in the background ignores it
        )

    return start


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_command(command, tmp_path, encoding):
    """Paths to stdout, also where a Windows pipe or an old locale cannot spell them; no traceback."""
    process = command("猫", "--steps", "1", PYTHONIOENCODING=encoding)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert list(files(tmp_path)) == [tmp_path / "out" / "0001-0-猫.png"]
    assert re.fullmatch(r".*/out/0001-0-.+\.png\n", out) and (encoding == "ascii" or "猫" in out)


@pytest.mark.parametrize("argv", [["a cat", "--stepz", "3"], ["--help"]], ids=["a typo", "help"])
def test_the_command_answers_without_torch(command, tmp_path, argv):
    """At once, not after the seconds that torch takes to import: here, importing it would be an error."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    process = command(*argv, PYTHONPATH=str(tmp_path))
    out, err = process.communicate()
    if argv == ["--help"]:
        assert process.returncode == 0 and "--strength" in out and not err
    else:
        assert process.returncode == 2 and re.fullmatch(r"error: unrecognized arguments: --stepz.*\n", err) and not out


def test_a_closed_pipe(command):
    """`sample.py … | head -0`: ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = command("a cat", "--steps", "1", "-n", "3", stdout=writer)
    os.close(writer)
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err and "Exception" not in err


def test_ctrl_c(command, tmp_path):
    """In the midst of drawing: no traceback, and the pictures that were announced are whole."""
    process = command("a cat", "--steps", "2", "-n", "10000", "--batch", "1")
    first = Path(process.stdout.readline().strip())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    assert Image.open(first).convert("RGB").size == (SIDE, SIDE)
