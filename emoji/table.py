"""What each part of the loss does: trains the adaptors in every variant and measures the pictures of each.

    python emoji/table.py            # goes on where it stopped; the variants are kept in runs/table

Every variant is trained as `train.py --data emoji` trains, on the same targets, for fewer steps; and, if it is cheaper
or dearer than the first, once more for as much processor time. Two are trained at a time, one thread each. The columns
are those of `evaluate.py`; and *to 25 steps*: how different the pictures are from those that the frozen model draws in
25 steps from the same noise (DISTS on the evaluation net).
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import evaluate  # noqa: E402
import hipa  # noqa: E402
from evaluate import Evaluation, draw, row  # noqa: E402
from lora import load_lora  # noqa: E402
from sample import LORA_NAME, apply_lora, integer, run  # noqa: E402

ONLY_LATENT = [*"--spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 1 --head-start 0".split()]
VARIANTS = {
    "HiPA": [],
    "HiPA, other first values": ["--seed", "1"],
    "without the Fourier term": ["--fourier", "0"],
    "without the Sobel term": ["--sobel", "0"],
    "without both": ["--fourier", "0", "--sobel", "0"],
    "both at weight 0.3": ["--fourier", "0.3", "--sobel", "0.3"],
    "without the energy term": ["--energy", "0"],
    "without all three": ["--fourier", "0", "--sobel", "0", "--energy", "0"],
    "latents' error only": ONLY_LATENT,
    "without the latents' error": ["--latent", "0", "--head-start", "0"],
    "without the head start": ["--head-start", "0"],
    "LPIPS in DISTS' place": ["--distance", "lpips"],
    "rank 4": ["--rank", "4"],
    "rank 64": ["--rank", "64"],
    "attention only": ["--layers", "attention"],
}


def train(out, name, options, steps, script=HERE.parent / "train.py"):
    """One variant, unless it is there. Returns its folder."""
    folder = out / f"{name.replace(' ', '-').replace(',', '').replace(chr(39), '')}-{steps}"
    if not (folder / LORA_NAME).exists() or seconds_and_steps(folder)[1] < steps:
        command = [sys.executable, script, "--out", folder]
        if (folder / "settings.json").exists():
            command += ["--resume"]
        else:
            command += ["--data", "emoji", "--targets", out / "targets", "--steps", str(steps), *options]
        folder.mkdir(exist_ok=True)
        with open(out / f"{folder.name}.log", "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        with open(folder / COST, "a") as file:
            file.write(f"{usage.ru_utime + usage.ru_stime}\n")  # a line for each time it was started
        if process.returncode:
            raise hipa.UserError(f"{folder.name} did not end well: see {log.name}")
    return folder


COST = "processor_seconds"
HEADER = evaluate.HEADER.replace("defective |", "defective | to 25 steps | parameters | minutes |") + "---|" * 3


def seconds_and_steps(folder):
    """What the training cost a processor, whatever else that did meanwhile; and its updates."""
    cost = sum(map(float, (folder / COST).read_text().split())) if (folder / COST).exists() else 0.0
    with open(folder / "log.csv", newline="") as file:
        return cost, sum(1 for _ in csv.DictReader(file))


@torch.no_grad()
def measure(name, folder, evaluation, seeds, steps=1, **how):
    """Prints one row under HEADER, of the adaptors in `folder`. `how`: for `draw`."""
    model = hipa.load("emoji")
    count = sum(A.numel() + B.numel() for A, B in load_lora(folder / LORA_NAME, model.unet).values())
    apply_lora(model, folder / LORA_NAME)
    seconds, updates = seconds_and_steps(folder)
    figures = []
    for seed in range(seeds):
        pictures, labels = draw(model, evaluation, steps, 1.0, seed, 2, **how)
        figures.append([*evaluation.measure(pictures, labels), evaluation.to_many_steps(pictures, seed)])
    text = row(f"{name}, {updates:,} updates", figures, (*evaluate.FORMATS, "{:.3f}"))
    print(f"{text} {count:,} | {seconds / 60:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="(%(default)s)")
    parser.add_argument("--seeds", type=integer(1), default=3, help="of the measured pictures (%(default)s)")
    parser.add_argument("--jobs", type=integer(1), default=2, help="variants trained at a time (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=300, help="updates of each variant (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        train(args.out, "targets", [], 1)  # which all share
        tasks = {name: pool.submit(train, args.out, name, options, args.steps) for name, options in VARIANTS.items()}
        equal_steps = {name: task.result() for name, task in tasks.items()}
        seconds, _ = seconds_and_steps(equal_steps["HiPA"])
        equal_time = {}
        for name, options in VARIANTS.items():
            steps = round(args.steps * seconds / seconds_and_steps(equal_steps[name])[0])
            if abs(steps / args.steps - 1) > 0.15:
                equal_time[name] = pool.submit(train, args.out, name, options, steps)
        equal_time = {name: task.result() for name, task in equal_time.items()}

    evaluation = Evaluation(hipa.load("emoji"), 2)
    print(HEADER)
    for runs in (equal_steps, equal_time):
        for name, folder in runs.items():
            measure(name, folder, evaluation, args.seeds)


if __name__ == "__main__":
    run(main)
