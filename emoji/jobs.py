"""Measures editing, inpainting and super-resolution by the embedded model: plain one step, with adaptors, 25 steps.

    python emoji/jobs.py                            # all; half an hour on two cores
    python emoji/jobs.py inpainting                 # one of: editing, inpainting, super-resolution, tiles
    python emoji/jobs.py editing --lora runs/a runs/b runs/c     # HiPA's rows only, of other adaptors

The pictures are the real ones of `renders.png`: one of each class, and others in every repetition. A row shows the mean
and standard deviation over repetitions; with several adaptors, over the adaptors.

recognition, Fréchet, edges   as in `evaluate.py`
DISTS, PSNR (dB)              to the real picture that the job began with; DISTS on the evaluation net
seam                          mean step over the rim of the hole, relative to that of the real pictures; 1 is no seam
"""

import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import OTHER_VIEWS, SIZE, Evaluation, as_stored, header, psnr, real_pictures, row  # noqa: E402
from sample import Parser, apply_lora, find_lora, number, run  # noqa: E402

DIGITS = {"recognition, %": 1, "Fréchet": 2, "edges": 2, "DISTS": 3, "PSNR": 1, "seam": 2}  # after the point
ENLARGED = ["PSNR", "DISTS", "recognition, %", "edges"]


class Bench:
    """The models, the pictures and the nets that measure."""

    def __init__(self, loras, repetitions):
        folder, plain = hipa.find_checkpoint("emoji"), hipa.load("emoji")
        adapted = [hipa.load("emoji") for _ in loras or [None]]
        for model, lora in zip(adapted, loras or [None]):
            apply_lora(model, *find_lora(lora, folder, 1))
        self.ways = {"**HiPA, 1 step**": (adapted, 1)}  # {name: (models, steps)}
        if not loras:
            self.ways = {"plain 1 step": ([plain], 1), **self.ways, "25 steps": ([plain], 25)}
        self.evaluation, self.repetitions = Evaluation(plain, per_class=1), repetitions
        _, (pictures, _) = real_pictures(self.evaluation.glyphs)
        self.views = pictures.unflatten(0, (-1, OTHER_VIEWS))  # (classes, views, 3, 64, 64)
        self.names = [names[0] for _, names in self.evaluation.glyphs]

    def measure(self, pictures, sources, labels):
        """{column: figure}, those of DIGITS. Pictures and sources (N, 3, 64, 64), labels (N,)."""
        pictures = as_stored(pictures)
        dists = self.evaluation.difference(pictures, sources)
        step, real = ((x[..., SIZE // 2] - x[..., SIZE // 2 - 1]).abs().mean().item() for x in (pictures, sources))
        figures = [*self.evaluation.measure(pictures, labels), dists, psnr(pictures, sources), step / real]
        return dict(zip(DIGITS, figures))

    def print_table(self, title, columns, ends, others=None, shift=0):
        """ends: {end of a row's name: function (model, sources (N, 3, 64, 64), prompts=, seeds=, steps=) -> pictures}.
        others: {name of a row: function (sources, **_)}. The prompts name the classes `shift` places on."""
        print("\n" + header(title, *columns))
        labels = torch.arange(len(self.names)).roll(-shift)
        prompts = [self.names[label] for label in labels]
        rows = {name: [function] for name, function in (others or {}).items()}
        for (end, make), (name, (models, steps)) in itertools.product(ends.items(), self.ways.items()):
            rows[name + end] = [partial(make, model, steps=steps) for model in models]
        for name, functions in rows.items():
            table = np.zeros((len(functions), self.repetitions, len(columns)))
            for f, k in tqdm(np.ndindex(table.shape[:2]), name, len(functions) * self.repetitions, leave=False):
                sources = self.views[:, k % OTHER_VIEWS]
                seeds = [2_000_000_000 + 1_000_000 * k + i for i in range(len(sources))]
                pictures = functions[f](sources, prompts=prompts, seeds=seeds)
                figures = self.measure(pictures, sources[: len(pictures)], labels[: len(pictures)])
                table[f, k] = [figures[column] for column in columns]
            table = table.mean(axis=1) if len(functions) > 1 else table[0]
            print(row(name, table, [f"{{:.{DIGITS[column]}f}}" for column in columns]), flush=True)


def editing(bench):
    """Every picture becomes the thing seven classes on, which has nothing to do with what it was."""
    ends = {f", strength {strength:g}": partial(hipa.edit, strength=strength) for strength in (0.5, 0.7, 0.9)}
    others = {"real pictures of those": lambda sources, **_: sources.roll(-7, 0)}
    bench.print_table("editing", ["recognition, %", "Fréchet", "edges", "DISTS"], ends, others, shift=7)


def inpainting(bench):
    """The hole is the right half of every picture, and so of the thing in its middle."""
    mask = torch.arange(SIZE).ge(SIZE // 2).float().expand(1, 1, SIZE, SIZE)
    bench.print_table(
        f"inpainting the right half, strength {hipa.STRENGTH['inpainting']:g}",
        ["recognition, %", "Fréchet", "edges", "seam", "DISTS"],
        {"": partial(hipa.inpaint, mask=mask)},
        {
            "the real pictures": lambda sources, **_: sources,
            "the hole as it is filled first": lambda sources, **_: hipa.fill(sources, mask),
        },
    )


def resize(x, side):
    return hipa.resize(x, (side, side)).clamp(-1, 1)


def correct(large, small):
    """What `hipa.upscale` ends with: reduced, the result is the small picture again, nearly."""
    for _ in range(6):
        large = (large + resize(small - resize(large, small.shape[3]), large.shape[3])).clamp(-1, 1)
    return large


def bicubic(sources, side, corrected, **_):
    small = resize(sources, side)
    return correct(resize(small, SIZE), small) if corrected else resize(small, SIZE)


def enlarge(model, sources, side, prompted, prompts, **options):
    if not prompted:
        prompts, options["guidance"] = [""] * len(prompts), 1.0
    return hipa.upscale(model, resize(sources, side), SIZE // side, prompts, **options)


def super_resolution(bench):
    """From 16 and 32 pixels to 64, with the prompt and without."""
    for side in (16, 32):
        title = f"{side} to {SIZE} pixels, strength {hipa.STRENGTH['super-resolution']:g}"
        ends = {"": True, ", no prompt": False}
        ends = {end: partial(enlarge, side=side, prompted=prompted) for end, prompted in ends.items()}
        others = {"bicubic": False, "bicubic, corrected": True}
        others = {name: partial(bicubic, side=side, corrected=corrected) for name, corrected in others.items()}
        bench.print_table(title, ENLARGED, ends, others)


def tiles(bench):
    """Four pictures side by side, from 32 to 128 pixels: in tiles of 64, which lie across them, and in one piece."""
    strength = hipa.STRENGTH["super-resolution"]

    def in_one_piece(model, small, **options):
        return correct(hipa.edit(model, resize(small, 2 * SIZE), strength=strength, **options), small)

    def of_four(make, model, sources, prompts, seeds, steps):
        n = len(sources) // 4
        x = sources[: 4 * n].unflatten(0, (n, 2, 2)).permute(0, 3, 1, 4, 2, 5)  # (n, 3, row, 64, column, 64)
        small = resize(x.flatten(4, 5).flatten(2, 3), SIZE // 2)
        large = make(model, small, prompts=[""] * n, seeds=seeds[:n], guidance=1.0, steps=steps)
        return large.unflatten(2, (2, SIZE)).unflatten(4, (2, SIZE)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    tiled = partial(hipa.upscale, scale=4)
    ends = {", in tiles": partial(of_four, tiled), ", in one piece": partial(of_four, in_one_piece)}
    bench.print_table(f"four pictures in one, 32 to 128 pixels, strength {strength:g}, no prompt", ENLARGED, ends)


JOBS = {"editing": editing, "inpainting": inpainting, "super-resolution": super_resolution, "tiles": tiles}


@torch.no_grad()
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("job", nargs="?", choices=JOBS, help="(all)")
    parser.add_argument("--lora", nargs="+", metavar="PATH", help="measure these adaptors only")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=4, help="repetitions (%(default)s)")
    args = parser.parse_args(argv)
    bench = Bench(args.lora, args.seeds)
    for name in [args.job] if args.job else JOBS:
        JOBS[name](bench)


if __name__ == "__main__":
    run(main)
