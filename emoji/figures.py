"""Remakes the pictures in `docs/` from the embedded model: `python emoji/figures.py` (needs matplotlib).

`varied.png` is drawn too where `python emoji/results.py varied` has trained what it shows.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import Evaluation, class_of, draw, radial_power, read_glyphs, real_pictures  # noqa: E402
from sample import LORA_NAME, apply_lora  # noqa: E402
from vae import grid, to_pil  # noqa: E402

DOCS = HERE.parent / "docs"
PROMPTS = [
    "a cat", "a red apple", "an owl", "a rocket", "a panda on a blue background", "a house", "a small dog",
    "a bee", "a rainbow", "a robot", "a sunflower", "a pizza",
]  # fmt: skip
COLOURS = {"25 steps": "tab:blue", "plain 1 step": "tab:red", "HiPA 1 step": "tab:green"}


EDITS = {"a cat": "a dog", "a red apple": "an orange", "an owl": "a penguin", "a rocket": "a sailboat"}
HOLES = ["a panda", "a house", "a robot", "a pizza"]
SMALL = ["a sunflower", "a strawberry", "a rainbow", "a bee"]


def save_strip(pictures, columns, path):
    """PIL pictures row by row, twice as large as drawn"""
    sheet = grid(pictures, columns=columns)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, optimize=True)
    print(path)


def real(prompts, folder=HERE):
    """A real picture of what each prompt names, from the folder's sheet: (N, 3, 64, 64) in [-1, 1]"""
    glyphs = read_glyphs()
    pictures = real_pictures(glyphs, folder)[1][0].unflatten(0, (len(glyphs), -1))[:, 0]
    return pictures[[class_of(prompt, glyphs) for prompt in prompts]]


def jobs_strip(rows, path):
    """Real pictures edited, half inpainted, and enlarged four times. Rows: what is given; then each way of drawing."""
    edits, holes = real(EDITS), real(HOLES)
    mask = torch.zeros_like(holes[:, :1])
    mask[..., mask.shape[3] // 2 :] = 1
    small = F.interpolate(real(SMALL), scale_factor=1 / 4, mode="bicubic", antialias=True)
    sheet = [*edits, *(holes * (1 - mask)), *F.interpolate(small, scale_factor=4)]
    for model, steps, guidance in rows.values():
        how = {"steps": steps, "guidance": guidance}
        sheet += hipa.edit(model, edits, list(EDITS.values()), range(4), **how)
        sheet += hipa.inpaint(model, holes, mask, HOLES, range(4), **how)
        sheet += hipa.upscale(model, small, 4, SMALL, range(4), **how)
    save_strip(to_pil(torch.stack(sheet)), 12, path)


def strip(rows, path, folder=HERE):
    """One column a prompt, one row a way of drawing it, all from the same noise; the last row is of real pictures."""
    seeds = range(len(PROMPTS))
    drawn = [hipa.sample(model, PROMPTS, seeds, *how) for model, *how in rows.values()]
    save_strip(to_pil(torch.cat([*drawn, real(PROMPTS, folder)])), len(PROMPTS), path)


def varied_strip(path, folder=HERE / "build" / "varied", trainings=HERE.parent / "runs" / "table-varied"):
    """The copy of the model whose pictures vary more: adaptors trained in three ways, then its 25 steps."""
    rows = {}
    for name in ("regression-of-latents", "as-the-paper-trains", "hipa"):
        rows[name] = hipa.load(folder), 1, 1.0
        apply_lora(rows[name][0], next(trainings.glob(f"{name}-0-*")) / LORA_NAME)
    rows["25 steps"] = hipa.load(folder), 25, hipa.GUIDANCE["emoji"]
    strip(rows, path, folder)


def contact_sheet(model, path):
    """Every class under its name: a real picture, and beside it the model's in 25 steps."""
    names = [names[0] for _, names in read_glyphs()]
    drawn = to_pil(torch.cat([hipa.sample(model, [name], [seed]) for seed, name in enumerate(names)]))
    cells = []
    for name, *pair in zip(names, to_pil(real(names)), drawn):
        cell = Image.new("RGB", (2 * pair[0].width + 8, pair[0].height + 16), "white")
        cell.paste(grid(pair, columns=2), (4, 14))
        ImageDraw.Draw(cell).text((6, 1), name, "black")
        cells.append(cell)
    grid(cells, columns=8).save(path, optimize=True)
    print(path)


def spectrum(rows, path):
    """The paper's diagnosis and its cure: power over frequency of pictures of every prompt."""
    import matplotlib.pyplot as plt

    evaluation = Evaluation(next(iter(rows.values()))[0], 1)
    plt.figure(figsize=(6, 3.6), dpi=120)
    power = radial_power(evaluation.copies)
    frequency = torch.linspace(0, 1, len(power))
    plt.semilogy(frequency[1:], power[1:], "k--", label="real (through the VAE)")
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
        "plain 1 step": (frozen, 1, 1.0),
        "HiPA 1 step": (adapted, 1, 1.0),
        "25 steps": (frozen, 25, frozen.guidance),
    }
    strip(rows, DOCS / "strip.png")
    jobs_strip(rows, DOCS / "jobs.png")
    spectrum(rows, DOCS / "spectrum.png")
    contact_sheet(frozen, DOCS / "contact_sheet.png")
    if (HERE.parent / "runs" / "table-varied").exists():
        varied_strip(DOCS / "varied.png")


if __name__ == "__main__":
    main()
