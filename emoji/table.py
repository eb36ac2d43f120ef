"""HiPA beside what else could be trained in the same time, and what each part of its loss does.

    python emoji/table.py                 # says first how long it takes; goes on where it stopped
    python emoji/table.py --share 0.33    # every training a third as long
    python emoji/table.py --more          # more rows: LPIPS, ranks, attention only, ...
    python emoji/table.py --model emoji/build/varied --rows hipa regression-of-latents   # a copy made by make.py

Every row has the same prompts and batch, and as many updates as take the time of 1,100 of HiPA's on one thread. Each is
trained three times, with targets, starting weights and test noise of its own: mean ± standard deviation. * : differs
from HiPA's row with p < .05 (Welch's test; needs scipy). Trainings are kept in `runs/table`, or `runs/table-varied` for
a copy of that name: after a change of options here, give another --out. Columns: those of `evaluate.py`; *to 25 steps*,
the distance to the frozen model's 25 steps from the same noise (DISTS on the evaluation net); minutes of a processor.
*A mask*: regression's pictures under the unsharp mask of MASKS that has the least Fréchet distance on other noise.
"""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from scipy.stats import ttest_ind

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import COLUMNS, Evaluation, draw, header, row, sharpened  # noqa: E402
from lcm import sample_consistency  # noqa: E402
from lora import LORA_NAME  # noqa: E402
from progressive import sample_ddim  # noqa: E402
from sample import Parser, apply_lora, choose_device, find_lora, number, run, slug  # noqa: E402

MINUTES = 10  # of one thread for 1,100 of HiPA's updates, with AVX-512; without, nearly twice as many
TRAININGS, PER_CLASS = 3, 2  # of each row; pictures of each thing
ALIKE = "--data emoji --dtype float32 --pairs 1024".split()
LATENT = "--spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 1 --head-start 0"
MAIN = {  # name: (options of train.py, updates that take as long as 1,100 of HiPA's, steps to sample in)
    "**HiPA**": ("", 1100, [1]),
    "half a head start": ("--head-start 0.5", 870, [1]),
    "no head start": ("--head-start 0", 620, [1]),
    "regression of latents": (LATENT, 1490, [1]),
    "as the paper trains": ("--paper", 640, [1]),
    "the same and energy": ("--paper --energy 1", 630, [1]),
    "spatial and energy": ("--paper --fourier 0 --sobel 0 --energy 1", 680, [1]),
    "spatial alone": ("--paper --fourier 0 --sobel 0", 710, [1]),
    "LCM-LoRA": ("--lr 2e-4 --later 0", 710, [1, 2, 4]),
    "progressive distillation": ("--lr 3e-4", 900, [1, 2, 4, 8]),
}
MORE = {
    "without energy": ("--energy 0", 1110, [1]),
    "LPIPS in DISTS' place": ("--distance lpips", 1080, [1]),
    "rank 4": ("--rank 4", 1110, [1]),
    "rank 64": ("--rank 64 --lr 1e-3", 880, [1]),
    "attention only": ("--layers attention", 1310, [1]),
}
ROWS = MAIN | MORE
SCRIPTS = {"LCM-LoRA": HERE / "lcm.py", "progressive distillation": HERE / "progressive.py"}
SAMPLERS = {"LCM-LoRA": sample_consistency, "progressive distillation": sample_ddim}
MASKS = [(sigma, amount) for sigma in (0.5, 1, 2) for amount in (0.15, 0.25, 0.5, 1)]


def train(folder, model, device, name):
    """One training for the model of that name, in a process, unless it is finished. It goes on where it stopped."""
    if (folder / "finished").exists():
        return
    command = [sys.executable, SCRIPTS.get(name, HERE.parent / "train.py"), "--out", folder]
    if (folder / "settings.json").exists():
        command += ["--resume"]
    else:
        *_, seed, updates = folder.name.split("-")
        command += [*ALIKE, "--device", device, "--model", model, "--seed", seed, "--steps", updates]
        command += ["--targets", folder.parent / "targets", *(ROWS[name][0].split() if name in ROWS else [])]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, process.returncode, usage = os.wait4(process.pid, 0)
    with open(folder / "processor_seconds", "a") as file:  # a line for each time it was started
        print(usage.ru_utime + usage.ru_stime, file=file)
    if process.returncode:
        raise hipa.UserError(f"{folder.name} did not end well: see {log.name}")
    (folder / "finished").touch()


class Measures:
    """Measures models with test noise of any seed, each in the columns of the table."""

    formats = (*COLUMNS.values(), "{:.3f}")

    def __init__(self, frozen, folder, out):
        self.frozen, self.out = frozen, out
        self.evaluation = Evaluation(frozen, PER_CLASS, folder)

    def draw(self, model, seed, steps, sample=hipa.sample):
        return draw(model, self.evaluation.prompts, seed, steps, sample=sample)

    def many_steps(self, seed):
        path = self.out / f"25-steps-{seed}.safetensors"  # they take minutes
        if not path.exists():
            hipa.write_file(path, save({"pictures": self.draw(self.frozen, seed, 25).contiguous()}))
        return load_file(path)["pictures"]

    def of(self, pictures, seed):
        return [*self.evaluation.measure_all(pictures), self.evaluation.difference(pictures, self.many_steps(seed))]

    def best_mask(self, model):
        """On noise that no row is measured with."""
        pictures = self.draw(model, TRAININGS, 1)
        return min(MASKS, key=lambda mask: self.evaluation.measure_all(sharpened(pictures, *mask))[0])


def p_values(figures, others):
    """Of each column of two rows (three trainings each), by Welch's test."""
    return ttest_ind(figures, others, equal_var=False).pvalue


@torch.no_grad()
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="emoji", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="(runs/table; of a copy: runs/table-NAME)")
    parser.add_argument("--rows", nargs="+", choices=[slug(name) for name in ROWS], help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu", help="(%(default)s)")
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=2, help="trainings at a time (%(default)s)")
    parser.add_argument("--share", type=number(float, 0, 100), default=1.0, help="of the updates (%(default)s)")
    parser.add_argument("--more", action="store_true", help="the rows of MORE too")
    args = parser.parse_args(argv)
    checkpoint, device = hipa.find_checkpoint(args.model), choose_device(args.device)
    out = args.out or Path("runs") / ("table" if args.model == "emoji" else f"table-{checkpoint.name}")
    wanted = args.rows or [slug(name) for name in (ROWS if args.more else MAIN)]
    rows = {}  # {name: the folders of its trainings}
    for name in (name for name in ROWS if slug(name) in wanted):
        updates = max(1, round(args.share * ROWS[name][1]))
        rows[name] = [out / f"{slug(name)}-{seed}-{updates}" for seed in range(TRAININGS)]
    missing = [(f, name) for name, folders in rows.items() for f in folders if not (f / "finished").exists()]
    if missing:
        expected = len(missing) * MINUTES * args.share / args.jobs
        print(f"{len(missing)} trainings, about {expected:.0f} minutes on an idle CPU", file=sys.stderr)
        missing.sort(key=lambda job: job[0].name.split("-")[-2])  # one training of every row, then the second ones
        targets = [(out / f"targets-{seed}-1", "targets") for seed in range(TRAININGS)]  # made first: the others share
        with ThreadPoolExecutor(args.jobs) as pool:
            for jobs in (targets, missing):
                list(pool.map(lambda job: train(job[0], args.model, device, job[1]), jobs))

    measures, best = Measures(hipa.load(args.model, device), checkpoint, out), None

    def load(folder, steps=1):
        model = hipa.load(args.model, device)
        if (path := folder / f"unet-{steps}.safetensors").exists():
            hipa.read_weights(model.unet, path, torch.float32)
            model.unet.to(model.device)
        else:
            apply_lora(model, folder / LORA_NAME)
        return model

    def print_row(name, figures, minutes=""):
        nonlocal best
        best, marks = figures if name.startswith("**HiPA**") else best, None
        if best:
            marks = [" *" if p < 0.05 else "" for p in p_values(figures, best)]
        print(row(name, figures, measures.formats, marks), minutes, flush=True)

    warnings.filterwarnings("ignore", "Precision loss")  # where all trainings have the same figure
    print(header("pictures", *COLUMNS, "to 25 steps", "minutes"))
    evaluation, seeds = measures.evaluation, range(TRAININGS)
    print_row("other real pictures", [[*evaluation.measure_all(evaluation.real[0]), np.nan]], "|")
    print_row("25 steps", [measures.of(measures.many_steps(seed), seed) for seed in seeds], "|")
    print_row("plain 1 step", [measures.of(measures.draw(measures.frozen, seed, 1), seed) for seed in seeds], "|")
    if shipped := find_lora(None, checkpoint, 1):
        model = load(shipped[0].parent)
        print_row("the shipped adaptors", [measures.of(measures.draw(model, seed, 1), seed) for seed in seeds], "|")
    for name, folders in rows.items():
        seconds = [sum(map(float, (f / "processor_seconds").read_text().split())) for f in folders]
        minutes, updates = f"{np.mean(seconds) / 60:.1f} |", folders[0].name.rpartition("-")[2]
        for steps in ROWS[name][2]:
            sampled = partial(measures.draw, steps=steps, sample=SAMPLERS.get(name, hipa.sample))
            pictures = [sampled(load(folder, steps), seed) for seed, folder in enumerate(folders)]
            title = f"{name}, {steps} step{'s' * (steps > 1)}, {updates} updates"
            print_row(title, [measures.of(part, seed) for seed, part in enumerate(pictures)], minutes)
        if name == "regression of latents":
            mask = measures.best_mask(load(folders[0]))
            figures = [measures.of(sharpened(part, *mask), seed) for seed, part in enumerate(pictures)]
            print_row(f"the same under a mask, σ {mask[0]:g}, times {mask[1]:g}", figures, minutes)
            if best:
                p = row("p of this difference to HiPA", [p_values(figures, best)], ["{:.3f}"] * len(best[0]))
                print(p, "|", flush=True)


if __name__ == "__main__":
    run(main)
