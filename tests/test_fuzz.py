"""300 damaged files of each kind, seeded: whatever is in them, the command ends with exit code 0, or with 2 and one
line, within 20 seconds. Each is read in a forked child, so that a crash in C would be seen too."""

import json
import os
import random
import re
import select
import shutil
import signal
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import hipa
import sample
import train
from training import LORA

pytest_plugins = "training"
pytestmark = pytest.mark.slow
COUNT, SECONDS = 300, 20
JUNK = [b"", b"\x00", b"\xff" * 8, b"[" * 3000, b'{"a":' * 3000, b"-1", b"1e999", b"99999999999999999999", b"null",
        b'"', b"\x1b[31m\x07", b"<html>", b"\x80\x02", "猫".encode(), b"NaN", b"{}", b"[]"]  # fmt: skip


def damaged(data, rng):
    """Bytes changed, cut, doubled, or replaced by junk; in half of the cases near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(len(data), 300)))
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + rng.randrange(9)] = rng.choice(JUNK)
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(50)]
        else:
            del data[at : at + rng.randrange(20)]
    return bytes(data)


def ends(work, seconds=SECONDS):
    """Runs `work` as a command line in a forked child -> exit code, stderr. Exit code -9: it took too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 70
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not in a fork
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(writer, "w", closefd=False)
            sample.run(work)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(f"Traceback {error!r}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    said, limit = b"", time.monotonic() + seconds
    while select.select([reader], [], [], max(0, limit - time.monotonic()))[0] and (more := os.read(reader, 1 << 16)):
        said += more
    if time.monotonic() >= limit:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def fuzz(files, work, kind):
    """Damages one of `files` {path: bytes} after the other, COUNT times, and runs `work` each time."""
    rng, codes, began = random.Random(kind), [], time.monotonic()
    for k in range(COUNT):
        path = rng.choice(list(files))
        path.write_bytes(damaged(files[path], rng))
        code, said = ends(work)
        lines = [line for line in re.split(r"[\r\n]+", said) if "error: " in line or "Traceback" in line]
        assert code in (0, 2) and len(lines) == (code == 2), (k, path.name, code, said[-2000:])
        assert "\x1b[31m" not in said
        codes.append(code)
        for each, data in files.items():  # a run may have written others anew
            each.write_bytes(data)
    assert COUNT / 10 < codes.count(2), codes  # the damage is felt
    print(f"{kind}: {codes.count(2)} of {COUNT} refused, {time.monotonic() - began:.0f} s")


def bytes_of(*paths):
    return {path: path.read_bytes() for path in paths}


def test_safetensors(small, tmp_path):
    model = shutil.copytree(small, tmp_path / "model")
    unet = hipa.load(model).unet

    def work():
        path = model / "unet" / "diffusion_pytorch_model.safetensors"
        hipa.assign_weights(unet, hipa.read_weights(path), path, torch.float32)
        train.load_distance("dists", model)

    fuzz(bytes_of(*model.glob("unet/*.safetensors"), *model.glob("features/*.safetensors")), work, "safetensors")


def test_json(small, tmp_path):
    """Configs, tokenizer, prompts."""
    model, prompts = shutil.copytree(small, tmp_path / "model"), tmp_path / "p.json"
    captions = [{"image_id": k, "caption": f"a cat {k}"} for k in range(9)]
    prompts.write_text(json.dumps({"annotations": captions}))

    def work():
        hipa.load(model).encode_text(sample.read_prompts(prompts)[:2])
        sample.picture_size(model)

    fuzz(bytes_of(prompts, *model.rglob("*.json"), *model.rglob("merges.txt")), work, "json")


def test_pictures(tmp_path):
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tif", "a.avif", "a.jp2", "a.ppm", "a.tga", "a.ico"):
        picture.save(tmp_path / name)
    files = bytes_of(*tmp_path.iterdir())
    fuzz(files, lambda: [sample.read_picture(path) and sample.read_mask(path, (8, 8)) for path in files], "pictures")


def test_adaptors(finished, small, tmp_path):
    path, model = tmp_path / LORA, hipa.load(small)
    data = (finished.out / LORA).read_bytes()
    path.write_bytes(data)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 1}}))
    renamed = tmp_path / "peft.safetensors"
    tensors = hipa.read_weights(path)
    save_file({key.replace("unet.", "base_model.model."): tensor for key, tensor in tensors.items()}, renamed)
    files = bytes_of(path, renamed, tmp_path / "adapter_config.json")
    fuzz(files, lambda: [sample.apply_lora(model, each) for each in (path, renamed)], "adaptors")


def test_folders_of_runs(finished, small, tmp_path, monkeypatch):
    """--resume of a run of which any file is damaged; what is loaded beside it is there already."""
    model, distance = hipa.load(small), train.load_distance("dists", small)
    monkeypatch.setattr(hipa, "load", lambda *_: model)
    monkeypatch.setattr(train, "load_distance", lambda *_: distance)
    monkeypatch.setattr(train, "rehearse", lambda _: None)
    monkeypatch.setattr(train.Run, "draw_samples", lambda _: None)  # a third of the time
    update, missing = train.Run.update, train.Targets.missing

    def enough(there, most, value):  # damaged settings can ask for a million steps or pairs
        if there > most:
            raise hipa.UserError("a longer run than there was")
        return value()

    monkeypatch.setattr(train.Run, "update", lambda run: enough(run.step, 12, lambda: update(run)))
    monkeypatch.setattr(train.Targets, "missing", lambda targets: enough(targets.pairs, 50, lambda: missing(targets)))
    copy = shutil.copytree(finished.out, tmp_path / "run")
    files = bytes_of(*(path for path in copy.rglob("*") if path.is_file() and path.suffix != ".png"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(copy)])

    fuzz(files, train.main, "runs")
