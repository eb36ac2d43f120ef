"""Trains the adaptors: prompts -> the teacher's pictures -> a single step that draws them.

    python train.py --data emoji                     # the embedded model; minutes on two CPU cores
    python train.py --data emoji --paper             # with the losses of the paper, and nothing else
    python train.py --data coco                      # Stable Diffusion 2.1-base, captions of COCO 2017; a GPU
    python train.py --data prompts.txt --model sd15  # your own prompts, one a line, or COCO captions (.json)
    python train.py --out runs/emoji --resume        # continues an interrupted run
    torchrun --nproc_per_node 8 train.py --data coco --batch 64

Stage one: the frozen model draws every (prompt, seed) pair in many guided steps; its latents are the targets.
Stage two: the same network, with adaptors, draws each pair in one step; `hipa.adaptation_loss` compares the two.

Everything random in a pair or a step is drawn from a generator seeded by its number. So on a CPU an interrupted run
continues bitwise as if it had not been interrupted, and N processes draw what one would. (Some CUDA kernels are not
deterministic.) Several nodes need a file system that they share.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import hipa
import unet
import vae
from hipa import UserError
from lora import ATTENTION, adapted, add_lora, lora_off, save_atomically, save_lora, write_file
from losses import DISTS, LPIPS, VGG, HiPALoss, VGGConfig
from sample import LORA_NAME, choose_device, integer, number, read_prompts, run

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# What goes with the short names of --data. "emoji" was measured (docs/results.md). "coco" has the paper's 3.3 million
# parameters; the rest was tried on a copy of the embedded model that predicts epsilon, as official models do, and on no
# official one. There one step is much harder to learn than with v, for at t = 999 an error in epsilon is 14.6 times as
# large in x0; a larger weight of the latents' error helps most, learning rates up to 4e-3 help, 1e-2 diverges, and
# clipping the gradient matters little; 2e-4 is a caution. Other data: as coco.
PRESETS = {
    "emoji": {
        "model": "emoji", "pairs": 4096, "guidance": 2.0, "teacher_steps": 10, "teacher_batch": 16,
        "steps": 3000, "batch": 8, "lr": 2e-3, "latent": 2.0, "layers": "all",
    },
    "coco": {
        "model": "sd21", "pairs": 100_000, "guidance": 3.0, "teacher_steps": 25, "teacher_batch": 16,
        "steps": 12_500, "batch": 8, "lr": 2e-4, "latent": 20.0, "layers": "attention",
    },
}  # fmt: skip
WEIGHTS = {"spatial": 1.0, "fourier": 3.0, "sobel": 1.0, "energy": 1.0}  # of the terms between pictures, measured
PAPER = {"energy": 0.0, "latent": 0.0, "head_start": 0.0, "later": 0.0}  # what this project added to the paper's loss
WITHOUT_GPU = """--data coco wants a GPU: 6 GB of downloads, then 4 EFLOP for the teacher's pictures and 0.4 for the \
adaptors: an estimated 5 to 9 hours of an H100, a year of two CPU cores. --device cpu starts it all the same; --data \
emoji trains in minutes"""


# ----------------------------------------------------------------------------------------------------------- settings
def parse_args(argv=None):
    def preset(name):
        return "(" + ", ".join(f"{data}: {values[name]}" for data, values in PRESETS.items()) + ")"

    def place(text):  # so that --resume finds it from another folder
        return os.path.abspath(text) if os.path.exists(text) and text not in {*PRESETS, *hipa.SHORT_NAMES} else text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {hipa.printable(message)} (--help shows all options)\n")
    add = parser.add_argument
    add("--data", type=place, help="emoji, coco (downloads 253 MB once), or a file of prompts")
    add("--model", type=place, help=f"a folder, a Hugging Face id, or a short name, as for sample.py {preset('model')}")
    add("--out", type=Path, help="folder of this run (runs/<data>)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--paper", action="store_true", help="only the paper's losses: no energy or latent term, all pairs from noise")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the frozen networks; the adaptors are float32 (auto: bfloat16 on cuda, else float32)")  # fmt: skip
    add = parser.add_argument_group("stage one: the teacher's pictures").add_argument
    add("--pairs", type=integer(1), help=f"(prompt, seed) pairs; prompts repeat if there are fewer {preset('pairs')}")
    add("--later", type=number, default=0.2, help="share of pairs that begin at t < 999 (%(default)s)")
    add("--guidance", type=number, help=f"of the teacher {preset('guidance')}")
    add("--teacher-steps", type=integer(1, 1000), metavar="STEPS", help=f"per picture {preset('teacher_steps')}")
    add("--teacher-batch", type=integer(1), metavar="N", help=f"pictures at a time {preset('teacher_batch')}")
    add("--targets", type=Path, metavar="FOLDER", help="where they are kept; runs can share them (<out>/targets)")
    add = parser.add_argument_group("stage two: the adaptors").add_argument
    add("--steps", type=integer(1), help=f"updates {preset('steps')}")
    add("--batch", type=integer(1), help=f"pairs per update, over all processes {preset('batch')}")
    add("--accumulate", type=integer(1), default=1, help="parts that a process takes its share in (%(default)s)")
    add("--lr", type=number, help=f"learning rate {preset('lr')}")
    add("--rank", type=integer(1), default=16, help="of the adaptors (%(default)s)")
    add("--layers", choices=["attention", "all"],
        help=f"attention: to_q, to_k, to_v, to_out; all: every linear or convolution {preset('layers')}")  # fmt: skip
    add("--distance", choices=["dists", "lpips"], default="dists", help="between pictures (%(default)s)")
    for name, weight in WEIGHTS.items():
        add(f"--{name}", type=number, default=weight, metavar="WEIGHT", help="of this term of the loss (%(default)s)")
    add("--latent", type=number, metavar="WEIGHT", help=f"of the latents' squared error {preset('latent')}")
    add("--head-start", type=number, default=0.75, metavar="SHARE",
        help="of the steps: trained on the latents' squared error alone, which is cheap (%(default)s)")  # fmt: skip
    add("--radius", type=number, default=0.25, help="of the Fourier disc, fraction of Nyquist (%(default)s)")
    add("--seed", type=integer(0, 2**31 - 1), default=0, help="first values of adaptors, order of pairs (%(default)s)")
    add("--save-every", type=integer(1), default=250, metavar="STEPS", help="state and a sample grid (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on cuda)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    args = parser.parse_args(argv)

    if args.resume:
        try:
            begun = hipa.read_json(args.out / "settings.json")
            begun |= {"targets": args.out / begun["targets"], "data": begun["data"]}
        except (UserError, KeyError, TypeError):
            parser.error(f"--out {args.out} is no folder of a run, which --resume needs, or settings.json is damaged")
        said = {k.replace("_", "-"): v for k, v in begun.items() if v is not None and v is not False}
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in said.items()]
        begun = parser.parse_args(words)  # which refuses what no run was begun with
        args = parser.parse_args([*words, *(sys.argv[1:] if argv is None else argv)])
        for name, value in vars(begun).items():
            if name not in FREE and getattr(args, name) != value:
                parser.error(f"the run in {args.out} was begun with --{name.replace('_', '-')} {value}")
    elif args.paper:
        parser.set_defaults(**PAPER)
        args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is missing: emoji, coco, or a file of prompts")
    for name, value in PRESETS.get(args.data, PRESETS["coco"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / Path(args.data).stem
    args.targets = args.targets or args.out / "targets"
    if args.batch % (WORLD * args.accumulate):
        parser.error(f"--batch {args.batch} does not divide into {WORLD} processes x {args.accumulate} parts")
    if max(args.later, args.head_start) > 1:
        parser.error("--later and --head-start are shares, from 0 to 1")
    if not args.latent and not any(getattr(args, name) for name in WEIGHTS):
        parser.error("all terms of the loss have weight 0")
    if args.data == "coco" and args.device == "auto" and choose_device("auto") == "cpu":
        parser.error(WITHOUT_GPU)
    return args


# What does not change the result, so that a run can continue with another value.
FREE = {"resume", "out", "device", "compile", "checkpointing", "accumulate", "targets", "teacher_batch"}


# -------------------------------------------------------------------------------------------------------------- prompts
COCO = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
COCO_SHA256 = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"


def find_prompts(data):
    """The prompts that --data names, shuffled, always in the same way. Downloads COCO's captions once."""
    path = HERE / "emoji" / "captions.txt" if data == "emoji" else Path(data)
    if data == "coco":
        path = Path(torch.hub.get_dir()) / "coco" / "captions_train2017.json"
        if not path.exists():
            archive = path.with_suffix(".zip")
            hipa.fetch(COCO, archive, COCO_SHA256)
            with zipfile.ZipFile(archive) as file:
                write_file(path, file.read("annotations/captions_train2017.json"))
            archive.unlink()
    prompts = read_prompts(path)
    random.Random(0).shuffle(prompts)
    return prompts


# ------------------------------------------------------------------------------------- stage one: the teacher's targets
SHARD = 64  # pairs in a file, and what is lost at most when stage one is interrupted
FIRST_SEED = 10**9  # of the pairs' noise: no picture that a user draws later begins where training did
HELD_OUT = 8  # further pairs, never trained on, for the sample grids


def seeded(*key):
    """A generator for `key`. torch's on the CPU looks at the lowest 32 bits of its seed only, so they are mixed."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


class Targets:
    """Pair k: a prompt, where the student begins, and x0, what the teacher makes of that.

    Most pairs begin with the noise of seed FIRST_SEED + k. A share `later` begins at some t < 999, as editing and
    super-resolution do: with noise added to the picture of an earlier pair, or to that picture blurred, which keeps its
    prompt. Kept as safetensors shards, so that memory stays constant: `x0` (n, 4, h, w), timesteps `t` (n), and `x`
    (m, 4, h, w), where those with t < 999 begin. Half precision, far finer than the teacher's own error.
    """

    def __init__(self, folder, prompts, pairs, later, schedule):
        self.folder, self.prompts, self.pairs, self.later = folder, prompts, pairs, later
        self.schedule, self.last = schedule, schedule.num_train_timesteps - 1
        self.shards = [range(i, min(i + SHARD, pairs + HELD_OUT)) for i in range(0, pairs + HELD_OUT, SHARD)]

    def begins_later(self, k):
        share = torch.rand((), generator=seeded("later", k)).item()
        return k % SHARD > 0 and k < self.pairs and share < self.later

    def plan(self, k):
        """Pair k -> (the earlier pair whose picture it begins with, or None; whether that is blurred; its timestep)"""
        if not self.begins_later(k):
            return None, False, self.last
        source = next(j for j in range(k - 1, -1, -1) if not self.begins_later(j))
        blurred, t = torch.rand(2, generator=seeded("pair", k)).tolist()
        return source, blurred < 0.5, int(self.last * (0.2 + 0.8 * t))

    def prompt(self, k):
        source, blurred, _ = self.plan(k)
        return self.prompts[(source if blurred else k) % len(self.prompts)]

    def path(self, k):
        return self.folder / f"{k // SHARD:06d}.safetensors"

    def check(self, **settings):
        """Refuses targets made with other settings, or writes down what these are made with. Raises UserError."""
        hipa.writable(self.folder)
        path = self.folder / "settings.json"
        settings["prompts"] = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        if any(self.folder.glob("*.safetensors")) and path.exists():
            there = hipa.read_json(path)
            wrong = [key.replace("steps", "--teacher-steps") for key in settings if there.get(key) != settings[key]]
            if wrong:
                raise UserError(f"{self.folder} holds targets made with another {wrong[0]}: name another --targets")
        else:
            write_file(path, json.dumps(settings, indent=2).encode())

    def missing(self):
        """The shards still to be drawn, ranges of pairs; this process draws every WORLD-th."""
        return [indices for indices in self.shards[RANK::WORLD] if not self.whole(indices)]

    def whole(self, indices):
        """Whether the shard of these pairs is there, undamaged and as planned."""
        try:
            with safe_open(self.path(indices[0]), "pt") as file:  # with fewer pairs, others began with noise
                t, (n, *shape), (m, *like) = file.get_tensor("t"), *(file.get_slice(x).get_shape() for x in ("x0", "x"))
            square = shape == like and shape[0] < shape[1] == shape[2]  # (4, h, w), and h = w above 4
            fits = square and (n, m) == (len(t), int((t < self.last).sum()))
            return fits and t[: len(indices)].tolist() == [self.plan(k)[2] for k in indices]
        except (OSError, SafetensorError, ValueError, LookupError):
            return False

    def make(self, model, steps, guidance, batch):
        """Stage one: draws what is missing."""
        shards = self.missing()
        with tqdm(total=sum(map(len, shards)), desc="teacher", unit="picture", disable=RANK > 0) as bar:
            for indices in shards:
                if self.path(indices[0]).exists():
                    tqdm.write(f"{self.path(indices[0])} is damaged, or has other pairs: drawn again", file=sys.stderr)
                tensors = self.draw(model, indices, steps, guidance, batch, bar.update)
                save_atomically(tensors, self.path(indices[0]))
        barrier()

    @torch.no_grad()
    def draw(self, model, indices, steps, guidance, batch, progress=int):
        """The tensors of a shard: first the pairs that begin with noise, then those that begin with their pictures."""
        config, first, side = model.unet.config, indices[0], model.unet.config.sample_size
        noise = hipa.noise([FIRST_SEED + k for k in indices], config.in_channels, side, side)
        t = torch.tensor([self.plan(k)[2] for k in indices])
        x, x0 = noise.clone(), torch.empty_like(noise)
        for later in (False, True):
            chosen = [k for k in indices if self.begins_later(k) == later]
            for part in (chosen[i : i + batch] for i in range(0, len(chosen), batch)):
                rows = torch.tensor(part) - first
                if later:
                    sources, blurred, _ = zip(*map(self.plan, part))
                    pictures = model.decode(x0[torch.tensor(sources) - first].to(model.device))
                    small = F.interpolate(pictures, scale_factor=1 / 4, mode="bicubic", antialias=True)
                    blurry = hipa.resize(small, pictures.shape[2:])
                    blurred = torch.tensor(blurred, device=model.device)[:, None, None, None]
                    source = model.encode(torch.where(blurred, blurry, pictures)).cpu()
                    x[rows] = self.schedule.add_noise(source, t[rows], noise[rows])
                prompts, begin = [self.prompt(k) for k in part], t[rows] if later else None
                x0[rows] = hipa.teacher(model, prompts, x[rows].to(model.device), steps, guidance, begin).cpu()
                progress(len(part))
                if INTERRUPTED.is_set:
                    stop(f"{self.folder}: interrupted")
        if not torch.isfinite(x0).all():
            raise UserError("the teacher's latents are not finite (NaN or inf): try --dtype float32")
        return {"x0": x0.half(), "t": t, "x": x[t < self.last].half()}

    def batch(self, pairs):
        """Pairs (B ints) -> x (B, 4, h, w), timesteps (B,), x0 (B, 4, h, w), prompts"""
        rows = []
        for k in pairs:
            with safe_open(self.path(k), "pt") as file:
                x0, t, row = file.get_slice("x0")[k % SHARD].float(), file.get_tensor("t"), k % SHARD
                if t[row] < self.last:
                    x = file.get_slice("x")[int((t[:row] < self.last).sum())].float()
                else:
                    x = hipa.noise([FIRST_SEED + k], *x0.shape)[0]
            rows.append((x, t[row], x0))
        return *(torch.stack(column) for column in zip(*rows)), [self.prompt(k) for k in pairs]


# ------------------------------------------------------------------------------------------------------------ networks
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


def load_distance(kind, checkpoint):
    """DISTS or LPIPS on the checkpoint's own feature net (its folder `features/`), else on the official VGG16."""
    folder, learned = checkpoint / "features", {}
    if folder.is_dir():
        vgg, path = VGG(hipa.read_config(VGGConfig, folder / "config.json")), folder / "model.safetensors"
        weights = hipa.read_weights(path)
    else:
        vgg, path = VGG(), Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16).name
        hipa.fetch(VGG16, path, VGG16_SHA256)
        if hipa.sha256(path) != VGG16_SHA256:
            raise UserError(f"{path} is not the official file: delete it, and it is downloaded again")
        # A pickle, but a known one, and read as tensors only.
        weights = {k: v for k, v in torch.load(path, weights_only=True).items() if k.startswith("features.")}
        learned = load_file(HERE / "losses.safetensors")  # the two distances' own weights were learned for VGG16
    hipa.assign_weights(vgg, weights, path, torch.float32)
    if kind == "lpips":
        return LPIPS(vgg, [learned[f"lpips.{i}"] for i in range(5)] if learned else None)
    return DISTS(vgg, learned.get("dists.alpha"), learned.get("dists.beta"))


def checkpoint_activations(model, distance):
    """Makes blocks, and each distance, recompute their activations in the backward pass instead of keeping them."""
    blocks = (unet.ResnetBlock, unet.Transformer2D, vae.ResnetBlock)
    modules = [*model.unet.modules(), *model.vae.decoder.modules()]
    for block in [distance, *(module for module in modules if isinstance(module, blocks))]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ------------------------------------------------------------------------------------------ stage two: the adaptors
def schedule_of_lr(step, steps):
    """Share of the full learning rate at a step: up along a line over the first 5 %, then down along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def descend(optimizer, lr):
    """One step of the optimizer at the rate `lr`, along gradients that are together no longer than 1; then clears them.

    Returns the length that they had before (float). If it is not finite, the parameters are left as they are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def pairs_of_step(step, args):
    """The pairs of a step: all pairs in shuffled order, each once per epoch."""
    positions = range(step * args.batch, (step + 1) * args.batch)
    return [shuffled(args.pairs, args.seed, position // args.pairs)[position % args.pairs] for position in positions]


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=seeded("epoch", seed, epoch)).tolist()


MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam


class Run:
    """Stage two: the student, its optimizer, and what is kept of them in the run's folder."""

    def __init__(self, args, model, targets, loss):
        self.args, self.model, self.targets, self.loss = args, model, targets, loss
        torch.manual_seed(args.seed)
        self.parameters = add_lora(model.unet, args.rank, "all" if args.layers == "all" else ATTENTION)
        names = [f"{path}.{factor}" for path in adapted(model.unet) for factor in "AB"]
        self.named_parameters = dict(zip(names, self.parameters, strict=True))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.step, self.seconds, self.rows, self.damaged = 0, 0.0, [], None
        self.states = [args.out / f"state{age}.safetensors" for age in ("", "-before")]
        self.student = model
        if WORLD > 1:  # gradients are averaged as they pass through the wrapper
            self.student = dataclasses.replace(model, unet=DistributedDataParallel(model.unet))

    def train(self):
        """The loop: every update, and what is written and shown in between."""
        args, average = self.args, None
        with tqdm(total=args.steps, initial=self.step, desc="adaptors", unit="step", disable=RANK > 0) as bar:
            while self.step < args.steps:
                row = self.update()
                average = row["loss"] if average is None else 0.95 * average + 0.05 * row["loss"]
                bar.update()
                bar.set_postfix(loss=f"{average:.4f}", refresh=False)
                interrupted = row.pop("interrupted")
                if interrupted or self.step == args.steps or self.step % args.save_every == 0:
                    self.save()
                    if interrupted:
                        stop(f"{args.out}: saved at step {self.step}")
                    self.draw_samples()

    def update(self):
        """One update of the adaptors. Returns the row for log.csv."""
        args, start = self.args, time.perf_counter()
        lr = args.lr * schedule_of_lr(self.step, args.steps)
        pairs = pairs_of_step(self.step, args)[RANK::WORLD]
        terms = self.backward(pairs, head_start=self.step < args.head_start * args.steps)
        norm = descend(self.optimizer, lr)
        loss, interrupted = sum(terms.values()) - terms["interrupted"], terms.pop("interrupted")
        if not math.isfinite(loss + norm):
            words = "; ".join(self.targets.prompt(k) for k in pairs)
            what = f"the loss is {loss} and its gradient {norm} at step {self.step}"
            raise UserError(f"{what}, prompts: {words}. What was saved before is kept; try a lower --lr")
        self.step += 1
        self.seconds += time.perf_counter() - start
        row = {"step": self.step, "loss": loss, **terms, "gradient": norm, "lr": lr, "seconds": self.seconds}
        self.rows.append(row)
        return {**row, "interrupted": interrupted}

    def backward(self, pairs, head_start):
        """Gradients of the mean loss of `pairs`, this process's share. Returns the mean of each term over all."""
        device, total = self.model.device, {}
        size = len(pairs) // self.args.accumulate
        for i in range(0, len(pairs), size):
            x, timesteps, x0, prompts = self.targets.batch(pairs[i : i + size])
            last = i + size == len(pairs)  # only then must the processes meet
            with contextlib.nullcontext() if last or WORLD == 1 else self.student.unet.no_sync():
                terms = self.loss_of(x.to(device), timesteps.to(device), x0.to(device), prompts, head_start)
                (sum(terms.values()) / self.args.accumulate).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value.detach() / self.args.accumulate
        total["interrupted"] = torch.tensor(float(INTERRUPTED.is_set), device=device)
        mean = torch.stack(list(total.values()))
        if WORLD > 1:
            dist.all_reduce(mean)
        return dict(zip(total, (mean / WORLD).tolist()))

    def loss_of(self, x, timesteps, x0, prompts, head_start):
        """One step of the student from x at its timesteps -> {term: scalar}; the sum of the terms is the loss."""
        predicted = hipa.student(self.student, prompts, x, timesteps)
        terms = {}
        if self.args.latent or head_start:
            terms["latent"] = (self.args.latent or 1) * F.mse_loss(predicted, x0)
        if any(self.loss.weights.values()) and not head_start:
            terms |= hipa.adaptation_loss(self.model, self.loss, predicted, x0)
        return terms

    # ------------------------------------------------------------------------------------------------- what is kept
    def save(self):
        """Writes the adaptors, the log, and the state that --resume reads."""
        if RANK:
            return
        args, tensors = self.args, {}
        for name, parameter in self.named_parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {name: parameter, **{f"{name}.{m}": state[m] for m in MOMENTS}}
        name = os.path.basename(args.model) if os.path.isabs(args.model) else args.model
        made = {"base_model": name, "rank": str(args.rank), "step": str(self.step)}
        save_lora(args.out / LORA_NAME, self.model.unet, made)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, {column: None for row in self.rows for column in row})
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(args.out / "log.csv", table.getvalue().encode())
        state = {"step": str(self.step), "seconds": repr(self.seconds), "rows": json.dumps(self.rows)}
        last, before = self.states  # written at last, for it is what --resume believes
        save_atomically(tensors, last, state, keep=None if self.damaged else before)
        self.damaged = None

    def resume(self):
        """Takes up the last state in the run's folder; if that is damaged, loudly, the one before. Raises UserError."""
        for path in filter(os.path.exists, self.states):
            try:
                with safe_open(path, "pt") as file:
                    tensors, state = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
                for name, parameter in self.named_parameters.items():
                    moments = {m: torch.empty_like(parameter).copy_(tensors[f"{name}.{m}"]) for m in MOMENTS}
                    parameter.data.copy_(tensors[name])
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
                self.step, self.seconds, self.rows = (json.loads(state[key]) for key in ("step", "seconds", "rows"))
                return
            except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
                tqdm.write(f"warning: {path} is damaged: {hipa.printable(error)}", file=sys.stderr)
                self.damaged = path
        if self.damaged:
            raise UserError(f"no state in {self.args.out} can be read: delete state*, and --resume begins at step 0")

    @torch.no_grad()
    def draw_samples(self):
        """A grid of pairs never trained on. Rows: plain one step, one step with the adaptors, the teacher."""
        if RANK:
            return
        pairs = range(self.args.pairs, self.args.pairs + HELD_OUT)
        *_, x0, prompts = self.targets.batch(pairs)
        seeds = [FIRST_SEED + k for k in pairs]
        with lora_off(self.model.unet):
            rows = [hipa.sample(self.model, prompts, seeds, steps=1)]
        rows.append(hipa.sample(self.model, prompts, seeds, steps=1))
        rows.append(self.model.decode(x0.to(self.model.device)))
        folder = self.args.out / "samples"
        folder.mkdir(exist_ok=True)
        sheet = vae.grid([picture for row in rows for picture in vae.to_pil(row)], columns=HELD_OUT)
        sheet.save(file := io.BytesIO(), "PNG")
        write_file(folder / f"{self.step:06d}.png", file.getvalue())


def rehearse(run):
    """Before anything slow: one throw-away update of each kind and one batch of the teacher, to see that memory
    suffices and to tell how long both stages will take. Changes nothing."""
    args, model, targets = run.args, run.model, run.targets
    drawing = sum(map(len, targets.missing()))
    drawn, trained = min(args.teacher_batch, drawing), args.batch // WORLD // args.accumulate
    config, prompts = model.unet.config, [targets.prompt(0)] * max(drawn, trained)
    x = hipa.noise(range(len(prompts)), config.in_channels, config.sample_size, config.sample_size).to(model.device)
    t = torch.full((trained,), targets.last, device=model.device)

    def teacher():
        hipa.teacher(model, prompts[:drawn], x[:drawn], 1, args.guidance)

    def update(head_start):
        sum(run.loss_of(x[:trained], t, x[:trained], prompts[:trained], head_start).values()).backward()
        run.optimizer.zero_grad()

    def minutes(count, work, *arguments):
        for _ in range(2 if count else 0):  # the first is slower: it warms up, or compiles
            start = time.perf_counter()
            work(*arguments)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
        return count * (time.perf_counter() - start) / 60 if count else 0

    first = minutes(drawing / max(drawn, 1) * args.teacher_steps, teacher)
    head = args.head_start * args.steps * args.accumulate
    second = minutes(head, update, True) + minutes(args.steps * args.accumulate - head, update, False)
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if model.device.type == "cuda" else ""
    if not RANK:
        count = sum(parameter.numel() for parameter in run.parameters)
        expected = f"about {first:.0f} min for the teacher's pictures, {second:.0f} min for the adaptors{peak}"
        print(f"{count:,} parameters in {len(run.parameters) // 2} adaptors; {expected}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- processes
class Interrupted:
    """Set by SIGTERM, SIGHUP, Ctrl-C, so that the step at hand is finished and saved first; by a second Ctrl-C not."""

    is_set = 0

    def __call__(self, signum, _):
        if self.is_set and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = signum


INTERRUPTED = Interrupted()


def stop(where):
    if not RANK:
        tqdm.write(f"{where}; --resume continues", file=sys.stderr)  # not behind the progress bar
    sys.exit(128 + (INTERRUPTED.is_set or signal.SIGTERM))


def barrier():
    if WORLD > 1:
        dist.barrier()


def main(run_class=Run):
    """`run_class` trains; `emoji/lcm.py` has one with another loss."""
    args = parse_args()
    device = choose_device(args.device)
    hipa.writable(args.out)
    with contextlib.nullcontext() if RANK else hipa.locked(args.out, "wait for it, or name another --out"):
        train_adaptors(args, device, run_class)


def train_adaptors(args, device, run_class):
    for part in () if RANK else args.out.rglob("*.part"):  # of a process that was killed
        part.unlink(missing_ok=True)
    if not args.resume and any((args.out / name).exists() for name in ("settings.json", "state.safetensors")):
        raise UserError(f"{args.out} holds a run already: continue it with --resume, or name another --out")
    if WORLD > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=2))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, INTERRUPTED)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal was closed; nohup ignores that
        signal.signal(signal.SIGHUP, INTERRUPTED)
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on a GPU; no effect on a CPU
    if RANK:
        barrier()  # the first process downloads, the others find it in the caches
    folder = hipa.find_checkpoint(args.model)
    prompts, distance = find_prompts(args.data), load_distance(args.distance, folder)
    if not RANK:
        barrier()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    model = hipa.load(args.model, device, getattr(torch, dtype))
    targets = Targets(args.targets, prompts, args.pairs, args.later, model.schedule)
    if not RANK:
        made_with = {"guidance": args.guidance, "steps": args.teacher_steps, "later": args.later, "format": 3}
        targets.check(unet=hipa.sha256(hipa.weights_file(folder / "unet")), **made_with)
    if args.checkpointing:
        checkpoint_activations(model, distance)
    weights = {name: getattr(args, name) for name in WEIGHTS}
    loss = HiPALoss(distance.to(device), **weights, radius=args.radius)
    if args.compile if args.compile is not None else device == "cuda":
        for network in (model.text_encoder, model.unet, model.vae.decoder, loss):
            network.compile(dynamic=False)  # a graph for each size of batch: symbolic sizes are slower

    training = run_class(args, model, targets, loss)
    rehearse(training)
    if not (RANK or args.resume):  # not earlier: an attempt that failed is no run
        out, kept = (Path(os.path.abspath(path)) for path in (args.out, args.targets))
        kept = kept.relative_to(out) if kept.is_relative_to(out) else kept  # the folder may be renamed
        kept = json.dumps({**vars(args), "targets": kept}, indent=2, default=str)
        write_file(args.out / "settings.json", kept.encode())
    barrier()
    targets.make(model, args.teacher_steps, args.guidance, args.teacher_batch)
    if args.resume:
        training.resume()
    training.train()
    if not RANK:
        print(f"done in {training.seconds / 60:.1f} minutes; try it: python sample.py ... --model {args.model} --lora "
              f"{args.out / LORA_NAME}", file=sys.stderr)  # fmt: skip
        print(args.out / LORA_NAME)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
