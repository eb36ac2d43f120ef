"""HiPA beside what else could be trained in the same time, and what each part of its loss does.

    python emoji/table.py                 # says first how long it takes; goes on where it stopped
    python emoji/table.py --share 0.33    # every training a third as long
    python emoji/table.py --more          # more rows, trained once: LPIPS, ranks, attention only, ...
    python emoji/table.py --model emoji/build/varied --rows hipa regression-of-latents   # a copy made by make.py

Every row has the same prompts, batch and optimizer, and as many updates as take the time of 1,100 of HiPA's. The rows
of MAIN are trained three times, with other first values and another order of the pairs; they show the mean and half the
spread over the trainings, all other rows over the seeds of noise. Each training has one thread; it is kept in
`runs/table`, or `runs/table-varied` for a copy of that name.
Columns: those of `evaluate.py`, and *to 25 steps*, the distance to the frozen model's 25 steps from the same noise
(DISTS on the evaluation net).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hipa  # noqa: E402
from evaluate import FORMATS, HEADER, Evaluation, draw, row  # noqa: E402
from lcm import sample_consistency  # noqa: E402
from lora import LORA_NAME  # noqa: E402
from sample import Parser, apply_lora, find_lora, number, run, slug  # noqa: E402

MINUTES = 15  # of one thread for 1,100 of HiPA's updates, without AVX-512
TRAININGS, SEEDS, PER_CLASS = 3, 3, 2  # of each row of MAIN; of the noise; pictures of each thing for each seed
ALIKE = "--device cpu --data emoji --pairs 1024 --lr 4e-3".split()  # short trainings want a larger rate
LATENT = "--spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 1 --head-start 0"
MAIN = {  # name: (options of train.py, updates that take as long as 1,100 of HiPA's, steps to sample in)
    "**HiPA**": ("", 1100, [1]),
    "without the Fourier term": ("--fourier 0", 1150, [1]),
    "without the Sobel term": ("--sobel 0", 1140, [1]),
    "without both": ("--fourier 0 --sobel 0", 1170, [1]),
    "without the energy term": ("--energy 0", 1130, [1]),
    "without all three": ("--fourier 0 --sobel 0 --energy 0", 1210, [1]),
    "as the paper trains": ("--paper", 640, [1]),
    "regression of latents": (LATENT, 1490, [1]),
    "LCM-LoRA": ("--lr 2e-4 --later 0", 710, [1, 2, 4]),
}
MORE = {
    "without the latents' error": ("--latent 0 --head-start 0", 660, [1]),
    "without the head start": ("--head-start 0", 640, [1]),
    "LPIPS in DISTS' place": ("--distance lpips", 1080, [1]),
    "rank 4": ("--rank 4", 1110, [1]),
    "rank 64": ("--rank 64 --lr 2e-3", 880, [1]),
    "attention only": ("--layers attention", 1310, [1]),
    "the latents' error at weight 20": ("--latent 20", 1100, [1]),
}
ROWS = MAIN | MORE


def train(folder, model, name):
    """One training for the model of that name, in a process, unless it is finished. It goes on where it stopped."""
    if (folder / "finished").exists():
        return
    script = HERE / "lcm.py" if name == "LCM-LoRA" else HERE.parent / "train.py"
    command = [sys.executable, script, "--out", folder]
    if (folder / "settings.json").exists():
        command += ["--resume"]
    else:
        *_, seed, updates = folder.name.split("-")
        command += [*ALIKE, "--model", model, "--seed", seed, "--steps", updates]
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


@torch.no_grad()
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="emoji", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="(runs/table; of a copy: runs/table-NAME)")
    parser.add_argument("--rows", nargs="+", choices=[slug(name) for name in ROWS], help="only these")
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=2, help="trainings at a time (%(default)s)")
    parser.add_argument("--share", type=number(float, 0, 100), default=1.0, help="of the updates (%(default)s)")
    parser.add_argument("--more", action="store_true", help="the rows of MORE too")
    args = parser.parse_args(argv)
    checkpoint = hipa.find_checkpoint(args.model)
    out = args.out or Path("runs") / ("table" if args.model == "emoji" else f"table-{checkpoint.name}")
    wanted = args.rows or [slug(name) for name in (ROWS if args.more else MAIN)]
    rows = {}  # {name: the folders of its trainings}
    for name in (name for name in ROWS if slug(name) in wanted):
        updates = max(1, round(args.share * ROWS[name][1]))
        rows[name] = [out / f"{slug(name)}-{seed}-{updates}" for seed in range(TRAININGS if name in MAIN else 1)]
    missing = [(f, name) for name, folders in rows.items() for f in folders if not (f / "finished").exists()]
    if missing:
        expected = len(missing) * MINUTES * args.share / args.jobs
        print(f"{len(missing)} trainings, about {expected:.0f} minutes where nothing else runs", file=sys.stderr)
        train(out / "targets-0-1", args.model, "targets")  # makes the targets, which the others share
        missing.sort(key=lambda job: job[0].name.split("-")[-2])  # one training of every row, then the second ones
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(job[0], args.model, job[1]), missing))

    # Of several trainings, the mean over the seeds. The first row makes the pictures of 25 steps.
    frozen, many_steps = hipa.load(args.model), {}
    evaluation = Evaluation(frozen, PER_CLASS, checkpoint)

    def print_row(name, models, steps, guidance=1.0, rest="| |", **how):
        table = np.zeros((len(models), SEEDS, len(FORMATS) + 1))
        for k, seed in np.ndindex(table.shape[:2]):
            pictures, labels = draw(models[k], evaluation, steps, guidance, seed, PER_CLASS, **how)
            difference = evaluation.difference(pictures, many_steps.setdefault(seed, pictures))
            table[k, seed] = [*evaluation.measure(pictures, labels), difference]
        table = table.mean(axis=1) if len(models) > 1 else table[0]
        print(row(name, table, (*FORMATS, "{:.3f}")), rest, flush=True)

    def load(path):
        model = hipa.load(args.model)
        apply_lora(model, path)
        return model

    print(HEADER.replace("defective |", "defective | to 25 steps | parameters | minutes |") + "---|" * 3)
    print_row("25 steps", [frozen], 25, frozen.guidance)
    print_row("plain 1 step", [frozen], 1)
    if shipped := find_lora(None, checkpoint, 1):
        print_row("the shipped adaptors, 1 step", [load(shipped[0])], 1)
    for name, folders in rows.items():
        models = [load(folder / LORA_NAME) for folder in folders]
        with safe_open(folders[0] / LORA_NAME, "pt") as file:
            count = sum(file.get_tensor(key).numel() for key in file.keys())
        seconds = [sum(map(float, (f / "processor_seconds").read_text().split())) for f in folders]
        rest = f"{count:,} | {np.mean(seconds) / 60:.1f} |"
        how = {"sample": sample_consistency} if name == "LCM-LoRA" else {}
        for steps in ROWS[name][2]:
            title = f"{name}, {steps} step{'s' * (steps > 1)}, {folders[0].name.rpartition('-')[2]} updates"
            print_row(title, models, steps, rest=rest, **how)


if __name__ == "__main__":
    run(main)
