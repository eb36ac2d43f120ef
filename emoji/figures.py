"""Makes the pictures in `docs/` from the embedded model: `python emoji/figures.py` (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import Evaluation, draw, radial_power, read_glyphs, real_pictures  # noqa: E402
from lora import LORA_NAME  # noqa: E402
from sample import apply_lora, grid, to_pil  # noqa: E402

DOCS, TRAININGS = HERE.parent / "docs", HERE.parent / "runs" / "table-varied"
SEEDS = {"a cat": 3, "a red apple": 0, "a rocket": 1, "a house": 2, "a bee": 4, "a slice of pizza": 5}
EDITS = {"a cat": "a dog", "a red apple": "an orange", "an owl": "a penguin", "a rocket": "a sailboat"}
HOLES = ["a panda", "a house", "a robot", "a pizza"]
SMALL = ["a sunflower", "a strawberry", "a rainbow", "a bee"]


def save_rows(rows, path, side=128):
    """{name: pictures (B, 3, H, W) in [-1, 1]} -> a picture with a row of them beside each name."""
    font = ImageFont.load_default(size=22)
    left = 24 + round(max(font.getlength(name) for name in rows))
    sheet = Image.new("RGB", (left + side * max(map(len, rows.values())), side * len(rows)), "white")
    for y, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((8, (y + 0.5) * side), name, "black", font, anchor="lm")
        for x, picture in enumerate(to_pil(pictures)):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left + x * side, y * side))
    sheet.save(path, optimize=True)


def real(prompts, folder=HERE):
    """A real picture of what each prompt names, from the folder's sheet: (N, 3, 64, 64) in [-1, 1]"""
    glyphs = read_glyphs()
    classes = {name: index for index, (_, names) in enumerate(glyphs) for name in names}
    pictures = real_pictures(glyphs, folder)[1][0].unflatten(0, (len(glyphs), -1))[:, 0]
    return pictures[[classes[prompt] for prompt in prompts]]


def strip(ways):
    """{name: (model, steps)} -> {name: pictures}, all from the same noise."""
    return {name: hipa.sample(model, list(SEEDS), SEEDS.values(), steps) for name, (model, steps) in ways.items()}


def jobs(ways):
    """Real pictures edited, half inpainted, and enlarged four times; the first row is what is given."""
    edits, holes, small = real(EDITS), real(HOLES), hipa.resize(real(SMALL), (16, 16))
    mask = torch.zeros_like(holes[:, :1])
    mask[..., mask.shape[3] // 2 :] = 1
    rows = {"given": torch.cat([edits, holes * (1 - mask), small.repeat_interleave(4, 2).repeat_interleave(4, 3)])}
    for name, (model, steps) in ways.items():
        edited = hipa.edit(model, edits, list(EDITS.values()), range(4), steps=steps)
        inpainted = hipa.inpaint(model, holes, mask, HOLES, range(4), steps=steps)
        rows[name] = torch.cat([edited, inpainted, hipa.upscale(model, small, 4, SMALL, range(4), steps=steps)])
    return rows


def varied(folder=HERE / "build" / "varied"):
    """The copy `varied` (docs/tables.md): adaptors trained in three ways, its 25 steps, real pictures."""
    ways = {}
    for name in ("regression of latents", "as the paper trains", "HiPA"):
        ways[name] = hipa.load(folder), 1
        apply_lora(ways[name][0], next(TRAININGS.glob(f"{name.lower().replace(' ', '-')}-0-*")) / LORA_NAME)
    return strip(ways | {"25 steps": (hipa.load(folder), 25)}) | {"real": real(SEEDS, folder)}


def contact_sheet(glyphs, real, sampled, path):
    """Every class under its name: a real picture and one of the model's."""
    sheet = Image.new("RGB", (8 * 136, 10 * 80), "white")
    for k, ((_, names), *pair) in enumerate(zip(glyphs, real, sampled)):
        x, y = k % 8 * 136, k // 8 * 80
        sheet.paste(grid(to_pil(torch.stack(pair)), columns=2), (x + 4, y + 14))
        ImageDraw.Draw(sheet).text((x + 6, y + 1), names[0], "black")
    sheet.save(path, optimize=True)


def spectrum(rows, path):
    """The paper's diagnosis and its cure: power over frequency of {name: pictures}, the first of real ones."""
    plt.figure(figsize=(6, 3.6), dpi=120, layout="tight")
    for (name, pictures), style in zip(rows.items(), ("k--", "tab:red", "tab:green", "tab:blue")):
        power = radial_power(pictures)[1:]
        plt.semilogy(torch.arange(1, len(power) + 1) / len(power), power, style, label=name)
    plt.gca().set(xlabel="spatial frequency (1 = Nyquist)", ylabel="power")
    plt.legend()
    plt.savefig(path)


def main():
    frozen, adapted = hipa.load("emoji"), hipa.load("emoji")
    apply_lora(adapted, HERE / LORA_NAME)
    ways = {"1 step": (frozen, 1), "1 step, HiPA": (adapted, 1), "25 steps": (frozen, 25)}
    save_rows(strip(ways), DOCS / "strip.png")
    save_rows(jobs(ways), DOCS / "jobs.png", side=96)
    if TRAININGS.exists():
        save_rows(varied(), DOCS / "varied.png")
    evaluation = Evaluation(frozen, per_class=1)
    rows = {"real (through the VAE)": evaluation.copies}
    for name, (model, steps) in ways.items():
        rows[name] = draw(model, evaluation.alone, 0, steps)
    spectrum(rows, DOCS / "spectrum.png")
    contact_sheet(evaluation.glyphs, evaluation.real[0], rows["25 steps"], DOCS / "contact_sheet.png")


if __name__ == "__main__":
    main()
