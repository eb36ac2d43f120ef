"""The real compiler of torch.compile, on a CPU: training with `--compile` ends as without it. Takes minutes."""

import csv
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hipa
import train
from lora import LORA_NAME
from test_compile import small_distance, small_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
]


def test_training(sd15_like, tmp_path, monkeypatch):
    """Four updates, two of the head start, which has one term only, and two of the whole loss: the same log, and the
    same adaptors as a whole. A single number may differ more: Adam's steps are as long where a gradient is small.
    """
    load = hipa.load
    monkeypatch.setattr(hipa, "load", lambda *args: small_model(load(*args), levels=1))
    monkeypatch.setattr(train, "load_distance", lambda *_: small_distance())
    monkeypatch.setattr(train, "save_samples", lambda *_: None)  # would compile the same for other inputs
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = "--pairs 8 --guidance 1 --teacher-steps 2 --steps 4 --batch 8 --head-start 0.5 --device cpu --rank 2"
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        paths = ["--data", tmp_path / "prompts.txt", "--model", sd15_like, "--out", tmp_path / out]
        train.main([*map(str, paths), *options.split(), "--targets", str(tmp_path / "targets"), *more])
    plain, compiled = (list(csv.DictReader((tmp_path / out / "log.csv").open())) for out in ("plain", "compiled"))
    assert len(plain) == len(compiled) == 4
    for ours, theirs in zip(compiled, plain):
        for name in theirs.keys() - {"seconds"}:
            assert float(ours[name] or 0) == pytest.approx(float(theirs[name] or 0), rel=1e-4), name
    ours, theirs = (
        torch.cat([tensor.flatten() for tensor in load_file(tmp_path / out / LORA_NAME).values()])
        for out in ("compiled", "plain")
    )
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
