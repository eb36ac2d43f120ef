"""Runs a student's code: each exercise in a process of its own, in a folder of its own, with a time limit.

The folder is a fresh copy of the project, written from memory: an answer that deletes or changes files there costs its
own exercise and no other. It is not a prison: code that sets out to cheat or to do harm can.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cutting import FILES, Problem, answers, exercises

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEALED = HERE / "sealed"  # where `cut` made the folder: reference and banks, packed so that nobody reads by chance
PARSING = threading.Lock()  # Python 3.11's ast.parse fails now and then where two threads parse at once
WALL_SECONDS = 120  # for a loop that the child's own limit does not reach, or sleep()
# Of emoji/, what exercises, sample.py and train.py read.
EMOJI = [
    "captions.txt", "evaluate.py", "model_index.json", "prompts.txt", "pytorch_lora_weights.safetensors", "renders.png",
    "evaluator", "features", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
]  # fmt: skip


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its message, one line, and exits with code 2."""


def files_below(folder):
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    return [p for p in paths if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc"]


class Project:
    """The project in memory, {path: bytes} and the reference's {module: text}, also where `cut` has sealed it."""

    def __init__(self):
        kept = [*FILES.values(), *(f"emoji/{name}" for name in EMOJI), "course"]
        self.files = {p.relative_to(ROOT).as_posix(): p.read_bytes() for k in kept for p in files_below(ROOT / k)}
        self.is_cut = SEALED.exists()
        if self.is_cut:
            sealed = json.loads(zlib.decompress(self.files.pop("course/sealed")))
            self.files |= {path: text.encode() for path, text in sealed.items()}
        self.texts = {name: self.files[file].decode() for name, file in FILES.items()}
        self.exercises = exercises(HERE)

    def write(self, folder):
        for path, data in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def student_files(folder):
    """{module: its path} and {module: its text}, of a student's folder. Also where emoji/evaluate.py lies flat."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    paths, texts = {}, {}
    for module, file in FILES.items():
        path = next((p for p in (folder / file, folder / Path(file).name) if p.is_file()), None)
        if path:
            paths[module], texts[module] = str(path), path.read_bytes().decode("utf-8-sig", "replace")
    if not texts:
        raise UserError(f"{folder} holds none of the course's files, such as hipa.py")
    return paths, texts


class Result:
    """What came of checking one exercise.

    state     {target: "right", "wrong" or "empty"}
    checks    [[target, name, why, None if right, else what is wrong]]
    hints     {target: a sentence}
    problems  {target: a sentence}, of what could not be read, or ended the process
    failed    why nothing could be judged, or None
    """

    def __init__(self, exercise, written):
        self.exercise, self.checks, self.hints, self.failed, self.printed = exercise, [], {}, None, ""
        self.problems = {target: str(a) for target, a in written.items() if isinstance(a, Problem)}
        self.state = {target: "wrong" if a else "empty" for target, a in written.items()}

    def take(self, event):
        """What was found of one function."""
        self.checks, self.printed = self.checks + event["checks"], self.printed + event["printed"]
        self.hints[event["done"]] = event["hint"]
        # A function's points come only with all of its checks.
        self.state[event["done"]] = "wrong" if any(c[3] for c in event["checks"]) else "right"

    @property
    def points(self):
        share = sum(state == "right" for state in self.state.values()) / len(self.state)
        return round(share * self.exercise.POINTS, 2)

    @property
    def begun(self):
        return any(state != "empty" for state in self.state.values())


def check(project, exercise, paths, texts, seed=0):
    """Checks one exercise of a student's files -> Result. Whatever the student's code does, there is one.

    A function that ends the process, or is waited for in vain, costs itself: the remaining ones are run again.
    """
    with PARSING:
        written = answers(exercise, texts, project.texts)
    result, end = Result(exercise, written), time.monotonic() + 2 * WALL_SECONDS
    left = [target for target, a in written.items() if a and target not in result.problems]
    while left:
        events, failed = ask(project, exercise, paths, texts, seed, left, min(WALL_SECONDS, end - time.monotonic()))
        done = [event["done"] for event in events if "checks" in event]
        for event in events:
            if "checks" in event:
                result.take(event)
        left = [target for target in left if target not in done]
        if left:
            last = next((e for e in reversed(events) if e.get("begun") in left), {"begun": left[0]})
            late = left if time.monotonic() > end - 1 else [last["begun"]]
            why = f"{failed}\nThis happened while it was checked: {last['why']}" if "why" in last else failed
            result.problems |= dict.fromkeys(late, why)
            left = [target for target in left if target not in late]
    return result


def check_all(project, some, paths, texts, seed=0):
    """Yields the Result of each exercise in `some`, in order; two run at a time. Raises nothing."""

    def one(exercise):
        try:
            return check(project, exercise, paths, texts, seed)
        except Exception as error:
            result = Result(exercise, {target: None for target in exercise.TARGETS})
            result.failed = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return result

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(one, some)


def picture(project, exercise, paths, texts):
    """-> {"png": base64, "words", "printed"}. Raises UserError."""
    events, failed = ask(project, exercise, paths, texts, 0)
    failed = events[-1].get("failed") if events and "printed" in events[-1] else failed
    if failed:
        raise UserError(failed.replace("\n", "; "))
    return events[-1]


def ask(project, exercise, paths, texts, seed, only=None, seconds=WALL_SECONDS):
    """Runs child.py for an exercise, or its picture -> its events, and in words how it ended if it did not answer."""
    request = {"exercise": exercise.number, "paths": paths, "texts": texts, "seed": seed, "only": only}
    return run_child(project, "child.py", request, seconds)


def plain(value):
    """An event with its escape codes as text: what a student's code prints must not steer a terminal."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def run_child(project, script, request, seconds):
    """Runs a script of course/ in a fresh copy of the project -> its events, and in words how it ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        project.write(Path(folder))
        command, pipe = [sys.executable, str(Path(folder) / "course" / script)], subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder)
        timed_out = False
        try:
            out, err = child.communicate(json.dumps(request).encode() + b"\n", seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            timed_out = True
            out, err = child.communicate()
    events = []
    for line in out.decode("utf-8", "replace").splitlines():
        try:
            events.append(plain(json.loads(line)))
        except ValueError:
            continue
    if timed_out:
        return events, f"stopped after {seconds:.0f} seconds: is there a loop that never ends, or a sleep?"
    if not events:
        last = err.decode("utf-8", "replace").strip().splitlines() or [f"exit code {child.returncode}"]
        hint = "; pip install -r requirements.txt" if "ModuleNotFoundError" in last[-1] else ""
        raise UserError(f"the checks cannot start: {last[-1]}{hint}")
    return events, f"your code ended Python itself (exit code {child.returncode})"
