"""Rebuilds the embedded model from the emoji font: pictures -> VAE -> feature nets -> text encoder + UNet -> `emoji/`.

    python emoji/make.py               # goes on where it stopped
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 emoji/make.py --device cpu  # 2 CPU cores: a quarter faster
    python emoji/make.py --improve unet 480     # trains the UNet and text encoder that are there further
    python emoji/make.py --improve decoder 60   # the same for the VAE's decoder; the latents stay what they are
    python emoji/make.py --improve epsilon 15   # a copy in emoji/build/epsilon that predicts noise, not v
    python emoji/make.py --improve varied 60    # a copy for pictures of which half are mirrored, anywhere in the frame

Nobody needs this to use the project. It takes about three hours on two CPU cores, half an hour on a GPU, and needs
the font "Noto Color Emoji" (Debian: apt-get install fonts-noto-color-emoji; SIL Open Font License). Every stage trains
for a given time, not for a number of steps, so that any machine ends with a model as good as its speed allows.

--improve writes what it has into `emoji/` every half hour: a model that works. After any interruption the same command
continues; without its build folder too, from the weights in `emoji/`, whose headers say how many minutes they have had.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from clip import BEGIN, END, CLIPTextConfig, CLIPTextModel, Tokenizer, byte_characters  # noqa: E402
from evaluate import (  # noqa: E402
    OTHER_VIEWS,
    REFERENCE_VIEWS,
    SIZE,
    EvaluationNet,
    high_frequency_energy,
    psnr,
    read_glyphs,
    without_article,
)
from lora import save_atomically  # noqa: E402
from losses import VGG, VGGConfig, high_pass  # noqa: E402
from sample import LORA_NAME  # noqa: E402
from unet import UNet2DConditionModel, UNetConfig  # noqa: E402
from vae import AutoencoderKL, VAEConfig, grid, to_pil  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size this bitmap font has
HELD_OUT = 1024  # the last of the pictures: never trained on
COLOURS = {
    "red": (229, 57, 53), "orange": (251, 140, 0), "yellow": (253, 216, 53), "green": (67, 160, 71),
    "blue": (66, 133, 244), "purple": (142, 36, 170), "pink": (244, 143, 177), "black": (0, 0, 0),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- pictures
GLYPHS = read_glyphs()


@cache
def glyph_picture(glyph):
    """The font's bitmap of `glyph` as RGBA, cropped and centred on a square."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), glyph, font=ImageFont.truetype(FONT, FONT_SIZE), embedded_color=True)
    cropped = canvas.crop(canvas.getbbox())
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square


@dataclass
class Scene:
    """What a picture shows: classes, their places (centre x, centre y, size, tilt in degrees), and the background."""

    classes: list
    places: list
    background: str = None
    small: bool = False
    mirrored: bool = False

    @staticmethod
    def sample(rng, index=None, varied=False):
        """Three quarters show one glyph, the others a small one or two side by side; two thirds are on plain white.

        With an `index`: that class, alone, at the usual size, on white. `varied`: half are mirrored, and what is alone
        can be anywhere in the picture, for which it is a little smaller.
        """
        kind = rng.choices(["one", "small", "two"], [0.74, 0.10, 0.16])[0] if index is None else "one"
        background = rng.choice(list(COLOURS)) if index is None and rng.random() < 0.33 else None

        def jitter(centre, by):
            return centre + rng.uniform(-by, by)

        def tilt():
            return rng.uniform(-10, 10)

        if kind == "two":
            classes = rng.sample(range(len(GLYPHS)), 2)
            size = rng.uniform(27, 30)
            places = [(jitter(x, 1.5), jitter(32, 4), size, tilt()) for x in (17, 47)]
        else:
            classes = [rng.randrange(len(GLYPHS)) if index is None else index]
            usual = (38, 46) if varied else (48, 58)
            size, by = (rng.uniform(24, 30), 8) if kind == "small" else (rng.uniform(*usual), 3)
            if varied:
                by = (SIZE - size) / 2
            places = [(jitter(32, by), jitter(32, by), size, tilt())]
        return Scene(classes, places, background, kind == "small", varied and rng.random() < 0.5)

    def draw(self):
        """-> RGB picture of SIZE x SIZE. Pillow resamples RGBA premultiplied, so edges get no dark fringe."""
        picture = Image.new("RGBA", (SIZE, SIZE), COLOURS.get(self.background, (255, 255, 255)))
        for index, (x, y, size, tilt) in zip(self.classes, self.places):
            glyph = glyph_picture(GLYPHS[index][0]).rotate(tilt, Image.Resampling.BICUBIC, expand=True)
            side = round(size * glyph.width / glyph_picture(GLYPHS[index][0]).width)
            glyph = glyph.resize((side, side), Image.Resampling.LANCZOS)
            layer = Image.new("RGBA", picture.size)
            layer.paste(glyph, (round(x - side / 2), round(y - side / 2)))
            picture = Image.alpha_composite(picture, layer)
        return (ImageOps.mirror(picture) if self.mirrored else picture).convert("RGB")

    def caption(self, rng):
        """One of the ways a person would ask for this picture."""
        names = [rng.choice(GLYPHS[index][1]) for index in self.classes]
        if self.small:
            names = [with_adjective(rng.choice(["small", "little", "tiny"]), names[0])]
        if rng.random() < 0.35:
            names = [without_article(name) for name in names]
        text = rng.choice([" and ", " and ", " next to "]).join(names)
        if rng.random() < 0.1:
            text = rng.choice(["a picture of ", "an emoji of ", "a drawing of "]) + text
        if self.background:
            article = "an" if self.background == "orange" else "a"
            text += rng.choice([f" on {article} {{}} background"] * 3 + [" on {}"]).format(self.background)
        elif rng.random() < 0.1:
            text += " on a white background"
        return text


def with_adjective(adjective, name):
    """("small", "an apple") -> "a small apple"; ("small", "grapes") -> "small grapes"."""
    article = "" if without_article(name) == name else "the " if name.startswith("the ") else "a "
    return f"{article}{adjective} {without_article(name)}"


def pictures_of(scenes, desc="drawing"):
    """-> uint8 (N, 3, SIZE, SIZE)"""
    pictures = np.stack([np.asarray(scene.draw()) for scene in tqdm(scenes, desc)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures):
    """uint8 -> float32 in [-1, 1]"""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------- training
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def cached(path, make):
    """What make() returns, kept in `path` for the next run and for the other processes."""
    if not path.exists() and not RANK:
        torch.save(make(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    if WORLD > 1:
        dist.barrier()
    return torch.load(path, weights_only=True, mmap=True)


def minutes_used(device):
    """On a CPU the processor time of each thread: neither a pause nor what else the machine does counts as training."""
    return (time.monotonic() if device.type == "cuda" else time.process_time() / torch.get_num_threads()) / 60


def fit(name, model, loss_of, minutes, batches, lr, build, parameters=None, ema=0.998, report=None, earlier=None):
    """Minimises loss_of(*batch) for `minutes` and returns an exponential moving average of the model's weights.

    AdamW; the rate warms up over 2 % of the time and falls along a cosine. The state is kept in `build/name.state`
    every two minutes, and a second call continues from there. Where there is none, `earlier` says how much training
    `model` has had (minutes, samples, step), and the rate goes on from there. Every half hour and at the end
    report(average, progress) is called, and what it returns becomes a line of `build/name.csv`. Under torchrun each
    process takes its own batches, and gradients are averaged.
    """
    parameters = list(parameters or model.parameters())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = copy.deepcopy(model).requires_grad_(False)
    progress = {"minutes": 0.0, "samples": 0, "step": 0} | (earlier or {})
    path = build / f"{name}.state"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"]), average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
    torch.manual_seed(progress["step"] * WORLD + RANK)  # from here on, each process draws its own batches and noise

    def save():
        if RANK:
            return
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "progress": progress}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def write_report():
        if RANK or not report:
            return
        row = {key: round(value, 2) for key, value in progress.items()} | {"loss": round(running, 5)}
        row |= report(average, progress)
        with open(build / f"{name}.csv", "a") as log:
            if not log.tell():
                print(*row, sep=",", file=log)
            print(*row.values(), sep=",", file=log)
        tqdm.write(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))

    bar = tqdm(total=round(minutes), initial=round(progress["minutes"]), desc=name, unit="min", disable=RANK > 0)
    saved = reported = progress["minutes"]
    running, fresh, last = None, 0, minutes_used(device)
    while progress["minutes"] < minutes:
        done = progress["minutes"] / minutes
        warm = min(1, (done + 1e-4) / 0.02, (fresh + 1) / 100)  # the optimizer's moments begin anew with each start
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        batch = next(batches)
        loss = loss_of(*batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {progress['step']}")
        optimizer.zero_grad()
        loss.backward()
        now = minutes_used(device)
        clock, last = progress["minutes"] + now - last, now
        if WORLD > 1:  # the clock is averaged too, so that all stop after the same step
            flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([clock], device=device)])
            dist.all_reduce(flat)
            *gradients, clock = (flat / WORLD).split([p.numel() for p in parameters] + [1])
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad.copy_(gradient.view_as(parameter))
            clock = clock.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema, (progress["step"] + 1) / (progress["step"] + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        samples, step = progress["samples"] + len(batch[0]) * WORLD, progress["step"] + 1
        progress = {"minutes": clock, "samples": samples, "step": step}
        fresh += 1
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.update(int(clock) - bar.n)
        bar.set_postfix(samples=progress["samples"], loss=f"{running:.4f}", refresh=False)
        if clock - saved > min(2, minutes / 10):
            save()
            saved = clock
            if clock - reported > min(30, minutes / 2):
                reported = clock
                write_report()
            last = minutes_used(device)  # reporting does not count as training
    bar.close()
    if fresh:
        save()
        write_report()
    return average


def batches_of(size, *tensors):
    """Endless shuffled batches of each tensor's rows, `size` over all processes."""
    size //= WORLD
    while True:
        order = torch.randperm(len(tensors[0]))
        for i in range(0, len(order) - size + 1, size):
            yield [t[order[i : i + size]] for t in tensors]


# --------------------------------------------------------------------------------------------------------------- VAE
VAE = VAEConfig(block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8)


def gradient_difference(a, b):
    """Mean absolute difference of the horizontal and vertical pixel differences: blurred edges cost here."""
    return sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for d in (-1, -2))


def reconstruction_loss(picture, target):
    error = picture - target
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * gradient_difference(picture, target)


def train_vae(device, build, pictures, held_out, minutes):
    torch.manual_seed(0)
    model = AutoencoderKL(VAE).to(device, memory_format=torch.channels_last)

    def loss_of(batch):
        target = to_unit(batch.to(device)).contiguous(memory_format=torch.channels_last)
        mean, logvar = model.moments(target)
        # The mean decoded through noise of the posterior's size; a weak pull to a unit Gaussian keeps latents small.
        latent = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        scaled = latent * VAE.scaling_factor
        return reconstruction_loss(model.decode(scaled), target) + 1e-4 * kl

    data = batches_of(16 if device == "cpu" else 128, pictures)
    return fit("vae", model, loss_of, minutes, data, 2e-3, build, report=quality_of_copies(held_out, device))


def quality_of_copies(held_out, device):
    """-> report(vae, _): PSNR of the VAE's copies of unseen pictures, and their share of the pictures' edge energy."""

    @torch.no_grad()
    def report(vae, _):
        real = to_unit(held_out[:256])
        copies = torch.cat([vae.decode(vae.encode(part)).cpu() for part in real.to(device).split(64)])
        edges = high_frequency_energy(copies)[0] / high_frequency_energy(real)[0]
        return {"psnr": round(psnr(copies, real), 2), "edges": round(edges, 3)}

    return report


def normalise_latents(vae, mean, std):
    """Gives the scaled latent's channels, which have this `mean` and `std` (4,), mean 0 and variance 1, by rewriting
    the two 1x1 convolutions around it. The pictures stay what they were; so does the scaling factor."""
    k = VAE.scaling_factor
    mean, std = mean / k, std / k  # of the unscaled latent
    shift = 2 * torch.log(std * k)
    quant, post = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        quant.weight[:4] /= (std * k)[:, None, None, None]
        quant.bias[:4] = (quant.bias[:4] - mean) / (std * k)
        quant.bias[4:] -= shift
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= (std * k)[None, :, None, None]


@torch.no_grad()
def encode_all(vae, pictures, device, desc):
    """Scaled latents (N, 4, 16, 16) of uint8 pictures."""
    chunks = tqdm(pictures.split(128), desc, unit_scale=128, unit="picture")
    return torch.cat([vae.encode(to_unit(chunk.to(device))).cpu() for chunk in chunks])


# ------------------------------------------------------------------------------------------- feature and evaluation net
FEATURES = VGGConfig(channels=(16, 32, 64, 96, 128), convs=(2, 2, 2, 2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)


class Classifier(nn.Module):
    """The feature net with a head to train it by; only the features are kept."""

    def __init__(self):
        super().__init__()
        self.vgg = VGG(FEATURES)
        self.head = nn.Linear(FEATURES.channels[-1], len(GLYPHS))

    def forward(self, x):
        return self.head(self.vgg(x / 2 + 0.5)[-1].mean(dim=(2, 3)))


def train_nets(device, build, pictures, labels, held_out, held_out_labels, minutes):
    """Two classifiers of single glyphs, of different shape and seed: one for the loss, one only for measuring."""
    nets, makers = [], {"features": Classifier, "evaluator": lambda: EvaluationNet(len(GLYPHS))}
    for seed, (name, make) in enumerate(makers.items()):
        torch.manual_seed(100 + seed)
        net = make().to(device, memory_format=torch.channels_last)

        def loss_of(batch, label, net=net):
            return F.cross_entropy(net(to_unit(batch.to(device))), label.to(device), label_smoothing=0.05)

        @torch.no_grad()
        def report(average, _):
            right = average(to_unit(held_out.to(device))).argmax(1) == held_out_labels.to(device)
            return {"recognised": round(right.float().mean().item(), 3)}

        data = batches_of(32 if device == "cpu" else 256, pictures, labels)
        nets.append(fit(name, net, loss_of, minutes, data, 2e-3, build, report=report).cpu())
    return nets[0].vgg, nets[1]


# ------------------------------------------------------------------------------------------------ text encoder and UNet
TEXT_LENGTH = 32
TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH)  # fmt: skip
UNET = UNetConfig(
    block_out_channels=(64, 96, 160), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=TEXT["hidden_size"], use_linear_projection=True, sample_size=SIZE // VAE.downscale,
)  # fmt: skip
SCHEDULE = hipa.Schedule(prediction_type="v_prediction")


def train_tokenizer(captions):
    """Byte-level BPE (Sennrich et al. 2016): merges the most frequent pair until every word is one token."""
    words = {}
    for caption in captions:
        for word in regex.findall(r"\p{L}+|[^\s\p{L}]+", caption.lower()):
            words[word] = words.get(word, 0) + 1
    characters = byte_characters()
    parts = {w: [characters[b] for b in w.encode()] for w in words}
    parts = {w: [*p[:-1], p[-1] + "</w>"] for w, p in parts.items()}
    merges = []
    while True:
        pairs = {}
        for word, p in parts.items():
            for pair in zip(p, p[1:]):
                pairs[pair] = pairs.get(pair, 0) + words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for p in parts.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = [p[i] + p[i + 1]]
                i += 1
    alphabet = list(characters.values())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [BEGIN, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, TEXT_LENGTH)


def train_unet(device, build, tokenizer, vae, latents, ids, minutes, name="unet", start=None, earlier=None, out=None):
    """Diffusion training (Ho et al. 2020) of UNet and text encoder together, predicting v (Salimans & Ho 2022).

    latents (N, 4, 16, 16); ids (N, K, TEXT_LENGTH): K captions of each; the last HELD_OUT are never trained on. One
    caption in ten is left empty, for guidance. `start`: a model to go on from, at half the learning rate, exported
    into the folder `out` with each report; `earlier`: see `fit`. The name "epsilon": predicts the noise instead.
    """
    schedule = hipa.Schedule() if name == "epsilon" else SCHEDULE
    torch.manual_seed(0)
    networks = nn.ModuleDict(
        {
            "unet": UNet2DConditionModel(UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer.vocab), **TEXT)),
        }
    )
    for embedding in networks["text_encoder"].text_model.embeddings.children():
        nn.init.normal_(embedding.weight, std=0.02)
    if start:
        networks["unet"].load_state_dict(start.unet.state_dict())
        networks["text_encoder"].load_state_dict(start.text_encoder.state_dict())
    networks = networks.to(device, memory_format=torch.channels_last)
    empty = tokenizer([""])[0].to(device)

    def loss(nets, x0, text, timestep, noise):
        alpha, sigma = schedule.alpha_sigma(timestep)
        prediction = nets["unet"](alpha * x0 + sigma * noise, timestep, nets["text_encoder"](text))
        return F.mse_loss(prediction, noise if name == "epsilon" else alpha * noise - sigma * x0)

    def loss_of(x0, captions):
        x0, batch = x0.to(device), len(x0)
        text = captions[torch.arange(batch), torch.randint(captions.shape[1], (batch,))].long().to(device)
        text[torch.rand(batch, device=device) < 0.1] = empty
        # Logit-normal timesteps (Esser et al. 2024): more in the middle, where the shapes are decided. One from each of
        # `batch` equally likely parts: less noise in the loss than independent draws.
        quantile = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        share = torch.sigmoid(0.3 + 1.3 * torch.special.ndtri(quantile))
        timestep = (share * SCHEDULE.num_train_timesteps).long().clamp(max=SCHEDULE.num_train_timesteps - 1)
        return loss(networks, x0, text, timestep, torch.randn_like(x0))

    @torch.no_grad()
    def report(average, progress):
        """The loss on unseen pictures, always with the same noise; all classes in 25 steps, as `build/NAME.png`."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents[-HELD_OUT:].shape, generator=generator)
        timestep = torch.randperm(HELD_OUT, generator=generator) * SCHEDULE.num_train_timesteps // HELD_OUT
        held_out = zip(
            *(x.to(device).split(64) for x in (latents[-HELD_OUT:], ids[-HELD_OUT:, 0].long(), timestep, noise))
        )
        held_out_loss = sum(loss(average, *part).item() for part in held_out) * 64 / HELD_OUT
        model = assemble(tokenizer, average, vae, schedule)
        names = [names[0] for _, names in GLYPHS]
        parts = [range(i, min(i + 25, len(names))) for i in range(0, len(names), 25)]
        pictures = [p for part in parts for p in to_pil(hipa.sample(model, [names[k] for k in part], part, 25, 2.0))]
        grid(pictures, columns=10).save(build / f"{name}.png")
        if out:
            export_unet(out, average, tokenizer, schedule, progress)
        return {"held_out_loss": round(held_out_loss, 5)}

    rate, ema = (5e-4, 0.9995) if start else (1e-3, 0.998)
    data = batches_of(32 if device == "cpu" else 256, latents[:-HELD_OUT], ids[:-HELD_OUT])
    return fit(name, networks, loss_of, minutes, data, rate, build, ema=ema, report=report, earlier=earlier)


def assemble(tokenizer, networks, vae, schedule):
    return hipa.StableDiffusion(tokenizer, networks["text_encoder"], networks["unet"], vae, schedule)


# -------------------------------------------------------------------------------------------------------------- decoder
def sharpen_decoder(device, build, vae, vgg, pictures, latents, held_out, minutes, name="decoder", earlier=None):
    """Trains the decoder alone, the latents fixed, with a perceptual term added, so that edges become crisp.

    With another `name`, at half the learning rate, exported with each report; `earlier`: see `fit`.
    """
    torch.manual_seed(1)
    model = copy.deepcopy(vae).to(device, memory_format=torch.channels_last).requires_grad_(False)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    vgg = vgg.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def loss_of(batch, latent):
        target = to_unit(batch.to(device)).contiguous(memory_format=torch.channels_last)
        # A little noise: the sampler's latents are not exactly those of pictures.
        picture = model.decode(latent.to(device) + 0.03 * torch.randn(latent.shape, device=device))
        with torch.no_grad():
            wanted = vgg(target / 2 + 0.5)
        features = vgg(picture / 2 + 0.5)
        perceptual = sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(features[:3], wanted[:3]))
        # Any distance is least for a soft edge where the latent leaves its place open: so ask for the energy as well.
        energy, wanted_energy = (high_pass(x, 0.25).square().mean(dim=(1, 2, 3)).log() for x in (picture, target))
        softness = (energy - wanted_energy).square().mean()
        return reconstruction_loss(picture, target) + 0.03 * perceptual + 0.1 * softness

    measure = quality_of_copies(held_out, device)

    def report(average, progress):
        if name != "decoder":
            write_weights(HERE / "vae", average, "diffusion_pytorch_model", progress)
        return measure(average, progress)

    data = batches_of(16 if device == "cpu" else 128, pictures, latents)
    rate = 1e-3 if name == "decoder" else 5e-4
    return fit(name, model, loss_of, minutes, data, rate, build, trained, report=report, earlier=earlier)


# --------------------------------------------------------------------------------------------------------------- export
def write_renders(folder=HERE, varied=False):
    """`renders.png`: real pictures of every class, one row each, so that measuring does not need the font."""
    rng = random.Random(12345)
    views = REFERENCE_VIEWS + OTHER_VIEWS
    pictures = [Scene.sample(rng, index, varied).draw() for index in range(len(GLYPHS)) for _ in range(views)]
    grid(pictures, columns=views).save(folder / "renders.png", optimize=True)


def write_captions():
    """`captions.txt`, what adaptors are trained on: five captions of each glyph alone, some small, some in pairs."""
    rng = random.Random(7)
    alone = [Scene([index], [None], rng.choice(list(COLOURS)) if k % 3 == 0 else None)
             for k in range(5) for index in range(len(GLYPHS))]  # fmt: skip
    others = [scene for scene in (Scene.sample(rng) for _ in range(300)) if scene.small or len(scene.classes) > 1]
    captions = [scene.caption(rng) for scene in alone + others]
    (HERE / "captions.txt").write_text("\n".join(captions) + "\n", "utf-8")


def write_json(path, settings):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def write_network(folder, network, config, stem="diffusion_pytorch_model", progress=None):
    write_json(folder / "config.json", config)
    write_weights(folder, network, stem, progress)


def write_weights(folder, network, stem, progress=None):
    """In half precision: a hundredth of a grey level, for half the bytes. `progress`, how much training the network
    has had, goes into the file's header, for `read_progress`. A file that is there is replaced at once."""
    folder.mkdir(exist_ok=True)
    tensors = {key: value.half() for key, value in network.state_dict().items()}
    save_atomically(tensors, folder / f"{stem}.safetensors", {"format": "pt", "progress": json.dumps(progress or {})})


def read_progress(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata().get("progress", "{}"))


def fields(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


VERSION = {"_diffusers_version": "0.42.1"}


def export_unet(folder, networks, tokenizer, schedule, progress=None):
    """What is trained together, and the schedule it is trained with, into a checkpoint's folder."""
    settings = {"_class_name": "UNet2DConditionModel", **VERSION, **fields(UNET)}
    write_network(folder / "unet", networks["unet"], settings, progress=progress)
    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}
    text |= {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    text |= fields(networks["text_encoder"].config)
    write_network(folder / "text_encoder", networks["text_encoder"], text, "model")
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", **VERSION, **fields(schedule)}
    scheduler |= {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def export(tokenizer, networks, vae, vgg, evaluator):
    """Writes the checkpoint in diffusers' layout into this folder."""
    export_unet(HERE, networks, tokenizer, SCHEDULE)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae_config = {"_class_name": "AutoencoderKL", **VERSION, **fields(VAE), **blocks, "sample_size": SIZE}
    write_network(HERE / "vae", vae, vae_config)

    folder = HERE / "tokenizer"
    write_json(folder / "vocab.json", tokenizer.vocab)
    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **special})

    index = {
        "_class_name": "StableDiffusionPipeline", **VERSION, "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    write_json(HERE / "model_index.json", index)

    write_network(HERE / "features", vgg, fields(FEATURES), "model")
    write_weights(HERE / "evaluator", evaluator, "model")


TRAINED = {"unet": "unet", "decoder": "vae", "epsilon": "unet", "varied": "unet"}  # what --improve takes: its folder


def improve(part, minutes, device, build, everything, captions):
    """Trains a part of the model in `emoji/` further, until it has had `minutes`.

    Two parts are copies of the model, which stays as it is: "epsilon", in `build/epsilon`, predicts the noise, as
    official checkpoints do; "varied", in `build` itself, is for the varied pictures that `everything` then holds.
    """
    out = {"epsilon": build / "epsilon", "varied": build}.get(part, HERE)
    if not (out / "unet").exists() and not RANK:
        others = {"build", "__pycache__", LORA_NAME}
        shutil.copytree(HERE, out, ignore=lambda folder, names: others & set(names), dirs_exist_ok=True)
        write_weights(out / "unet", hipa.load(out).unet, "diffusion_pytorch_model")  # whose own training begins
        if part == "varied":
            write_renders(out, varied=True)
    if WORLD > 1:
        dist.barrier()
    earlier = read_progress(out / TRAINED[part] / "diffusion_pytorch_model.safetensors")
    model = hipa.load(out, device)
    encoder = [*model.vae.encoder.parameters(), *model.vae.quant_conv.parameters()]
    key = hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in encoder)).hexdigest()[:12]
    latents = cached(build / f"latents-{key}.pt", lambda: encode_all(model.vae, everything, device, "encoding"))
    if part == "decoder":
        vgg = VGG(FEATURES)
        vgg.load_state_dict({k: v.float() for k, v in load_file(HERE / "features" / "model.safetensors").items()})
        data = everything[:-HELD_OUT], latents[:-HELD_OUT], everything[-HELD_OUT:]
        sharpen_decoder(device, build, model.vae, vgg, *data, float(minutes), "improve-decoder", earlier)
    else:
        ids = torch.stack([model.tokenizer(group) for group in captions]).short()
        name = part if out != HERE else "improve-unet"
        tools = device, build, model.tokenizer, model.vae
        train_unet(*tools, latents, ids, float(minutes), name, model, earlier, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device, help="(%(default)s)")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="what can be gone on with (%(default)s)")
    stages = ("VAE", "NETS", "UNET", "DECODER")
    minutes = [35, 3, 120, 10] if device == "cpu" else [6, 1, 15, 3]
    parser.add_argument("--minutes", type=float, nargs=4, default=minutes, metavar=stages,
                        help="training time of each stage; NETS twice (%(default)s)")  # fmt: skip
    parser.add_argument("--improve", nargs=2, metavar=("PART", "MINUTES"),
                        help="only train the unet or the decoder further, until it has had MINUTES in all")  # fmt: skip
    args = parser.parse_args()
    if args.improve:
        part, minutes = args.improve
        if part not in TRAINED or not regex.fullmatch(r"\d{1,6}(\.\d+)?", minutes):
            parser.error(f"--improve takes one of {', '.join(TRAINED)}, then minutes: not {part} {minutes}")
    if not Path(FONT).exists():
        sys.exit(f"error: {FONT} is missing: apt-get install fonts-noto-color-emoji")
    varied = args.improve is not None and args.improve[0] == "varied"
    device, build = args.device, args.build / "varied" if varied else args.build
    build.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=2))
    vae_minutes, nets_minutes, unet_minutes, decoder_minutes = args.minutes

    rng = random.Random(0)
    scenes = [Scene.sample(rng, varied=varied) for _ in range(args.pictures + HELD_OUT)]
    captions = [[scene.caption(rng) for _ in range(4)] for scene in scenes]
    made_of = build / "made_of.txt"  # what is in the build folder was made from these pictures
    content = hashlib.sha256(repr((GLYPHS, COLOURS, scenes)).encode()).hexdigest()
    if made_of.exists() and made_of.read_text() != content:
        sys.exit(f"error: {build} was made from other pictures or prompts: delete it, or name another --build")
    made_of.write_text(content)
    everything = cached(build / "pictures.pt", lambda: pictures_of(scenes))
    pictures, held_out = everything[:-HELD_OUT], everything[-HELD_OUT:]

    if args.improve:
        improve(*args.improve, device, build, everything, captions)
        return

    for old in build.glob("improve-*"):  # further training of the model that this one replaces
        old.unlink(missing_ok=True)
    vae = train_vae(device, build, pictures, held_out, vae_minutes)
    single = torch.tensor([len(scene.classes) == 1 for scene in scenes])
    labels = torch.tensor([scene.classes[0] for scene in scenes])
    train, test = single.clone(), single.clone()
    train[-HELD_OUT:], test[:-HELD_OUT] = False, False
    vgg, evaluator = train_nets(
        device, build, everything[train], labels[train], everything[test], labels[test], nets_minutes
    )

    latents = cached(build / "latents.pt", lambda: encode_all(vae, everything, device, "encoding"))
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    normalise_latents(vae.cpu(), mean, std)
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    vae = vae.to(device)

    tokenizer = train_tokenizer([caption for group in captions for caption in group])
    ids = torch.stack([tokenizer(group) for group in captions]).short()
    networks = train_unet(device, build, tokenizer, vae, latents, ids, unet_minutes)
    vae = sharpen_decoder(device, build, vae, vgg, pictures, latents[:-HELD_OUT], held_out, decoder_minutes)
    if not RANK:
        export(tokenizer, networks, vae, vgg, evaluator)
        write_renders()
        write_captions()
        print(f"wrote {HERE}: now `python emoji/evaluate.py`")


if __name__ == "__main__":
    main()
