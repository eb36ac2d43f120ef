"""Rebuilds the embedded model from the emoji font: pictures -> VAE -> feature nets -> text encoder + UNet -> `emoji/`.

    python emoji/make.py                        # three hours of two CPU cores, or half an hour of a GPU
    python emoji/make.py --improve unet 480     # trains the UNet and the text encoder further
    python emoji/make.py --improve decoder 60   # the same for the VAE's decoder; the latents stay what they are
    python emoji/make.py --improve epsilon 15   # a copy in emoji/build/epsilon that predicts noise, not v
    python emoji/make.py --improve varied 60    # a copy in emoji/build/varied: half mirrored, anywhere in the frame

Nobody needs this to use the project. It needs the font "Noto Color Emoji" (Debian: fonts-noto-color-emoji; SIL Open
Font License). Each stage trains for a given time, so that any machine ends with a model as good as its speed allows.
Every five minutes the weights are written, with the minutes that they have had: after an interruption, and for
--improve, the training continues from there.
"""

import copy
import hashlib
import json
import math
import multiprocessing
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from clip import BEGIN, END, CLIPTextConfig, CLIPTextModel, Tokenizer, byte_characters  # noqa: E402
from evaluate import SIZE, EvaluationNet, high_frequency_energy, psnr, read_glyphs  # noqa: E402
from hipa import UserError, write_file  # noqa: E402
from lora import LORA_NAME  # noqa: E402
from losses import VGG, VGGConfig, high_pass  # noqa: E402
from sample import Parser, grid, number, run  # noqa: E402
from train import descend, load_distance  # noqa: E402
from unet import UNet2DConditionModel, UNetConfig  # noqa: E402
from vae import AutoencoderKL, VAEConfig  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size this bitmap font has
HELD_OUT = 1024
NO_CLASS = -100  # which cross_entropy() leaves out
NOT_COPIED = shutil.ignore_patterns("build", "*.py", "__pycache__", "captions.txt", LORA_NAME)
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
        """Half show one glyph, the others a small one or two side by side; two thirds are on plain white.
        With an `index`: that class, alone, on white. `varied`: half are mirrored; what is alone can be anywhere."""
        kind = rng.choices(["one", "small", "two"], [0.53, 0.17, 0.30])[0] if index is None else "one"
        background = rng.choice(list(COLOURS)) if index is None and rng.random() < 0.33 else None

        def place(x, y, size, dx, dy):
            return x + rng.uniform(-dx, dx), y + rng.uniform(-dy, dy), size, rng.uniform(-10, 10)

        if kind == "two":
            classes = rng.sample(range(len(GLYPHS)), 2)
            size = rng.uniform(27, 30)
            places = [place(x, 32, size, 1.5, 4) for x in (17, 47)]
        else:
            classes = [rng.randrange(len(GLYPHS)) if index is None else index]
            size = rng.uniform(*((24, 30) if kind == "small" else (38, 46) if varied else (48, 58)))
            shift = (SIZE - size) / 2 if varied else 8 if kind == "small" else 3
            places = [place(32, 32, size, shift, shift)]
        return Scene(classes, places, background, kind == "small", varied and rng.random() < 0.5)

    def draw(self):
        """-> RGB picture of SIZE x SIZE. Pillow resamples RGBA premultiplied, so edges get no dark fringe."""
        picture = Image.new("RGBA", (SIZE, SIZE), COLOURS.get(self.background, (255, 255, 255)))
        for index, (x, y, size, tilt) in zip(self.classes, self.places):
            upright = glyph_picture(GLYPHS[index][0])
            glyph = upright.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
            side, layer = round(size * glyph.width / upright.width), Image.new("RGBA", picture.size)
            glyph = glyph.resize((side, side), Image.Resampling.LANCZOS)
            layer.paste(glyph, (round(x - side / 2), round(y - side / 2)))
            picture = Image.alpha_composite(picture, layer)
        return (ImageOps.mirror(picture) if self.mirrored else picture).convert("RGB")

    def caption(self, rng):
        """One of the ways a person would ask for this picture."""
        names = [rng.choice(GLYPHS[index][1]) for index in self.classes]
        if self.small:
            article = names[0].removesuffix(without_article(names[0])).replace("an", "a")  # "a ", "the " or none
            names = [f"{article}{rng.choice(['small', 'little', 'tiny'])} {without_article(names[0])}"]
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


def without_article(name):
    return regex.sub("^(an?|the) ", "", name)


class Data:
    """The pictures, four captions of each, and the class of what is alone. The last HELD_OUT are never trained on."""

    def __init__(self, device, count, varied=False):
        rng = random.Random(0)
        self.device, self.scenes = device, [Scene.sample(rng, varied=varied) for _ in range(count + HELD_OUT)]
        self.captions = [[scene.caption(rng) for _ in range(4)] for scene in self.scenes]
        self.labels = torch.tensor([scene.classes[0] if len(scene.classes) == 1 else NO_CLASS for scene in self.scenes])
        self.pictures = pictures_of(self.scenes)

    @torch.no_grad()
    def latents(self, vae, count=None):
        """Scaled latents (N, 4, 16, 16) of all pictures, or of the first."""
        parts = tqdm(self.pictures[:count].split(512), "encoding", leave=False)
        return torch.cat([vae.encode(to_unit(part.to(self.device))).cpu() for part in parts])


def pictures_of(scenes):
    """-> uint8 (N, 3, SIZE, SIZE)"""
    with multiprocessing.Pool() as pool:
        drawn = tqdm(pool.imap(Scene.draw, scenes, chunksize=64), "pictures", len(scenes))
        pictures = np.stack([np.asarray(picture) for picture in drawn])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]"""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------- training
def minutes_used(device):
    """On a CPU the processor time of each thread: neither a pause nor what else the machine does counts as training."""
    return (time.monotonic() if device == "cuda" else time.process_time() / torch.get_num_threads()) / 60


def batches_of(size, tensors):
    """Endless shuffled batches of each tensor's rows, without those held out."""
    while True:
        order = torch.randperm(len(tensors[0]) - HELD_OUT, device=tensors[0].device)
        for rows in order.unfold(0, size, size):  # whole batches
            yield [tensor[rows] for tensor in tensors]


def fit(networks, tensors, batch, loss_of, device, minutes, lr, decay, progress, keep):
    """Minimises loss_of(rows of each tensor) until the networks have had `minutes`; before, they had `progress`.

    AdamW; the rate rises over 2 % of the time and falls along a cosine. Every five minutes and at the end
    keep(average, progress) is called, with a moving average of the networks. On a GPU batches are 32 times as large,
    the data stay there, and the networks are compiled and compute in bfloat16.
    """
    cuda = device == "cuda"
    networks = networks.to(device, memory_format=torch.channels_last)
    parameters = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    ema = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    progress = {"minutes": 0.0, "samples": 0, "step": 0} | progress
    first, kept = progress["step"], progress["minutes"]
    torch.manual_seed(first)
    batches = batches_of(32 * batch if cuda else batch, [tensor.to(device) for tensor in tensors])
    for network in networks.children() if cuda else ():
        network.compile(dynamic=False)
    while progress["minutes"] < minutes:
        start, share, step = minutes_used(device), progress["minutes"] / minutes, progress["step"] + 1
        rows = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = loss_of(*rows)
        loss.backward()
        warm = min(1, (share + 1e-4) / 0.02, (step - first) / 100)  # at each start AdamW has no moments yet
        norm = descend(optimizer, lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))))
        if not math.isfinite(norm):
            raise UserError(f"step {step}: the loss is {loss.item()}, its gradient {norm}")
        with torch.no_grad():
            weight = 1 - min(decay, step / (step + 9))
            torch._foreach_lerp_(list(ema.parameters()), list(networks.parameters()), weight)
        now = progress["minutes"] + minutes_used(device) - start
        progress = {"minutes": now, "samples": progress["samples"] + len(rows[0]), "step": step}
        if now >= minutes or now - kept > min(5, minutes / 2):
            kept = now
            keep(ema, progress)


def improve(data, part, minutes, folder, first=False):
    """Trains a part of the checkpoint in `folder`, one of TRAININGS, until it has had `minutes`."""
    model = hipa.load(folder, data.device)
    networks, tensors, batch, lr, loss_of, measure = TRAININGS[part](data, model, folder)
    with safe_open(weights_file(folder / next(iter(networks))), "pt") as file:
        header = file.metadata()
    key = part if data.device == "cpu" else f"{part} on {data.device}"  # minutes there are others

    def keep(ema, progress):
        if part == "vae":
            ema = copy.deepcopy(ema)
            normalise_latents(ema["vae"], data.latents(ema["vae"], 1024))
        figures = progress | measure(ema)
        print(f"{part}:", ", ".join(f"{name} {value:.5g}" for name, value in figures.items()), flush=True)
        for name, network in ema.items():
            if (folder / name).exists():
                write_weights(folder / name, network, {**header, key: json.dumps(progress)})

    progress = json.loads(header.get(key, "{}"))
    lr, decay = (lr, 0.998) if first else (2 * lr, 0.998) if data.device == "cuda" else (lr / 2, 0.9995)
    fit(networks, tensors, batch, loss_of, data.device, minutes, lr, decay, progress, keep)


# --------------------------------------------------------------------------------------------------------------- VAE
def reconstruction_loss(picture, target):
    """The last term compares neighbours' differences: blurred edges cost here."""
    error = picture - target
    edges = sum((picture.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


# Each training: {part of the checkpoint: network}, tensors with a row for each picture, batch, learning rate, loss of
# some rows, and measure(networks) -> {name: number}.
def vae_training(data, model, folder):
    vae = model.vae.requires_grad_(True)

    def loss_of(pictures):
        target = to_unit(pictures)
        mean, logvar = (part.float() for part in vae.moments(target))
        # The mean decoded through noise of the posterior's size; a weak pull to a unit Gaussian keeps latents small.
        latent = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(vae.decode(latent * vae.config.scaling_factor).float(), target) + 1e-4 * kl

    return nn.ModuleDict({"vae": vae}), [data.pictures], 16, 2e-3, loss_of, lambda ema: quality(ema["vae"], data)


def decoder_training(data, model, folder):
    """The decoder alone, with a perceptual term added, so that edges become crisp."""
    vae, vgg = model.vae, load_distance("dists", folder).vgg
    vae.decoder.requires_grad_(True), vae.post_quant_conv.requires_grad_(True)
    vgg = vgg.to(data.device, memory_format=torch.channels_last).requires_grad_(False)

    def loss_of(pictures, latent):
        target = to_unit(pictures)
        # A little noise: the sampler's latents are not exactly those of pictures.
        picture = vae.decode(latent + 0.03 * torch.randn_like(latent)).float()
        features, wanted = vgg(picture / 2 + 0.5), vgg(target / 2 + 0.5)
        perceptual = sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(features[:3], wanted[:3]))
        # Any distance is least for a soft edge where the latent leaves its place open: so ask for the energy as well.
        energy, wanted = (high_pass(x, 0.25).square().mean(dim=(1, 2, 3)).log() for x in (picture, target))
        return reconstruction_loss(picture, target) + 0.03 * perceptual + 0.1 * (energy - wanted).square().mean()

    tensors = [data.pictures, data.latents(vae)]
    return nn.ModuleDict({"vae": vae}), tensors, 16, 1e-3, loss_of, lambda ema: quality(ema["vae"], data)


@torch.no_grad()
def quality(vae, data):
    """PSNR of the VAE's copies of unseen pictures, and their share of the pictures' energy at edges."""
    real = to_unit(data.pictures[-256:])
    copies = torch.cat([vae.decode(vae.encode(part.to(data.device))).cpu() for part in real.split(64)])
    edges = high_frequency_energy(copies)[0] / high_frequency_energy(real)[0]
    return {"psnr": psnr(copies, real), "edges": edges}


@torch.no_grad()
def normalise_latents(vae, latents):
    """Gives the scaled latent's channels, now as in `latents` (N, 4, h, w), mean 0 and variance 1, by rewriting the two
    1x1 convolutions around it. The pictures stay what they were; so does the scaling factor."""
    k, quant, post = vae.config.scaling_factor, vae.quant_conv, vae.post_quant_conv
    latents = latents.to(quant.weight.device) / k  # not scaled
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant.weight[:4] /= (std * k)[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / (std * k)
    quant.bias[4:] -= 2 * torch.log(std * k)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= (std * k)[None, :, None, None]


# ------------------------------------------------------------------------------------------- feature and evaluation net
def nets_training(data, model, folder):
    """Two classifiers of single glyphs: of the VGG for the loss, the features are kept; the other is for measuring."""
    vgg, net = load_distance("dists", folder).vgg, EvaluationNet(len(GLYPHS))
    head = nn.Linear(vgg.config.channels[-1], len(GLYPHS))
    hipa.read_weights(net, weights_file(folder / "evaluator"), torch.float32)

    def loss_of(pictures, labels):
        x = to_unit(pictures)
        logits = head(vgg(x / 2 + 0.5)[-1].mean(dim=(2, 3))), net(x)
        return sum(F.cross_entropy(y, labels, label_smoothing=0.05) for y in logits)

    networks = nn.ModuleDict({"features": vgg, "evaluator": net, "head": head}).requires_grad_(True)
    return networks, [data.pictures, data.labels], 32, 2e-3, loss_of, lambda ema: {}


# --------------------------------------------------------------------------------------- tokenizer, text encoder, UNet
def train_tokenizer(captions, length):
    """Byte-level BPE (Sennrich et al. 2016): merges the most frequent pair until every word is one token."""
    counts = Counter(word for text in captions for word in regex.findall(r"\p{L}+|[^\s\p{L}]+", text.lower()))
    characters, merges = byte_characters(), []
    parts = {word: [characters[byte] for byte in word.encode()] for word in counts}
    parts = {word: [*part[:-1], part[-1] + "</w>"] for word, part in parts.items()}
    while True:
        pairs = Counter()
        for word, part in parts.items():
            for pair in zip(part, part[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for part in parts.values():
            i = 0
            while i < len(part) - 1:
                if (part[i], part[i + 1]) == best:
                    part[i : i + 2] = [part[i] + part[i + 1]]
                i += 1
    alphabet = list(characters.values())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), BEGIN, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, length)


def draw_timesteps(batch, total, device):
    """-> (batch,), logit-normal (Esser et al. 2024): more in the middle, where the shapes are decided. One from each of
    `batch` equally likely parts: less noise in the loss than independent draws."""
    quantile = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    share = torch.sigmoid(0.3 + 1.3 * torch.special.ndtri(quantile))
    return (share * total).long().clamp(max=total - 1)


def diffusion_loss(network, schedule, x0, context, timestep, noise):
    """Latents x0 and noise (B, 4, h, w), text states (B, S, D), timesteps (B,) -> the mean square error of what
    network(x, timestep, context) says of the noisy x: the noise, or v (Salimans & Ho 2022)."""
    alpha, sigma = schedule.alpha_sigma(timestep)
    target = noise if schedule.prediction_type == "epsilon" else alpha * noise - sigma * x0
    return F.mse_loss(network(schedule.add_noise(x0, timestep, noise), timestep, context), target)


def unet_training(data, model, folder):
    """Diffusion training (Ho et al. 2020) of UNet and text encoder together, for v
    (Salimans & Ho 2022) or the noise. One caption in ten is left empty, for guidance."""
    networks = nn.ModuleDict({"unet": model.unet, "text_encoder": model.text_encoder}).requires_grad_(True)
    schedule, empty = model.schedule, model.tokenizer([""])[0].to(data.device)
    latents = data.latents(model.vae)
    ids = torch.stack([model.tokenizer(group) for group in data.captions])  # (N, 4, S)

    def error(networks, x0, text, timestep, noise):
        return diffusion_loss(networks["unet"], schedule, x0, networks["text_encoder"](text), timestep, noise)

    def loss_of(x0, captions):
        text = captions[torch.arange(len(x0)), torch.randint(captions.shape[1], (len(x0),), device=captions.device)]
        text = torch.where(torch.rand(len(x0), 1, device=text.device) < 0.1, empty, text)
        timestep = draw_timesteps(len(x0), schedule.num_train_timesteps, x0.device)
        return error(networks, x0, text, timestep, torch.randn_like(x0))

    @torch.no_grad()
    def measure(ema):
        """The loss on unseen pictures, always with the same noise."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents[-HELD_OUT:].shape, generator=generator)
        timestep = torch.randperm(HELD_OUT, generator=generator) * schedule.num_train_timesteps // HELD_OUT
        held_out = latents[-HELD_OUT:], ids[-HELD_OUT:, 0], timestep, noise
        parts = zip(*(tensor.to(data.device).split(64) for tensor in held_out))
        return {"held_out_loss": sum(error(ema, *part).item() for part in parts) * 64 / HELD_OUT}

    return networks, [latents, ids], 32, 1e-3, loss_of, measure


TRAININGS = {
    "vae": vae_training, "nets": nets_training, "unet": unet_training, "decoder": decoder_training,
    "epsilon": unet_training, "varied": unet_training,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- files
def write_renders(folder, varied=False):
    """`renders.png`: real pictures of every class, one row each, so that measuring does not need the font."""
    rng = random.Random(12345)
    pictures = [Scene.sample(rng, index, varied).draw() for index in range(len(GLYPHS)) for _ in range(12)]
    grid(pictures, columns=12).save(folder / "renders.png", optimize=True)


def write_captions(folder):
    """`captions.txt`, what adaptors are trained on: five captions of each glyph alone, some small, some in pairs."""
    rng, classes, colours = random.Random(7), range(len(GLYPHS)), list(COLOURS)
    scenes = [Scene([c], [None], rng.choice(colours) if k % 3 == 0 else None) for k in range(5) for c in classes]
    scenes += [scene for scene in (Scene.sample(rng) for _ in range(800)) if scene.small or len(scene.classes) > 1]
    (folder / "captions.txt").write_text("".join(f"{scene.caption(rng)}\n" for scene in scenes), "utf-8")


def write_json(path, settings):
    write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def weights_file(folder):
    return folder / f"{'diffusion_pytorch_model' if folder.name in ('unet', 'vae') else 'model'}.safetensors"


def write_weights(folder, network, header=None):
    """In half precision: a hundredth of a grey level, for half the bytes."""
    tensors = {key: value.half().cpu().contiguous() for key, value in network.state_dict().items()}
    write_file(weights_file(folder), safetensors_bytes(tensors, {**(header or {}), "format": "pt"}))


def begin_copy(folder):
    """The model in `emoji/` again, as `epsilon` or `varied`."""
    shutil.copytree(HERE, folder, ignore=NOT_COPIED, dirs_exist_ok=True)
    write_weights(folder / "unet", hipa.load(folder).unet)  # without the minutes that it has had
    if folder.name == "varied":
        write_renders(folder, varied=True)
    else:
        path = folder / "scheduler" / "scheduler_config.json"
        write_json(path, json.loads(path.read_text()) | {"prediction_type": "epsilon"})


def begin(folder, data):
    """A checkpoint with a tokenizer, and networks that are not trained yet. Its settings are those in `emoji/`."""
    shutil.copytree(HERE, folder, ignore=NOT_COPIED, dirs_exist_ok=True)
    path = folder / "text_encoder" / "config.json"
    settings = json.loads(path.read_text())
    captions = (caption for group in data.captions for caption in group)
    tokenizer = train_tokenizer(captions, settings["max_position_embeddings"])
    write_json(folder / "tokenizer" / "vocab.json", tokenizer.vocab)
    merges = ["#version: 0.2", *(" ".join(pair) for pair in sorted(tokenizer.ranks, key=tokenizer.ranks.get))]
    write_file(folder / "tokenizer" / "merges.txt", ("\n".join(merges) + "\n").encode())
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    write_json(path, settings | {**ids, "vocab_size": len(tokenizer.vocab)})

    kinds = {
        "text_encoder": (CLIPTextModel, CLIPTextConfig), "unet": (UNet2DConditionModel, UNetConfig),
        "vae": (AutoencoderKL, VAEConfig), "features": (VGG, VGGConfig),
    }  # fmt: skip
    torch.manual_seed(0)
    networks = {name: net(hipa.read_config(c, folder / name / "config.json")) for name, (net, c) in kinds.items()}
    for embedding in networks["text_encoder"].text_model["embeddings"].values():
        nn.init.normal_(embedding.weight, std=0.02)
    for name, network in {**networks, "evaluator": EvaluationNet(len(GLYPHS))}.items():
        write_weights(folder / name, network)
    write_renders(folder)


# --------------------------------------------------------------------------------------------------------------- main
PARTS = ("unet", "decoder", "epsilon", "varied")  # that --improve takes; the last two are the UNets of two copies


def main(argv=None):
    parser = Parser(__doc__)
    add, minutes = parser.add_argument, number(float, 0, 10**6)
    add("--pictures", type=number(int, 1, 10**6), default=40_000, help="training pictures (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=device, help="(%(default)s)")
    add("--minutes", type=minutes, nargs=4, metavar=("VAE", "NETS", "UNET", "DECODER"),
        help="training time of each stage (35 6 120 10, on cuda 6 2 15 3)")  # fmt: skip
    add("--improve", nargs=2, metavar=("PART", "MINUTES"), help=f"only train one of {PARTS}, until it has had MINUTES")
    args = parser.parse_args(argv)
    part, total = args.improve or ("", "0")
    if args.improve and part not in PARTS or not regex.fullmatch(r"\d{1,6}(\.\d+)?", total):
        parser.error(f"--improve takes one of {', '.join(PARTS)}, then minutes: not {part} {total}")
    if not Path(FONT).exists():
        raise UserError(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    data = Data(args.device, args.pictures, varied=part == "varied")
    content = repr((GLYPHS, COLOURS, data.scenes)).encode()  # after a change of prompts all begins anew
    name = part or f"model-{hashlib.sha256(content).hexdigest()[:8]}"
    folder = HERE if part in ("unet", "decoder") else HERE / "build" / name
    if not (folder / "captions.txt").exists():
        begin_copy(folder) if part else begin(folder, data)
        write_captions(folder)  # last: now the folder is complete
    if part:
        return improve(data, part, float(total), folder)
    minutes = args.minutes or ([6, 2, 15, 3] if args.device == "cuda" else [35, 6, 120, 10])
    for part, total in zip(TRAININGS, minutes):
        improve(data, part, total, folder, first=True)
    shutil.copytree(folder, HERE, dirs_exist_ok=True)
    print(f"wrote {HERE}: now `python emoji/evaluate.py`")


if __name__ == "__main__":
    run(main)
