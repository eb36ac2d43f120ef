"""Remakes the README's pictures from the embedded model: `python emoji/figures.py` (needs matplotlib)."""

import sys
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import Evaluation, draw  # noqa: E402
from sample import LORA_NAME, apply_lora, grid, to_pil  # noqa: E402
from train import PRESETS  # noqa: E402

DOCS = HERE.parent / "docs"
PROMPTS = [
    "a cat", "a red apple", "an owl", "a rocket", "a panda on a blue background", "a house", "a small dog",
    "a bee and a strawberry", "a rainbow", "a robot", "a sunflower", "a pizza",
]  # fmt: skip
COLOURS = {"25 steps": "tab:blue", "plain 1 step": "tab:red", "HiPA 1 step": "tab:green"}


def strip(rows, path):
    """One column a prompt, one row a way of drawing it, all from the same noise; twice as large as drawn."""
    seeds = range(len(PROMPTS))
    pictures = [p for model, *how in rows.values() for p in to_pil(hipa.sample(model, PROMPTS, seeds, *how))]
    sheet = grid(pictures, columns=len(PROMPTS))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, optimize=True)
    print(path)


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


def spectrum(rows, path):
    """The paper's diagnosis and its cure: power over frequency of pictures of every prompt."""
    import matplotlib.pyplot as plt

    evaluation = Evaluation(next(iter(rows.values()))[0], 1)
    plt.figure(figsize=(6, 3.6), dpi=120)
    real = radial_power(evaluation.copies)
    frequency = torch.linspace(0, 1, len(real))
    plt.semilogy(frequency[1:], real[1:], "k--", label="real (through the VAE)")
    for name, (model, *how) in rows.items():
        plt.semilogy(frequency[1:], radial_power(draw(model, evaluation, *how, 0, 1)[0])[1:], COLOURS[name], label=name)
    plt.xlabel("spatial frequency (1 = Nyquist)")
    plt.ylabel("power")
    plt.legend()
    plt.tight_layout()
    plt.savefig(path)
    print(path)


@torch.no_grad()
def main():
    frozen, adapted = hipa.load("emoji"), hipa.load("emoji")
    apply_lora(adapted, HERE / LORA_NAME)
    DOCS.mkdir(exist_ok=True)
    rows = {
        "25 steps": (frozen, 25, PRESETS["emoji"]["guidance"]),
        "plain 1 step": (frozen, 1, 1.0),
        "HiPA 1 step": (adapted, 1, 1.0),
    }
    strip(rows, DOCS / "strip.png")
    spectrum(rows, DOCS / "spectrum.png")


if __name__ == "__main__":
    main()
