"""Trains the adaptors: prompts -> the teacher's pictures -> a single step that draws them.

    python train.py --data emoji                     # the embedded model; minutes on two CPU cores
    python train.py --data coco                      # Stable Diffusion 2.1-base, captions of COCO 2017; a GPU
    python train.py --data prompts.txt --model sd15  # your own prompts, one a line, or COCO captions (.json)
    python train.py --out runs/emoji --resume        # goes on with what was interrupted
    torchrun --nproc_per_node 8 train.py --data coco --batch 64

Stage one: the frozen model draws every (prompt, seed) pair in many guided steps; the resulting latent is kept. The
noise it began with is not kept, its seed is. And from another picture, or this one blurred, with noise as at some
t < 999, the model draws on too: that is where editing, inpainting and super-resolution begin.
Stage two: the same network, with adaptors, draws each pair's picture in one step; HiPALoss compares the two.

Everything random in step k is drawn from a generator seeded by k. So a run that was interrupted goes on bitwise as if
it had not been, and N processes draw what one would.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import http.client
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import hipa
import unet
import vae
from hipa import UserError
from lora import ATTENTION, adapted, add_lora, lora_off, save_atomically, save_lora
from losses import DISTS, LPIPS, VGG, HiPALoss, VGGConfig
from sample import LORA_NAME, choose_device, grid, number, read_prompts, run, to_pil, whole, writable

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# What goes with the short names of --data. "emoji" was measured (see the README); "coco" is the paper's 3.3 million
# parameters, and for the rest a guess until somebody measures it. Other data: as coco.
PRESETS = {
    "emoji": {
        "model": "emoji", "pairs": 704, "guidance": 2.0, "teacher_steps": 10,
        "steps": 900, "batch": 8, "lr": 4e-3, "layers": "all",
    },
    "coco": {
        "model": "sd21", "pairs": 100_000, "guidance": 3.0, "teacher_steps": 25,
        "steps": 12_500, "batch": 8, "lr": 2e-4, "layers": "attention",
    },
}  # fmt: skip
# Weights of the loss's terms, as measured.
WEIGHTS = {"spatial": 1.0, "fourier": 3.0, "sobel": 1.0, "energy": 0.2, "latent": 2.0}


# ----------------------------------------------------------------------------------------------------------- settings
def preset(name):
    """The presets' values of an option, for its help."""
    return "(" + ", ".join(f"{data}: {values[name]}" for data, values in PRESETS.items()) + ")"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help shows all options)\n")
    add = parser.add_argument
    add("--data", help="emoji, coco (downloads 253 MB once), or a file of prompts")
    add("--model", help=f"a folder, a Hugging Face id, or a short name, as for sample.py {preset('model')}")
    add("--out", type=Path, help="folder of this run (runs/<data>)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the frozen networks; the adaptors are float32 (auto: bfloat16 on cuda, else float32)")  # fmt: skip
    group = parser.add_argument_group("stage one: the teacher's pictures")
    add = group.add_argument
    add("--pairs", type=whole(1), help=f"(prompt, seed) pairs; prompts repeat if there are fewer {preset('pairs')}")
    add("--guidance", type=number, help=f"of the teacher {preset('guidance')}")
    add("--teacher-steps", type=whole(1, 1000), metavar="STEPS",
        help=f"that the teacher takes to a picture {preset('teacher_steps')}")  # fmt: skip
    add("--targets", type=Path, metavar="FOLDER", help="where they are kept; runs can share them (<out>/targets)")
    group = parser.add_argument_group("stage two: the adaptors")
    add = group.add_argument
    add("--steps", type=whole(1), help=f"updates {preset('steps')}")
    add("--batch", type=whole(1), help=f"pairs per update, over all processes {preset('batch')}")
    add("--accumulate", type=whole(1), default=1, help="parts that a process takes its share in (%(default)s)")
    add("--lr", type=number, help=f"learning rate {preset('lr')}")
    add("--rank", type=whole(1), default=16, help="of the adaptors (%(default)s)")
    add("--layers", choices=["attention", "all"],
        help=f"attention: to_q, to_k, to_v, to_out; all: every linear or convolution {preset('layers')}")  # fmt: skip
    add("--later", type=number, default=0.2, help="share of pictures begun at t < 999 (%(default)s)")
    add("--distance", choices=["dists", "lpips"], default="dists", help="between pictures (%(default)s)")
    for name, weight in WEIGHTS.items():
        add(f"--{name}", type=number, default=weight, metavar="WEIGHT", help="of this term of the loss (%(default)s)")
    add("--head-start", type=number, default=0.5, metavar="SHARE",
        help="of the steps: trained on the latents' squared error alone, which is cheap (%(default)s)")  # fmt: skip
    add("--radius", type=number, default=0.25, help="of the Fourier disc, fraction of Nyquist (%(default)s)")
    add("--seed", type=whole(0, 2**31 - 1), default=0, help="first values of adaptors, order of pairs (%(default)s)")
    add("--save-every", type=whole(1), default=250, metavar="STEPS", help="state and a sample grid (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on cuda)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    args = parser.parse_args(argv)

    if args.resume:
        args = resumed(parser, args, argv)
    elif not args.data:
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
    if not any(getattr(args, name) for name in WEIGHTS):
        parser.error("all terms of the loss have weight 0")
    return args


# What does not change the result, so that a run can go on with another.
FREE = {"resume", "out", "device", "compile", "checkpointing", "accumulate", "targets"}


def resumed(parser, args, argv):
    """The settings of the run in args.out. What is said anew must agree with them."""
    if not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    path = args.out / "settings.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
        settings["targets"] = Path(settings["targets"])
    except (OSError, ValueError, KeyError, TypeError):
        parser.error(f"{args.out} holds no run to go on with")
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name, value in settings.items():
        if name not in FREE and getattr(args, name) != value:
            parser.error(f"the run in {args.out} was begun with --{name.replace('_', '-')} {value}")
    return args


# -------------------------------------------------------------------------------------------------------------- prompts
COCO = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
COCO_SHA256 = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"


def find_prompts(data):
    """The prompts that --data names, shuffled, always in the same way. Raises UserError."""
    path = HERE / "emoji" / "captions.txt" if data == "emoji" else Path(data)
    if data == "coco":
        path = Path(torch.hub.get_dir()) / "coco" / "captions_train2017.json"
        if not path.exists() and not RANK:
            download_coco(path)
        barrier()
    prompts = read_prompts(path)
    random.Random(0).shuffle(prompts)
    return prompts


def download_coco(path):
    """Fetches the annotations' archive and takes the training captions out of it."""
    url, digest = os.environ.get("HIPA_COCO_URL", COCO), os.environ.get("HIPA_COCO_SHA256", COCO_SHA256)
    archive = path.with_suffix(".zip")
    fetch_file(url, archive, digest)
    try:
        with zipfile.ZipFile(archive) as file:
            part = path.with_suffix(".part")
            part.write_bytes(file.read("annotations/captions_train2017.json"))
            part.replace(path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{url} is not the archive of COCO's annotations: {error}") from None
    finally:
        archive.unlink()


def fetch_file(url, path, digest):
    """Downloads `url` to `path`, which appears only once its sha256 is `digest`. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, path, hash_prefix=digest)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:  # no network; another sha256
        raise UserError(f"cannot download {url}: {error}") from None


# ------------------------------------------------------------------------------------- stage one: the teacher's targets
SHARD = 64  # pairs in a file, and what is lost at most when stage one is interrupted
FIRST_SEED = 10**9  # of the pairs' noise: no picture that a user draws later begins where training did
HELD_OUT = 8  # further pairs, never trained on, for the sample grids


class Targets:
    """What the teacher draws: pair k is prompt k (in a circle) and the noise of seed FIRST_SEED + k.

    Kept as safetensors shards in a folder, so that memory stays constant: `x0` (n, 4, h, w), what the noise becomes;
    `x` (n, 4, h, w) at the timesteps `t` (n), where a picture begins later than with noise, and `x0_later`, what that
    becomes. Half precision, far finer than the teacher's own error.
    """

    def __init__(self, folder, prompts, last):
        """`last`: the timestep of pure noise, 999."""
        self.folder, self.prompts, self.last = folder, prompts, last

    def prompt(self, k):
        return self.prompts[k % len(self.prompts)]

    def path(self, shard):
        return self.folder / f"{shard:06d}.safetensors"

    def check(self, **settings):
        """Compares with what made the targets that are there already, or writes it down. Raises UserError."""
        writable(self.folder)
        path = self.folder / "settings.json"
        settings["prompts"] = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            wrong = [key for key, value in settings.items() if there.get(key) != value]
            if wrong:
                raise UserError(f"{self.folder} holds targets made with another {wrong[0]}: name another --targets")
        path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    def make(self, model, pairs, steps, guidance, batch, interrupted):
        """Draws what is missing of pairs 0 ... `pairs` + HELD_OUT, this process every WORLD-th shard."""
        total = pairs + HELD_OUT
        shards = range(-(-total // SHARD))
        with tqdm(total=total, desc="teacher", unit="picture", disable=RANK > 0) as bar:
            for shard in shards:
                indices = range(shard * SHARD, min((shard + 1) * SHARD, total))
                if shard % WORLD == RANK and self.count(shard) < len(indices):
                    parts = []
                    for i in range(0, len(indices), batch):
                        parts.append(self.draw(model, indices[i : i + batch], steps, guidance))
                        bar.update(len(parts[-1]["x0"]) * (WORLD if RANK == 0 else 1))
                        interrupted()
                    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                    save_atomically(tensors, self.path(shard))
                elif shard % WORLD == RANK:
                    bar.update(len(indices) * WORLD)
        barrier()

    def count(self, shard):
        """How many pairs the shard's file holds."""
        if not self.path(shard).exists():
            return 0
        with safe_open(self.path(shard), "pt") as file:
            return file.get_slice("x0").get_shape()[0]

    @torch.no_grad()
    def draw(self, model, indices, steps, guidance):
        """What becomes of some pairs: a dict of tensors as in the shards, on the CPU."""
        config, schedule, generator = model.unet.config, model.schedule, seeded("later", indices[0])
        seeds, side = [FIRST_SEED + k for k in indices], config.sample_size
        noise = hipa.noise(seeds, config.in_channels, side, side)
        predict_x0 = hipa.predictor(model, [self.prompt(k) for k in indices], guidance)
        x0 = hipa.dpm_solver(predict_x0, noise.to(model.device), schedule, steps)
        # Every second pair begins later with another's picture, as editing does; the others with their own, blurred.
        pictures = model.vae.decode(x0.to(model.dtype)).float()
        small = F.interpolate(pictures, scale_factor=1 / 4, mode="bicubic", antialias=True)
        blurred = F.interpolate(small, size=pictures.shape[2:], mode="bicubic")
        odd = torch.tensor([k % 2 for k in indices], device=model.device).bool()[:, None, None, None]
        source = model.vae.encode(torch.where(odd, pictures.roll(1, 0), blurred).to(model.dtype)).float()
        t = torch.randint(self.last // 5, self.last, (), generator=generator).item()
        x = schedule.add_noise(source, t, torch.randn(noise.shape, generator=generator).to(model.device))
        x0_later = hipa.dpm_solver(predict_x0, x, schedule, max(1, round(steps * t / self.last)), first=t)
        drawn = {"x0": x0, "x": x, "x0_later": x0_later}
        if not all(torch.isfinite(x).all() for x in drawn.values()):
            raise UserError("the teacher's latents are not finite (NaN or inf): try --dtype float32")
        return {key: x.half().cpu() for key, x in drawn.items()} | {"t": torch.full((len(indices),), t)}

    def batch(self, chosen):
        """[(pair, whether it begins later)] -> x (B, 4, h, w), timesteps (B,), x0 (B, 4, h, w), prompts"""
        rows = []
        for k, later in chosen:
            with safe_open(self.path(k // SHARD), "pt") as file:
                tensor = lambda key: file.get_slice(key)[k % SHARD]  # noqa: B023, E731
                if later:
                    rows.append((tensor("x").float(), tensor("t"), tensor("x0_later").float()))
                else:
                    x0 = tensor("x0").float()
                    rows.append((hipa.noise([FIRST_SEED + k], *x0.shape)[0], torch.tensor(self.last), x0))
        return *(torch.stack(column) for column in zip(*rows)), [self.prompt(k) for k, _ in chosen]


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
        if not RANK and not path.exists():
            fetch_file(VGG16, path, VGG16_SHA256)
        barrier()
        if hipa.sha256(path) != VGG16_SHA256:
            raise UserError(f"{path} is not the official file: delete it, and it is downloaded again")
        # A pickle, but a known one, and read as tensors only.
        weights = {k: v for k, v in torch.load(path, weights_only=True).items() if k.startswith("features.")}
        learned = load_file(HERE / "losses.safetensors")  # the two distances' own weights were learned for VGG16
    hipa.assign_weights(vgg, weights, path, torch.float32)
    if kind == "lpips":
        return LPIPS(vgg, [learned[f"lpips.{i}"] for i in range(5)] if learned else None)
    return DISTS(vgg, learned.get("dists.alpha"), learned.get("dists.beta"))


def checkpoint_activations(*nets):
    """Makes the networks' blocks recompute their activations in the backward pass instead of keeping them."""
    for net in nets:
        for block in net.modules():
            if isinstance(block, (unet.ResnetBlock, unet.Transformer2D, vae.ResnetBlock)):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ------------------------------------------------------------------------------------------------------------- training
def schedule_of_lr(step, steps):
    """Share of the full learning rate at a step: up along a line over the first 5 %, then down along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def pairs_of_step(step, args):
    """(pair, whether it begins later) for every picture of a step: pairs in shuffled order, each once per round."""
    generator = seeded("step", args.seed, step)
    later = torch.rand(args.batch, generator=generator) < args.later
    places = range(step * args.batch, (step + 1) * args.batch)
    pairs = [shuffled(args.pairs, args.seed, place // args.pairs)[place % args.pairs] for place in places]
    return list(zip(pairs, later.tolist()))


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, turn):
    return torch.randperm(n, generator=seeded("round", seed, turn)).tolist()


def seeded(*key):
    """A generator for `key`. torch's on the CPU looks at the lowest 32 bits of its seed only, so they are mixed."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


class Run:
    """Stage two: the student, its optimizer, and what is kept of them in the run's folder."""

    def __init__(self, args, model, targets, loss):
        self.args, self.model, self.targets, self.loss = args, model, targets, loss
        torch.manual_seed(args.seed)
        self.parameters = add_lora(model.unet, args.rank, "all" if args.layers == "all" else ATTENTION)
        names = [f"{path}.{factor}" for path in adapted(model.unet) for factor in "AB"]
        self.named_parameters = dict(zip(names, self.parameters, strict=True))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.step, self.seconds, self.rows = 0, 0.0, []
        self.student = model
        if WORLD > 1:  # gradients are averaged as they pass through the wrapper
            self.student = dataclasses.replace(model, unet=DistributedDataParallel(model.unet))

    def loss_of(self, x, timesteps, x0, prompts):
        """One step of the student from x at its timesteps -> {term: scalar}; the sum of the terms is the loss."""
        predicted = hipa.predictor(self.student, prompts)(x, timesteps)
        terms, head_start = {}, self.step < self.args.head_start * self.args.steps
        if self.args.latent or head_start:
            terms["latent"] = (self.args.latent or 1) * F.mse_loss(predicted, x0)
        if any(self.loss.weights.values()) and not head_start:
            decode = lambda latent: self.model.vae.decode(latent.to(self.model.dtype)).float()  # noqa: E731
            with torch.no_grad():
                target = decode(x0)
            terms |= self.loss(decode(predicted), target)
        return terms

    def update(self):
        """One update of the adaptors. Returns what log.csv says of it."""
        args, device, start = self.args, self.model.device, time.perf_counter()
        chosen = pairs_of_step(self.step, args)[RANK::WORLD]
        size = len(chosen) // args.accumulate
        total = {}
        for i in range(0, len(chosen), size):
            x, timesteps, x0, prompts = self.targets.batch(chosen[i : i + size])
            last = i + size == len(chosen)  # only then must the processes meet
            with contextlib.nullcontext() if last or WORLD == 1 else self.student.unet.no_sync():
                terms = self.loss_of(x.to(device), timesteps.to(device), x0.to(device), prompts)
                (sum(terms.values()) / args.accumulate).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0) + value.detach() / args.accumulate
        mean = torch.stack([*total.values(), torch.zeros((), device=device)])
        mean[-1] = INTERRUPTED.is_set
        if WORLD > 1:
            dist.all_reduce(mean)
            mean /= WORLD
        *values, interrupted = mean.tolist()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        if not math.isfinite(sum(values) + norm):
            words = "; ".join(self.targets.prompt(k) for k, _ in chosen)
            what = f"the loss is {sum(values)} and its gradient {norm} at step {self.step}"
            raise UserError(f"{what}, prompts: {words}. What was saved before is kept; try a lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * schedule_of_lr(self.step, args.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        row = {"step": self.step, "loss": sum(values), **dict(zip(total, values)), "gradient": norm}
        self.rows.append({**row, "lr": group["lr"], "seconds": self.seconds})
        return row, bool(interrupted)

    # ------------------------------------------------------------------------------------------------- what is kept
    def save(self):
        """Writes the adaptors, the state that --resume goes on from, and the log."""
        if RANK:
            return
        tensors = {}
        for name, parameter in self.named_parameters.items():
            state = self.optimizer.state[parameter]
            tensors[name] = parameter
            tensors |= {f"{name}.{moment}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        args = self.args
        made = {"base_model": args.model, "rank": args.rank, "step": self.step}
        save_lora(args.out / LORA_NAME, self.model.unet, {key: str(value) for key, value in made.items()})
        self.write_log()
        # Last, for it is what --resume believes.
        save_atomically(
            tensors, args.out / "state.safetensors", {"step": str(self.step), "seconds": repr(self.seconds)}
        )

    def resume(self):
        """Takes up the state that is kept in the run's folder, if there is one."""
        path = self.args.out / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
            for name, parameter in self.named_parameters.items():
                parameter.data.copy_(file.get_tensor(name))
                moments = {m: file.get_tensor(f"{name}.{m}").to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        log = self.args.out / "log.csv"
        if log.exists():
            with open(log, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]

    def write_log(self):
        """All steps so far, anew each time, atomically. Steps that the state does not have are dropped by resume()."""
        part = self.args.out / "log.part"
        with open(part, "w", newline="") as file:
            columns = {column: None for row in (self.rows[0], self.rows[-1]) for column in row}
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.args.out / "log.csv")

    @torch.no_grad()
    def draw_samples(self):
        """A grid of pairs never trained on. Rows: plain one step, one step with the adaptors, the teacher."""
        if RANK:
            return
        indices = range(self.args.pairs, self.args.pairs + HELD_OUT)
        *_, x0, prompts = self.targets.batch([(k, False) for k in indices])
        seeds = [FIRST_SEED + k for k in indices]
        with lora_off(self.model.unet):
            rows = [hipa.sample(self.model, prompts, seeds, steps=1)]
        rows.append(hipa.sample(self.model, prompts, seeds, steps=1))
        rows.append(self.model.vae.decode(x0.to(self.model.device, self.model.dtype)).float())
        folder = self.args.out / "samples"
        folder.mkdir(exist_ok=True)
        sheet = grid([picture for row in rows for picture in to_pil(row)], columns=HELD_OUT)
        sheet.save(folder / f"{self.step:06d}.png")

    def train(self):
        args = self.args
        average = None
        with tqdm(total=args.steps, initial=self.step, desc="adaptors", unit="step", disable=RANK > 0) as bar:
            while self.step < args.steps:
                row, interrupted = self.update()
                average = row["loss"] if average is None else 0.95 * average + 0.05 * row["loss"]
                bar.update()
                bar.set_postfix(loss=f"{average:.4f}", refresh=False)
                done = self.step == args.steps
                if done or interrupted or self.step % args.save_every == 0:
                    self.save()
                    if not interrupted:
                        self.draw_samples()
                if interrupted:
                    stop(f"{args.out}: saved at step {self.step}; --resume goes on")


# ---------------------------------------------------------------------------------------------------------- processes
class Interrupted:
    """Set by SIGTERM and Ctrl-C, so that the step at hand is finished and saved first. A second Ctrl-C ends at once."""

    is_set = 0

    def __call__(self, signum, _):
        if self.is_set and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = signum


INTERRUPTED = Interrupted()


def stop(message):
    if not RANK:
        tqdm.write(message, file=sys.stderr)  # not behind the progress bar
    sys.exit(128 + (INTERRUPTED.is_set or signal.SIGTERM))


def barrier():
    if WORLD > 1:
        dist.barrier()


def main(kind=Run):
    """`kind`: the class that trains; `emoji/peers.py` has one with another loss."""
    args = parse_args()
    device = choose_device(args.device)
    if not args.resume and (args.out / "settings.json").exists():
        raise UserError(f"{args.out} holds a run already: go on with it by --resume, or name another --out")
    if WORLD > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=2))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, INTERRUPTED)
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32 on a GPU; no effect on a CPU
    writable(args.out)
    prompts = find_prompts(args.data)
    if RANK:
        barrier()  # the first process downloads it, the others find it in the cache
    checkpoint_folder = hipa.find_checkpoint(args.model)
    if not RANK:
        barrier()
    distance = load_distance(args.distance, checkpoint_folder)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    model = hipa.load(checkpoint_folder, device, getattr(torch, dtype))
    barrier()
    targets = Targets(args.targets, prompts, model.schedule.num_train_timesteps - 1)
    if not RANK:
        sha256 = hipa.sha256(hipa.weights_file(checkpoint_folder / "unet"))
        targets.check(unet=sha256, guidance=args.guidance, steps=args.teacher_steps, format=2)
        kept = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if key != "resume"}
        (args.out / "settings.json").write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    barrier()
    if args.compile if args.compile is not None else device == "cuda":
        for net in (model.unet, model.vae.decoder, distance):
            net.compile()

    def interrupted():
        if INTERRUPTED.is_set:
            stop(f"{args.targets}: interrupted; --resume goes on")

    targets.make(model, args.pairs, args.teacher_steps, args.guidance, args.batch, interrupted)
    if args.checkpointing:
        checkpoint_activations(model.unet, model.vae.decoder)
    weights = {name: getattr(args, name) for name in WEIGHTS if name != "latent"}
    training = kind(args, model, targets, HiPALoss(distance.to(device), **weights, radius=args.radius))
    if args.resume:
        training.resume()
    if not RANK:
        count = sum(parameter.numel() for parameter in training.parameters)
        print(f"{count:,} trained parameters in {len(training.parameters) // 2} adaptors", file=sys.stderr)
    training.train()
    if not RANK:
        name = args.model
        print(f"done in {training.seconds / 60:.1f} minutes; try it: python sample.py ... --model {name} --lora "
              f"{args.out / LORA_NAME}", file=sys.stderr)  # fmt: skip
        print(args.out / LORA_NAME)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
