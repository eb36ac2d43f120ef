"""HiPA beside what else could be trained in the same time, and what each part of its loss does.

    python emoji/table.py                 # says first how long it takes; goes on where it stopped
    python emoji/table.py --share 0.33    # every training a third as long
    python emoji/table.py --more          # further rows, trained once: LPIPS, ranks, attention only, ...
    python emoji/table.py --model emoji/build/varied --rows hipa regression-of-latents   # a copy made by make.py

Every row has the same prompts, batch and optimizer, and as many updates as take the time of 1,100 of HiPA's. The
rows of MAIN are trained three times, with other first values and another order of the pairs; they show the mean and
half the spread over the trainings, all other rows over the seeds of noise. Two are trained at a time, one thread each;
what is trained is kept in `runs/table`, or `runs/table-varied` for a copy of that name.
The columns are those of `evaluate.py`, and *to 25 steps*: how different the pictures are from those that the frozen
model draws in 25 steps from the same noise (DISTS on the evaluation net).
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import FORMATS, HEADER, Evaluation, draw, row  # noqa: E402
from lcm import sample_consistency  # noqa: E402
from lora import load_lora  # noqa: E402
from sample import LORA_NAME, apply_lora, integer, number, own_lora, run, slug  # noqa: E402

MINUTES = 15  # of one thread for 1,100 of HiPA's updates, without AVX-512
ALIKE = ["--data", "emoji", "--pairs", "1024", "--lr", "4e-3"]  # in every training; short ones want a larger rate
ONLY_LATENT = [*"--spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 1 --head-start 0".split()]
MAIN = {  # name: (options of train.py, updates that take as long as 1,100 of HiPA's, steps to draw in)
    "**HiPA**": ([], 1100, [1]),
    "without the Fourier term": (["--fourier", "0"], 1150, [1]),
    "without the Sobel term": (["--sobel", "0"], 1140, [1]),
    "without both": (["--fourier", "0", "--sobel", "0"], 1170, [1]),
    "without the energy term": (["--energy", "0"], 1130, [1]),
    "without all three": ([*"--fourier 0 --sobel 0 --energy 0".split()], 1210, [1]),
    "as the paper trains": (["--paper"], 640, [1]),
    "regression of latents": (ONLY_LATENT, 1490, [1]),
    "LCM-LoRA": (["--lr", "2e-4"], 710, [1, 2, 4]),
}
MORE = {
    "without the latents' error": (["--latent", "0", "--head-start", "0"], 660, [1]),
    "without the head start": (["--head-start", "0"], 640, [1]),
    "LPIPS in DISTS' place": (["--distance", "lpips"], 1080, [1]),
    "rank 4": (["--rank", "4"], 1110, [1]),
    "rank 64": (["--rank", "64", "--lr", "2e-3"], 880, [1]),
    "attention only": (["--layers", "attention"], 1310, [1]),
    "the latents' error at weight 20": (["--latent", "20"], 1100, [1]),
}


# ------------------------------------------------------------------------------------------------------------ training
def folder_of(out, name, seed, updates):
    return out / f"{slug(name)}-{seed}-{updates}"


def train(folder, model, name, options):
    """One training, unless it is there."""
    updates, seed = folder.name.split("-")[:-3:-1]
    if cost(folder, finished=True):
        return
    targets = folder.parent / ("targets-paper" if "--paper" in options else "targets")  # the paper's all begin at 999
    script = HERE / "lcm.py" if name == "LCM-LoRA" else HERE.parent / "train.py"
    command = [sys.executable, script, "--out", folder, "--device", "cpu"]
    if (folder / "settings.json").exists():
        command += ["--resume"]
    else:
        command += [*ALIKE, "--model", model, "--targets", targets, "--steps", updates, "--seed", seed, *options]
    folder.mkdir(exist_ok=True)
    with open(folder.with_suffix(".log"), "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    with open(folder / COST, "a") as file:  # a line for each time it was started
        file.write(f"{usage.ru_utime + usage.ru_stime}\n")
    if process.returncode:
        raise hipa.UserError(f"{folder.name} did not end well: see {log.name}")
    (folder / "finished").touch()


COST = "processor_seconds"


def cost(folder, finished=False):
    """What the training cost a processor, in minutes, whatever else that did meanwhile; 0 if it is not there."""
    if not (folder / COST).exists() or finished and not (folder / "finished").exists():
        return 0.0
    return sum(map(float, (folder / COST).read_text().split())) / 60


# ----------------------------------------------------------------------------------------------------------- measuring
PER_CLASS = 2  # pictures of each thing, for each seed


def of_pictures(evaluation, drawn):
    """All measures of each seed. `drawn`: its (pictures, labels), as `draw` gives them."""
    return [
        [*evaluation.measure(pictures, labels), evaluation.to_many_steps(pictures, seed)]
        for seed, (pictures, labels) in enumerate(drawn)
    ]


def print_row(name, figures, rest="| |"):
    print(row(name, figures, (*FORMATS, "{:.3f}")), rest, flush=True)


def load(name):
    """The embedded model, or a copy of it, which wants the same guidance."""
    return replace(hipa.load(name), guidance=hipa.GUIDANCE["emoji"])


@torch.no_grad()
def measure(name, folders, evaluation, seeds, steps, model_name):
    """Prints the row of a variant's trainings, which are for the model of that name."""
    figures = []
    for folder in folders:
        model = load(model_name)
        adaptors = load_lora(folder / LORA_NAME, model.unet)
        apply_lora(model, folder / LORA_NAME)
        how = {"sample": sample_consistency} if name == "LCM-LoRA" else {}
        drawn = (draw(model, evaluation, steps, 1.0, seed, PER_CLASS, **how) for seed in range(seeds))
        figures.append(of_pictures(evaluation, drawn))
    figures = np.mean(figures, axis=1) if len(folders) > 1 else figures[0]
    count = sum(A.numel() + B.numel() for A, B in adaptors.values())
    updates, minutes = int(folders[0].name.rpartition("-")[2]), np.mean([cost(folder) for folder in folders])
    title = f"{name}, {steps} step{'s' * (steps > 1)}, {updates:,} updates"
    print_row(title, figures, f"{count:,} | {minutes:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="(runs/table; of a copy: runs/table-NAME)")
    parser.add_argument("--rows", nargs="+", choices=[slug(name) for name in MAIN | MORE], help="only these")
    parser.add_argument("--seeds", type=integer(1), default=3, help="of the measured pictures' noise (%(default)s)")
    parser.add_argument("--jobs", type=integer(1), default=2, help="trainings at a time (%(default)s)")
    parser.add_argument("--share", type=number, default=1.0, help="of the updates (%(default)s)")
    parser.add_argument("--trainings", type=integer(1), default=3, help="of each row of MAIN (%(default)s)")
    parser.add_argument("--more", action="store_true", help="the rows of MORE too")
    args = parser.parse_args()
    checkpoint = hipa.find_checkpoint(args.model)
    out = args.out or Path("runs") / ("table" if args.model == "emoji" else f"table-{checkpoint.name}")
    out.mkdir(parents=True, exist_ok=True)
    variants = MAIN | MORE
    wanted = args.rows or [slug(name) for name in (variants if args.more else MAIN)]
    rows = {}  # name: its trainings' folders
    for name, (_, updates, _) in variants.items():
        if slug(name) in wanted:
            steps = max(1, round(args.share * updates))
            rows[name] = [folder_of(out, name, seed, steps) for seed in range(args.trainings if name in MAIN else 1)]
    every = [(folders[k], name) for k in range(args.trainings) for name, folders in rows.items() if k < len(folders)]
    jobs = [(folder, name) for folder, name in every if not cost(folder, finished=True)]
    minutes = len(jobs) * MINUTES * args.share / args.jobs
    if jobs:
        print(f"{len(jobs)} trainings, about {minutes:.0f} minutes where nothing else runs", file=sys.stderr)
        with ThreadPoolExecutor(args.jobs) as pool:
            options = {name: variants[name][0] for _, name in jobs} | {"targets": []}
            if any("--paper" in of_row for of_row in options.values()):
                options["targets of the paper"] = ["--paper"]
            first = [(folder_of(out, name, 0, 1), name) for name in options if name.startswith("targets")]
            for trainings in (first, jobs):  # the first make targets, which the others share
                tasks = [pool.submit(train, folder, args.model, name, options[name]) for folder, name in trainings]
                for task in tasks:
                    task.result()

    frozen = load(args.model)
    evaluation, seeds = Evaluation(frozen, PER_CLASS, checkpoint), range(args.seeds)
    print(HEADER.replace("defective |", "defective | to 25 steps | parameters | minutes |") + "---|" * 3)
    with torch.no_grad():
        many = (evaluation.many_steps(seed, PER_CLASS) for seed in seeds)
        print_row("25 steps", of_pictures(evaluation, many))
        models = {"plain 1 step": frozen}
        lora, _ = own_lora(checkpoint, 1)
        if lora:
            models["the shipped adaptors, 1 step"] = load(args.model)
            apply_lora(models["the shipped adaptors, 1 step"], lora)
        for name, model in models.items():
            drawn = (draw(model, evaluation, 1, 1.0, seed, PER_CLASS) for seed in seeds)
            print_row(name, of_pictures(evaluation, drawn))
    for name, folders in rows.items():
        for steps in variants[name][2]:
            measure(name, folders, evaluation, args.seeds, steps, args.model)


if __name__ == "__main__":
    run(main)
