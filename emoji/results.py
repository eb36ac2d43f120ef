"""Remakes the tables of docs/results.md and README.md: runs each table's command and puts what it prints in its place.

    python emoji/results.py                # all; says first how long that takes, and goes on where it stopped
    python emoji/results.py jobs speed     # these anew

A table's place is between `<!-- name -->` and `<!-- / -->`. What the commands printed is kept in `runs/results`. Leave
the machine alone meanwhile: speed is measured, and peers are trained for equal time. One table is of a copy of the
model, which make.py trains first, with the font that it names.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hipa  # noqa: E402
from lora import write_file  # noqa: E402
from sample import run  # noqa: E402

PAGES = [ROOT / "docs" / "results.md", ROOT / "README.md"]
COPY = "-m torch.distributed.run --nproc_per_node 2 emoji/make.py --device cpu --improve"
OF_VARIED = "hipa without-both without-the-energy-term without-all-three as-the-paper-trains regression-of-latents"
TABLES = {  # name: (commands, of which the last prints it; minutes of two cores that do nothing else)
    "measures": (["emoji/evaluate.py --calibrate"], 1),
    "table": (["emoji/table.py --share 0.33"], 90),
    "varied": (
        [f"{COPY} varied 30", f"emoji/table.py --share 0.33 --model emoji/build/varied --rows {OF_VARIED}"],
        105,
    ),
    "halves": (["emoji/evaluate.py --halves"], 3),
    "jobs": (["emoji/jobs.py"], 30),
    "speed": (["emoji/bench.py command pictures small train large load"], 10),
}
OF_MAIN = "**HiPA**", "as the paper trains", "regression of latents", "LCM-LoRA"
COLUMNS = 7  # of the README
IN_README = "25 steps", "plain 1 step", "the shipped", *OF_MAIN


def output(command):
    """What the command prints; its progress is shown."""
    process = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise hipa.UserError(f"python {command} ended with code {process.returncode}")
    return process.stdout.strip()


def commit():
    """The commit that the files are at, short, with "-dirty" if they are not quite."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main_rows(table):
    """Of what table.py prints the rows and the columns of the README."""
    _, _, head, rule, *rows = table.splitlines()  # after the command and an empty line
    lines = [head, rule, *(row for row in rows if row.removeprefix("| ").startswith(IN_README))]
    return "\n".join("|".join(line.split("|")[: COLUMNS + 1]) + "|" for line in lines) + "\n"


def put(page, name, text):
    """Replaces what stands in the page between the marks of `name`, if they are there."""
    old = page.read_text("utf-8")
    new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- / -->)", lambda m: f"{m[1]}{text}{m[2]}", old, flags=re.DOTALL)
    if new != old:
        write_file(page, new.encode())
        print(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="(all that are not there)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results", help="(runs/results)")
    args = parser.parse_args()
    kept = {name: args.out / f"{name}.md" for name in TABLES}
    names = args.tables or list(TABLES)
    missing = args.tables or [name for name in TABLES if not kept[name].exists()]
    minutes = sum(TABLES[name][1] for name in missing)
    print(f"{', '.join(missing) or 'nothing'}: about {minutes} minutes", file=sys.stderr)
    hipa.writable(args.out)
    for name in missing:
        commands, state = TABLES[name][0], commit()
        printed = [output(command) for command in commands][-1]
        how = ", then ".join(f"`python {command}`" for command in commands)
        write_file(kept[name], f"{how}, at {state}:\n\n{printed}\n".encode())
    for name in names:
        text = kept[name].read_text("utf-8")
        put(PAGES[0], name, text)
        if name == "table":
            put(PAGES[1], name, main_rows(text))


if __name__ == "__main__":
    run(main)
