"""Measures editing, inpainting and super-resolution by the embedded model: plain one step, with adaptors, 25 steps.

    python emoji/jobs.py                            # all; half an hour on two cores
    python emoji/jobs.py inpainting                 # one of: editing, inpainting, super-resolution
    python emoji/jobs.py editing --lora runs/a runs/b runs/c     # of other adaptors, without the frozen model

The pictures are real ones of `renders.png`, four of each class; in each repetition noise is new. A row shows mean and
standard deviation over repetitions; with several adaptors, over the adaptors. Strengths are the defaults, and 0.4.

recognition, Fréchet, edges   as in `evaluate.py`
DISTS, PSNR (dB)              to the real picture that the job began with; DISTS on the evaluation net
seam                          mean step in the middle, the rim of the hole, relative to the real pictures'; 1 is no seam
"""

import io
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import OTHER_VIEWS, SIZE, Evaluation, as_stored, blurred, header, psnr, row  # noqa: E402
from sample import Parser, apply_lora, find_lora, number, run, to_pil, to_tensor  # noqa: E402

COLUMNS = {
    "recognition": "{:.1f} %", "Fréchet": "{:.2f}", "edges": "{:.2f}", "DISTS": "{:.3f}", "PSNR": "{:.1f}",
    "seam": "{:.2f}",
}  # fmt: skip
REDUCED = 16  # pixels, before they are enlarged


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
        self.evaluation, self.repetitions = Evaluation(plain), repetitions
        self.pictures, self.labels = self.evaluation.real

    def measure(self, pictures, labels):
        """[a figure of each of COLUMNS]. Pictures (N, 3, 64, 64), the classes that they should show (N,)."""
        pictures, originals = as_stored(pictures), self.pictures
        dists = self.evaluation.difference(pictures, originals)
        step, real = ((x[..., SIZE // 2] - x[..., SIZE // 2 - 1]).abs().mean().item() for x in (pictures, originals))
        return [*self.evaluation.measure(pictures, labels), dists, psnr(pictures, originals), step / real]

    def print_table(self, title, make, given, others, shift=0):
        """A row for each way, of make(model, some of given, prompts=, seeds=, steps=), and for each of others,
        {name: pictures}. The prompts name what is `shift` classes on."""
        print("\n" + header(title, *COLUMNS))
        labels = (self.labels + shift) % len(self.evaluation.glyphs)
        prompts = [self.evaluation.glyphs[label][1][0] for label in labels]
        for name, pictures in others.items():
            print(row(name, [self.measure(pictures, labels)], COLUMNS.values()), flush=True)
        for name, (models, steps) in self.ways.items():
            table = np.zeros((len(models), self.repetitions, len(COLUMNS)))
            for m, k in tqdm([*np.ndindex(table.shape[:2])], name, leave=False):
                parts = []
                for places in torch.arange(len(labels)).split(24):
                    seeds = [2_000_000_000 + 1_000_000 * k + i for i in places.tolist()]
                    some = [prompts[i] for i in places]
                    parts.append(make(models[m], given[places], prompts=some, seeds=seeds, steps=steps))
                table[m, k] = self.measure(torch.cat(parts), labels)
            table = table.mean(axis=1) if len(models) > 1 else table[0]
            print(row(name, table, COLUMNS.values()), flush=True)


def editing(bench):
    """Every picture becomes the thing seven classes on, which has nothing to do with what it was."""
    others = {"real pictures of those": bench.pictures.roll(-7 * OTHER_VIEWS, 0)}
    bench.print_table(f"editing, strength {hipa.STRENGTH['editing']:g}", hipa.edit, bench.pictures, others, shift=7)


def inpainting(bench):
    """The hole is the right half of every picture, and so of the thing in its middle."""
    mask = torch.arange(SIZE).ge(SIZE // 2).float().expand(1, 1, SIZE, SIZE)
    others = {"the real pictures": bench.pictures, "the hole as it is filled": hipa.fill(bench.pictures, mask)}
    title = f"inpainting the right half, strength {hipa.STRENGTH['inpainting']:g}"
    bench.print_table(title, partial(hipa.inpaint, mask=mask), bench.pictures, others)


def resized(pictures, side):
    return hipa.resize(pictures, (side, side)).clamp(-1, 1)


def degraded(pictures, side):
    """As small pictures are that one finds: blurred before they were reduced, then with noise, then a JPEG. The
    strengths differ from picture to picture."""
    small, rng, generator = [], random.Random(0), torch.Generator().manual_seed(0)
    for picture in pictures:
        reduced = resized(blurred(picture[None], rng.uniform(0.5, 2)), side)
        noise = torch.randn(reduced.shape, generator=generator)
        noisy = to_pil((reduced + rng.uniform(0.04, 0.2) * noise).clamp(-1, 1))[0]
        noisy.save(file := io.BytesIO(), "JPEG", quality=rng.randint(40, 90))
        small.append(to_tensor(Image.open(file)))
    return torch.stack(small)


def super_resolution(bench):
    """Of pictures that were only reduced, and of degraded ones. Up to the default strength, `hipa.upscale` ends with a
    correction: reduced, the result is the small picture again, nearly. A row of bicubic ones is corrected, too."""
    default = hipa.STRENGTH["super-resolution"]
    for kind, reduce, strengths in (("reduced", resized, [default]), ("degraded", degraded, [default, 0.4])):
        small = reduce(bench.pictures, REDUCED)
        bicubic = corrected = resized(small, SIZE)
        for _ in range(6):
            missing = small - hipa.resize(corrected, (REDUCED, REDUCED))
            corrected = (corrected + hipa.resize(missing, (SIZE, SIZE))).clamp(-1, 1)
        others = {"the real pictures": bench.pictures, "bicubic": bicubic, "bicubic, corrected": corrected}
        for strength in strengths:
            title = f"{kind}, {REDUCED} to {SIZE} pixels, strength {strength:g}"
            make = partial(hipa.upscale, scale=SIZE // REDUCED, strength=strength)
            bench.print_table(title, make, small, others)


JOBS = {"editing": editing, "inpainting": inpainting, "super-resolution": super_resolution}


@torch.no_grad()
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("job", nargs="?", choices=JOBS, help="(all)")
    parser.add_argument("--lora", nargs="+", metavar="PATH", help="measure these adaptors only")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=3, help="repetitions (%(default)s)")
    args = parser.parse_args(argv)
    bench = Bench(args.lora, args.seeds)
    for name in [args.job] if args.job else JOBS:
        JOBS[name](bench)


if __name__ == "__main__":
    run(main)
