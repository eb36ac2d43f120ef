"""Rebuilds the embedded model from the emoji font: pictures -> VAE -> feature nets -> text encoder + UNet -> `emoji/`.

    python emoji/make.py               # goes on where it stopped
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 emoji/make.py --device cpu  # 2 CPU cores: a quarter faster
    python emoji/make.py --improve 60   # another hour for the UNet that is there

Nobody needs this to use the project. It takes about three hours on two CPU cores, half an hour on a GPU, and needs
the font "Noto Color Emoji" (Debian: apt-get install fonts-noto-color-emoji; SIL Open Font License). Every stage trains
for a given time, not for a number of steps, so that any machine ends with a model as good as its speed allows.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
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
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from clip import BEGIN, END, CLIPTextConfig, CLIPTextModel, Tokenizer, byte_characters  # noqa: E402
from evaluate import OTHER_VIEWS, REFERENCE_VIEWS, SIZE, EvaluationNet, psnr, read_glyphs, without_article  # noqa: E402
from losses import VGG, VGGConfig  # noqa: E402
from sample import grid, to_pil  # noqa: E402
from unet import UNet2DConditionModel, UNetConfig  # noqa: E402
from vae import AutoencoderKL, VAEConfig  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size this bitmap font has
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

    @staticmethod
    def sample(rng, index=None):
        """Three quarters show one glyph, the others a small one or two side by side; two thirds are on plain white.

        With an `index`: that class, alone, at the usual size, on white.
        """
        kind = rng.choices(["one", "small", "two"], [0.74, 0.10, 0.16])[0] if index is None else "one"
        background = rng.choice(list(COLOURS)) if index is None and rng.random() < 0.33 else None
        jitter = lambda centre, by: centre + rng.uniform(-by, by)  # noqa: E731
        tilt = lambda: rng.uniform(-10, 10)  # noqa: E731
        if kind == "two":
            classes = rng.sample(range(len(GLYPHS)), 2)
            size = rng.uniform(27, 30)
            places = [(jitter(x, 1.5), jitter(32, 4), size, tilt()) for x in (17, 47)]
        else:
            classes = [rng.randrange(len(GLYPHS)) if index is None else index]
            size, by = (rng.uniform(24, 30), 8) if kind == "small" else (rng.uniform(48, 58), 3)
            places = [(jitter(32, by), jitter(32, by), size, tilt())]
        return Scene(classes, places, background, kind == "small")

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
        return picture.convert("RGB")

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


def fit(name, model, loss_of, minutes, batches, lr, build, parameters=None, ema=0.998, report=None):
    """Minimises loss_of(*batch) for `minutes` and returns an exponential moving average of the model's weights.

    AdamW; the rate warms up over 2 % of the time and falls along a cosine. The state is kept in `build/name.state`
    every two minutes, and a second call goes on from there. Under torchrun each process takes its own batches, and
    gradients are averaged.
    """
    parameters = list(parameters or model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average, step, seconds = copy.deepcopy(model).requires_grad_(False), 0, 0.0
    path = build / f"{name}.state"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"]), average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    torch.manual_seed(step * WORLD + RANK)  # from here on, each process draws its own batches and noise

    def save():
        if RANK:
            return
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "seconds": seconds}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    total = round(minutes * 60)
    bar = tqdm(total=total, initial=round(seconds), desc=name, unit="s", mininterval=5, disable=RANK > 0)
    last, saved, reported, running = time.time(), time.time(), time.time(), None
    while seconds < minutes * 60:
        done = seconds / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (done + 1e-4) / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = loss_of(*next(batches))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        now = time.time()
        seconds, last = seconds + min(now - last, 10), now  # a process that was stopped for a while did not train
        if WORLD > 1:  # the clock is averaged too, so that all stop after the same step
            flat = torch.cat(
                [p.grad.flatten() for p in parameters] + [torch.tensor([seconds], device=parameters[0].device)]
            )
            dist.all_reduce(flat)
            *gradients, clock = (flat / WORLD).split([p.numel() for p in parameters] + [1])
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad.copy_(gradient.view_as(parameter))
            seconds = clock.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.update(round(seconds) - bar.n)
        bar.set_postfix(step=step, loss=f"{running:.4f}", refresh=False)
        if now - saved > 120:
            save()
            if report and not RANK and now - reported > 900:
                reported = now
                tqdm.write(f"{name} {seconds / 60:.1f} min, step {step}, loss {running:.4f}: {report(average)}")
            last = saved = time.time()  # reporting does not count as training
    bar.close()
    save()
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

    @torch.no_grad()
    def report(average):
        target = to_unit(held_out[:128].to(device))
        return f"PSNR {psnr(average.decode(average.encode(target)), target):.2f} dB on unseen pictures"

    return fit(
        "vae", model, loss_of, minutes, batches_of(16 if device == "cpu" else 128, pictures), 2e-3, build, report=report
    )


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
        def report(average):
            right = average(to_unit(held_out.to(device))).argmax(1) == held_out_labels.to(device)
            return f"{100 * right.float().mean():.1f} % of unseen pictures right"

        data = batches_of(32 if device == "cpu" else 256, pictures, labels)
        nets.append(fit(name, net, loss_of, minutes, data, 2e-3, build, report=report).cpu())
        if not RANK:
            print(name, report(nets[-1].to(device)))
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


def train_unet(device, build, tokenizer, vae, latents, ids, minutes, start=None):
    """Diffusion training (Ho et al. 2020) of UNet and text encoder together, predicting v (Salimans & Ho 2022).

    latents (N, 4, 16, 16); ids (N, K, TEXT_LENGTH): K captions of each. One caption in ten is left empty, for guidance.
    `start`: a model to go on from, at half the learning rate.
    """
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
    alphas_cumprod = SCHEDULE.alphas_cumprod.to(device)

    def loss_of(x0, captions):
        x0, batch = x0.to(device), len(x0)
        text = captions[torch.arange(batch), torch.randint(captions.shape[1], (batch,))].long().to(device)
        text[torch.rand(batch, device=device) < 0.1] = empty
        # One timestep from each of `batch` equal parts of the schedule: less noise in the loss than independent draws.
        timestep = (
            (torch.arange(batch, device=device) + torch.rand(batch, device=device))
            * SCHEDULE.num_train_timesteps
            / batch
        ).long()
        alpha = alphas_cumprod[timestep].sqrt()[:, None, None, None]
        sigma = (1 - alphas_cumprod[timestep]).sqrt()[:, None, None, None]
        noise = torch.randn_like(x0)
        states = networks["text_encoder"](text)
        prediction = networks["unet"](alpha * x0 + sigma * noise, timestep, states)
        return F.mse_loss(prediction, alpha * noise - sigma * x0)

    @torch.no_grad()
    def report(average):
        """Draws a few prompts into build/unet.png: 25 steps at two strengths of guidance, then one step."""
        model = assemble(tokenizer, average, vae)
        prompts = ["a cat", "a red apple", "a small dog", "a cat and a dog", "a rocket", "a tree on a blue background",
                   "a pizza", "an owl", "a house", "a panda face"]  # fmt: skip
        seeds = range(len(prompts))
        rows = [hipa.sample(model, prompts, seeds, steps, guidance) for steps, guidance in ((25, 3), (25, 7.5), (1, 1))]
        grid([picture for row in rows for picture in to_pil(row)], columns=len(prompts)).save(build / "unet.png")
        return f"see {build / 'unet.png'}"

    batch = 16 if device == "cpu" else 256
    # A CPU has no time for more views of each glyph than these; a GPU sees them all.
    some = slice(10_000 if device == "cpu" else None)
    data, name, rate = batches_of(batch, latents[some], ids[some]), *(("improved", 5e-4) if start else ("unet", 1e-3))
    return fit(name, networks, loss_of, minutes, data, rate, build, report=report)


def assemble(tokenizer, networks, vae):
    return hipa.StableDiffusion(tokenizer, networks["text_encoder"], networks["unet"], vae, SCHEDULE)


# -------------------------------------------------------------------------------------------------------------- decoder
def sharpen_decoder(device, build, vae, vgg, pictures, latents, held_out, minutes):
    """Trains the decoder alone, the latents fixed, with a perceptual term added, so that edges become crisp."""
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
        return reconstruction_loss(picture, target) + 0.03 * perceptual

    @torch.no_grad()
    def report(average):
        target = to_unit(held_out[:128].to(device))
        return f"PSNR {psnr(average.decode(average.encode(target)), target):.2f} dB on unseen pictures"

    data = batches_of(16 if device == "cpu" else 128, pictures, latents)
    return fit("decoder", model, loss_of, minutes, data, 1e-3, build, parameters=trained, report=report)


# --------------------------------------------------------------------------------------------------------------- export
def write_renders():
    """`renders.png`: real pictures of every class, one row each, so that measuring does not need the font."""
    rng = random.Random(12345)
    views = REFERENCE_VIEWS + OTHER_VIEWS
    pictures = [Scene.sample(rng, index).draw() for index in range(len(GLYPHS)) for _ in range(views)]
    grid(pictures, columns=views).save(HERE / "renders.png", optimize=True)


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


def write_network(folder, network, config, stem="diffusion_pytorch_model"):
    write_json(folder / "config.json", config)
    write_weights(folder, network, stem)


def write_weights(folder, network, stem):
    """In half precision: a hundredth of a grey level, for half the bytes."""
    folder.mkdir(exist_ok=True)
    tensors = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def fields(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


VERSION = {"_diffusers_version": "0.42.1"}


def export_unet(networks, tokenizer):
    write_network(HERE / "unet", networks["unet"], {"_class_name": "UNet2DConditionModel", **VERSION, **fields(UNET)})
    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}
    text |= {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    text |= fields(networks["text_encoder"].config)
    write_network(HERE / "text_encoder", networks["text_encoder"], text, "model")


def export(tokenizer, networks, vae, vgg, evaluator):
    """Writes the checkpoint in diffusers' layout into this folder."""
    export_unet(networks, tokenizer)
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

    scheduler = {"_class_name": "DPMSolverMultistepScheduler", **VERSION, **fields(SCHEDULE)}
    scheduler |= {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}
    write_json(HERE / "scheduler" / "scheduler_config.json", scheduler)
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
    parser.add_argument("--improve", type=float, metavar="MINUTES", help="only train the UNet that is there further")
    args = parser.parse_args()
    if not Path(FONT).exists():
        sys.exit(f"error: {FONT} is missing: apt-get install fonts-noto-color-emoji")
    args.build.mkdir(exist_ok=True)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=2))
    vae_minutes, nets_minutes, unet_minutes, decoder_minutes = args.minutes
    device, build, held = args.device, args.build, 1024

    rng = random.Random(0)
    scenes = [Scene.sample(rng) for _ in range(args.pictures + held)]
    captions = [[scene.caption(rng) for _ in range(4)] for scene in scenes]
    made_of = build / "made_of.txt"  # what is in the build folder was made from these pictures
    content = hashlib.sha256(repr((GLYPHS, COLOURS, scenes)).encode()).hexdigest()
    if made_of.exists() and made_of.read_text() != content:
        sys.exit(f"error: {build} was made from other pictures or prompts: delete it, or name another --build")
    made_of.write_text(content)
    everything = cached(build / "pictures.pt", lambda: pictures_of(scenes))
    pictures, held_out = everything[:-held], everything[-held:]

    if args.improve:
        model = hipa.load("emoji", device)
        latents = encode_all(model.vae, pictures, device, "encoding")
        ids = torch.stack([model.tokenizer(group) for group in captions[:-held]]).short()
        networks = train_unet(device, build, model.tokenizer, model.vae, latents, ids, args.improve, start=model)
        if not RANK:
            export_unet(networks, model.tokenizer)
            (build / "improved.state").unlink()  # the next --improve starts from what was just written
        return

    vae = train_vae(device, build, pictures, held_out, vae_minutes)
    single = torch.tensor([len(scene.classes) == 1 for scene in scenes])
    labels = torch.tensor([scene.classes[0] for scene in scenes])
    train, test = single.clone(), single.clone()
    train[-held:], test[:-held] = False, False
    vgg, evaluator = train_nets(
        device, build, everything[train], labels[train], everything[test], labels[test], nets_minutes
    )

    latents = cached(build / "latents.pt", lambda: encode_all(vae, pictures, device, "encoding"))
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    normalise_latents(vae.cpu(), mean, std)
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    vae = vae.to(device)

    tokenizer = train_tokenizer([caption for group in captions for caption in group])
    ids = torch.stack([tokenizer(group) for group in captions[:-held]]).short()
    networks = train_unet(device, build, tokenizer, vae, latents, ids, unet_minutes)
    vae = sharpen_decoder(device, build, vae, vgg, pictures, latents, held_out, decoder_minutes)
    if not RANK:
        export(tokenizer, networks, vae, vgg, evaluator)
        write_renders()
        write_captions()
        print(f"wrote {HERE}: now `python emoji/evaluate.py`")


if __name__ == "__main__":
    main()
