"""Training from end to end: what a run leaves, what its targets and its loss are, and that it ends in the same adaptors
however it was interrupted, cut into parts or spread over processes. Whatever goes wrong ends in one line on stderr."""

import argparse
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hipa
import sample
import train
from conftest import ROOT
from losses import DISTS, LPIPS, VGG, HiPALoss
from training import FLAGS, LORA, PROMPTS, STATE, STEPS, contents, done, log, refused, resume, run, same_run, saved_step

pytest_plugins = "training"
FIRST, TERMS = train.FIRST_SEED + 10**6 * FLAGS["seed"], ["spatial", "fourier", "sobel", "energy"]


# ---------------------------------------------------------------------------------------------------------- end to end
def test_what_a_run_leaves_and_says(finished):
    """Only the path of the adaptors goes to stdout, and no half-written file stays. The log has a row for each step;
    its terms, by name, sum to the loss. The head start has the latents' error alone."""
    settings, told = json.loads((finished.out / "settings.json").read_text()), "\n".join(finished.result.err)
    assert {name: settings[name.replace("-", "_")] for name in FLAGS} == FLAGS and set(finished.prompts) == set(PROMPTS)
    assert (
        finished.result.out == [str(finished.out / LORA)] and f'sample.py "a cat" --model {settings["model"]}' in told
    )
    assert re.search(r"[\d,]+ parameters to train; about \d+ min for the teacher's pictures, \d+ for", told)
    paths = sorted(str(path.relative_to(finished.out)) for path in contents(finished.out))
    assert paths[:-2] == ["log.csv", LORA, *(f"samples/00000{step}.png" for step in (2, 4, 5)), "settings.json", STATE]
    assert all(re.fullmatch(r"targets/\w+/00000[08].safetensors", path) for path in paths[-2:])
    columns = log(finished.out)
    assert set(columns) == {"step", "loss", "latent", *TERMS, "gradient", "lr", "seconds"}
    assert columns["step"] == [1, 2, 3, 4, 5] and columns["seconds"] == sorted(columns["seconds"])
    terms = zip(*(columns[name] for name in ("latent", *TERMS)))
    assert columns["loss"] == pytest.approx([sum(term or 0 for term in row) for row in terms])
    assert all([value is None for value in columns[name]] == [True, True, False, False, False] for name in TERMS)
    assert columns["lr"] == [FLAGS["lr"] * train.schedule_of_lr(step, STEPS) for step in range(STEPS)]


def test_the_adaptors_and_the_sample_grid(finished, small):
    """Pairs never trained on: plain, by the adaptors as sample.py reads them, by the teacher. So targets are what many
    steps make, and half precision is exact enough for them."""
    model, held_out = hipa.load(small), range(FLAGS["pairs"], FLAGS["pairs"] + train.HELD_OUT)
    jobs = [finished.prompts[k % len(PROMPTS)] for k in held_out], [FIRST + k for k in held_out]
    plain, teacher = (hipa.sample(model, *jobs, *options) for options in ((1,), (FLAGS["teacher-steps"], 3.0)))
    sample.apply_lora(model, finished.out / LORA)
    adapted = hipa.sample(model, *jobs, steps=1)
    assert (plain - adapted).abs().max() > 0.05
    expected = torch.cat([torch.cat(list(row), dim=2) for row in (plain, adapted, teacher)], dim=1).clamp(-1, 1)
    grid = sample.to_tensor(Image.open(finished.out / "samples" / f"{STEPS:06d}.png"))
    assert grid.shape == (3, 3 * 32, train.HELD_OUT * 32) and (grid - expected).abs().max() < 3 / 127.5


def test_the_loss_falls(begin, tmp_path):
    """The same four pairs at every step."""
    done(*begin(pairs=4, later=0, latent=0, head_start=0, steps=12, save_every=12))
    loss = log(tmp_path / "run")["loss"]
    assert sum(loss[-3:]) < 0.95 * sum(loss[:3])


def test_presets_and_explicit_options():
    """A preset fills in what is not given; --paper halves the rate and switches off what the paper does not have; what
    is given wins."""
    args = train.parse_args("--data emoji --lr 0.5 --pairs 3 --model sd15".split())
    assert (args.lr, args.pairs, args.model, args.latent, args.out) == (0.5, 3, "sd15", 2, Path("runs/emoji"))
    args = train.parse_args(["--data", "some/prompts.txt"])
    assert (args.model, args.pairs, args.layers, args.out) == ("sd21", 100_000, "attention", Path("runs/prompts"))
    args = train.parse_args("--data emoji --paper --energy 0.3".split())
    assert (args.energy, args.latent, args.head_start, args.later, args.lr) == (0.3, 0, 0, 0, 1e-3)
    assert train.parse_args("--data emoji --paper --lr 0.5".split()).lr == 0.5


OUT_OF_MEMORY = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
FAULTS = [
    ("hipa.teacher", OUT_OF_MEMORY, "--accumulate", 0),
    ("hipa.student", OUT_OF_MEMORY, "--accumulate", 0),
    ("hipa.teacher", lambda model, prompts, x, *_: x * math.nan, "not finite", 1),
    ("train.rehearse", lambda args, *_: hipa.write_file(args.out / "settings.json", b""), "settings.json", 1),
]


@pytest.mark.parametrize("name, replacement, word, files", FAULTS)
def test_a_fault_before_training(begin, monkeypatch, tmp_path, name, replacement, word, files):
    """Not enough memory, targets that are NaN, or another run that begins in the same folder while this one rehearses:
    one line, before anything slow begins or is kept."""
    monkeypatch.setattr(name, replacement)
    refused(*begin(targets=None), words=[word])
    assert len(contents(tmp_path)) == files


# ---------------------------------------------------------------------------------------------- interrupted and resumed
FORKS = multiprocessing.get_context("forkserver")  # its processes are forks of one that has imported train.py
FORKS.set_forkserver_preload(["train"])


def killed_run(argv, name, count):
    """A run that ends by kill -9 when a file is written for the `count`-th time: half of it is on the disk by then."""
    fsync, names = os.fsync, []

    def fsync_or_die(file):
        names.append(Path(file.name).name.startswith(name))
        if names[-1] and sum(names) == count:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = fsync_or_die
    run(*argv)


@pytest.mark.parametrize("name, count, shards, step", [("000008.", 1, 1, 0), ("log.csv", 1, 2, 0), (STATE, 2, 2, 2)])
def test_a_killed_run_goes_on_bitwise(begin, finished, tmp_path, name, count, shards, step):
    """In stage one, between the files of the first save, in those of the second: resumed, the run leaves the bits of
    one that was not interrupted. Targets are not made again."""
    out = tmp_path / "run"
    with ProcessPoolExecutor(1, FORKS) as pool, pytest.raises(BrokenProcessPool):
        pool.submit(killed_run, begin(targets=None), name, count).result()
    before = contents(out / "targets", "*.safetensors")
    assert (len(before), saved_step(out)) == (shards, step)
    resume(out)
    same_run(out, finished.out)
    assert before.items() <= contents(out / "targets").items()


def with_signals(at, signums, args, model, loss, step, batch):
    """A `loss_of` that is interrupted at one step."""
    for signum in signums if step == at else ():
        signal.raise_signal(signum)
    return train.loss_of(args, model, loss, step, batch)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(begin, finished, tmp_path, times):
    """The update is finished and saved, one line says how to go on, and the run leaves the bits of one that was not
    interrupted. A second Ctrl-C ends at once. The handlers are put back."""
    out, handlers = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    result = run(*begin(), loss_of=partial(with_signals, 2, [signal.SIGINT] * times))
    step, lines = (3, [f"{out}: saved at step 3; --resume continues"]) if times == 1 else (2, [])
    assert (result.code, result.out, saved_step(out), len(log(out)["step"])) == (130, [], step, step)
    assert [line for line in result.err if re.search("--resume|error", line, re.I)] == lines
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    if times == 1:
        resume(out)
        same_run(out, finished.out)


def test_a_thread_and_no_rehearsal(begin, finished, monkeypatch, tmp_path):
    """As in a notebook: only the main thread can have handlers of signals. The rehearsal changes nothing."""
    monkeypatch.setattr(train, "rehearse", lambda *_: None)
    thread = threading.Thread(target=run, args=begin())
    thread.start()
    thread.join()
    same_run(tmp_path / "run", finished.out)


def test_a_signal_to_the_command(begin, tmp_path):
    """SIGTERM, as from a scheduler of jobs, does the same."""
    out, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *begin(steps=10**6, save_every=1)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as child:
        while child.poll() is None and not (out / STATE).exists():
            time.sleep(0.01)
        child.terminate()
        err = child.communicate()[1]
    assert child.returncode == 143 and "Traceback" not in err
    assert f"{out}: saved at step {saved_step(out)}; --resume continues" in re.split(r"[\r\n]+", err)


def test_resuming_with_other_options(finished, tmp_path):
    """A finished run stays as it is. In another place it can be made longer, with another learning rate, in parts."""
    out = shutil.copytree(finished.out, tmp_path / "moved")
    before = contents(out)
    assert resume(out).out == [str(out / LORA)]
    assert [path.name for path, data in contents(out).items() if data != before[path]] == ["settings.json"]
    resume(out, "--steps", 7, "--lr", 1e-3, "--accumulate", 2, "--save-every", 3)
    old, new, settings = log(finished.out), log(out), json.loads((out / "settings.json").read_text())
    assert new["step"] == [1, 2, 3, 4, 5, 6, 7] and new["loss"][:STEPS] == old["loss"]
    assert new["lr"][STEPS:] == [1e-3 * train.schedule_of_lr(step, 7) for step in (5, 6)]
    assert [settings[name] for name in ("steps", "lr", "accumulate", "save_every")] == [7, 1e-3, 2, 3]


@pytest.mark.parametrize("name", ["settings.json", STATE, "000000.safetensors"])
def test_a_cut_file(finished, tmp_path, name):
    out = shutil.copytree(finished.out, tmp_path / "run")
    (path,) = out.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused("--resume", "--out", out, "--steps", 7, words=[str(path)])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_a_number(begin, finished, tmp_path, kind):
    """A loss from outside, or the gradient of a finite one: the run ends; what was saved stays, and can be resumed."""

    def loss_of(args, model, loss, step, batch):
        zero = sum(p.sum() for p in model.unet.parameters() if p.requires_grad)
        zero = (zero - zero.detach()).square().sqrt()  # the slope of the root at 0 is infinite
        mine = 0 * zero.detach() if step != 3 else zero.detach() * math.nan if kind == "loss" else zero
        return train.loss_of(args, model, loss, step, batch) | {"mine": mine}

    error = refused(*begin(), loss_of=loss_of, words=["step 3", "--lr", "nan"])
    assert ("loss is nan" in error) == (kind == "loss") and saved_step(tmp_path / "run") == 2
    assert log(tmp_path / "run")["mine"] == [0, 0]
    if kind == "loss":
        resume(tmp_path / "run")
        assert log(tmp_path / "run")["loss"] == log(finished.out)["loss"]


# ---------------------------------------------------------------------------------- several processes, parts of a batch
def run_as(rank, port, argv, at):
    """A run as torchrun starts it. SIGTERM reaches process 1 at one step."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    importlib.reload(train)
    return run(*argv, loss_of=partial(with_signals, at if rank == 1 else -1, [signal.SIGTERM]))


def test_two_processes(begin, tmp_path):
    """Each makes half of the targets and takes half of every batch, the first one writes: the same bits as one process
    that takes its batches in two parts. A signal to one of them stops both after the same step."""
    out, one = tmp_path / "run", tmp_path / "one"
    done(*begin(one, targets=None, accumulate=2))

    def both(argv, at=-1):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with ProcessPoolExecutor(2, FORKS) as pool:
            return pool.map(run_as, range(2), [port] * 2, [argv] * 2, [at] * 2)

    first, second = both(begin(targets=None), at=2)
    assert (first.code, second.code, saved_step(out)) == (143, 143, 3), (first, second)
    assert f"{out}: saved at step 3; --resume continues" in first.err and "--resume" not in str(second.err)
    first, second = both(["--resume", "--out", out])
    assert (first.code, first.out, second.code, second.out) == (0, [str(out / LORA)], 0, []), (first, second)
    same_run(out, one)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_downloads(begin, monkeypatch, rank):
    """The others wait, then find model, captions and VGG16 in the caches: two would write the same files."""
    calls = Mock(**{"load_distance.return_value": torch.nn.Identity()})
    for name in ("train.barrier", "train.find_prompts", "train.load_distance", "hipa.find_checkpoint"):
        monkeypatch.setattr(name, getattr(calls, name.split(".")[1]))
    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(hipa, "load", lambda *_, **__: sys.exit("far enough"))
    assert run(*begin()).code == "far enough"
    names = [name for name, *_ in calls.mock_calls]
    assert names.index("barrier") == (0 if rank else 3) and len(names) == 4


# ------------------------------------------------------------------------------------------------ the teacher's targets
def pairs_of(run, folder, prompts=PROMPTS, **changed):
    """A train.Pairs like that of a run."""
    args = argparse.Namespace(**vars(run.args) | {"targets": run.out / "targets"} | changed)
    return train.Pairs(args, run.model, prompts, folder)


def test_runs_share_targets(begin, finished, tmp_path):
    """With other settings of stage two nothing is made again; for more pairs only what is missing."""
    folder = shutil.copytree(finished.out / "targets", tmp_path / "targets")
    before = contents(folder)
    done(*begin(targets=folder, steps=1, rank=1, distance="lpips", later=0, pairs=16))
    after = contents(folder)
    assert before.items() <= after.items() and {p.name for p in after.keys() - before} == {"000016.safetensors"}
    assert len({path.parent for path in after}) == 1 and not (tmp_path / "run" / "targets").exists()


def test_targets_that_are_made_otherwise_are_not_shared(finished, small, tmp_path):
    """With other settings or noise, or if a file of the checkpoint's five parts differs. Its place and features may."""
    copy = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    changes = (
        {},
        {"guidance": 2.0},
        {"teacher_steps": 4},
        {"seed": 6},
        {"prompts": PROMPTS[1:]},
        {"prompts": PROMPTS[::-1]},
    )
    folders = {pairs_of(finished, small, **change).folder for change in changes}
    assert len(folders) == len(changes) and pairs_of(finished, copy).folder in folders
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (copy / part).iterdir():
            path.write_bytes((before := path.read_bytes()) + b" ")
            assert pairs_of(finished, copy).folder not in folders, path
            path.write_bytes(before)


@torch.no_grad()
def test_a_pair_does_not_depend_on_what_is_beside_it(finished, small):
    """In stage one up to half precision, in stage two bitwise. At the next step, it may begin elsewhere."""
    order = [13, 3, 0, 8, 5]
    data = pairs_of(finished, small, finished.prompts, later=0.7)
    batch = data.batch(order, 2)
    assert batch.prompts == [finished.prompts[k % 5] for k in order] and batch.x0.dtype == torch.float32
    for row, k in enumerate(order):
        x = hipa.noise([FIRST + k], 4, 8, 8)
        target = hipa.teacher(finished.model, [finished.prompts[k % 5]], x, FLAGS["teacher-steps"], FLAGS["guidance"])
        torch.testing.assert_close(batch.x0[row], target[0], rtol=2e-3, atol=2e-3)
        alone, next_step = data.batch([k], 2), data.batch([k], 3)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(batch[1:], alone[1:]))
        assert torch.equal(alone.x, x) == (alone.timesteps == 999).item()
        assert torch.equal(alone.x, next_step.x) == (alone.timesteps == next_step.timesteps == 999).item()
    assert len(set(batch.timesteps.tolist())) > 2


@pytest.mark.parametrize("later", [0.0, 0.3])
def test_later_starts(finished, small, later):
    """A share of the pairs begins at timesteps from 199 to 998, with the noisy target, half of them blurred first. The
    noise is the pair's own from t = 599 on, else new. Here targets are 100 with stripes of 100; the VAE does nothing.
    """
    schedule, stripes = finished.model.schedule, torch.tensor([1.0, -1.0]).repeat(4)
    data, order = pairs_of(finished, small, later=later), range(1000)
    noise, target = data.noise(order), (100 + 100 * stripes).expand(1000, 4, 8, 8)
    data.targets = lambda rows: target[list(rows)].clone()
    data.model = Mock(encode=lambda x: x, decode=lambda x: x, schedule=schedule, unet=data.model.unet, device="cpu")
    _, x, t, x0 = data.batch(order, step=7)
    begins_later = t < 999
    assert torch.equal(x0, target) and torch.equal(x[~begins_later], noise[~begins_later])
    assert begins_later.float().mean().item() == pytest.approx(later, abs=0.05)
    if later:
        assert 199 <= min(t) < 230 and 970 < max(t[begins_later]) and {*range(2, 10)} <= {*(t // 100).tolist()}
        alpha, sigma = schedule.alpha_sigma(t)
        sharp = (x / alpha - target).abs().amax(dim=(1, 2, 3)) < 80  # blurred, there are no stripes
        assert sharp[begins_later].float().mean().item() == pytest.approx(0.5, abs=0.1)
        assert ((x / alpha)[begins_later & ~sharp].mean(0) - 100).abs().max() < 25
        eps = (x - alpha * target) / sigma
        own = (eps - noise).abs().amax(dim=(1, 2, 3)) < 0.01
        assert torch.equal(own[begins_later & sharp], (t >= 599)[begins_later & sharp])
        assert eps[begins_later & sharp & ~own].std().item() == pytest.approx(1, abs=0.05)


# ----------------------------------------------------------------------------------------------------------- downloads
@pytest.mark.parametrize("fault", [None, "another file", "no server"])
def test_coco(begin, monkeypatch, tmp_path, fault):
    """Downloaded once, here from a file; the first caption of each image counts. If that fails, there is one line, and
    nothing is left that would pass for captions."""
    with zipfile.ZipFile(path := tmp_path / "annotations.zip", "w") as file:
        file.writestr("annotations/instances_train2017.json", "{}")
        captions = [{"image_id": k, "caption": text} for k, text in ((9, "a cat"), (4, "a\n dog "), (9, "2"), (4, "3"))]
        file.writestr("annotations/captions_train2017.json", json.dumps({"annotations": captions}))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(train, "COCO", "http://127.0.0.1:9/x.zip" if fault == "no server" else path.as_uri())
    if fault != "another file":
        monkeypatch.setattr(train, "COCO_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    if fault:
        monkeypatch.setattr(train, "choose_device", lambda name: "cuda")
        refused(*begin(data="coco"), words=[train.COCO])
        assert contents(tmp_path / "torch") == {}
    else:
        prompts = train.find_prompts("coco")
        path.unlink()
        assert train.find_prompts("coco") == prompts and sorted(prompts) == ["a cat", "a dog"]


def test_vgg16(monkeypatch, tmp_path):
    """A checkpoint without a feature net of its own has the official VGG16, with the weights that DISTS and LPIPS
    learned for it. A file whose name says another hash is refused; the official name says one."""
    assert train.VGG16.startswith("https://") and torch.hub.HASH_REGEX.search(train.VGG16)[1] == "397923af"
    torch.save(VGG().state_dict() | {"classifier.0.bias": torch.zeros(3)}, path := tmp_path / "vgg16.pth")
    path = path.rename(path.with_stem(f"vgg16-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(train, "VGG16", path.as_uri())
    distance, learned = train.load_distance("dists", tmp_path), load_file(ROOT / "losses.safetensors")
    assert torch.equal(distance.vgg.features[0].weight, torch.load(path)["features.0.weight"])
    total = learned["dists.alpha"].sum() + learned["dists.beta"].sum()
    torch.testing.assert_close(distance.alpha, learned["dists.alpha"] / total)
    monkeypatch.setattr(train, "VGG16", path.rename(path.with_stem("vgg16-00000000")).as_uri())
    with pytest.raises(hipa.UserError, match="vgg16-00000000.*hash"):
        train.load_distance("lpips", tmp_path)


# ------------------------------------------------------------------------------------------------------------- mistakes
MISTAKES = {  # options, and a word of the message
    "--out new": "--data", "--data missing.txt": "missing.txt", "--data empty.txt": "no prompts",
    "--data .": "directory", "--data other.json": "other.json", "--data p.txt --model no-such-model": "no-such-model",
    "--data p.txt --batch 4 --accumulate 3": "--batch 4", "--data p.txt --device cuda": "--device cuda",
    "--data p.txt --spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 0": "weight 0", "--data coco": "--data emoji",
    "--data p.txt --out old": "--resume", "--resume": "settings.json", "--resume --out new": "new/settings.json",
    "--resume --out odd": "--data", "--resume --out old --accumulate 3": "--batch",
}  # fmt: skip
for option in ("--lr nan", "--later 1.5", "--head-start 2", "--rank 0", "--pairs 0", "--teacher-steps 0", "--batch x",
               f"--seed {2**63}", "--distance mse", "--stepz 3"):  # fmt: skip
    MISTAKES[f"--data p.txt {option}"] = option.split()[0]
for option in (
    "--data p.txt",
    "--model emoji",
    "--rank 4",
    "--layers all",
    "--batch 8",
    "--pairs 16",
    "--seed 6",
    "--guidance 2",
    "--teacher-steps 4",
    "--later 0",
    "--distance lpips",
    "--dtype bfloat16",
    "--paper",
):
    MISTAKES[f"--resume --out old {option}"] = option.split()[0]


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake(finished, small, monkeypatch, tmp_path, options):
    """One line that says what is wrong, before the model is loaded; no file is written or changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hipa, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    if "no-such-model" not in options:
        monkeypatch.setattr(hipa, "find_checkpoint", lambda *_, **__: pytest.fail("the model was looked for"))
    for name, text in {"p.txt": "a cat\n", "empty.txt": " \n", "other.json": "[]", "odd/settings.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(finished.out, tmp_path / "old")
    before = contents(tmp_path)
    model = [] if "--model" in options or "--resume" in options else ["--model", small]
    refused(*options.split(), *model, words=[MISTAKES[options]])
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------- parts of an update
def test_terms_of_the_loss(finished, small, monkeypatch):
    """Twice the weight, twice the term; weight 0 leaves it out. The head start, and --latent alone, decode nothing."""

    def terms(step=STEPS, latent=0.5, **weights):
        args = argparse.Namespace(**vars(finished.args) | {"latent": latent})
        loss = HiPALoss(finished.loss.distance, **finished.loss.weights | weights)
        found = train.loss_of(args, finished.model, loss, step, finished.batch)
        return {name: term.item() for name, term in found.items()}

    once, twice = terms(), terms(fourier=2, sobel=0, latent=1)
    factors = {"latent": 2, "spatial": 1, "fourier": 2, "energy": 1}
    assert {name: twice[name] / once[name] for name in twice} == pytest.approx(factors) and "sobel" in once
    monkeypatch.setattr(hipa.StableDiffusion, "decode", lambda *_: pytest.fail("something was decoded"))
    assert terms(step=1) == terms(**dict.fromkeys(TERMS, 0)) == {"latent": once["latent"]}
    assert terms(step=1, latent=0) == {"latent": pytest.approx(2 * once["latent"])}
    assert isinstance(finished.loss.distance, DISTS) and isinstance(train.load_distance("lpips", small), LPIPS)


def test_the_student_has_no_guidance_and_the_teacher_no_adaptors(finished, small):
    """The student evaluates the network once for each picture; the teacher is the network as it was loaded."""
    args, model, batch, asked = finished.args, finished.model, finished.batch, []
    targets = [hipa.teacher(each, batch.prompts, batch.x, 2, 3.0) for each in (model, hipa.load(small))]
    assert torch.equal(*targets)
    hook = model.unet.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    train.loss_of(args, model, finished.loss, STEPS, batch)
    hook.remove()
    assert asked == [4]


@pytest.mark.parametrize("layers, rank", [("attention", 3), ("all", 1)])
def test_how_many_parameters_are_trained(begin, small, tmp_path, layers, rank):
    """Counted from the shapes in the checkpoint: an adaptor of W (out, in, ...) has rank x (in ... + out). The frozen
    networks are in half precision here, adaptors and optimizer's state are not; and batches of one will do."""
    weights = load_file(small / "unet" / "diffusion_pytorch_model.safetensors")
    pattern = r"\.to_(q|k|v|out\.0)\.weight$" if layers == "attention" else r"^(down|mid|up)_block.*\.weight$"
    wanted = [w for key, w in weights.items() if w.dim() > 1 and re.search(pattern, key)]
    count = sum(rank * (math.prod(w.shape[1:]) + w.shape[0]) for w in wanted)
    result = done(*begin(layers=layers, rank=rank, dtype="bfloat16", steps=1, batch=1))
    assert f"{count:,} parameters to train" in "\n".join(result.err)
    tensors = list(load_file(tmp_path / "run" / LORA).values())
    assert sum(tensor.numel() for tensor in tensors) == count and len(tensors) == 2 * len(wanted)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors)
    moments = torch.load(tmp_path / "run" / STATE)["optimizer"]["state"].values()
    for tensor in [*tensors, *(each["exp_avg_sq"] for each in moments)]:
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()


@pytest.mark.parametrize("pairs, batch", [(12, 1), (12, 4), (12, 24), (5, 4)])
def test_every_pair_once_per_epoch(pairs, batch):
    """In another order each epoch, also where one ends within a batch. A step depends on its number and the seed."""

    def chosen(steps, seed=3):
        args = argparse.Namespace(pairs=pairs, batch=batch, seed=seed)
        return sum((train.pairs_of_step(step, args) for step in steps), [])

    ours = chosen(range(4 * pairs))
    epochs = [ours[i : i + pairs] for i in range(0, 4 * pairs, pairs)]
    assert all(sorted(epoch) == list(range(pairs)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    torch.manual_seed(99)
    assert chosen([2]) == ours[2 * batch : 3 * batch] and chosen(range(9), seed=4) != ours[: 9 * batch]


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 1000])
def test_the_learning_rate(steps):
    """Up in equal steps, to 1 at a twentieth of the way, then down to almost 0; never 0, not with very few steps."""
    rates = [train.schedule_of_lr(step, steps) for step in range(steps)]
    top = max(1, steps // 20)
    assert rates[:top] == pytest.approx([(step + 1) / top for step in range(top)])
    assert rates[top - 1 :] == sorted(rates[top - 1 :], reverse=True) and min(rates) > 0
    if steps >= 20:
        assert rates[top] == 1 and rates[-1] < 0.01 and rates[(steps + top) // 2] == pytest.approx(0.5, abs=0.05)
