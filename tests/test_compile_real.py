"""The real compiler of torch.compile, on a CPU: with `--compile` the results are those without. Takes minutes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from training import LORA, difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
]


def command(*argv):
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("steps", [1, 2])
def test_pictures(tmp_path, steps):
    """Three in batches of two, so that a second size of batch is compiled. Values differ by one of 255 at most."""
    (tmp_path / "prompts.txt").write_text("a cat\na rocket\na red apple\n")
    argv = ["sample.py", "--prompts", tmp_path / "prompts.txt", "--batch", 2, "--steps", steps, "--device", "cpu"]
    plain, compiled = (
        [np.asarray(Image.open(path)).astype(int) for path in command(*argv, "--out", tmp_path / name, *options)]
        for name, options in (("plain", []), ("compiled", ["--compile"]))
    )
    assert len(plain) == len(compiled) == 3
    assert max(np.abs(a - b).max() for a, b in zip(plain, compiled)) <= 1


def test_training(tmp_path):
    """Four updates, two of the head start and two of the whole loss."""
    argv = ["train.py", "--data", "emoji", "--pairs", 16, "--steps", 4, "--teacher-steps", 2, "--device", "cpu"]
    argv += ["--targets", tmp_path / "targets"]
    plain, compiled = (
        command(*argv, "--out", tmp_path / name, option)
        for name, option in (("plain", "--no-compile"), ("compiled", "--compile"))
    )
    assert (plain, compiled) == ([str(tmp_path / "plain" / LORA)], [str(tmp_path / "compiled" / LORA)])
    assert difference(plain[0], compiled[0]) < 1e-4
