"""The real compiler of torch.compile, on a CPU: with `--compile` the results are those without. Takes minutes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT
from training import LORA, log

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
    """Four updates, two of the head start, which has one term only, and two of the whole loss: the same log, and the
    same adaptors as a whole. A single number may differ more: Adam's steps are as long where a gradient is small.
    """
    # At the usual rate, 4e-3, the last bits of the first updates grow within three more to 5 % of the gradient's norm.
    argv = ["train.py", "--data", "emoji", "--pairs", 16, "--steps", 4, "--teacher-steps", 2, "--device", "cpu"]
    argv += ["--targets", tmp_path / "targets", "--lr", "4e-4"]
    plain, compiled = (
        command(*argv, "--out", tmp_path / name, option)
        for name, option in (("plain", "--no-compile"), ("compiled", "--compile"))
    )
    assert (plain, compiled) == ([str(tmp_path / "plain" / LORA)], [str(tmp_path / "compiled" / LORA)])
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for name in log(plain).keys() - {"seconds"}:
        found, expected = ([value or 0 for value in log(out)[name]] for out in (compiled, plain))
        assert found == pytest.approx(expected, rel=1e-4), name
    ours, theirs = (torch.cat([t.flatten() for t in load_file(out / LORA).values()]) for out in (compiled, plain))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
