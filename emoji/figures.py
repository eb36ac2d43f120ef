"""Remakes the README's pictures from the embedded model: `python emoji/figures.py`."""

import sys
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from sample import to_pil  # noqa: E402

DOCS = HERE.parent / "docs"
PROMPTS = [
    "a cat", "a red apple", "an owl", "a rocket", "a panda on a blue background", "a house", "a small dog",
    "a bee and a strawberry", "a rainbow", "a robot", "a sunflower", "a pizza",
]  # fmt: skip


def strip(path, seed=0, scale=2):
    """One column a prompt: 25 steps above, one step from the same noise below."""
    model = hipa.load("emoji")
    seeds = [seed + k for k in range(len(PROMPTS))]
    rows = [hipa.sample(model, PROMPTS, seeds, steps, guidance) for steps, guidance in ((25, 7.5), (1, 1))]
    # (rows, columns, 3, H, W) -> one picture
    sheet = to_pil(torch.stack(rows).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])[0]
    path.parent.mkdir(exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    strip(DOCS / "strip.png")
