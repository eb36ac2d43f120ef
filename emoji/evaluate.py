"""Measures pictures of the embedded model's prompts: are they recognised, how far are they from real ones, how sharp?

    python emoji/evaluate.py                       # one step, beside real pictures and the VAE's copies of them
    python emoji/evaluate.py --steps 25            # the 25 steps of the frozen model
    python emoji/evaluate.py --lora none           # one step without the adaptors
    python emoji/evaluate.py --calibrate           # real pictures, damaged in known ways
    python emoji/evaluate.py --halves              # how far one-step pictures in half precision are from float32's

recognition  share of pictures that the evaluation net gives the class of their prompt
Fréchet      distance between the evaluation net's features of the pictures and of real ones (as FID, with this net)
edges        high-frequency energy at edges; 1 means as sharp as real pictures after the VAE
all          the same over all pixels; speckle counts here, so it can be high where edges are soft
defective    share of pictures that a critic takes for blurred, doubled or smeared ones, see `train_critic`
to itself    (--calibrate) DISTS on the evaluation net: how different from another picture, as a whole
"""

import random
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


def psnr(a, b):
    """Mean over pictures (B, 3, H, W) in [-1, 1] of the peak signal-to-noise ratio, in dB."""
    mse = (a.clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4  # 4 = (1 - -1)^2
    return (-10 * mse.log10()).mean().item()


# ------------------------------------------------------------------------------------------------- damage, and a critic
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


def train_critic(net, real):
    """-> a function: pictures (N, 3, 64, 64) in [-1, 1] -> (N,) bool, defective or not. It is a logistic regression on
    means and deviations of the net's feature maps, trained on `real` pictures and on as many damaged at random."""

    def statistics(pictures):
        maps = ([F.silu(m) for m in net.stages(part)] for part in pictures.split(128))
        return torch.cat([torch.cat([f(m, dim=(2, 3)) for m in ms for f in (torch.mean, torch.std)], 1) for ms in maps])

    rng, damaged = random.Random(0), []
    for k, picture in enumerate(real.split(1)):
        ways = [
            (blurred, rng.uniform(0.6, 1.6)),
            (doubled, rng.choice([-4, -3, -2, 2, 3, 4]), rng.randint(-4, 4), rng.uniform(0.3, 0.5)),
            (smeared, rng.randint(8, 40), rng.randint(8, 40)),
        ]
        damage, *options = ways[k % 3]
        damaged.append(damage(picture, *options))
    x = torch.cat([statistics(real), statistics(torch.cat(damaged))])
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / deviation, torch.arange(len(x)).ge(len(real)).float()
    linear = nn.Linear(x.shape[1], 1)
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200)

    def loss():
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(linear(x)[:, 0], y) + 2e-3 * linear.weight.square().sum()
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(loss)
    return lambda pictures: linear((statistics(pictures) - mean) / deviation)[:, 0] > 0


# --------------------------------------------------------------------------------------------------------- evaluation
class Evaluation:
    """The evaluation net, and real pictures, `per_class` of each class: as many as will be sampled, because the Fréchet
    distance of few pictures is larger. `folder`: where `renders.png` is. `measure` gives one row of figures."""

    def __init__(self, model, per_class=OTHER_VIEWS, folder=HERE):
        self.glyphs = read_glyphs()
        self.net = EvaluationNet(len(self.glyphs)).eval().requires_grad_(False)
        hipa.read_weights(self.net, HERE / "evaluator" / "model.safetensors", torch.float32)
        self.distance = DISTS(stages_for_dists(self.net))
        (reference, _), (pictures, labels) = real_pictures(self.glyphs, folder)
        self.reference_features, self.critic = self.net.features(reference), train_critic(self.net, reference)
        some = torch.arange(len(labels)) % OTHER_VIEWS < per_class
        self.real = pictures[some], labels[some]
        # Encoded and decoded as everything the model samples is: the sharpest it could be.
        self.copies = torch.cat([model.decode(model.encode(part)) for part in self.real[0].split(32)])
        self.copies_energy = high_frequency_energy(self.copies)

    def measure(self, pictures, labels):
        """Pictures (N, 3, 64, 64) in [-1, 1] and their classes (N,) -> [recognition, Fréchet, edges, all, defective]"""
        pictures = torch.stack([to_tensor(picture) for picture in to_pil(pictures)])  # as a PNG would hold them
        features = torch.cat([self.net.features(part) for part in pictures.split(256)])
        recognised = (self.net.head(features).argmax(1) == labels).float().mean().item()
        energy = [e / c for e, c in zip(high_frequency_energy(pictures), self.copies_energy)]
        defective = self.critic(pictures).float().mean().item()
        return [100 * recognised, frechet(features, self.reference_features), *energy, 100 * defective]

    def difference(self, pictures, others):
        """Mean DISTS between pictures (N, 3, 64, 64) in [-1, 1] and `others`, one by one, on the evaluation net."""
        pairs = zip(pictures.split(128), others.split(128))
        distances = torch.cat([self.distance(*(x.clamp(-1, 1) / 2 + 0.5 for x in pair)) for pair in pairs])
        return distances.mean().clamp(min=0).item()  # of equal pictures it can be -1e-8


def draw(model, evaluation, steps, guidance, seed, per_class, batch=24, sample=hipa.sample):
    """The model's pictures of every class, `per_class` each, and their classes. Seeds differ between all pictures."""
    prompts = [names[0] for _, names in evaluation.glyphs for _ in range(per_class)]
    seeds = [1_000_000 * (seed + 1) + k for k in range(len(prompts))]
    starts = tqdm(range(0, len(prompts), batch), f"{steps} steps, seed {seed}", leave=False)
    pictures = [sample(model, prompts[i : i + batch], seeds[i : i + batch], steps, guidance) for i in starts]
    return torch.cat(pictures), torch.arange(len(evaluation.glyphs)).repeat_interleave(per_class)


HEADER = "| pictures | recognition | Fréchet | edges | all | defective |\n|---|---|---|---|---|---|"
FORMATS = ("{:.1f} %", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f} %")


def row(name, measurements, formats=FORMATS):
    """One line of a table; over several measurements, mean ± half the spread."""
    cells = [text.format(mean) for text, mean in zip(formats, np.mean(measurements, axis=0), strict=True)]
    if len(measurements) > 1:
        spread = np.ptp(measurements, axis=0) / 2
        cells = [f"{cell} ± {half:.{text[3]}f}" for cell, text, half in zip(cells, formats, spread)]
    return f"| {name} | {' | '.join(cells)} |"


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


def halves(folder, lora, evaluation):
    """Rows: one picture of every class, plain and with adaptors, the networks in half precision beside float32."""
    print("| one step | | PSNR | mean error, grey levels | DISTS |\n|---|---|---|---|---|")
    for name, adaptors in {"plain": None, **({"with adaptors": lora} if lora else {})}.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = hipa.load(folder, dtype=dtype)
            if adaptors:
                apply_lora(model, *adaptors)
            pictures = draw(model, evaluation, 1, 1.0, 0, 1)[0].clamp(-1, 1)
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
    add("--per-class", type=number(int, 1, OTHER_VIEWS), default=2, help="pictures of each prompt (%(default)s)")
    add("--model", default="emoji", help="or a copy of it, made by make.py (%(default)s)")
    add("--calibrate", action="store_true", help="measure damaged real pictures instead")
    add("--halves", action="store_true", help="compare half precision with float32 instead")
    args = parser.parse_args(argv)
    folder = hipa.find_checkpoint(args.model)
    model, lora = hipa.load(folder), find_lora(args.lora, folder, args.steps)
    evaluation = Evaluation(model, OTHER_VIEWS if args.calibrate else args.per_class, folder)
    if args.calibrate:
        return calibrate(evaluation)
    if args.halves:
        return halves(folder, lora, evaluation)
    if lora:
        apply_lora(model, *lora)
    guidance = model.guidance_at(args.steps)
    name = f"{args.steps} step{'s' * (args.steps > 1)}, guidance {guidance:g}{f', {lora[0].name}' if lora else ''}"
    samples = (draw(model, evaluation, args.steps, guidance, seed, args.per_class) for seed in range(args.seeds))
    (real, labels), copies = evaluation.real, evaluation.copies
    print(HEADER)
    print(row("real", [evaluation.measure(real, labels)]))
    print(row(f"through the VAE ({psnr(copies, real):.1f} dB)", [evaluation.measure(copies, labels)]), flush=True)
    print(row(name, [evaluation.measure(*pair) for pair in samples]))


if __name__ == "__main__":
    run(main)
