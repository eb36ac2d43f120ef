"""Rebuilds the embedded model from the emoji font: pictures -> VAE -> feature nets -> text encoder + UNet -> `emoji/`.

    python emoji/make.py                # everything; continues where it stopped
    python emoji/make.py --stage vae    # one stage

Nobody needs this to use the project. It runs on a CPU in about three hours and on a GPU in minutes, and needs the font
"Noto Color Emoji" (Debian: apt-get install fonts-noto-color-emoji; SIL Open Font License). Every stage trains for a
given time, not for a given number of steps, so that any machine ends with a model as good as its speed allows.
"""
import argparse
import copy
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from vae import AutoencoderKL, VAEConfig  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size this bitmap font has
SIZE = 64  # pixels, width and height of a picture
COLOURS = {
    "red": (229, 57, 53), "orange": (251, 140, 0), "yellow": (253, 216, 53), "green": (67, 160, 71),
    "blue": (66, 133, 244), "purple": (142, 36, 170), "pink": (244, 143, 177), "black": (0, 0, 0),
}  # fmt: skip
MINUTES = {"vae": 35, "nets": 3, "unet": 90, "decoder": 12}  # training time by stage


# ---------------------------------------------------------------------------------------------------------- pictures
def read_glyphs(path=HERE / "prompts.txt"):
    """[(glyph, [names])] in the file's order; the position is the class."""
    lines = [line.split(" ", 1) for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [(glyph, [name.strip() for name in names.split(",")]) for glyph, names in lines]


GLYPHS = read_glyphs()


@lru_cache(maxsize=None)
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
    """What a picture shows: classes with their places (centre x, centre y, size, tilt in degrees), and the background."""

    classes: list
    places: list
    background: str = None
    small: bool = False

    @staticmethod
    def sample(rng):
        """Three quarters show one glyph, the others a small one or two side by side; two thirds are on plain white."""
        kind = rng.choices(["one", "small", "two"], [0.74, 0.10, 0.16])[0]
        background = rng.choice(list(COLOURS)) if rng.random() < 0.33 else None
        jitter = lambda centre, by: centre + rng.uniform(-by, by)  # noqa: E731
        tilt = lambda: rng.uniform(-10, 10)  # noqa: E731
        if kind == "two":
            classes = rng.sample(range(len(GLYPHS)), 2)
            size = rng.uniform(27, 30)
            places = [(jitter(x, 1.5), jitter(32, 4), size, tilt()) for x in (17, 47)]
        else:
            classes = [rng.randrange(len(GLYPHS))]
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
            text += rng.choice([" on a {} background"] * 3 + [" on {}"]).format(self.background)
        elif rng.random() < 0.1:
            text += " on a white background"
        return text


def without_article(name):
    first, _, rest = name.partition(" ")
    return rest if first in ("a", "an", "the") else name


def with_adjective(adjective, name):
    """("small", "an apple") -> "a small apple"; ("small", "grapes") -> "small grapes"."""
    article = "" if without_article(name) == name else "the " if name.startswith("the ") else "a "
    return f"{article}{adjective} {without_article(name)}"


def pictures_of(scenes, desc="drawing"):
    """-> uint8 (N, 3, SIZE, SIZE)"""
    return torch.from_numpy(np.stack([np.asarray(s.draw()) for s in tqdm(scenes, desc)])).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures):
    """uint8 -> float32 in [-1, 1]"""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------- training
def fit(name, model, loss_of, minutes, batches, lr, build, parameters=None, ema=0.999, report=None):
    """Minimises loss_of(*batch) for `minutes` and returns an exponential moving average of the model's weights.

    AdamW; the rate warms up over 2 % of the time and falls along a cosine. The state is kept in `build/name.state`
    every two minutes, and a second call goes on from there.
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

    def save():
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "seconds": seconds}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    bar = tqdm(total=round(minutes * 60), initial=round(seconds), desc=name, unit="s", mininterval=5)
    last, saved, running = time.time(), time.time(), None
    while seconds < minutes * 60:
        done = seconds / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (done + 1e-4) / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = loss_of(*next(batches))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        now = time.time()
        seconds, last = seconds + now - last, now
        bar.update(round(seconds) - bar.n)
        bar.set_postfix(step=step, loss=f"{running:.4f}", refresh=False)
        if now - saved > 120:
            save()
            if report:
                tqdm.write(f"{name} {seconds / 60:.1f} min, step {step}, loss {running:.4f}: {report(average)}")
            last = saved = time.time()  # reporting does not count as training
    bar.close()
    save()
    return average


def batches_of(size, *tensors):
    """Endless shuffled batches of `size` rows of each tensor."""
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


def psnr(a, b):
    """Mean over pictures of the peak signal-to-noise ratio in dB, for pictures (B, 3, H, W) in [-1, 1]."""
    mse = (a.clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4  # 4 = (1 - -1)^2
    return (-10 * mse.log10()).mean().item()


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

    return fit("vae", model, loss_of, minutes, batches_of(16, pictures), 2e-3, build, report=report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="all")
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder for what can be continued")
    args = parser.parse_args()
    args.build.mkdir(exist_ok=True)
    rng = random.Random(0)
    scenes = [Scene.sample(rng) for _ in range(args.pictures + 1024)]
    cache = args.build / "pictures.npy"
    if not cache.exists():
        np.save(cache, pictures_of(scenes).numpy())
    pictures = torch.from_numpy(np.load(cache, mmap_mode="c"))
    pictures, held_out = pictures[:-1024], pictures[-1024:]
    train_vae(args.device, args.build, pictures, held_out, MINUTES["vae"])


if __name__ == "__main__":
    main()
