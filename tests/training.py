"""What the tests of training share: a small checkpoint, a finished run of it, and ways to start and compare runs.

A test module gets the fixtures by `pytest_plugins = "training"` (PYTEST_DONT_REWRITE: it imports the module first).
"""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from hipa import write_file
from lora import LORA_NAME as LORA
from losses import VGG, VGGConfig

PROMPTS = ["a cat", "a dog", "a cat and a dog", "a red cat", "two dogs"]  # fewer than pairs: they repeat
PAIRS, STEPS, STATE = 8, 5, "state.pt"
FLAGS = {  # every option, so that no test depends on a default
    "pairs": PAIRS, "guidance": 3.0, "teacher-steps": 2, "steps": STEPS, "batch": 4, "lr": 1e-2, "rank": 2,
    "layers": "attention", "distance": "dists", "spatial": 1.0, "fourier": 1.0, "sobel": 1.0, "energy": 0.1,
    "latent": 0.5, "head-start": 0.3, "later": 0.5, "seed": 5, "save-every": 2, "device": "cpu",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- starting runs
def run(*argv, **loss_of):
    """Runs the command line in this process -> `code`, `out` and `err` (lines)

    With one thread: sums depend on the number of threads in their last bits, and runs are compared bitwise.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.run(lambda: train.main([str(arg) for arg in argv], **loss_of))
    except SystemExit as end:
        code = end.code
    finally:
        torch.set_num_threads(threads)
    out, err = ([line for line in re.split(r"[\r\n]+", f.getvalue()) if line.strip()] for f in (out, err))
    return SimpleNamespace(code=code, out=out, err=err)


def done(*argv, **loss_of):
    """A run that has to end well."""
    result = run(*argv, **loss_of)
    assert result.code == 0, result.err
    return result


def resume(out, *argv):
    return done("--resume", "--out", out, *argv)


def refused(*argv, words=(), **loss_of):
    """A mistake: exit code 2, nothing on stdout, and one line on stderr, which says `words`."""
    result = run(*argv, **loss_of)
    errors = [line for line in result.err if "error" in line.lower()]
    assert (result.code, result.out, len(errors)) == (2, [], 1) and errors[0].startswith("error: "), result
    assert all(word in errors[0] for word in words), errors
    return errors[0]


# ------------------------------------------------------------------------------------------- what runs leave, compared
def log(out):
    """log.csv as {column: [values]}; None where a step has none."""
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in rows[0]}


def saved_step(out):
    """Of the last state that was saved; 0 if there is none."""
    return torch.load(out / STATE)["step"] if (out / STATE).exists() else 0


def bits(value):
    """A nested value with the hash of its bits in place of each tensor, and without seconds."""
    if isinstance(value, torch.Tensor):
        return hash(value.detach().numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items() if key != "seconds"}
    return [bits(each) for each in value] if isinstance(value, list) else value


def same_run(a, b):
    """Adaptors, optimizer state, log but for the seconds, and the sample grids of `b` are the same bits."""
    for read in (lambda out: load_file(out / LORA), lambda out: torch.load(out / STATE), log):
        assert bits(read(a)) == bits(read(b))
    for grid in (b / "samples").iterdir():
        assert (a / "samples" / grid.name).read_bytes() == grid.read_bytes(), grid


def contents(folder, pattern="*"):
    """{path: (bytes, when they were written)} of the files below a folder"""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob(pattern) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session")
def small(sd15_like, tmp_path_factory):
    """A folder with prompts and a small checkpoint that has its own feature net; its pictures have 32 x 32 pixels."""
    folder = shutil.copytree(sd15_like, tmp_path_factory.mktemp("models") / "small")
    torch.manual_seed(0)
    vgg = VGG(VGGConfig((4, 6, 8, 8, 8), (1,) * 5, (0.5,) * 3, (0.5,) * 3))
    write_file(folder / "features" / "config.json", json.dumps(dataclasses.asdict(vgg.config)).encode())
    save_file(vgg.state_dict(), folder / "features" / "model.safetensors")
    (folder / "prompts.txt").write_text("\n\n ".join(PROMPTS))
    return folder


def options(folder, out, **changed):
    """The argv of a run with the checkpoint in `folder`. FLAGS can be changed; None leaves one out."""
    flags = {"data": folder / "prompts.txt", "model": folder, "out": out, **FLAGS}
    flags |= {name.replace("_", "-"): value for name, value in changed.items()}
    return [str(part) for name, value in flags.items() if value is not None for part in (f"--{name}", value)]


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A run end to end, which others are compared with; its targets serve them too. -> `out`, `result`, `prompts`, and
    what `loss_of` took in the last update: `args`, `model`, `loss`, `batch`"""
    run = SimpleNamespace(out=tmp_path_factory.mktemp("runs") / "finished")
    run.prompts = train.find_prompts(str(small / "prompts.txt"))

    def loss_of(args, model, loss, step, batch):
        run.args, run.model, run.loss, run.batch = args, model, loss, batch
        return train.loss_of(args, model, loss, step, batch)

    run.result = done(*options(small, run.out), loss_of=loss_of)
    return run


@pytest.fixture
def begin(small, finished, tmp_path):
    """Makes the argv of a run like `finished`, with its targets, in tmp_path/run."""
    return lambda out=tmp_path / "run", **changed: options(
        small, out, **{"targets": finished.out / "targets"} | changed
    )
