"""The process in which a student's code runs: a request comes in on stdin, events go out on stdout, one JSON a line.

It runs in a folder of its own, a copy of the project, so that an answer can break nothing else. See `running.py`.
"""

import base64
import io
import json
import os
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Capped(io.TextIOBase):
    """Stands for stdout and stderr: keeps the first characters that are printed, and counts the rest."""

    def __init__(self, most=2000):
        self.text, self.most, self.count = "", most, 0

    def write(self, text):
        self.text += text[: max(0, self.most - len(self.text))]
        self.count += len(text)
        return len(text)


def begin():
    """-> tell(**event), which sends an event, and the request. From here on stdout and stderr are the student's."""
    import torch

    torch.set_num_threads(1)  # everything here is small; two threads on a busy laptop are slower than one
    request = json.loads(sys.stdin.buffer.readline())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that no print of any library gets between the events
    sys.stdout = sys.stderr = Capped()

    def tell(**event):
        out.write(json.dumps(event) + "\n")
        out.flush()

    return tell, request


def main():
    from checks import Course

    tell, request = begin()
    printed = sys.stdout
    course = Course(HERE.parent)
    exercise = course.exercise(request["exercise"])
    tell(ready=True)
    if request["picture"]:
        tell(**picture(course, exercise, request), printed=shown(printed))
    else:
        tell(**judge(course, exercise, request, tell), printed=shown(printed))


def shown(printed):
    more = f"\n... and {printed.count - len(printed.text):,} characters more" if printed.count > printed.most else ""
    return printed.text + more


def judge(course, exercise, request, tell):
    """-> {"checks": [[target, name, why, None if right, else what is wrong]], "hints": {target: sentence}}"""
    from checks import Raised, Wrong, in_general
    from cutting import Answer, answers

    written = answers(exercise, request["texts"], course.texts)
    written = {target: answer for target, answer in written.items() if isinstance(answer, Answer)}
    seed, paths = request["seed"], request["paths"]
    results = course.run(exercise, written, seed, paths, before=lambda name: tell(begun=exercise.checks[name].why))
    checks, hints = [], {}
    for name, (how, value) in results.items():
        f = exercise.checks[name]
        if isinstance(value, Raised) and not isinstance(value.error, Wrong):
            how += place_of(value.error, set(paths.values()))
        checks.append([f.target, name, f.why, how])
    for target in written:
        failed = [n for n, r in results.items() if r[0] and exercise.checks[n].target == target]
        if failed:
            mistake = course.diagnose(exercise, results, target, seed)
            first = failed[0]
            guess = mistake["says"] if mistake else in_general(results[first][1], course.expected[first, seed])
            hints[target] = guess
    return {"checks": checks, "hints": hints}


def place_of(error, paths):
    """Where in the student's own files an exception was raised, in a line of its own; "" if in none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in paths]
    if not frames:
        return ""
    last = frames[-1]
    line = f": {last.line}" if last.line else ""
    return f"\n{Path(last.filename).name}, line {last.lineno}, in {last.name}{line}"


def picture(course, exercise, request):
    """What the student sees at the end, made with the student's own functions. -> {"png": base64, "words"}"""
    from checks import PICTURE_SECONDS, TimeLimit, Wrong
    from cutting import Answer, answers

    written = answers(exercise, request["texts"], course.texts)
    written = {target: answer for target, answer in written.items() if isinstance(answer, Answer)}
    try:
        with TimeLimit(PICTURE_SECONDS):
            image, words = exercise.show(course.graft(written, request["paths"]))
    except BaseException as error:
        where = place_of(error, set(request["paths"].values()))
        says = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}{where}"
        return {"failed": f"no picture: {says}"}
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return {"png": base64.b64encode(file.getvalue()).decode(), "words": words}


if __name__ == "__main__":
    main()
