"""Training: the teacher's targets are what sampling draws, a run that was interrupted ends bitwise as if it had not
been, several processes do what one does, and a mistake ends in one line and exit code 2.

Most tests call `train.run(train.main)` in this process, on a checkpoint of random weights; those about signals, a
killed process and torchrun start the real command.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hipa
import sample
import train
from conftest import ROOT
from lora import load_lora
from losses import VGG, HiPALoss, VGGConfig

PROMPTS = ["a cat", "a dog", "a cat and a dog", "a red cat", "two dogs"]  # fewer than pairs: they come around again
GUIDANCE, TEACHER_STEPS, PAIRS, STEPS = 3.0, 4, 8, 6
FIRST = train.FIRST_SEED
SIDE = 32  # of the small checkpoint's pictures
FLAGS = {
    "pairs": PAIRS, "guidance": GUIDANCE, "teacher-steps": TEACHER_STEPS, "steps": STEPS, "batch": 4, "lr": 3e-4,
    "rank": 2, "layers": "attention", "later": 0.5, "distance": "dists", "spatial": 1, "fourier": 1, "sobel": 1,
    "energy": 0.1, "latent": 0, "head-start": 0, "radius": 0.25, "seed": 5, "save-every": 2, "device": "cpu",
    "dtype": "float32",
}  # fmt: skip
TERMS = ["spatial", "fourier", "sobel", "energy"]
LORA, STATE = sample.LORA_NAME, "state.safetensors"


# ---------------------------------------------------------------------------------------------------------------- tools
@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads in their last bits, and processes are to be compared bitwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_features(folder):
    """A feature net with random weights, so that the official VGG16 is not needed."""
    torch.manual_seed(0)
    config = {"channels": [4, 6, 8, 8, 8], "convs": [1] * 5, "mean": [0.5] * 3, "std": [0.5] * 3}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(VGG(VGGConfig(**config)).state_dict(), folder / "model.safetensors")


@pytest.fixture(scope="module")
def model(sd15_like, tmp_path_factory):
    """The folder of a small checkpoint with its own feature net."""
    folder = shutil.copytree(sd15_like, tmp_path_factory.mktemp("models") / "small")
    write_features(folder / "features")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts."""
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def run(*argv):
    """Runs the command line in this process, which is afterwards as it was. -> `code`, `out` and `err` (lines)"""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    precision, code = torch.get_float32_matmul_precision(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(train, "INTERRUPTED", train.Interrupted())
        try:
            train.run(train.main)
        except SystemExit as end:
            code = end.code
        finally:
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


@pytest.fixture(scope="module")
def finished(model, prompts, tmp_path_factory):
    """A run end to end, which others are compared with; its targets serve them too. -> `out` folder, `result`, and its
    `prompts` in their order"""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = done("--data", prompts, "--model", model, "--out", out, *flags())
    return SimpleNamespace(out=out, result=result, prompts=train.find_prompts(str(prompts)))


@pytest.fixture
def begin(model, prompts, finished, tmp_path):
    """Makes the argv of a run like `finished`, with its targets, in tmp_path/run; options can be changed."""

    def argv(out=tmp_path / "run", targets=finished.out / "targets", **changed):
        return ["--data", prompts, "--model", model, "--out", out, *flags(targets=targets, **changed)]

    return argv


@pytest.fixture
def student(model, prompts, finished):
    """Makes a train.Run as main does, on the targets of `finished`, for single updates."""

    def make(dtype=torch.float32, checkpointing=False, **changed):
        args = train.parse_args(["--data", str(prompts), "--model", str(model), *flags(**changed)])
        net = hipa.load(model, dtype=dtype)
        if checkpointing:
            train.checkpoint_activations(net.unet, net.vae.decoder)
        targets = train.Targets(finished.out / "targets", finished.prompts, 999)
        weights = {name: getattr(args, name) for name in TERMS}
        return train.Run(args, net, targets, HiPALoss(train.load_distance(args.distance, model), **weights))

    return make


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


def equal(a, b):
    """Two safetensors files hold the same tensors, bit by bit."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def difference(a, b):
    """The largest between the tensors of two safetensors files."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def same_run(a, b):
    """Adaptors, optimizer state, log but for the seconds, and the last sample grid are the same bits."""
    for name in (LORA, STATE):
        assert equal(a / name, b / name), name
    logs = [{name: values for name, values in log(out).items() if name != "seconds"} for out in (a, b)]
    assert logs[0] == logs[1]
    grid = max((a / "samples").iterdir()).name
    assert (a / "samples" / grid).read_bytes() == (b / "samples" / grid).read_bytes()


def stamps(folder):
    """{name: when it was written} of the shards in a folder."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------- end to end
def test_what_a_run_leaves(finished):
    """Only the path of the adaptors goes to stdout, and no half-written file stays."""
    assert finished.result.out == [str(finished.out / LORA)]
    assert {str(path.relative_to(finished.out)) for path in contents(finished.out)} == {
        "settings.json", "log.csv", STATE, LORA, "targets/settings.json", "targets/000000.safetensors",
        *(f"samples/{step:06d}.png" for step in range(2, STEPS + 1, 2)),
    }  # fmt: skip
    settings = json.loads((finished.out / "settings.json").read_text())
    assert {name: settings[name.replace("-", "_")] for name in FLAGS} == FLAGS


def test_the_log(finished):
    """A row for each step; the terms, by name, sum to the loss."""
    columns = log(finished.out)
    assert list(columns) == ["step", "loss", *TERMS, "gradient", "lr", "seconds"]
    assert columns["step"] == list(range(1, STEPS + 1)) and columns["seconds"] == sorted(columns["seconds"])
    assert columns["loss"] == pytest.approx([sum(terms) for terms in zip(*(columns[name] for name in TERMS))])
    assert columns["lr"] == pytest.approx([FLAGS["lr"] * train.schedule_of_lr(step, STEPS) for step in range(STEPS)])


def test_the_adaptors_and_the_sample_grid(finished, model):
    """The last grid: pairs never trained on, drawn plain, by the adaptors as sample.py reads them, by the teacher."""
    net, seeds = hipa.load(model), range(FIRST + PAIRS, FIRST + PAIRS + train.HELD_OUT)
    words = [finished.prompts[k % len(PROMPTS)] for k in range(PAIRS, PAIRS + train.HELD_OUT)]
    rows = [hipa.sample(net, words, seeds, steps=1)]
    assert all(B.abs().max() > 0 for _, B in load_lora(finished.out / LORA, net.unet).values())  # all were trained
    sample.apply_lora(net, finished.out / LORA)
    rows.append(hipa.sample(net, words, seeds, steps=1))
    rows.append(hipa.sample(hipa.load(model), words, seeds, TEACHER_STEPS, GUIDANCE))
    expected = np.concatenate([np.concatenate([np.asarray(p) for p in sample.to_pil(row)], 1) for row in rows])
    drawn = np.asarray(Image.open(finished.out / "samples" / f"{STEPS:06d}.png"))
    assert drawn.shape == (3 * SIDE, train.HELD_OUT * SIDE, 3)
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 2


def test_the_loss_falls(begin, tmp_path):
    """The same four pairs at every step."""
    done(*begin(pairs=4, batch=4, later=0, steps=20, lr=1e-2, save_every=20))
    loss = log(tmp_path / "run")["loss"]
    assert sum(loss[-5:]) < 0.95 * sum(loss[:5])


def test_explicit_options_win_over_the_presets():
    args = train.parse_args(["--data", "emoji", "--lr", "0.5", "--pairs", "3", "--steps", "7", "--model", "sd15"])
    assert (args.lr, args.pairs, args.steps, args.model) == (0.5, 3, 7, "sd15")
    assert args.out == Path("runs/emoji") and args.targets == Path("runs/emoji/targets")
    assert train.parse_args(["--data", "some/prompts.txt"]).out == Path("runs/prompts")


# ------------------------------------------------------------------------------------------------ the teacher's targets
def from_noise(net, prompt, seed, steps=TEACHER_STEPS):
    """What the noise of a seed becomes, as a latent."""
    config = net.unet.config
    with torch.no_grad():
        noise = hipa.noise([seed], config.in_channels, config.sample_size, config.sample_size)
        return hipa.dpm_solver(hipa.predictor(net, [prompt], GUIDANCE), noise, net.schedule, steps)[0]


def close(a, b, tolerance=2e-3):
    """Equal to half precision, which has 11 bits."""
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_targets_are_what_sampling_draws(checkpoint, tmp_path):
    """Of a model that predicts noise, and one that predicts v: decoded, they are hipa.sample's pictures."""
    net, words, steps = hipa.load(checkpoint), PROMPTS[:3], 6
    drawn = train.Targets(tmp_path, words, 999).draw(net, range(1, 4), steps, GUIDANCE)
    with torch.no_grad():
        pictures = net.vae.decode(drawn["x0"].float())
    expected = hipa.sample(net, [words[1], words[2], words[0]], range(FIRST + 1, FIRST + 4), steps, GUIDANCE)
    assert (pictures - expected).abs().max() < 1e-2
    for n, k in enumerate((1, 2, 3)):
        close(drawn["x0"][n], from_noise(net, words[k % 3], FIRST + k, steps))


@pytest.mark.parametrize("steps", [1, 6])
def test_a_later_start(tmp_path, steps):
    """Even pairs begin at their own picture, blurred, odd ones at that of the pair before, with noise of their own; it
    becomes what `hipa.redraw` makes of it in as many steps of the same length. Of the embedded model, whose pictures
    differ."""
    net, words, indices = hipa.load("emoji"), ["a cat", "a red apple", "a rocket"], range(2, 6)
    drawn = train.Targets(tmp_path, words, 999).draw(net, indices, steps, GUIDANCE)
    generator = train.seeded("later", 2)
    t = torch.randint(199, 999, (), generator=generator).item()
    noise = torch.randn(drawn["x0"].shape, generator=generator)
    assert drawn["t"].tolist() == [t] * 4
    with torch.no_grad():
        own = net.vae.decode(drawn["x0"].float())
        blurred = F.interpolate(own, scale_factor=0.25, mode="bicubic", antialias=True)
        blurred = F.interpolate(blurred, scale_factor=4, mode="bicubic")
        source = torch.stack([blurred[0], own[0], blurred[2], own[2]])
        alpha, sigma = net.schedule.alpha_sigma(t)
        close(drawn["x"], alpha * net.vae.encode(source) + sigma * noise, 5e-3)
        assert alpha * (net.vae.encode(own) - net.vae.encode(blurred)).abs().max() > 0.2  # so that it would be seen
        prompts, fewer = [words[k % 3] for k in indices], max(1, round(steps * t / 999))
        expected = hipa.redraw(net, source, noise, prompts, t / 999, fewer, GUIDANCE, "", None)
        assert (net.vae.decode(drawn["x0_later"].float()) - expected).abs().mean() < 5e-3


def test_later_starts_differ(checkpoint, tmp_path):
    """In their timestep, from batch to batch."""
    targets, net = train.Targets(tmp_path, PROMPTS, 999), hipa.load(checkpoint)
    assert len({targets.draw(net, [k], 1, 1.0)["t"].item() for k in range(8)}) > 4


def test_what_training_reads_of_them(finished, model):
    """The noise of FIRST_SEED + k at t = 999 and what it becomes, or a later start and what that becomes."""
    words = finished.prompts
    assert sorted(words) == sorted(PROMPTS) and words != PROMPTS  # shuffled
    targets, net = train.Targets(finished.out / "targets", words, 999), hipa.load(model)
    there = load_file(finished.out / "targets" / "000000.safetensors")
    chosen = [(0, False), (7, False), (3, True), (6, True), (15, False)]
    x, timesteps, x0, prompts = targets.batch(chosen)
    assert prompts == [words[k % len(words)] for k, _ in chosen]
    for n, (k, later) in enumerate(chosen):
        assert timesteps[n] == (there["t"][k] if later else 999)
        if later:
            assert torch.equal(x[n], there["x"][k].float()) and torch.equal(x0[n], there["x0_later"][k].float())
        else:
            close(x0[n], from_noise(net, prompts[n], FIRST + k))
    assert torch.equal(x[:2], hipa.noise([FIRST, FIRST + 7], 4, 8, 8))
    assert x.dtype == x0.dtype == torch.float32


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(finished, model):
    """Nor on how many there are: drawn alone or in threes, as in the run's batches of four. (A later start does.)"""
    net, words = hipa.load(model), finished.prompts
    there = load_file(finished.out / "targets" / "000000.safetensors")
    for indices in ([2], [9, 2, 5]):
        drawn = train.Targets(finished.out, words, 999).draw(net, indices, TEACHER_STEPS, GUIDANCE)
        close(drawn["x0"], there["x0"][indices], 1e-3)


def test_a_teacher_that_draws_nan(begin, model, tmp_path):
    """It is refused, and no shard is written."""
    damaged = shutil.copytree(model, tmp_path / "model")
    path = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"conv_out.bias": torch.full((4,), float("nan"))}, path)
    argv = begin(targets=tmp_path / "targets")
    argv[argv.index(model)] = damaged
    refused(*argv, words=["not finite"])
    assert stamps(tmp_path / "targets") == {}


# --------------------------------------------------------------------------------------------------- stage one, resumed
@pytest.fixture
def small_shards(monkeypatch):
    """Eight pairs a file: two files for the eight pairs and the eight held out."""
    monkeypatch.setattr(train, "SHARD", 8)


def test_only_missing_shards_are_made(begin, small_shards, tmp_path):
    """One of two deleted: it is made again, the same bits; the other is left alone."""
    folder = tmp_path / "run" / "targets"
    done(*begin(targets=folder, steps=1))
    before, copy = stamps(folder), shutil.copytree(folder, tmp_path / "copy")
    assert list(before) == ["000000.safetensors", "000001.safetensors"]
    (folder / "000000.safetensors").unlink()
    resume(tmp_path / "run")
    after = stamps(folder)
    assert after["000001.safetensors"] == before["000001.safetensors"]
    assert all(equal(folder / name, copy / name) for name in after) and after.keys() == before.keys()


def test_more_pairs_keep_the_full_shards(begin, small_shards, tmp_path):
    """12 pairs and 8 held out leave the third shard half full; with 16 only that one is made again."""
    folder = tmp_path / "targets"
    done(*begin(targets=folder, steps=1, pairs=12))
    before, half = stamps(folder), load_file(folder / "000002.safetensors")
    done(*begin(tmp_path / "more", targets=folder, steps=1, pairs=16))
    assert {name for name, stamp in stamps(folder).items() if stamp != before.get(name)} == {"000002.safetensors"}
    full = load_file(folder / "000002.safetensors")
    assert len(half["x0"]) == 4 and len(full["x0"]) == 8
    close(full["x0"][:4], half["x0"], 1e-3)


def test_runs_share_targets(begin, finished, tmp_path):
    """With other settings of stage two. Nothing is drawn again, and none are kept in the run's own folder."""
    before = stamps(finished.out / "targets")
    done(*begin(steps=1, rank=1, later=0, distance="lpips", seed=9))
    assert stamps(finished.out / "targets") == before and not (tmp_path / "run" / "targets").exists()


@pytest.fixture
def other(model, tmp_path):
    """What to change of a run, by the name of what its targets then differ in."""
    words = tmp_path / "other.txt"
    words.write_text("a horse\n")
    folder = shutil.copytree(model, tmp_path / "other_model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 1.01 for key, tensor in load_file(path).items()}, path)
    return {
        "guidance": ["--guidance", "2"], "steps": ["--teacher-steps", "5"],
        "prompts": ["--data", words], "unet": ["--model", folder],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["guidance", "steps", "prompts", "unet"])
def test_targets_of_other_settings_are_refused(begin, finished, other, name):
    """The message names what differs, and the targets stay as they are."""
    before = contents(finished.out / "targets")
    refused(*begin(), *other[name], words=["targets", "--targets", f"another {name}"])
    assert contents(finished.out / "targets") == before


def test_a_refused_run_can_be_mended(begin, tmp_path):
    """Once the mistake is mended, the same --out serves: no run had begun there."""
    refused(*begin(guidance=2))
    done(*begin(steps=1))


# ---------------------------------------------------------------------------------------------- interrupted and resumed
class Died(BaseException):
    """The process ends here, as far as files can tell."""


def dies(*_, **__):
    raise Died


def update_dies_at(step):
    update = train.Run.update
    return lambda training: dies() if training.step == step else update(training)


PLACES = {
    "in a step": ("Run.update", update_dies_at(3)),
    "before the adaptors are written": ("save_lora", dies),
    "before the state is written": ("save_atomically", dies),
    "before the log is written": ("Run.write_log", dies),
    "before the samples are drawn": ("Run.draw_samples", dies),
}


@pytest.mark.parametrize("name, replacement", PLACES.values(), ids=PLACES)
def test_a_run_that_dies_goes_on_bitwise(begin, finished, monkeypatch, tmp_path, name, replacement):
    """Wherever it ends: resumed, it leaves the adaptors, optimizer state and log of a run that was not interrupted."""
    with monkeypatch.context() as patch:
        patch.setattr(f"train.{name}", replacement)
        with pytest.raises(Died):
            run(*begin())
    assert saved_step(tmp_path / "run") < STEPS
    resume(tmp_path / "run")
    same_run(tmp_path / "run", finished.out)


def test_a_finished_run_resumed_stays_as_it_is(begin, tmp_path):
    done(*begin(steps=2))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in (LORA, STATE, "log.csv")}
    assert resume(tmp_path / "run").out == [str(tmp_path / "run" / LORA)]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


@pytest.fixture
def process(tmp_path):
    """Starts the real command, with one thread as this process has."""
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


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_stage_two(process, begin, finished, tmp_path, signum, code):
    """kill -9 loses the steps since the last state. SIGTERM and Ctrl-C lose none, and say how to go on. Resumed, the
    run ends bitwise as if it had not been interrupted."""
    out = tmp_path / "run"
    child = process(ROOT / "train.py", *begin())
    while child.poll() is None and saved_step(out) < 2:
        time.sleep(0.005)
    child.send_signal(signum)
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (code, "") and "Traceback" not in stderr
    step = saved_step(out)
    assert 2 <= step < STEPS
    if signum != signal.SIGKILL:
        lines = [line for line in re.split(r"[\r\n]+", stderr) if "--resume" in line]
        assert len(lines) == 1 and f"{out}: saved at step {step}; --resume" in lines[0]
        assert log(out)["step"][-1] == step
    resume(out)
    same_run(out, finished.out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_stage_one(begin, finished, small_shards, monkeypatch, tmp_path, signum):
    """The second shard is lost, the first stays."""
    draw, folder = train.Targets.draw, tmp_path / "run" / "targets"

    def draw_and_signal(self, model, indices, *rest):
        if indices[0] == 12:
            signal.raise_signal(signum)
        return draw(self, model, indices, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.Targets, "draw", draw_and_signal)
        result = run(*begin(targets=folder, steps=2))
    assert result.code == 128 + signum and result.out == []
    assert len([line for line in result.err if "--resume" in line]) == 1
    before = stamps(folder)
    assert list(before) == ["000000.safetensors"] and not list(tmp_path.rglob("*.part"))
    resume(tmp_path / "run")
    assert stamps(folder)["000000.safetensors"] == before["000000.safetensors"]
    there = load_file(finished.out / "targets" / "000000.safetensors")["x0"]
    assert torch.equal(load_file(folder / "000001.safetensors")["x0"], there[8:])


def test_a_message_stands_on_a_line_of_its_own(begin, monkeypatch):
    """Not behind the progress bar."""
    update = train.Run.update
    monkeypatch.setattr(train.Run, "update", lambda self: signal.raise_signal(signal.SIGTERM) or update(self))
    result = run(*begin())
    assert result.code == 143 and [line for line in result.err if re.match(r"\S+: saved at step 1; --resume", line)]


def test_a_second_ctrl_c_ends_at_once(begin, monkeypatch, tmp_path):
    """Without waiting for the step, and without a traceback."""
    update = train.Run.update

    def twice(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return update(training)

    monkeypatch.setattr(train.Run, "update", twice)
    assert run(*begin()).code == 130 and saved_step(tmp_path / "run") == 0


# ---------------------------------------------------------------------------------- several processes, parts of a batch
def nearly_same_run(a, b):
    """Equal but for the order of sums. Adam hides the gradient's scale; the log shows its length."""
    for name in ("loss", *TERMS, "gradient"):
        assert log(a)[name] == pytest.approx(log(b)[name], rel=1e-2, abs=1e-6), name
    assert difference(a / LORA, b / LORA) < 1e-5


def test_a_batch_taken_in_parts(begin, finished, tmp_path):
    """--accumulate: less memory, the same updates."""
    done(*begin(accumulate=2))
    nearly_same_run(tmp_path / "run", finished.out)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
train.SHARD = 8
update = train.Run.update
def update_or_signal(training):
    if training.step == {step} and train.RANK == 1:
        signal.raise_signal(signal.SIGTERM)
    return update(training)
train.Run.update = update_or_signal
train.run(train.main)
"""


def free_port():
    with socketserver.TCPServer(("127.0.0.1", 0), None) as free:
        return free.server_address[1]


@pytest.fixture
def script(tmp_path):
    """Makes a train.py with small shards, in which SIGTERM reaches the second process at `step`."""

    def write(step=-1):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(root=str(ROOT), step=step))
        return path

    return write


def test_two_processes_do_what_one_does(begin, finished, process, script, tmp_path):
    """torchrun: each draws half of the targets and takes half of every batch; the first one writes."""
    out = tmp_path / "run"
    place = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    child = process("-m", "torch.distributed.run", *place, script(), *begin(targets=out / "targets"))
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (0, f"{out / LORA}\n"), stderr
    there = load_file(finished.out / "targets" / "000000.safetensors")
    made = [load_file(out / "targets" / f"{shard:06d}.safetensors") for shard in range(2)]
    for key, tensor in there.items():
        close(torch.cat([shard[key] for shard in made]), tensor, 1e-3)
    nearly_same_run(out, finished.out)


def test_a_signal_to_one_process_stops_all(begin, finished, process, script, tmp_path):
    """They agree on the step, and one process alone can go on from there."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = script(step=2)
    children = [process(path, *begin(), RANK=str(rank), **place) for rank in range(2)]
    ends = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [143, 143] and [out for out, _ in ends] == ["", ""], ends
    assert "saved at step 3; --resume" in ends[0][1] and "--resume" not in ends[1][1]
    assert saved_step(tmp_path / "run") == 3
    resume(tmp_path / "run")
    nearly_same_run(tmp_path / "run", finished.out)


@pytest.mark.parametrize("rank, expected", [(0, ["model", "barrier"]), (1, ["barrier", "model"])])
def test_only_the_first_process_downloads_the_model(begin, monkeypatch, rank, expected):
    """The others wait, then find it in the cache: two would write the same partial file."""
    events = []

    def find(model, **_):
        events.append("model")
        return Path(model)

    def load(*_, **__):
        raise hipa.UserError("far enough")

    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(train, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(hipa, "find_checkpoint", find)
    monkeypatch.setattr(hipa, "load", load)
    refused(*begin(), words=["far enough"])
    assert list(dict.fromkeys(events)) == expected


# ----------------------------------------------------------------------------------------------------------------- data
def captions():
    """A captions file as COCO has it: several of each image."""
    lines = [(9, "a cat"), (4, "a\n dog "), (9, "another cat"), (4, "x"), (5, "a horse")]
    return json.dumps({"annotations": [{"image_id": image, "caption": text} for image, text in lines]})


def archive(**members):
    """The bytes of a zip file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A server on this machine that has COCO's annotations. -> `serve(bytes)`, `asked` how often, `home` of torch"""
    play = SimpleNamespace(data=b"", asked=0, home=tmp_path / "torch", raw=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            play.asked += 1
            if play.raw:
                return self.wfile.write(play.data)
            self.send_response(200)
            self.send_header("Content-Length", str(len(play.data)))
            self.end_headers()
            self.wfile.write(play.data)

        def log_message(self, *_):
            pass

    def serve(data, raw=False):
        play.data, play.raw = data, raw
        monkeypatch.setenv("HIPA_COCO_SHA256", hashlib.sha256(data).hexdigest())

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    play.serve, play.url = serve, f"http://127.0.0.1:{server.server_address[1]}/annotations.zip"
    monkeypatch.setenv("HIPA_COCO_URL", play.url)
    monkeypatch.setenv("TORCH_HOME", str(play.home))
    yield play
    server.shutdown()
    server.server_close()


MEMBER = "annotations/captions_train2017.json"


def coco_run(begin, out):
    """The argv of a run with --data coco, on targets of its own."""
    argv = begin(out, targets=out / "targets", pairs=4, steps=1)
    argv[1] = "coco"
    return argv


def test_coco(begin, coco, tmp_path):
    """The annotations are downloaded once; of each image the first caption counts."""
    coco.serve(archive(**{MEMBER: captions(), "annotations/instances_train2017.json": "{}"}))
    for name in ("first", "second"):
        done(*coco_run(begin, tmp_path / name))
        assert coco.asked == 1
        assert [path.name for path in contents(coco.home)] == ["captions_train2017.json"]
    assert equal(tmp_path / "first" / LORA, tmp_path / "second" / LORA)
    assert sorted(train.find_prompts("coco")) == ["a cat", "a dog", "a horse"]


def not_the_file(coco):
    coco.serve(archive(**{MEMBER: captions()}))
    coco.data += b" "


def no_server(coco):
    os.environ["HIPA_COCO_URL"] = "http://127.0.0.1:9/annotations.zip"


COCO_FAULTS = {
    "another sha256": (not_the_file, ["cannot download", "hash"]),
    "not a zip": (lambda coco: coco.serve(b"<html>"), ["not the archive"]),
    "a zip without the captions": (lambda coco: coco.serve(archive(other="{}")), ["not the archive"]),
    "captions of another kind": (lambda coco: coco.serve(archive(**{MEMBER: "[]"})), ["captions_train2017.json"]),
    "an answer that is not HTTP": (lambda coco: coco.serve(b"\x00not HTTP\r\n\r\n", raw=True), ["cannot download"]),
    "nobody there": (no_server, ["cannot download"]),
}


@pytest.mark.parametrize("fault, words", COCO_FAULTS.values(), ids=COCO_FAULTS)
def test_coco_that_cannot_be_had(begin, coco, tmp_path, fault, words):
    """One line, and nothing stays that a later run would have to get past."""
    fault(coco)
    refused(*coco_run(begin, tmp_path / "run"), words=words)
    left = [path.name for path in contents(coco.home)] if coco.home.exists() else []
    assert left == (["captions_train2017.json"] if "captions_train2017.json" in words else [])


def test_no_place_for_coco(begin, coco, monkeypatch, tmp_path):
    """TORCH_HOME cannot be written."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "taken"))
    refused(*coco_run(begin, tmp_path / "run"), words=["cannot download"])


@pytest.mark.parametrize("name", ["p.txt", "p.json"])
def test_a_file_of_prompts(tmp_path, name):
    """One a line, or COCO's captions; shuffled, but always in the same way."""
    (tmp_path / name).write_text("a cat\n\n a dog \na horse\n" if name == "p.txt" else captions())
    first, second = (train.find_prompts(str(tmp_path / name)) for _ in range(2))
    assert sorted(first) == ["a cat", "a dog", "a horse"] and first == second


# ------------------------------------------------------------------------------------------------------------- mistakes
BAD = {
    "no --data": (["--out", "new"], ["--data"]),
    "no such file": (["--data", "missing.txt"], ["missing.txt"]),
    "an empty file": (["--data", "empty.txt"], ["no prompts"]),
    "a folder": (["--data", "."], ["directory"]),
    "JSON of another kind": (["--data", "other.json"], ["neither text"]),
    "an unknown model": (["--data", "p.txt", "--model", "no-such-model"], ["no-such-model"]),
    "a batch that does not divide": (["--data", "p.txt", "--batch", "4", "--accumulate", "3"], ["--batch 4"]),
    "no loss": ([*"--data p.txt --spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 0".split()], ["weight 0"]),
    "no CUDA": (["--data", "p.txt", "--device", "cuda"], ["--device cuda"]),
    "a file in place of the folder": (["--data", "p.txt", "--out", "taken"], ["cannot write", "taken"]),
    "a folder nobody can write": (["--data", "p.txt", "--out", "/proc/x"], ["cannot write", "/proc/x"]),
    "a learning rate of nan": (["--data", "p.txt", "--lr", "nan"], ["--lr"]),
    "a learning rate of 1e30": (["--data", "p.txt", "--lr", "1e30"], ["--lr"]),
    "rank 0": (["--data", "p.txt", "--rank", "0"], ["--rank"]),
    "no pairs": (["--data", "p.txt", "--pairs", "0"], ["--pairs"]),
    "no teacher steps": (["--data", "p.txt", "--teacher-steps", "0"], ["--teacher-steps"]),
    "a seed too large": (["--data", "p.txt", "--seed", str(2**63 - 1)], ["--seed"]),
    "a distance there is not": (["--data", "p.txt", "--distance", "mse"], ["--distance"]),
    "an unknown option": (["--data", "p.txt", "--stepz", "3"], ["--stepz"]),
    "an existing run": (["--data", "p.txt", "--out", "old"], ["old", "--resume", "--out"]),
    "--resume without --out": (["--resume"], ["--out"]),
    "--resume without a run": (["--resume", "--out", "new"], ["new", "no run"]),
    "--resume of something else": (["--resume", "--out", "odd"], ["odd", "no run"]),
    "--resume with another --lr": (["--resume", "--out", "old", "--lr", "0.5"], ["--lr", str(FLAGS["lr"])]),
    "--resume with another --steps": (["--resume", "--out", "old", "--steps", "99"], ["--steps", str(STEPS)]),
    "--resume in other parts": (["--resume", "--out", "old", "--accumulate", "3"], ["--batch"]),
}


@pytest.mark.parametrize("argv, words", BAD.values(), ids=BAD)
def test_a_mistake(finished, model, monkeypatch, tmp_path, argv, words):
    """One line that says what is wrong, before the model is loaded; no file is written or changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hipa, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for name, text in {"p.txt": "a cat\n", "empty.txt": " \n", "other.json": "[]", "taken": "precious"}.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(finished.out, tmp_path / "old")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "settings.json").write_text("{}")
    before = contents(tmp_path)
    refused(*([] if "--model" in argv or "--resume" in argv else ["--model", model]), *argv, words=words)
    assert contents(tmp_path) == before


def poison(training, step):
    """The loss of one step becomes nan."""
    loss_of = training.loss_of
    value = lambda: math.nan if training.step == step else 1.0  # noqa: E731
    training.loss_of = lambda *batch: {name: term * value() for name, term in loss_of(*batch).items()}


def test_a_loss_that_is_not_a_number(begin, finished, monkeypatch, tmp_path):
    """The run ends with the step and its prompts; what was saved before stays, and can be gone on with."""
    go, out = train.Run.train, tmp_path / "run"
    pairs = train.pairs_of_step(3, SimpleNamespace(pairs=PAIRS, batch=4, later=0.5, seed=5))
    words = [finished.prompts[k % len(PROMPTS)] for k, _ in pairs]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train", lambda training: poison(training, 3) or go(training))
        result = refused(*begin(), words=["step 3", "--lr", *words])
    assert "nan" in result.err[-1]
    assert saved_step(out) == 2 and log(out)["step"] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in load_file(out / STATE).values())
    resume(out)
    assert saved_step(out) == STEPS


def test_a_gradient_that_is_not_a_number(student):
    """Of a finite loss, as of a square root at 0: the adaptors stay as they were."""
    training = student()
    training.update()
    before = [parameter.clone() for parameter in training.parameters]
    training.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(hipa.UserError, match="step 1.*prompts"):
        training.update()
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters))


# -------------------------------------------------------------------------------------------------------------- options
def test_without_a_loss_of_pictures_nothing_is_decoded(student, monkeypatch):
    """--latent alone spares the decoder; with the other terms, the picture and its target are decoded."""
    decoded = []

    def count(training):
        decode = training.model.vae.decode
        monkeypatch.setattr(training.model.vae, "decode", lambda x: decoded.append(len(x)) or decode(x))
        row, _ = training.update()
        return row

    row = count(student(latent=1, spatial=0, fourier=0, sobel=0, energy=0))
    assert decoded == [] and row["loss"] == row["latent"] > 0 and "spatial" not in row
    row = count(student(latent=1))
    assert decoded == [4, 4] and row["loss"] == pytest.approx(row["latent"] + sum(row[name] for name in TERMS))


def test_a_head_start(begin, tmp_path):
    """A first share of the steps has the latents' error alone, and the rest the terms that were asked for."""
    done(*begin(head_start=0.5, steps=4))
    columns = log(tmp_path / "run")
    assert [value is not None for value in columns["latent"]] == [True, True, False, False]
    assert all([value is not None for value in columns[name]] == [False, False, True, True] for name in TERMS)
    assert columns["loss"][:2] == columns["latent"][:2]


def test_weights_of_the_terms(student):
    """Twice the weight, twice the term; weight 0 leaves it out."""
    once, twice = (student(**weights).update()[0] for weights in ({}, {"fourier": 2, "sobel": 0}))
    assert twice["fourier"] == pytest.approx(2 * once["fourier"]) and "sobel" not in twice
    assert twice["spatial"] == pytest.approx(once["spatial"])


def test_lpips(student):
    """Another distance, another loss."""
    training = student(distance="lpips")
    assert isinstance(training.loss.distance, train.LPIPS)
    assert training.update()[0]["loss"] != pytest.approx(student().update()[0]["loss"])


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_how_many_parameters_are_trained(begin, model, tmp_path, layers, rank):
    """Counted from the shapes in the checkpoint: an adaptor of W (out, in, ...) has rank x (in ... + out)."""
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = {key: w for key, w in weights.items() if key.endswith(".weight") and w.dim() > 1}
    if layers == "attention":
        wanted = {key: w for key, w in wanted.items() if re.search(r"\.to_(q|k|v|out\.0)\.weight$", key)}
    count = sum(rank * (math.prod(w.shape[1:]) + w.shape[0]) for w in wanted.values())
    result = done(*begin(layers=layers, rank=rank, steps=1))
    assert f"{count:,} trained parameters in {len(wanted)} adaptors" in "\n".join(result.err)
    tensors = load_file(tmp_path / "run" / LORA)
    assert sum(tensor.numel() for tensor in tensors.values()) == count and len(tensors) == 2 * len(wanted)


def test_recomputed_activations(begin, finished, student, tmp_path):
    """--checkpointing: the same gradients, and the same adaptors in the end."""
    gradients = []
    for checkpointing in (False, True):
        training = student(checkpointing=checkpointing)
        training.optimizer.zero_grad = lambda: None
        training.update()
        gradients.append([parameter.grad for parameter in training.parameters])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    done(*begin(), "--checkpointing")
    assert difference(tmp_path / "run" / LORA, finished.out / LORA) < 1e-6


def test_recomputing_happens(student, monkeypatch):
    """Blocks with text run twice in a step, forward and again for the gradient."""
    calls = []
    forward = train.unet.Transformer2D.forward
    monkeypatch.setattr(train.unet.Transformer2D, "forward", lambda *a: calls.append(1) or forward(*a))
    counts = []
    for checkpointing in (False, True):
        training = student(checkpointing=checkpointing, latent=1, spatial=0, fourier=0, sobel=0, energy=0)
        calls.clear()
        training.update()
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


def test_bfloat16(begin, tmp_path):
    """The frozen networks are in half precision; the adaptors and the optimizer's state are not."""
    done(*begin(dtype="bfloat16", steps=2))
    for name in (LORA, STATE):
        tensors = load_file(tmp_path / "run" / name)
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in load_file(tmp_path / "run" / LORA).values())


@pytest.mark.parametrize("later", [0, 1])
def test_where_pictures_begin(student, later):
    """--later 1: at none of the noise; 0: nowhere else."""
    training = student(later=later)
    for step in range(3):
        _, timesteps, _, _ = training.targets.batch(train.pairs_of_step(step, training.args))
        assert ((timesteps < 999) == bool(later)).all()


# ------------------------------------------------------------------------------------- what a step is made of, its rate
def settings(**values):
    return SimpleNamespace(**{"pairs": 12, "batch": 4, "later": 0.25, "seed": 3} | values)


@pytest.mark.parametrize("batch", [1, 4, 12, 24])
def test_every_pair_once_per_round(batch):
    """In another order each round."""
    args = settings(batch=batch)
    pairs = [pair for step in range(48 // batch) for pair, _ in train.pairs_of_step(step, args)]
    rounds = [pairs[i : i + 12] for i in range(0, 48, 12)]
    assert all(sorted(each) == list(range(12)) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4


def test_rounds_that_end_within_a_batch():
    args = settings(pairs=5, batch=4)
    pairs = [pair for step in range(5) for pair, _ in train.pairs_of_step(step, args)]
    assert all(sorted(pairs[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))


def test_a_step_depends_on_its_number_only():
    """Not on the steps before it, nor on the global generator."""
    first = [train.pairs_of_step(step, settings()) for step in range(6)]
    train.shuffled.cache_clear()
    torch.manual_seed(99)
    assert [train.pairs_of_step(step, settings()) for step in reversed(range(6))] == first[::-1]
    assert first[0] != first[3]


def test_the_seed_decides_the_order_of_pairs_and_which_begin_later():
    """Other seeds, other orders."""
    steps = [[train.pairs_of_step(step, settings(seed=seed)) for step in range(3)] for seed in range(3)]
    for part in (0, 1):
        assert len({tuple(pair[part] for step in each for pair in step) for each in steps}) == 3


def test_the_share_that_begins_later():
    later = [later for step in range(500) for _, later in train.pairs_of_step(step, settings())]
    assert sum(later) / len(later) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_the_learning_rate(steps):
    """Up, once to 1, then down to almost 0."""
    rates = [train.schedule_of_lr(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == 1 and top <= 0.05 * steps
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] and 0 < rates[-1] < 0.01


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_learning_rate_of_very_few_steps(steps):
    assert all(0 < train.schedule_of_lr(step, steps) <= 1 for step in range(steps))
