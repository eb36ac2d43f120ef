"""What the tests of train.py share: a small checkpoint, a finished run of it, and ways to start and compare runs.

A test module gets the fixtures by `pytest_plugins = "training"`. `run` calls `train.run(train.main)` in this process;
`process` starts the real command. (PYTEST_DONT_REWRITE: the module is imported before pytest sees that it is a plugin.)
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hipa
import train
from losses import VGG, HiPALoss, VGGConfig
from sample import LORA_NAME as LORA

PROMPTS = ["a cat", "a dog", "a cat and a dog", "a red cat", "two dogs"]  # fewer than pairs: they come around again
GUIDANCE, TEACHER_STEPS, PAIRS, STEPS = 3.0, 4, 8, 6
FIRST = train.FIRST_SEED
FLAGS = {
    "pairs": PAIRS, "guidance": GUIDANCE, "teacher-steps": TEACHER_STEPS, "teacher-batch": 3, "steps": STEPS,
    "batch": 4, "lr": 3e-4, "rank": 2, "layers": "attention", "later": 0.5, "distance": "dists", "spatial": 1,
    "fourier": 1, "sobel": 1, "energy": 0.1, "latent": 0, "head-start": 0, "radius": 0.25, "seed": 5, "save-every": 2,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip
TERMS = ["spatial", "fourier", "sobel", "energy"]
STATE = "state.safetensors"


# ------------------------------------------------------------------------------------------------------- starting runs
def run(*argv):
    """Runs the command line in this process, which is afterwards as it was. -> `code`, `out` and `err` (lines)

    With one thread: sums depend on the number of threads in their last bits, and runs are compared bitwise.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    precision, threads, code = torch.get_float32_matmul_precision(), torch.get_num_threads(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(train, "INTERRUPTED", train.Interrupted())
        torch.set_num_threads(1)
        try:
            train.run(train.main)
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
    out, err = (
        [line for line in re.split(r"[\r\n]+", f.buffer.getvalue().decode()) if line.strip()] for f in (out, err)
    )
    return SimpleNamespace(code=code, out=out, err=err)


def flags(**changed):
    """Every option, so that no test depends on a default; None leaves one out."""
    options = FLAGS | {name.replace("_", "-"): value for name, value in changed.items()}
    return [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]


def done(*argv):
    """A run that has to end well."""
    result = run(*argv)
    assert result.code == 0, result.err
    return result


def resume(out, *argv):
    return done("--resume", "--out", out, *argv)


def refused(*argv, words=()):
    """A mistake: exit code 2, nothing on stdout, and one line on stderr, which says `words`."""
    result = run(*argv)
    assert result.code == 2 and result.out == [], result
    errors = [line for line in result.err if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and errors[0] == result.err[-1], result.err
    assert all(word in errors[0] for word in words), errors
    return result


# ------------------------------------------------------------------------------------------- what runs leave, compared
def log(out):
    """log.csv as {column: [values]}; None where a step has none."""
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in rows[0]}


def saved_step(out):
    """Of the last state that was saved; 0 if there is none."""
    if not (out / STATE).exists():
        return 0
    with safe_open(out / STATE, "pt") as file:
        return int(file.metadata()["step"])


def same_tensors(a, b):
    """Two safetensors files hold the same tensors, bit by bit."""
    a, b = load_file(a), load_file(b)
    different = [key for key in a.keys() | b.keys() if key not in a or key not in b or not torch.equal(a[key], b[key])]
    assert not different, different


def difference(a, b):
    """The largest between the tensors of two safetensors files."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def same_run(a, b):
    """Adaptors, optimizer state, log but for the seconds, and the last sample grid are the same bits."""
    for name in (LORA, STATE):
        same_tensors(a / name, b / name)
    logs = [{name: values for name, values in log(out).items() if name != "seconds"} for out in (a, b)]
    assert logs[0] == logs[1], logs
    grid = max((a / "samples").iterdir()).name
    assert (a / "samples" / grid).read_bytes() == (b / "samples" / grid).read_bytes()


def nearly_same_run(a, b):
    """Equal but for the order of sums. Adam hides the gradient's scale; the log shows its length."""
    for name in ("loss", *TERMS, "gradient"):
        assert log(a)[name] == pytest.approx(log(b)[name], rel=1e-2, abs=1e-6), name
    assert difference(a / LORA, b / LORA) < 1e-5


def close(a, b, tolerance=2e-3):
    """Equal to half precision, which has 11 bits."""
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def stamps(folder):
    """{name: when it was written} of the shards in a folder."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- fixtures
def write_features(folder):
    """A feature net with random weights, so that the official VGG16 is not needed."""
    torch.manual_seed(0)
    config = {"channels": [4, 6, 8, 8, 8], "convs": [1] * 5, "mean": [0.5] * 3, "std": [0.5] * 3}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(VGG(VGGConfig(**config)).state_dict(), folder / "model.safetensors")


@pytest.fixture(scope="session")
def small(sd15_like, tmp_path_factory):
    """The folder of a small checkpoint with its own feature net; its pictures have 32 x 32 pixels."""
    folder = shutil.copytree(sd15_like, tmp_path_factory.mktemp("models") / "small")
    write_features(folder / "features")
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """A file of prompts."""
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def finished(small, prompts_file, tmp_path_factory):
    """A run end to end, which others are compared with; its targets serve them too. -> `out` folder, `result`, and its
    `prompts` in their order"""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = done("--data", prompts_file, "--model", small, "--out", out, *flags())
    return SimpleNamespace(out=out, result=result, prompts=train.find_prompts(str(prompts_file)))


@pytest.fixture
def begin(small, prompts_file, finished, tmp_path):
    """Makes the argv of a run like `finished`, with its targets, in tmp_path/run; options can be changed."""

    def argv(out=tmp_path / "run", targets=finished.out / "targets", data=prompts_file, model=small, **changed):
        return ["--data", data, "--model", model, "--out", out, *flags(targets=targets, **changed)]

    return argv


@pytest.fixture
def student(small, prompts_file, finished):
    """Makes a train.Run as main does, on the targets of `finished`, for single updates."""

    def make(checkpointing=False, **changed):
        args = train.parse_args(["--data", str(prompts_file), "--model", str(small), *flags(**changed)])
        model, distance = hipa.load(small), train.load_distance(args.distance, small)
        if checkpointing:
            train.checkpoint_activations(model, distance)
        targets = train.Targets(finished.out / "targets", finished.prompts, PAIRS, args.later, model.schedule)
        return train.Run(args, model, targets, HiPALoss(distance, **{name: getattr(args, name) for name in TERMS}))

    return make


@pytest.fixture
def small_shards(monkeypatch):
    """Eight pairs a file: two files for the eight pairs and the eight held out."""
    monkeypatch.setattr(train, "SHARD", 8)


@pytest.fixture
def process(tmp_path):
    """Starts the real command, with one thread as `run` has."""
    started = []

    def start(*argv, **env):
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest in the background ignores it
            )
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()
