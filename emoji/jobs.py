"""Measures editing, inpainting and super-resolution by the embedded model: plain one step, with the adaptors, 25 steps.

    python emoji/jobs.py                            # all; half an hour on two cores
    python emoji/jobs.py inpainting                 # one of: editing, inpainting, super-resolution, tiles

The pictures are the real ones of `renders.png`: one of each class, and others in every repetition.

recognition, Fréchet, edges   as in `evaluate.py`
DISTS    distance to the picture that the job began with, by the net that training uses: when editing, to what was
         edited (what stays of it); after inpainting and super-resolution, to the real picture
seam     mean step over the rim of the hole, relative to that of the real pictures; 1 is no seam
PSNR     to the real picture, in dB
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import OTHER_VIEWS, SIZE, Evaluation, psnr, real_pictures, row  # noqa: E402
from hipa import STRENGTH  # noqa: E402
from sample import apply_lora, integer, own_lora, run  # noqa: E402
from train import load_distance  # noqa: E402
from vae import to_pil, to_tensor  # noqa: E402

BATCH = 37


class Bench:
    """The models, the pictures and the nets that measure."""

    def __init__(self):
        folder = hipa.find_checkpoint("emoji")
        self.plain, self.adapted = hipa.load("emoji"), hipa.load("emoji")
        apply_lora(self.adapted, *own_lora(folder, 1))
        self.evaluation = Evaluation(self.plain, per_class=1)
        self.distance = load_distance("dists", folder)
        _, (pictures, _) = real_pictures(self.evaluation.glyphs)
        self.views = pictures.unflatten(0, (-1, OTHER_VIEWS))  # (classes, views, 3, 64, 64)
        self.names = [names[0] for _, names in self.evaluation.glyphs]
        self.labels = torch.arange(len(self.names))

    def recognised(self, pictures, labels):
        """[recognition in %, Fréchet, edges]"""
        return self.evaluation.measure(pictures, labels)[:3]

    def dists(self, x, y):
        return self.distance(x.clamp(-1, 1) / 2 + 0.5, y / 2 + 0.5).mean().item()

    @staticmethod
    def header(title, columns):
        """Prints a table's head. Columns: {name: digits after the point}"""
        print(f"\n| {title} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))

    def rows(self, columns, draw, measure, repetitions, others=(), end=""):
        """Prints a table's rows. draw(model, sources, part, seeds, **options) -> pictures of the slice `part`;
        measure(pictures, sources) -> figures. `others`: further rows, (name, function sources -> pictures); `end`: of
        every name."""
        ways = {
            "plain 1 step": (self.plain, 1, 1.0), "**HiPA, 1 step**": (self.adapted, 1, 1.0),
            "25 steps": (self.plain, 25, self.plain.guidance),
        }  # fmt: skip

        def drawn(model, steps, guidance, sources, k):
            parts = [slice(i, min(i + BATCH, len(sources))) for i in range(0, len(sources), BATCH)]
            seeds = [[2_000_000_000 + 1_000_000 * k + i for i in range(part.start, part.stop)] for part in parts]
            options = {"steps": steps, "guidance": guidance}
            return torch.cat([draw(model, sources, *job, **options) for job in zip(parts, seeds)])

        rows = {name: lambda sources, k, f=f: f(sources) for name, f in others}
        rows |= {name: lambda sources, k, way=way: drawn(*way, sources, k) for name, way in ways.items()}
        for name, pictures in rows.items():
            figures = []
            for k in tqdm(range(repetitions), desc=name + end, leave=False):
                sources = self.views[:, k % OTHER_VIEWS]
                as_png = [to_tensor(picture) for picture in to_pil(pictures(sources, k))]
                figures.append(measure(torch.stack(as_png), sources))
            print(row(name + end, figures, [f"{{:.{digits}f}}" for digits in columns.values()]), flush=True)


def editing(bench, repetitions):
    """Every picture becomes the thing seven classes on, which has nothing to do with what it was."""
    labels = (bench.labels + 7) % len(bench.names)
    prompts = [bench.names[label] for label in labels]
    columns = {"recognition, %": 1, "Fréchet": 2, "edges": 2, "DISTS to the source": 3}
    bench.header("editing", columns)
    for strength in (0.5, 0.7, 0.9):

        def draw(model, sources, part, seeds, strength=strength, **options):
            return hipa.edit(model, sources[part], prompts[part], seeds, strength, **options)

        def measure(pictures, sources):
            return [*bench.recognised(pictures, labels), bench.dists(pictures, sources)]

        bench.rows(columns, draw, measure, repetitions, end=f", strength {strength:g}")


def inpainting(bench, repetitions):
    """The hole is the right half of every picture, and so of the thing in its middle."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1

    def rim(pictures):
        return (pictures[..., SIZE // 2] - pictures[..., SIZE // 2 - 1]).abs().mean().item()

    def draw(model, sources, part, seeds, **options):
        masks = mask.expand(len(seeds), -1, -1, -1)
        return hipa.inpaint(model, sources[part], masks, bench.names[part], seeds, **options)

    def measure(pictures, sources):
        seam = rim(pictures) / rim(sources)
        return [*bench.recognised(pictures, bench.labels), seam, bench.dists(pictures, sources)]

    columns = {"recognition, %": 1, "Fréchet": 2, "edges": 2, "seam": 2, "DISTS": 3}
    masks = mask.expand(len(bench.names), -1, -1, -1)
    filled = ("the hole as it is filled first", lambda sources: hipa.fill(sources, masks))
    bench.header(f"inpainting the right half, strength {STRENGTH['inpainting']:g}", columns)
    bench.rows(columns, draw, measure, repetitions, [filled])


def resize(x, side):
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def corrected(large, small):
    """With the correction that `hipa.upscale` ends with: reduced, it is the small picture again."""
    return large + resize(small - resize(large, small.shape[3]), large.shape[3])


def super_resolution(bench, repetitions):
    """From 16 and 32 pixels to 64, with the prompt and without."""
    strength = STRENGTH["super-resolution"]
    columns = {"PSNR": 1, "DISTS": 3, "recognition, %": 1, "Fréchet": 2, "edges": 2}

    def measure(pictures, sources):
        return [psnr(pictures, sources), bench.dists(pictures, sources), *bench.recognised(pictures, bench.labels)]

    for side in (16, 32):
        bench.header(f"{side} to {SIZE} pixels, strength {strength:g}", columns)

        def bicubic(sources, side=side):
            return resize(resize(sources, side), SIZE)

        def corrected_bicubic(sources, side=side, bicubic=bicubic):
            return corrected(bicubic(sources), resize(sources, side))

        for with_prompt in (True, False):

            def draw(model, sources, part, seeds, side=side, with_prompt=with_prompt, guidance=1.0, **options):
                options |= {"strength": strength, "guidance": guidance if with_prompt else 1.0}
                prompts = bench.names[part] if with_prompt else [""] * len(seeds)
                return hipa.upscale(model, resize(sources[part], side), SIZE // side, prompts, seeds, **options)

            others = [("bicubic", bicubic), ("bicubic, corrected", corrected_bicubic)] if with_prompt else []
            bench.rows(columns, draw, measure, repetitions, others, end="" if with_prompt else ", no prompt")


def in_tiles(bench, repetitions):
    """Four pictures side by side, from 32 to 128 pixels: in tiles of 64, which lie across them, and in one piece."""
    kept = [k for k in range(len(bench.names)) if k % BATCH < BATCH // 4 * 4]
    strength = STRENGTH["super-resolution"]

    def join(x):
        x = x[: len(x) // 4 * 4].unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)  # (n, 3, row, 64, column, 64)
        return x.flatten(4, 5).flatten(2, 3)

    def cut(x):
        return x.unflatten(2, (2, SIZE)).unflatten(4, (2, SIZE)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def measure(pictures, sources):
        recognised = bench.recognised(pictures, bench.labels[kept])
        return [psnr(pictures, sources[kept]), bench.dists(pictures, sources[kept]), *recognised]

    columns = {"PSNR": 1, "DISTS": 3, "recognition, %": 1, "Fréchet": 2, "edges": 2}
    bench.header(f"four pictures in one, 32 to 128 pixels, strength {strength:g}, no prompt", columns)
    for tiled in (True, False):

        def draw(model, sources, part, seeds, guidance, tiled=tiled, **options):
            large = join(sources[part])
            small, seeds, prompts = resize(large, SIZE // 2), seeds[: len(large)], [""] * len(large)
            if tiled:
                return cut(hipa.upscale(model, small, 4, prompts, seeds, strength, **options))
            large = resize(small, 2 * SIZE)
            large = hipa.redraw(model, large, hipa.noise_for(model, large, seeds), prompts, strength, **options)
            return cut(corrected(large, small))

        bench.rows(columns, draw, measure, repetitions, end=", in tiles" if tiled else ", in one piece")


JOBS = {"editing": editing, "inpainting": inpainting, "super-resolution": super_resolution, "tiles": in_tiles}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", choices=JOBS, help="(all)")
    parser.add_argument("--seeds", type=integer(1), default=3, help="repetitions, for the spread (%(default)s)")
    args = parser.parse_args()
    bench = Bench()
    for name in [args.job] if args.job else JOBS:
        JOBS[name](bench, args.seeds)


if __name__ == "__main__":
    run(main)
