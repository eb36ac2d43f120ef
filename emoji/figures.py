"""Remakes the README's pictures from the embedded model: `python emoji/figures.py`."""

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from sample import grid, to_pil  # noqa: E402

DOCS = HERE.parent / "docs"
PROMPTS = [
    "a cat", "a red apple", "an owl", "a rocket", "a panda on a blue background", "a house", "a small dog",
    "a bee and a strawberry", "a rainbow", "a robot", "a sunflower", "a pizza",
]  # fmt: skip


def strip(path):
    """One column a prompt: 25 steps above, one step from the same noise below; twice as large as drawn."""
    model, seeds = hipa.load("emoji"), range(len(PROMPTS))
    pictures = [picture for steps in (25, 1) for picture in to_pil(hipa.sample(model, PROMPTS, seeds, steps))]
    sheet = grid(pictures, columns=len(PROMPTS))
    path.parent.mkdir(exist_ok=True)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    strip(DOCS / "strip.png")
