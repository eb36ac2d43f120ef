"""Nothing is lost, nothing is silent: files that are damaged or cannot be written, disks that are full, too little
memory, two processes at once, and words from outside that a terminal would obey."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

import hipa
import lora
import sample
import train
from conftest import ROOT, run_sample

# isort: split
from training import (  # noqa: I001
    LORA, PROMPTS, STATE, contents, done, refused, resume, run, same_run, same_tensors, saved_step,
)  # fmt: skip

pytest_plugins = "training"
BEFORE = "state-before.safetensors"
FULL = OSError(28, "No space left on device")


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(finished.out, tmp_path / "copy")


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(bytes(range(1, 256)) * 50),
    "another file": lambda path: shutil.copy(ROOT / "losses.safetensors", path),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


# --------------------------------------------------------------------------------------------- damaged files of a run
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before(copy, finished, damage):
    """With a warning; the run ends bitwise as it did, and then both states are good again."""
    damage(copy / STATE)
    if (copy / STATE).is_dir():
        with pytest.raises(AssertionError, match="error"):  # nothing of the user's is deleted
            resume(copy)
        (copy / STATE).rmdir()
    result = resume(copy)
    if damage is not DAMAGES["a folder"]:
        assert [line for line in result.err if line.startswith(f"warning: {copy / STATE} is damaged")]
    same_run(copy, finished.out)
    (copy / STATE).unlink()
    resume(copy)
    same_run(copy, finished.out)


def test_two_states_are_kept(finished):
    with lora.safe_open(finished.out / BEFORE, "pt") as file:
        assert (saved_step(finished.out), file.metadata()["step"]) == (6, "4")


@pytest.mark.parametrize("damage", list(DAMAGES.values())[:6], ids=list(DAMAGES)[:6])
def test_two_damaged_states_end_in_one_line(copy, finished, damage):
    """Which says the way back: without them the run begins its adaptors anew."""
    for name in (STATE, BEFORE):
        damage(copy / name)
    refused("--resume", "--out", copy, words=[str(copy), "delete", "step 0"])
    for name in (STATE, BEFORE):
        (copy / name).unlink()
    resume(copy)
    same_run(copy, finished.out)


@pytest.mark.parametrize("damage", list(DAMAGES.values())[:6], ids=list(DAMAGES)[:6])
def test_a_damaged_shard_is_drawn_again(copy, finished, damage):
    damage(copy / "targets" / "000000.safetensors")
    result = resume(copy)
    assert [line for line in result.err if "000000.safetensors is damaged" in line]
    same_tensors(*(out / "targets" / "000000.safetensors" for out in (copy, finished.out)))


@pytest.mark.parametrize("name, shape", [("x0", (16, 8, 4, 8)), ("x", (1, 4, 8, 8))])
def test_a_shard_of_other_shapes_is_drawn_again(copy, finished, name, shape):
    path = copy / "targets" / "000000.safetensors"
    save_file(load_file(path) | {name: torch.zeros(shape).half()}, path)
    resume(copy)
    same_tensors(*(out / "targets" / "000000.safetensors" for out in (copy, finished.out)))


def test_a_damaged_log_is_written_again(copy, finished):
    """The state has all rows too."""
    (copy / "log.csv").write_bytes(b"\xff\x00")
    (copy / STATE).unlink()
    resume(copy)
    same_run(copy, finished.out)


SETTINGS = {
    "empty": "", "partial": '{"data": "x', "a list": "[]", "deep": "[" * 10**6, "no data": '{"targets": "targets"}',
    "a number for a path": '{"data": "p", "targets": 3}', "an unknown one": '{"data": "p", "targets": "t", "lrr": 1}',
    "a bad value": '{"data": "p", "targets": "t", "lr": "fast"}', 
    "a bad choice": '{"data": "p", "targets": "t", "layers": "1"}',
    "an escape": '{"data": "p", "targets": "t", "\\u001b[31m": 1}',
}  # fmt: skip


@pytest.mark.parametrize("text", SETTINGS.values(), ids=SETTINGS)
def test_damaged_settings_of_a_run(copy, text):
    """One line; nothing is changed, and a new run there is refused too: it would write over the states."""
    (copy / "settings.json").write_text(text)
    before = contents(copy)
    result = refused("--resume", "--out", copy)
    assert "\x1b" not in result.err[-1] and contents(copy) == before
    (copy / "settings.json").unlink()
    refused("--data", "emoji", "--out", copy, words=["holds a run", "--resume"])


@pytest.mark.parametrize("text", ["", '{"guid', "[]", "[" * 10**6])
def test_a_damaged_record_of_targets(copy, text):
    (copy / "targets" / "settings.json").write_text(text)
    refused("--resume", "--out", copy, words=["settings.json", "JSON"])


# ------------------------------------------------------------------------------------------------------ killed, resumed
def killed_at(argv, k, where):
    """Runs train.py in a child that is killed -9 in the k-th write of a file: inside it, or before its renaming."""
    child = os.fork()
    if not child:
        calls, real = [], getattr(os, where)

        def kill(*args):
            calls.append(args)
            if len(calls) == k:
                if where == "fsync":
                    os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(os, where, kill)
        try:
            run(*argv)
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("where, k", [
    ("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 5), ("fsync", 8),
    ("replace", 1), ("replace", 3), ("replace", 6), ("replace", 9), ("replace", 10),
])  # fmt: skip
def test_ten_kills(begin, finished, tmp_path, where, k):
    """Inside the writes of records, shards, adaptors, log, state and samples, and between their renamings: the run goes
    on, with --resume or before there are settings by the same command, to the same bits. No half-written file stays."""
    argv, out = begin(targets=tmp_path / "run" / "targets"), tmp_path / "run"
    assert killed_at(argv, k, where) == -signal.SIGKILL
    done(*(["--resume", "--out", out] if (out / "settings.json").exists() else argv))
    same_run(out, finished.out)
    assert not list(out.rglob("*.part"))


def test_settings_are_written_once(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("settings.json")}
    resume(copy)
    assert len(before) == 2 and before == {path: path.stat().st_mtime_ns for path in before}


def test_a_hangup_saves(begin, process, tmp_path):
    """The terminal is closed; under nohup that means nothing."""
    for preset, code in ((signal.SIG_DFL, 128 + signal.SIGHUP), (signal.SIG_IGN, 0)):
        out = tmp_path / str(code)
        script = f"""
import signal, sys; sys.path.insert(0, {str(ROOT)!r}); signal.signal(signal.SIGHUP, {int(preset)}); import train
update = train.Run.update
train.Run.update = lambda run: (run.step == 3 and signal.raise_signal(signal.SIGHUP)) or update(run)
train.run(train.main)"""
        child = process("-c", script, *begin(out=out))
        _, err = child.communicate()
        assert (child.returncode, saved_step(out)) == (code, 4 if code else 6), err


# ------------------------------------------------------------------------------------------------- elsewhere, renamed
def test_resume_from_another_folder_and_renamed(small, tmp_path, monkeypatch):
    """Data, model and run were named by relative paths. Nothing is drawn again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "p.txt").write_text("\n".join(PROMPTS))
    shutil.copytree(small, tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    done("--data", "p.txt", "--model", "model", "--out", "run", *"--pairs 4 --steps 1 --teacher-steps 1".split(),
        *"--rank 1 --batch 1 --device cpu --layers attention --head-start 1".split())  # fmt: skip
    assert json.loads(Path("run/settings.json").read_text())["targets"] == "targets"
    with lora.safe_open(f"run/{LORA}", "pt") as file:
        assert file.metadata()["base_model"] == "model"
    os.rename("run", "../renamed")
    monkeypatch.chdir("/")
    monkeypatch.setattr(train.Targets, "draw", fail(AssertionError("drawn again")))
    resume(tmp_path / "renamed")
    resume(os.path.relpath(tmp_path / "renamed"), "--data", tmp_path / "a" / "p.txt")
    assert not (tmp_path / "a" / "run").exists()


# ---------------------------------------------------------------------------------------------------------- the writer
def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    order, path = [], tmp_path / "a.safetensors"
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: order.append(name) or real(*args))
    lora.save_atomically({"a": torch.zeros(2)}, path)
    assert order == ["fsync", "replace"] and load_file(path)["a"].tolist() == [0, 0]


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        lora.save_atomically({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_a_full_disk_in_training(copy, finished, monkeypatch):
    """One line, no partial file; with room again the run goes on."""
    (copy / STATE).unlink()
    before = contents(copy)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(FULL))
        refused("--resume", "--out", copy, words=["No space left"])
    assert contents(copy) == before
    resume(copy)
    same_run(copy, finished.out)


@pytest.fixture
def cli(sd15_like, tmp_path, capsys):
    """sample.py in this process, with the small checkpoint at one step -> code, lines of stdout, lines of stderr"""

    def call(*argv):
        return run_sample(["--model", sd15_like, "--out", tmp_path / "out", "--steps", 1, *argv], capsys)

    return call


def one_line(result, *words):
    code, out, err = result
    assert code == 2 and out == [] and len(err) == 1 and err[0].startswith("error: "), result
    assert all(word in err[0] for word in words) and err[0].isprintable(), err


def test_a_full_disk_in_drawing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(FULL))
    one_line(cli("a cat"), "No space left")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_deleted_meanwhile(cli, tmp_path, monkeypatch):
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args, **kw: shutil.rmtree(tmp_path / "out") or draw(*args, **kw))
    one_line(cli("a cat"), "No such file", "out")


# -------------------------------------------------------------------------------------------------------------- memory
KINDS = {
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "Python": MemoryError(),
    "MPS": RuntimeError("MPS backend out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("error", KINDS.values(), ids=KINDS)
def test_a_batch_is_halved_once(cli, monkeypatch, error):
    draw, sizes = sample.draw, []

    def tight(model, words, *args, **options):
        sizes.append(len(words))
        if len(words) > most:
            raise error
        return draw(model, words, *args, **options)

    monkeypatch.setattr(sample, "draw", tight)
    most = 2
    code, out, err = cli("a cat", "-n", 5)
    assert code == 0 and sizes == [4, 2, 2, 1] and len(out) == 6
    assert [line for line in err if "not enough memory for --batch 4: going on with 2" in line]
    most, sizes[:] = 1, []
    code, out, err = cli("a dog", "-n", 5)
    assert code == 2 and sizes == [4, 2] and not out and "not enough memory: try a lower --batch" in err[-1]


@pytest.mark.parametrize("error", KINDS.values(), ids=KINDS)
def test_a_run_that_memory_did_not_suffice_for_can_begin_again(begin, monkeypatch, tmp_path, error):
    """With other options: nothing stands in their way."""
    with monkeypatch.context() as patch:
        patch.setattr(hipa, "student", fail(error))
        refused(*begin(), words=["not enough memory", "--batch", "--checkpointing"])
    assert contents(tmp_path / "run") == {}
    done(*begin(batch=2, steps=1))


# ---------------------------------------------------------------------------------------------------- several at once
def test_two_trainings_in_one_folder(begin, copy, tmp_path):
    """The second one is refused, and told who is there, before anything is loaded."""
    (tmp_path / "run").mkdir()
    for out, argv in ((tmp_path / "run", begin()), (copy, ["--resume", "--out", copy])):
        before = contents(out)
        with hipa.locked(out, "wait"):
            refused(*argv, words=[str(out), f"in use by process {os.getpid()}", "--out"])
        assert contents(out) == before
    done(*begin(steps=1))


def test_a_lock_ends_with_its_process(tmp_path):
    child = os.fork()
    if not child:
        with hipa.locked(tmp_path, "wait"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with hipa.locked(tmp_path, "wait"):
        pass


# ------------------------------------------------------------------------------------------------------ the terminal
def test_words_of_a_lora_are_escaped(cli, tmp_path):
    save_file({"\x1b]0;owned\x07\x1b[2Jlayer.lora_A.weight" + "x" * 9999: torch.zeros(1)}, tmp_path / "a.safetensors")
    result = cli("a cat", "--lora", tmp_path / "a.safetensors")
    one_line(result, r"\x1b[2J")
    assert len(result[2][0]) < 1200


def test_words_of_a_config_are_escaped(cli, sd15_like, tmp_path):
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"\x1b[31mkey\n": "on"}))
    one_line(cli("a cat", "--model", model), r"\x1b[31mkey\n")


def test_dropped_words_of_a_prompt_are_escaped(cli):
    code, _, err = cli("cat " * 80 + "\x1b[31m\x07")
    assert code == 0 and len(err) == 1 and "dropped" in err[0] and r"\x1b" in err[0] and err[0].isprintable()


# ------------------------------------------------------------------------------------------------- pictures, prompts
def test_only_kinds_of_pictures_that_run_no_program(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail(AssertionError("Ghostscript was started")))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "photo.png")
    one_line(cli("a cat", "--image", tmp_path / "photo.png"), "photo.png is no picture")


def test_no_waiting_for_a_pipe(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    signal.alarm(20)
    one_line(cli("a cat", "--image", tmp_path / "pipe.png"), "pipe.png", "not a file")
    one_line(cli("--prompts", "/dev/zero"), "/dev/zero")
    signal.alarm(0)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"annotations": ' + "[" * 10**6])
def test_deep_prompts(cli, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    one_line(cli("--prompts", tmp_path / "p.json"), "p.json")


def test_a_deep_tokenizer(cli, sd15_like, tmp_path):
    model = shutil.copytree(sd15_like, tmp_path / "model")
    (model / "tokenizer" / "vocab.json").write_text('{"a":' * 10**6)
    one_line(cli("a cat", "--model", model), "tokenizer")


def settings_of(path):
    return Image.open(path).text["parameters"].split("\n")


def test_what_others_read_in_a_picture_is_what_was_meant(cli, tmp_path, finished):
    """Names with commas are quoted, line breaks do not begin another entry, and no folder of this machine is told."""
    odd = "weird, Seed: 77, name.png"
    Image.new("RGB", (32, 32)).save(tmp_path / odd)
    code, out, err = cli("a\ncat", "--negative", "a dog\nSteps: 99", "--image", tmp_path / odd, "--lora", finished.out)
    prompt, negative, rest = settings_of(out[0])
    assert (prompt, negative) == ("a cat", "Negative prompt: a dog Steps: 99")
    assert f', Image: "{odd}", Denoising' in rest and f"Lora: finished/{LORA}:1," in rest
    found = dict(
        re.findall(r'\s*([\w ]+): ("(?:\\.|[^"])+"|[^,]*)(?:,|$)', rest)
    )  # as Stable Diffusion web UIs read it
    assert found["Seed"] == "0" and json.loads(found["Image"]) == odd


# --------------------------------------------------------------------------------------------------------- checkpoints
CONFIGS = [
    ("unet", "layers_per_block", 10**9), ("unet", "sample_size", 0), ("unet", "attention_head_dim", 7),
    ("unet", "attention_head_dim", 0), ("unet", "attention_head_dim", [3]), ("unet", "cross_attention_dim", 2**63),
    ("unet", "norm_num_groups", -1), ("unet", "block_out_channels", [24, 2**40, 72]), 
    ("vae", "layers_per_block", 10**9), ("vae", "scaling_factor", 0), ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "num_attention_heads", 7), ("text_encoder", "hidden_size", 2**63),
    ("scheduler", "beta_end", 1.5), ("scheduler", "beta_start", -1), ("scheduler", "num_train_timesteps", 2**63),
]  # fmt: skip


@pytest.mark.parametrize("part, key, value", CONFIGS)
def test_impossible_configs(cli, sd15_like, tmp_path, part, key, value):
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    signal.alarm(20)
    one_line(cli("a cat", "--model", model), part)
    signal.alarm(0)


def test_weights_in_several_parts(cli, sd15_like, tmp_path):
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    one_line(cli("a cat", "--model", model), "several parts")


def test_adaptors_of_the_text_encoder(cli, tmp_path):
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, tmp_path / "a.safetensors")
    one_line(cli("a cat", "--lora", tmp_path / "a.safetensors"), "text encoder?")


def test_nan_in_float32_is_no_matter_of_precision(cli, sd15_like, tmp_path):
    model = shutil.copytree(sd15_like, tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"decoder.conv_out.bias": torch.full((3,), float("nan"))}, path)
    code, _, err = cli("a cat", "--model", model)
    assert code == 2 and "damaged" in err[-1] and "--dtype" not in err[-1]
    assert "--dtype float32" in cli("a cat", "--model", model, "--dtype", "bfloat16")[2][-1]


# ----------------------------------------------------------------------------------------------------- the real command
@pytest.mark.parametrize("redirect, code, pictures", [
    ("2>&-", 0, 1), (">/dev/full", 2, 1), (">&-", 0, 1), ("", 0, 1),
])  # fmt: skip
def test_streams_that_are_not_there(sd15_like, tmp_path, redirect, code, pictures):
    """Also without UTF-8, in which the name of the file then goes without what it cannot spell."""
    words = [sys.executable, sample.__file__, "猫 cat", "--model", sd15_like, "--out", tmp_path / "out", "--steps", "1"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} if not redirect else None
    ran = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "_", *map(str, words)], capture_output=True, env=environment
    )
    err = ran.stderr.decode().splitlines()
    assert ran.returncode == code and len(err) == (code == 2), err
    assert len(list((tmp_path / "out").glob("0001-0-*cat.png"))) == pictures
    assert np.asarray(Image.open(next((tmp_path / "out").iterdir()))).shape == (32, 32, 3)
