"""Measures pictures of the embedded model's prompts: are they recognised, how far are they from real ones, how sharp?

    python emoji/evaluate.py                       # one step, beside real pictures and the VAE's copies of them
    python emoji/evaluate.py --steps 25            # the 25 steps of the frozen model
    python emoji/evaluate.py --lora none           # one step without the adaptors
    python emoji/evaluate.py --calibrate           # real pictures, damaged in known ways
    python emoji/evaluate.py --halves              # how far one-step pictures in half precision are from float32's

Fréchet      distance between the evaluation net's features of the pictures and of real ones (as FID, with this net)
edges        high-frequency energy at edges; 1 means as sharp as real pictures after the VAE. The loss's energy term is
             close to this, so it was trained on
both         share of pictures of "a bee and a rocket", pairs that adaptors never saw, in which the net finds both
small        share of pictures of "a small dog" in which it finds the dog, at the right size
spread       how far place and size vary between two pictures of one prompt: the mean standard deviation of the thing's
             x, y and length, in pixels
recognition  share of pictures of a single thing that the net gives the class of their prompt
to itself    (--calibrate) DISTS on the net: how different from another picture, as a whole
"""

import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from losses import DISTS  # noqa: E402
from sample import Parser, apply_lora, find_lora, number, run, to_pil, to_tensor  # noqa: E402

SIZE = 64
REFERENCE_VIEWS, OTHER_VIEWS = 8, 4  # per class in renders.png: to compare with, and as the "real pictures" row
SMALL = 36  # pixels; things alone are 38 to 58 long, small ones 24 to 30


# ------------------------------------------------------------------------------------------------------------ the net
class EvaluationNet(nn.Module):
    """`make.py` trains it on real pictures; adaptors never see it. A small pre-activation residual network, unlike the
    loss's VGG: strided, normalised, averaged."""

    def __init__(self, classes, channels=(24, 48, 96)):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.GroupNorm(8, c_in), "conv1": nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                "norm2": nn.GroupNorm(8, c_out), "conv2": nn.Conv2d(c_out, c_out, 3, padding=1),
                "shortcut": nn.Conv2d(c_in, c_out, 2, stride=2),
            })
            for c_in, c_out in zip((channels[0], *channels), channels)
        )  # fmt: skip
        self.norm = nn.GroupNorm(8, channels[-1])
        self.head = nn.Linear(channels[-1], classes)

    def stages(self, x):
        """Pictures (B, 3, 64, 64) in [-1, 1] -> feature maps, [(B, C_i, 64 / 2^i, 64 / 2^i)] with i from 1 to 4."""
        maps = [self.stem(x)]
        for block in self.blocks:
            h = block["conv1"](F.silu(block["norm1"](maps[-1])))
            maps.append(block["shortcut"](maps[-1]) + block["conv2"](F.silu(block["norm2"](h))))
        return maps

    def features(self, x):  # -> (B, 96)
        return F.silu(self.norm(self.stages(x)[-1])).mean(dim=(2, 3))

    def forward(self, x):  # -> (B, classes)
        return self.head(self.features(x))


def stages_for_dists(net):
    """The evaluation net's feature maps in the place of VGG's: `losses.DISTS` can then compare pictures with them."""

    def stages(x, pool):  # pictures in [0, 1]; the net has no pooling that could be replaced
        return [F.silu(x) for x in net.stages(2 * x - 1)]

    stages.config = SimpleNamespace(channels=[net.stem.out_channels, *(b["conv2"].out_channels for b in net.blocks)])
    return stages


# ------------------------------------------------------------------------------------------- prompts and real pictures
def read_glyphs():
    """`prompts.txt` -> [(glyph, [names])]; the position is the class."""
    lines = (HERE / "prompts.txt").read_text("utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return [(glyph, [name.strip() for name in names.split(",")]) for glyph, names in pairs]


def real_pictures(glyphs, folder=HERE):
    """`folder/renders.png`, a sheet with a row per class -> reference and other real pictures, each (N, 3, 64, 64) in
    [-1, 1], and their classes. The sheet is stored so that measuring does not need the font."""
    sheet = to_tensor(Image.open(folder / "renders.png").convert("RGB"))
    tiles = sheet.reshape(3, len(glyphs), SIZE, -1, SIZE).permute(1, 3, 0, 2, 4)  # (classes, views, 3, 64, 64)
    labels = torch.arange(len(glyphs))
    reference, other = tiles[:, :REFERENCE_VIEWS], tiles[:, REFERENCE_VIEWS:]
    return [(part.flatten(0, 1), labels.repeat_interleave(part.shape[1])) for part in (reference, other)]


# ----------------------------------------------------------------------------------------------------------- measures
def frechet(a, b):
    """Fréchet distance between the Gaussians with the means and covariances of features a and b (N, D), Heusel et al.:
    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), where the last trace is that of (A^(1/2) B A^(1/2))^(1/2)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def high_frequency_energy(pictures, cut=0.25):
    """Mean square of what lies above `cut` of the Nyquist frequency in (B, 3, H, W): at edges, and over all pixels.
    Edges are the fifth of each picture's pixels where the part BELOW the cut is steepest: so a blurred picture is asked
    about its blurred edges, and speckle between edges does not count."""
    grey = pictures.clamp(-1, 1).mean(dim=1)  # (B, H, W)
    height, width = grey.shape[1:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]) * 2  # 1 = Nyquist
    low = torch.fft.ifft2(torch.fft.fft2(grey) * (radius <= cut)).real
    energy = (grey - low).square()
    steepness = torch.hypot(*torch.gradient(low, dim=(1, 2)))
    edges = steepness >= steepness.flatten(1).quantile(0.8, dim=1)[:, None, None]
    return energy[edges].mean().item(), energy.mean().item()


def radial_power(pictures):
    """(B, 3, H, H) in [-1, 1] -> mean power of the grey picture at each distance from the spectrum's centre, H / 2 + 1
    bins from 0 to the Nyquist frequency. A Hann window first, because a picture does not go on at its other side."""
    grey = pictures.clamp(-1, 1).mean(dim=1)
    side = grey.shape[-1]
    window = torch.hann_window(side, periodic=False)
    grey = (grey - grey.mean(dim=(1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(grey).abs().square().mean(dim=0)
    radius = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)[None]) * side
    bins = radius.round().long().flatten()
    total = torch.zeros(int(bins.max()) + 1).index_add(0, bins, power.flatten())
    return (total / torch.bincount(bins))[: side // 2 + 1]


def as_stored(pictures):
    """Pictures (B, 3, H, W) rounded to the 256 levels that a PNG has."""
    return torch.stack([to_tensor(picture) for picture in to_pil(pictures)])


def psnr(a, b):
    """Mean over pictures (B, 3, H, W) in [-1, 1] of the peak signal-to-noise ratio, in dB."""
    mse = (a.clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4  # 4 = (1 - -1)^2
    return (-10 * mse.log10()).mean().item()


# ---------------------------------------------------------------------------------------------- damage, and its reverse
def blurred(pictures, sigma):
    """Pictures (B, 3, H, W) under a Gaussian of `sigma` pixels."""
    kernel = torch.exp(-(torch.arange(-6, 7.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(pictures.shape[1], 1, 1, -1)
    padded = F.pad(pictures, (6, 6, 6, 6), mode="replicate")
    across = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(across, kernel.transpose(2, 3), groups=len(kernel))


def doubled(pictures, down, right, share=0.5):
    """Pictures (B, 3, H, W) with a ghost of themselves, moved by so many pixels; its share of the result."""
    return torch.lerp(pictures, pictures.roll((down, right), (2, 3)), share)


def smeared(pictures, top, left, side=20):
    """Pictures (B, 3, H, W) with one square blurred."""
    window = (..., slice(top, top + side), slice(left, left + side))
    pictures = pictures.clone()
    pictures[window] = blurred(pictures, 2.0)[window]
    return pictures


def sharpened(pictures, sigma, amount):
    """An unsharp mask: pictures (B, 3, H, W) with what a blur of `sigma` pixels takes away added, times `amount`."""
    return pictures + amount * (pictures - blurred(pictures, sigma))


# ----------------------------------------------------------------------------------------------------- places of things
def background(pictures):
    """The colour (B, 3, 1, 1) of most of the border of pictures (B, 3, H, W)."""
    border = torch.cat([pictures[:, :, [0, -1]].flatten(2), pictures[:, :, :, [0, -1]].flatten(2)], dim=2)
    return border.median(dim=2).values[..., None, None]


def boxes(pictures):
    """Where the thing is in pictures (B, 3, H, W) of one background: its centre x, y and longer side (B, 3), in pixels.
    It ends where all but a hundredth of what differs from the background lies within."""
    differs = ((pictures - background(pictures)).abs().amax(dim=1) > 0.3).float()  # (B, H, W)
    ends = []
    for dim in (1, 2):
        share = differs.sum(dim).cumsum(1) / differs.sum(dim=(1, 2)).clamp(min=1)[:, None]
        ends += [(share < 0.01).sum(1), (share < 0.99).sum(1) + 1]
    left, right, top, bottom = torch.stack(ends).float()
    return torch.stack(
        [(left + right) / 2, (top + bottom) / 2, torch.maximum(right - left, bottom - top).clamp(min=4)], 1
    )


def enlarged(pictures, side=53):
    """The thing in each of the pictures (B, 3, 64, 64), moved to the middle and enlarged to `side` pixels of 64, as the
    evaluation net knows it; same shape."""
    theta = torch.zeros(len(pictures), 2, 3)
    x, y, length = boxes(pictures).T
    theta[:, 0, 0], theta[:, 0, 2] = length / side, 2 * x / SIZE - 1
    theta[:, 1, 1], theta[:, 1, 2] = length / side, 2 * y / SIZE - 1
    places = F.affine_grid(theta, pictures.shape, align_corners=False)
    return F.grid_sample(pictures, places, "bicubic", "border", align_corners=False).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------------- evaluation
class Evaluation:
    """The evaluation net, and real pictures, `per_class` of each class: as many as will be sampled, because the Fréchet
    distance of few pictures is larger. `folder`: where `renders.png` is."""

    def __init__(self, model, per_class=OTHER_VIEWS, folder=HERE):
        self.glyphs, self.per_class = read_glyphs(), per_class
        self.net = EvaluationNet(len(self.glyphs)).eval().requires_grad_(False)
        hipa.read_weights(self.net, HERE / "evaluator" / "model.safetensors", torch.float32)
        self.distance = DISTS(stages_for_dists(self.net))
        (reference, _), (pictures, labels) = real_pictures(self.glyphs, folder)
        self.reference_features = self.net.features(reference)
        some = torch.arange(len(labels)) % OTHER_VIEWS < per_class
        self.real = pictures[some], labels[some]
        # Encoded and decoded as everything the model samples is: the sharpest it could be.
        self.copies = torch.cat([model.decode(model.encode(part)).cpu() for part in self.real[0].split(32)])
        self.copies_energy = high_frequency_energy(self.copies)[0]

        # What is asked for: every thing alone, pairs, and small things, `per_class` pictures of each (pairs: as many).
        names = [names[0] for _, names in self.glyphs]
        self.labels, rng = torch.arange(len(names)).repeat_interleave(per_class), random.Random(0)
        seen, pairs = (HERE / "captions.txt").read_text("utf-8"), []
        while len(pairs) < len(self.labels):
            a, b = rng.sample(range(len(names)), 2)
            pairs += [(a, b)] if f"{names[a]} and {names[b]}" not in seen else []
        self.alone, self.pairs = [names[label] for label in self.labels], torch.tensor(pairs)
        small = [re.sub("^(an? |the |)", lambda m: f"{m[1].replace('an', 'a')}small ", name) for name in self.alone]
        self.prompts = [*self.alone, *(f"{names[a]} and {names[b]}" for a, b in pairs), *small]

    def classes(self, pictures):
        return torch.cat([self.net(part).argmax(1) for part in pictures.split(256)])

    def measure(self, pictures, labels):
        """Pictures (N, 3, 64, 64) in [-1, 1] of single things, their classes (N,) -> [recognition, Fréchet, edges]"""
        pictures = as_stored(pictures)
        features = torch.cat([self.net.features(part) for part in pictures.split(256)])
        recognised = (self.net.head(features).argmax(1) == labels).float().mean().item()
        edges = high_frequency_energy(pictures)[0] / self.copies_energy
        return [100 * recognised, frechet(features, self.reference_features), edges]

    def measure_all(self, pictures):
        """Pictures of `self.prompts`, or of `self.alone` only -> [Fréchet, edges, both, small, spread]"""
        pictures, count = as_stored(pictures), len(self.alone)
        alone, both, small = pictures[:count], math.nan, math.nan
        spread = boxes(alone).unflatten(0, (-1, self.per_class)).var(dim=1).mean(dim=0).sqrt().mean().item()
        if len(pictures) > count:
            _, pairs, little = pictures.split(count)
            left = torch.arange(SIZE) < SIZE // 2
            halves = [torch.where(side, pairs, background(pairs)) for side in (left, ~left)]
            found = torch.stack([self.classes(enlarged(half)) for half in halves], dim=1)
            both = 100 * (found.sort().values == self.pairs.sort().values).all(dim=1).float().mean().item()
            right = (self.classes(enlarged(little)) == self.labels) & (boxes(little)[:, 2] < SMALL)
            small = 100 * right.float().mean().item()
        return [*self.measure(alone, self.labels)[1:], both, small, spread]

    def difference(self, pictures, others):
        """Mean DISTS between pictures (N, 3, 64, 64) in [-1, 1] and `others`, one by one, on the evaluation net."""
        pairs = zip(pictures.split(128), others.split(128))
        distances = torch.cat([self.distance(*(x.clamp(-1, 1) / 2 + 0.5 for x in pair)) for pair in pairs])
        return distances.mean().clamp(min=0).item()  # of equal pictures it can be -1e-8


def draw(model, prompts, seed, steps, sample=hipa.sample):
    """The model's pictures of the prompts (N, 3, 64, 64). Seeds differ between all pictures."""
    starts = tqdm(range(0, len(prompts), 24), f"{steps} steps, seed {seed}", leave=False)
    seeds = range(1_000_000 * (seed + 1), 1_000_000 * (seed + 1) + len(prompts))
    parts = (slice(i, i + 24) for i in starts)
    return torch.cat([sample(model, prompts[part], seeds[part], steps).cpu() for part in parts])


COLUMNS = {"Fréchet": "{:.2f}", "edges": "{:.2f}", "both": "{:.1f} %", "small": "{:.1f} %", "spread": "{:.2f}"}


def header(title, *columns):
    return f"| {title} | {' | '.join(columns)} |\n|---|" + "---|" * len(columns)


def row(name, measurements, formats, marks=None):
    """One line of a table; over several measurements, mean ± standard deviation, and a mark. NaN: an empty cell."""
    cells = [text.format(mean) for text, mean in zip(formats, np.mean(measurements, axis=0), strict=True)]
    if len(measurements) > 1:
        deviations = np.std(measurements, axis=0, ddof=1)
        cells = [f"{cell} ± {sd:.{text[3]}f}" for cell, text, sd in zip(cells, formats, deviations)]
    cells = ["" if "nan" in cell else cell + mark for cell, mark in zip(cells, marks or [""] * len(cells))]
    return f"| {name} | {' | '.join(cells)} |"


def calibrate(evaluation):
    """A row of measures for each way to damage the real pictures, or to replace them by others."""
    real, labels = evaluation.real
    other_views = real.unflatten(0, (-1, OTHER_VIEWS)).roll(1, 1).flatten(0, 1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    damaged = {
        "real": real, "through the VAE": evaluation.copies,
        "blur of 0.5 pixels": blurred(real, 0.5), "blur of 1": blurred(real, 1), "blur of 1.5": blurred(real, 1.5),
        "ghost at 2 pixels": doubled(real, 2, 2), "ghost at 4": doubled(real, 4, 4),
        "two views in one": (real + other_views) / 2, "smeared in one place": smeared(real, 20, 20),
        "speckle of 0.05": real + 0.1 * noise, "speckle of 0.1": real + 0.2 * noise,
        "another view": other_views, "another thing": real.roll(7 * OTHER_VIEWS, 0),
    }  # fmt: skip
    print(header("pictures", "recognition", "Fréchet", "edges", "to itself"))
    for name, pictures in damaged.items():
        figures = [*evaluation.measure(pictures, labels), evaluation.difference(pictures, real)]
        print(row(name, [figures], ("{:.1f} %", "{:.2f}", "{:.2f}", "{:.3f}")), flush=True)


def halves(folder, lora, evaluation):
    """Rows: one picture of every class, plain and with adaptors, the networks in half precision beside float32."""
    print("| one step | | PSNR | mean error, grey levels | DISTS |\n|---|---|---|---|---|")
    for name, adaptors in {"plain": None, **({"with adaptors": lora} if lora else {})}.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = hipa.load(folder, dtype=dtype)
            if adaptors:
                apply_lora(model, *adaptors)
            pictures = draw(model, evaluation.alone, 0, 1).clamp(-1, 1)
            if dtype == torch.float32:
                exact = pictures
                continue
            error = 127.5 * (pictures - exact).abs().mean().item()
            figures = [psnr(pictures, exact), error, evaluation.difference(pictures, exact)]
            print(row(f"{name} | {str(dtype)[6:]}", [figures], ("{:.1f} dB", "{:.2f}", "{:.4f}")), flush=True)


@torch.no_grad()
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--steps", type=number(int, 1, 1000), default=1, help="UNet evaluations per picture (%(default)s)")
    add("--lora", metavar="PATH[:WEIGHT]", help="(as sample.py)")
    add("--seeds", type=number(int, 1, 1000), default=3, help="repetitions, for the spread (%(default)s)")
    add("--per-class", type=number(int, 2, OTHER_VIEWS), default=2, help="pictures of each prompt (%(default)s)")
    add("--model", default="emoji", help="or a copy of it, made by make.py (%(default)s)")
    add("--calibrate", action="store_true", help="measure damaged real pictures instead")
    add("--halves", action="store_true", help="compare half precision with float32 instead")
    args = parser.parse_args(argv)
    folder = hipa.find_checkpoint(args.model)
    model, lora = hipa.load(folder), find_lora(args.lora, folder, args.steps)
    evaluation = Evaluation(model, OTHER_VIEWS if args.calibrate else 1 if args.halves else args.per_class, folder)
    if args.calibrate:
        return calibrate(evaluation)
    if args.halves:
        return halves(folder, lora, evaluation)
    if lora:
        apply_lora(model, *lora)
    guidance = model.guidance_at(args.steps)
    name = f"{args.steps} step{'s' * (args.steps > 1)}, guidance {guidance:g}{f', {lora[0].name}' if lora else ''}"
    pictures = (draw(model, evaluation.prompts, seed, args.steps) for seed in range(args.seeds))
    print(header("pictures", *COLUMNS))
    real, copies = evaluation.real[0], evaluation.copies
    rows = {"real": [real], f"through the VAE ({psnr(copies, real):.1f} dB)": [copies], name: pictures}
    for name, parts in rows.items():
        print(row(name, [evaluation.measure_all(part) for part in parts], COLUMNS.values()), flush=True)


if __name__ == "__main__":
    run(main)
