"""Measures pictures of the embedded model's prompts: are they recognised, how far are they from real ones, how sharp?

    python emoji/evaluate.py                       # one step, beside real pictures and the VAE's copies of them
    python emoji/evaluate.py --steps 25            # the 25 steps of the frozen model
    python emoji/evaluate.py --lora none           # one step without the adaptors
    python emoji/evaluate.py --folder outputs      # any folder of samples (prompts are read from the pictures)
    python emoji/evaluate.py --calibrate           # what the measures say of real pictures damaged in known ways
    python emoji/evaluate.py --halves              # how far one-step pictures in half precision are from float32's

recognition  share of pictures that the evaluation net gives the class of their prompt
Fréchet      distance between the evaluation net's features of the pictures and of real ones (as FID, with this net)
edges        high-frequency energy at edges, relative to the VAE's copies of real pictures; 1 is as sharp as they are
all          the same over all pixels; speckle counts here, so it can be high where edges are soft
defective    share of pictures that a critic takes for blurred, doubled or smeared ones, see `Critic`
to itself    (--calibrate) DISTS on the evaluation net: how different from another picture, as a whole

The evaluation net is trained by `make.py` on real pictures only. No adaptors are trained with it.
"""

import argparse
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from losses import DISTS  # noqa: E402
from sample import apply_lora, integer, lora_weight, number, own_lora, run  # noqa: E402
from vae import to_pil, to_tensor  # noqa: E402

SIZE = 64
REFERENCE_VIEWS, OTHER_VIEWS = 8, 4  # per class in renders.png: to compare with, and as the "real pictures" row


# --------------------------------------------------------------------------------------------------------------- nets
class EvaluationNet(nn.Module):
    """A small pre-activation residual network, unlike the loss's VGG in kind: strided, normalised, averaged."""

    def __init__(self, classes, channels=(24, 48, 96)):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        self.blocks, before = nn.ModuleList(), channels[0]
        for width in channels:
            block = nn.ModuleDict(
                {
                    "norm1": nn.GroupNorm(8, before), "conv1": nn.Conv2d(before, width, 3, stride=2, padding=1),
                    "norm2": nn.GroupNorm(8, width), "conv2": nn.Conv2d(width, width, 3, padding=1),
                    "shortcut": nn.Conv2d(before, width, 2, stride=2),
                }
            )  # fmt: skip
            self.blocks.append(block)
            before = width
        self.norm = nn.GroupNorm(8, before)
        self.head = nn.Linear(before, classes)

    def stages(self, x):
        """Pictures (B, 3, 64, 64) in [-1, 1] -> feature maps, [(B, C_i, 64 / 2^i, 64 / 2^i)] with i from 1 to 4."""
        maps = [self.stem(x)]
        for block in self.blocks:
            h = block["conv1"](F.silu(block["norm1"](maps[-1])))
            maps.append(block["shortcut"](maps[-1]) + block["conv2"](F.silu(block["norm2"](h))))
        return maps

    def features(self, x):
        """Pictures (B, 3, 64, 64) in [-1, 1] -> (B, 96)"""
        return F.silu(self.norm(self.stages(x)[-1])).mean(dim=(2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def load_evaluation_net(classes, folder=HERE / "evaluator"):
    net = EvaluationNet(classes)
    net.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return net.eval().requires_grad_(False)


class Stages(nn.Module):
    """The evaluation net's feature maps in the place of VGG's: `losses.DISTS` can then compare pictures with them."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.config = SimpleNamespace(channels=[net.stem.out_channels, *(b["conv2"].out_channels for b in net.blocks)])

    def forward(self, x, pool=None):
        """Pictures (B, 3, 64, 64) in [0, 1] -> feature maps; the net has no pooling that could be replaced."""
        return [F.silu(x) for x in self.net.stages(2 * x - 1)]


# ------------------------------------------------------------------------------------------------------------ prompts
def read_glyphs(path=HERE / "prompts.txt"):
    """[(glyph, [names])] in the file's order; the position is the class."""
    lines = [line.split(" ", 1) for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [(glyph, [name.strip() for name in names.split(",")]) for glyph, names in lines]


def class_of(prompt, glyphs):
    """The class that the prompt names, or None if it names none or several: "a red apple on blue" -> the apple's."""
    text = re.split(r" on (?:an? )?\w+(?: background)?$", prompt.lower())[0]
    classes = {without_article(name): index for index, (_, names) in enumerate(glyphs) for name in names}
    found = [name for name in classes if re.search(rf"\b{re.escape(name)}\b", text)]
    found = {classes[name] for name in found if not any(name != other and name in other for other in found)}
    return found.pop() if len(found) == 1 else None


def without_article(name):
    first, _, rest = name.partition(" ")
    return rest if first in ("a", "an", "the") else name


def real_pictures(glyphs, folder=HERE):
    """`folder/renders.png` -> reference and other real pictures, each (N, 3, 64, 64) in [-1, 1], and their classes.

    The sheet has one row per class. It is stored so that measuring does not need the font.
    """
    sheet = np.asarray(Image.open(folder / "renders.png").convert("RGB"))
    tiles = torch.from_numpy(sheet.copy()).reshape(len(glyphs), SIZE, -1, SIZE, 3).permute(0, 2, 4, 1, 3) / 127.5 - 1
    labels = torch.arange(len(glyphs))
    reference, other = tiles[:, :REFERENCE_VIEWS], tiles[:, REFERENCE_VIEWS:]
    return [(part.flatten(0, 1), labels.repeat_interleave(part.shape[1])) for part in (reference, other)]


# ------------------------------------------------------------------------------------------------------------ figures
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

    Edges are the fifth of each picture's pixels where the part BELOW the cut is steepest, so that a blurred picture is
    asked about its blurred edges and speckle between edges does not count.
    """
    grey = pictures.clamp(-1, 1).mean(dim=1)  # (B, H, W)
    height, width = grey.shape[1:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]) * 2  # 1 = Nyquist
    low = torch.fft.ifft2(torch.fft.fft2(grey) * (radius <= cut)).real
    energy = (grey - low).square()
    steepness = torch.hypot(*torch.gradient(low, dim=(1, 2)))
    edges = steepness >= steepness.flatten(1).quantile(0.8, dim=1)[:, None, None]
    return energy[edges].mean().item(), energy.mean().item()


def radial_power(pictures):
    """(B, 3, H, H) in [-1, 1] -> mean power of the grey picture at each distance from the spectrum's centre, H / 2
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


def psnr(a, b):
    """Mean over pictures (B, 3, H, W) in [-1, 1] of the peak signal-to-noise ratio, in dB."""
    mse = (a.clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4  # 4 = (1 - -1)^2
    return (-10 * mse.log10()).mean().item()


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


class Critic:
    """Tells pictures that are drawn well from blurred, doubled and smeared ones, all of which the net recognises.

    A logistic regression on means and deviations of the evaluation net's feature maps, trained on real pictures and on
    as many that are damaged at random. No generated picture plays a part.
    """

    def __init__(self, net, real):
        """`real`: pictures (N, 3, 64, 64) in [-1, 1]"""
        self.net, draw = net, random.Random(0)
        damaged = []
        for k, picture in enumerate(real.split(1)):
            ways = {
                blurred: [draw.uniform(0.6, 1.6)],
                doubled: [draw.choice([-4, -3, -2, 2, 3, 4]), draw.randint(-4, 4), draw.uniform(0.3, 0.5)],
                smeared: [draw.randint(8, 40), draw.randint(8, 40)],
            }
            way = list(ways)[k % len(ways)]
            damaged.append(way(picture, *ways[way]))
        x = torch.cat([self.statistics(real), self.statistics(torch.cat(damaged))])
        self.mean, self.deviation = x.mean(0), x.std(0) + 1e-6
        x, y = (x - self.mean) / self.deviation, torch.arange(len(x)).ge(len(real)).float()
        with torch.enable_grad():
            self.linear = nn.Linear(x.shape[1], 1)
            nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)
            optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=200)

            def loss():
                optimizer.zero_grad()
                error = F.binary_cross_entropy_with_logits(self.linear(x)[:, 0], y)
                total = error + 2e-3 * self.linear.weight.square().sum()
                total.backward()
                return total

            optimizer.step(loss)

    def statistics(self, pictures):
        maps = ([F.silu(m) for m in self.net.stages(part)] for part in pictures.split(128))
        return torch.cat([torch.cat([f(m, dim=(2, 3)) for m in ms for f in (torch.mean, torch.std)], 1) for ms in maps])

    def __call__(self, pictures):
        """Pictures (N, 3, 64, 64) in [-1, 1] -> (N,) bool: defective"""
        return self.linear((self.statistics(pictures) - self.mean) / self.deviation)[:, 0] > 0


class Evaluation:
    """The real pictures and the evaluation net; `measure` gives one row of figures."""

    def __init__(self, model, per_class=OTHER_VIEWS, folder=HERE):
        """`per_class`: how many real pictures of each class make the "real" row; as many as will be drawn, because the
        Fréchet distance of few pictures is larger. `folder`: where `renders.png` is, for a model of other pictures."""
        self.glyphs = read_glyphs()
        self.net = load_evaluation_net(len(self.glyphs))
        (reference, _), (pictures, labels) = real_pictures(self.glyphs, folder)
        self.reference_features, self.critic = self.net.features(reference), Critic(self.net, reference)
        self.distance = DISTS(Stages(self.net))
        self.model, self.of_many_steps = model, {}
        some = torch.arange(len(labels)) % OTHER_VIEWS < per_class
        self.real = pictures[some], labels[some]
        # Encoded and decoded as everything the model draws is: the sharpest it could be.
        self.copies = torch.cat([model.vae.decode(model.vae.encode(p)) for p in self.real[0].split(32)])
        self.copies_energy = high_frequency_energy(self.copies)

    def measure(self, pictures, labels):
        """Pictures (N, 3, 64, 64) in [-1, 1] and their classes (N,) -> [recognition, Fréchet, edges, all, defective]"""
        pictures = torch.stack([to_tensor(picture) for picture in to_pil(pictures)])  # as a PNG would hold them
        features = torch.cat([self.net.features(part) for part in pictures.split(256)])
        recognised = (self.net.head(features).argmax(1) == labels).float().mean().item()
        energy = [e / c for e, c in zip(high_frequency_energy(pictures), self.copies_energy, strict=True)]
        defective = self.critic(pictures).float().mean().item()
        return [100 * recognised, frechet(features, self.reference_features), *energy, 100 * defective]

    def to_many_steps(self, pictures, seed):
        """`difference` from what the model of this evaluation, without adaptors, draws in 25 steps from the same noise.

        Pictures: as `draw` orders them, of that seed.
        """
        others, _ = self.many_steps(seed, len(pictures) // len(self.glyphs))
        return self.difference(pictures, others)

    def many_steps(self, seed, per_class):
        """`draw` in 25 steps, once for each seed."""
        if seed not in self.of_many_steps:
            self.of_many_steps[seed] = draw(self.model, self, 25, self.model.guidance, seed, per_class)
        return self.of_many_steps[seed]

    def difference(self, pictures, others):
        """Mean DISTS between pictures (N, 3, 64, 64) in [-1, 1] and `others`, one by one, on the evaluation net."""
        pairs = zip(pictures.split(128), others.split(128))
        distances = torch.cat([self.distance(*(x.clamp(-1, 1) / 2 + 0.5 for x in pair)) for pair in pairs])
        return distances.mean().clamp(min=0).item()  # of equal pictures it can be -1e-8


def draw(model, evaluation, steps, guidance, seed, per_class, batch=24, sample=hipa.sample):
    """The model's pictures of every class, `per_class` each, and their classes. Seeds differ between all pictures."""
    jobs = [(index, names[0]) for index, (_, names) in enumerate(evaluation.glyphs) for _ in range(per_class)]
    seeds = [1_000_000 * (seed + 1) + k for k in range(len(jobs))]
    pictures = []
    with tqdm(total=len(jobs), desc=f"{steps} steps, seed {seed}", unit="picture", leave=False) as bar:
        for i in range(0, len(jobs), batch):
            prompts = [name for _, name in jobs[i : i + batch]]
            pictures.append(sample(model, prompts, seeds[i : i + batch], steps, guidance))
            bar.update(len(prompts))
    return torch.cat(pictures), torch.tensor([index for index, _ in jobs])


HEADER = """| pictures | recognition | Fréchet | edges | all | defective |
|---|---|---|---|---|---|"""
FORMATS = ("{:.1f} %", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f} %")


def row(name, measurements, formats=FORMATS):
    """One line of a table; over several measurements, mean ± half the spread."""
    low, high = np.min(measurements, axis=0), np.max(measurements, axis=0)
    mean = np.mean(measurements, axis=0)
    cells = [
        f.format(m) + (f" ± {(h - lo) / 2:.{f[3]}f}" if len(measurements) > 1 else "")
        for f, m, lo, h in zip(formats, mean, low, high, strict=True)
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=integer(1, 1000), default=1, help="UNet evaluations per picture (%(default)s)")
    parser.add_argument("--lora", type=lora_weight, metavar="PATH[:WEIGHT]", help="(default: as sample.py)")
    parser.add_argument("--guidance", type=number, help="(default: as sample.py)")
    parser.add_argument("--seeds", type=integer(1), default=3, help="repetitions, for the spread (%(default)s)")
    parser.add_argument(
        "--per-class", type=integer(1, OTHER_VIEWS), default=2, help="pictures of each prompt, at most 4 (%(default)s)"
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--folder", type=Path, help="measure the PNGs in this folder instead of the model's")
    parser.add_argument("--calibrate", action="store_true", help="measure damaged real pictures instead")
    parser.add_argument("--halves", action="store_true", help="compare half precision with float32 instead")
    args = parser.parse_args()
    folder = hipa.find_checkpoint(args.model)
    model = hipa.load(args.model)
    lora, weight = args.lora or own_lora(folder, args.steps)
    if lora:
        apply_lora(model, lora, weight)
    real = folder if (folder / "renders.png").exists() else HERE
    evaluation = Evaluation(model, OTHER_VIEWS if args.calibrate else args.per_class, real)
    if args.calibrate:
        return calibrate(evaluation)
    if args.halves:
        own = args.lora or own_lora(folder, 1)
        return halves(args.model, {"plain": None} | ({"with adaptors": own} if own[0] else {}), evaluation)
    print(HEADER)
    print(row("real", [evaluation.measure(*evaluation.real)]))
    quality = psnr(evaluation.copies, evaluation.real[0])
    print(row(f"through the VAE ({quality:.1f} dB)", [evaluation.measure(evaluation.copies, evaluation.real[1])]))
    if args.folder:
        print(row(str(args.folder), [evaluation.measure(*read_folder(args.folder, evaluation.glyphs))]))
        return
    guidance = model.guidance_at(args.steps) if args.guidance is None else args.guidance
    rows = [
        evaluation.measure(*draw(model, evaluation, args.steps, guidance, seed, args.per_class))
        for seed in range(args.seeds)
    ]
    adaptors = f", {lora.name}" if lora else ""
    print(row(f"{args.steps} step{'s' * (args.steps > 1)}, guidance {guidance:g}{adaptors}", rows))


def calibrate(evaluation):
    """A row of measures for each way to damage the real pictures, or to replace them by others."""
    real, labels = evaluation.real
    other_views, noise = real.unflatten(0, (-1, OTHER_VIEWS)).roll(1, 1).flatten(0, 1), torch.randn(real.shape)
    damaged = {
        "real": real, "through the VAE": evaluation.copies,
        "blur of 0.5 pixels": blurred(real, 0.5), "blur of 1": blurred(real, 1), "blur of 1.5": blurred(real, 1.5),
        "ghost at 2 pixels": doubled(real, 2, 2), "ghost at 4": doubled(real, 4, 4),
        "two views in one": (real + other_views) / 2, "smeared in one place": smeared(real, 20, 20),
        "speckle of 0.05": real + 0.1 * noise, "speckle of 0.1": real + 0.2 * noise,
        "another view": other_views, "another thing": real.roll(7 * OTHER_VIEWS, 0),
    }  # fmt: skip
    print(HEADER.replace("defective |", "defective | to itself |") + "---|")
    for name, pictures in damaged.items():
        figures = [*evaluation.measure(pictures, labels), evaluation.difference(pictures, real)]
        print(row(name, [figures], (*FORMATS, "{:.3f}")), flush=True)


def halves(model, adaptors, evaluation):
    """A row for the model of that name plain and with its adaptors: one picture of every class, the networks in half
    precision, beside the same in float32. `adaptors`: {name of the row: (path, weight) or None}"""
    print("| one step | | PSNR | mean error, grey levels | DISTS |\n|---|---|---|---|---|")
    for name, lora in adaptors.items():
        drawn = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            parts = hipa.load(model, dtype=dtype)
            if lora:
                apply_lora(parts, *lora)
            drawn[dtype] = draw(parts, evaluation, 1, 1.0, 0, 1)[0].float().clamp(-1, 1)
        exact = drawn.pop(torch.float32)
        for dtype, pictures in drawn.items():
            error = (pictures - exact).abs().mean().item() * 127.5
            figures = f"{psnr(pictures, exact):.1f} dB | {error:.2f} | {evaluation.difference(pictures, exact):.4f}"
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {figures} |", flush=True)


def read_folder(folder, glyphs):
    """The PNGs in a folder whose prompt names a known class -> pictures (N, 3, 64, 64) in [-1, 1], classes (N,)"""
    if not folder.is_dir():
        raise hipa.UserError(f"{folder} is not a folder")
    pictures, labels = [], []
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path)
        prompt = picture.text.get("parameters", "").partition("\n")[0]
        label = class_of(prompt, glyphs)
        if label is not None and "-grid-" not in path.name:
            resized = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            pictures.append(to_tensor(resized))
            labels.append(label)
    if len(pictures) < 2:
        raise hipa.UserError(f"{folder}: no two PNGs by sample.py whose prompts name a glyph of emoji/prompts.txt")
    return torch.stack(pictures), torch.tensor(labels)


if __name__ == "__main__":
    run(main)
