"""Training from end to end, and stage two: what a run leaves, what its loss is made of, and that a run ends in the same
adaptors however it was interrupted, cut into parts or spread over processes.

What goes wrong is in test_train_faults.py, the teacher's targets in test_targets.py.
"""

import json
import math
import re
import signal
import socketserver
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hipa
import sample
import train
import vae
from conftest import ROOT
from lora import load_lora
from losses import LPIPS, VGG

# isort: split
from training import (  # noqa: I001
    FIRST, FLAGS, GUIDANCE, LORA, PAIRS, PROMPTS, STATE, STEPS, TEACHER_STEPS, TERMS, close, contents, done, log,
    nearly_same_run, refused, resume, run, same_run, saved_step,
)  # fmt: skip

pytest_plugins = "training"


# ----------------------------------------------------------------------------------------------------------- end to end
def test_what_a_run_leaves(finished):
    """Only the path of the adaptors goes to stdout, and no half-written file stays."""
    assert finished.result.out == [str(finished.out / LORA)]
    assert {str(path.relative_to(finished.out)) for path in contents(finished.out)} == {
        "settings.json", "log.csv", STATE, "state-before.safetensors", LORA,
        "targets/settings.json", "targets/000000.safetensors",
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


def test_the_adaptors_and_the_sample_grid(finished, small):
    """The last grid: pairs never trained on, drawn plain, by the adaptors as sample.py reads them, by the teacher."""
    model, seeds = hipa.load(small), range(FIRST + PAIRS, FIRST + PAIRS + train.HELD_OUT)
    words = [finished.prompts[k % len(PROMPTS)] for k in range(PAIRS, PAIRS + train.HELD_OUT)]
    teacher = hipa.sample(model, words, seeds, TEACHER_STEPS, GUIDANCE)
    plain = hipa.sample(model, words, seeds, steps=1)
    assert all(B.abs().max() > 0 for _, B in load_lora(finished.out / LORA, model.unet).values())  # all were trained
    sample.apply_lora(model, finished.out / LORA)
    rows = [plain, hipa.sample(model, words, seeds, steps=1), teacher]
    expected = np.concatenate([np.concatenate([np.asarray(p) for p in vae.to_pil(row)], 1) for row in rows])
    drawn = np.asarray(Image.open(finished.out / "samples" / f"{STEPS:06d}.png"))
    assert drawn.shape == (3 * 32, train.HELD_OUT * 32, 3)
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 2


def test_the_loss_falls(begin, tmp_path):
    """The same four pairs at every step."""
    done(*begin(targets=tmp_path / "targets", pairs=4, later=0, teacher_steps=1, steps=20, lr=1e-2, save_every=20))
    loss = log(tmp_path / "run")["loss"]
    assert sum(loss[-5:]) < 0.95 * sum(loss[:5])


def test_explicit_options_win_over_the_presets():
    args = train.parse_args(["--data", "emoji", "--lr", "0.5", "--pairs", "3", "--steps", "7", "--model", "sd15"])
    assert (args.lr, args.pairs, args.steps, args.model) == (0.5, 3, 7, "sd15")
    assert args.out == Path("runs/emoji") and args.targets == Path("runs/emoji/targets")
    assert train.parse_args(["--data", "some/prompts.txt"]).out == Path("runs/prompts")


def test_paper(begin, tmp_path):
    """--paper: the three losses of the paper's abstract and nothing else, all pairs from noise. --resume remembers."""
    argv = begin(targets=None, energy=None, latent=None, head_start=None, later=None, teacher_steps=1, steps=2)
    done(*argv, "--paper")
    out = tmp_path / "run"
    assert list(log(out)) == ["step", "loss", "spatial", "fourier", "sobel", "gradient", "lr", "seconds"]
    assert None not in log(out)["sobel"] and load_file(out / "targets" / "000000.safetensors")["t"].unique() == 999
    for args in (train.parse_args(["--resume", "--out", str(out)]), train.parse_args(["--data", "emoji", "--paper"])):
        assert (args.paper, args.energy, args.latent, args.head_start, args.later) == (True, 0, 0, 0, 0)


def test_explicit_options_win_over_paper():
    args = train.parse_args(["--data", "emoji", "--paper", "--energy", "0.3", "--later", "0.1"])
    assert (args.energy, args.later, args.latent, args.head_start) == (0.3, 0.1, 0, 0)


# ------------------------------------------------------------------------------------------------------------ rehearsal
def test_the_rehearsal_changes_nothing(begin, monkeypatch, tmp_path):
    """It says in one line how long both stages will take; without it, the run is bitwise the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    changed = {"head_start": 0.5, "latent": 1, "steps": 4, "teacher_steps": 1}
    told = [line for line in done(*begin(first, targets=first, **changed)).err if " min " in line]
    assert len(told) == 1 and re.search(
        r"[\d,]+ parameters in \d+ adaptors; about \d+ min .*teacher.* \d+ min", told[0]
    )
    monkeypatch.setattr(train, "rehearse", lambda _: None)
    done(*begin(second, targets=second, **changed))
    same_run(first, second)


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_not_enough_memory(begin, monkeypatch, tmp_path, part):
    """It is seen before anything slow begins, and ends in one line that says what to try."""

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hipa, part, refuse)
    refused(*begin(targets=tmp_path / "targets"), words=["not enough memory", "--batch", "--checkpointing"])
    assert list((tmp_path / "targets").glob("*.safetensors")) == [] and saved_step(tmp_path / "run") == 0


# ---------------------------------------------------------------------------------------------- interrupted and resumed
class Died(BaseException):
    """The process ends here, as far as files can tell."""


def dies(*_, **__):
    raise Died


def dies_second_time(function):
    calls = []
    return lambda *args, **kw: dies() if calls else calls.append(function(*args, **kw))


def dies_at(step, update=train.Run.update):
    return lambda training: dies() if training.step == step else update(training)


PLACES = {
    "in a step": ("Run.update", dies_at(3)),
    "before the adaptors are written": ("save_lora", dies),
    "before the log is written": ("csv.DictWriter", dies),
    "before the state is written": ("save_atomically", dies),
    "before the state is written again": ("save_atomically", dies_second_time(train.save_atomically)),
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


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_process(process, begin, finished, tmp_path, signum, code):
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
        assert len(lines) == 1 and f"{out}: saved at step {step}; --resume continues" in lines[0]
        assert log(out)["step"][-1] == step
    resume(out)
    same_run(out, finished.out)


# ---------------------------------------------------------------------------------- several processes, parts of a batch
def test_a_batch_taken_in_parts(begin, finished, tmp_path):
    """--accumulate: less memory, the same updates."""
    done(*begin(accumulate=2))
    nearly_same_run(tmp_path / "run", finished.out)


SCRIPT = """
import signal, sys
sys.path.insert(0, {root!r})
import train
train.SHARD = {shard}
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
    """Makes a train.py with shards of another size, or in which SIGTERM reaches the second process at `step`."""

    def write(shard=train.SHARD, step=-1):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(root=str(ROOT), shard=shard, step=step))
        return path

    return write


def test_two_processes_do_what_one_does(begin, finished, process, script, tmp_path):
    """torchrun: each draws half of the targets and takes half of every batch; the first one writes."""
    out = tmp_path / "run"
    place = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    child = process("-m", "torch.distributed.run", *place, script(shard=8), *begin(targets=out / "targets"))
    stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (0, f"{out / LORA}\n"), stderr
    there = load_file(finished.out / "targets" / "000000.safetensors")
    made = [load_file(out / "targets" / f"{shard:06d}.safetensors") for shard in range(2)]
    for key, tensor in there.items():
        close(torch.cat([shard[key] for shard in made]), tensor)
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


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_downloads(begin, monkeypatch, rank):
    """The others wait, then find model, captions and VGG16 in the caches: two would write the same partial file."""
    events = []

    def note(name, result=None):
        return lambda *_, **__: events.append(name) or result

    def load(*_, **__):
        raise hipa.UserError("far enough")

    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(train, "barrier", note("barrier"))
    monkeypatch.setattr(hipa, "find_checkpoint", note("model", Path("model")))
    monkeypatch.setattr(train, "find_prompts", note("captions"))
    monkeypatch.setattr(train, "load_distance", note("VGG16"))
    monkeypatch.setattr(hipa, "load", load)
    refused(*begin(), words=["far enough"])
    downloads = ["model", "captions", "VGG16"]
    assert events == (["barrier", *downloads] if rank else [*downloads, "barrier"])


# ------------------------------------------------------------------------------------------------------------- the loss
def test_without_a_loss_of_pictures_nothing_is_decoded(student, monkeypatch):
    """--latent alone spares the decoder; with the other terms, the picture and its target are decoded."""
    decoded = []

    def count(training):
        decode = training.model.vae.decode
        monkeypatch.setattr(training.model.vae, "decode", lambda x: decoded.append(len(x)) or decode(x))
        return training.update()

    row = count(student(latent=1, spatial=0, fourier=0, sobel=0, energy=0))
    assert decoded == [] and row["loss"] == row["latent"] > 0 and "spatial" not in row
    row = count(student(latent=1))
    assert decoded == [4, 4] and row["loss"] == pytest.approx(row["latent"] + sum(row[name] for name in TERMS))


def test_a_head_start(begin, tmp_path):
    """A first share of the steps has the latents' error alone, and the rest the terms that were asked for."""
    done(*begin(head_start=0.25, steps=4))
    columns = log(tmp_path / "run")
    assert [value is not None for value in columns["latent"]] == [True, False, False, False]
    assert all([value is not None for value in columns[name]] == [False, True, True, True] for name in TERMS)
    assert columns["loss"][0] == columns["latent"][0]


def test_weights_of_the_terms(student):
    """Twice the weight, twice the term; weight 0 leaves it out."""
    once, twice = (student(**weights).update() for weights in ({"latent": 1}, {"fourier": 2, "sobel": 0, "latent": 2}))
    assert "sobel" not in twice
    for name, factor in {"fourier": 2, "latent": 2, "spatial": 1}.items():
        assert twice[name] == pytest.approx(factor * once[name])


def test_the_student_has_no_guidance_and_the_teacher_no_adaptors(student):
    """The student asks the network once for each picture; the teacher's pictures do not change as adaptors learn."""
    training, asked = student(), []
    model, (x, t, x0, prompts) = training.model, training.targets.batch([0, 3])
    before = hipa.teacher(model, prompts, x, 2, GUIDANCE)
    for parameter in training.parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    assert torch.equal(hipa.teacher(model, prompts, x, 2, GUIDANCE), before)
    model.unet.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    training.loss_of(x, t, x0, prompts, head_start=False)
    assert asked == [2]


def test_lpips(student):
    """Another distance, another loss."""
    training = student(distance="lpips")
    assert isinstance(training.loss.distance, LPIPS)
    assert training.update()["loss"] != pytest.approx(student().update()["loss"])


@pytest.mark.parametrize("layers, rank", [("attention", 3), ("all", 1)])
def test_how_many_parameters_are_trained(begin, small, tmp_path, layers, rank):
    """Counted from the shapes in the checkpoint: an adaptor of W (out, in, ...) has rank x (in ... + out)."""
    weights = load_file(small / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = {key: w for key, w in weights.items() if key.endswith(".weight") and w.dim() > 1}
    if layers == "attention":
        wanted = {key: w for key, w in wanted.items() if re.search(r"\.to_(q|k|v|out\.0)\.weight$", key)}
    count = sum(rank * (math.prod(w.shape[1:]) + w.shape[0]) for w in wanted.values())
    result = done(*begin(layers=layers, rank=rank, steps=1))
    assert f"{count:,} parameters in {len(wanted)} adaptors" in "\n".join(result.err)
    tensors = load_file(tmp_path / "run" / LORA)
    assert sum(tensor.numel() for tensor in tensors.values()) == count and len(tensors) == 2 * len(wanted)


def test_recomputed_activations(student, monkeypatch):
    """--checkpointing: the same gradients; blocks with text and each of the distances run twice, forward and again for
    the gradient."""
    counts, gradients, calls = [], [], []
    for kind, name in ((train.unet.Transformer2D, "text"), (VGG, "distance")):
        forward = kind.forward

        def counted(*args, forward=forward, name=name):
            calls.append(name)
            return forward(*args)

        monkeypatch.setattr(kind, "forward", counted)
    for checkpointing in (False, True):
        training = student(checkpointing=checkpointing)
        calls.clear()
        training.backward([0, 1, 2, 3], head_start=False)
        counts.append({name: calls.count(name) for name in ("text", "distance")})
        gradients.append([parameter.grad for parameter in training.parameters])
    assert counts[0]["distance"] == 2 * 3  # of picture and target, for three terms
    assert counts[1] == {name: 2 * count for name, count in counts[0].items()}
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpointing_is_passed_on(begin, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "checkpoint_activations", lambda *_: seen.append(1))
    done(*begin(steps=1), "--checkpointing")
    assert seen == [1]


def test_bfloat16(begin, tmp_path):
    """The frozen networks are in half precision; the adaptors and the optimizer's state are not."""
    done(*begin(dtype="bfloat16", steps=2))
    for name in (LORA, STATE):
        tensors = load_file(tmp_path / "run" / name)
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in load_file(tmp_path / "run" / LORA).values())


def test_batches_of_one(begin, tmp_path):
    """--batch 1: one pair a step."""
    done(*begin(batch=1, steps=2))
    assert saved_step(tmp_path / "run") == 2


# ------------------------------------------------------------------------------------- what a step is made of, its rate
def pairs_of(steps, pairs=12, batch=4, seed=3):
    args = SimpleNamespace(pairs=pairs, batch=batch, seed=seed)
    return [train.pairs_of_step(step, args) for step in steps]


@pytest.mark.parametrize("pairs, batch", [(12, 1), (12, 4), (12, 24), (5, 4)])
def test_every_pair_once_per_round(pairs, batch):
    """In another order each round, also where rounds end within a batch."""
    chosen = sum(pairs_of(range(4 * pairs), pairs, batch), [])
    rounds = [chosen[i : i + pairs] for i in range(0, 4 * pairs, pairs)]
    assert all(sorted(each) == list(range(pairs)) for each in rounds)
    assert len(set(map(tuple, rounds))) == 4 and all(type(k) is int for k in chosen)


def test_a_step_depends_on_its_number_and_the_seed_only():
    """Not on the steps before it, nor on the global generator."""
    first = pairs_of(range(6))
    train.shuffled.cache_clear()
    torch.manual_seed(99)
    assert pairs_of(reversed(range(6))) == first[::-1]
    assert first[0] != first[3] and len({str(pairs_of(range(3), seed=seed)) for seed in range(3)}) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100, 1000])
def test_the_learning_rate(steps):
    """Up in equal steps, to 1 at a twentieth of the way, then down to almost 0; never 0, not with very few steps."""
    rates = [train.schedule_of_lr(step, steps) for step in range(steps)]
    top = max(1, steps // 20)
    assert rates[:top] == pytest.approx([(step + 1) / top for step in range(top)])
    assert rates[top - 1 :] == sorted(rates[top - 1 :], reverse=True) and min(rates) > 0
    if steps >= 20:
        assert rates[top] == 1 and rates[-1] < 0.01 and rates[(steps + top) // 2] == pytest.approx(0.5, abs=0.05)
