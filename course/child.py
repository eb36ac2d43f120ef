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

    def taken(self):
        """What was printed since the last time."""
        more = f"\n... and {self.count - len(self.text):,} characters more" if self.count > self.most else ""
        text, self.text, self.count = self.text + more, "", 0
        return text

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
    limit_memory()
    if request["only"] is None:
        tell(**picture(course, exercise, request), printed=printed.taken())
    else:
        judge(course, exercise, request, lambda **e: tell(**e, printed=printed.taken() if "checks" in e else ""))


def limit_memory(bytes_more=3 * 2**30):
    """So that an answer that would fill the memory costs itself, not the machine: where a system has such a limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_more, most))
    except (ImportError, OSError, ValueError):
        pass


def own_answers(course, exercise, request):
    from cutting import Answer, answers

    written = answers(exercise, request["texts"], course.texts)
    return {target: answer for target, answer in written.items() if isinstance(answer, Answer)}


def judge(course, exercise, request, tell):
    """Tells of each function when it begins, of each of its checks, and at the end
    "checks": [[target, name, why, None if right, else what is wrong]] and "hint": a sentence or None."""
    from checks import Raised, Wrong, in_general, suspect
    from cutting import parsed, source_of

    seed, paths = request["seed"], request["paths"]

    def before(name):
        tell(begun=exercise.checks[name].target, why=exercise.checks[name].why)

    for target, answer in own_answers(course, exercise, request).items():
        if target not in request["only"]:
            continue
        tell(begun=target)
        results = course.run(exercise, {target: answer}, seed, paths, before)
        checks, hint = [], None
        for name, (how, value) in results.items():
            if isinstance(value, Raised) and not isinstance(value.error, Wrong):
                how += place_of(value.error, set(paths.values()))
            checks.append([target, name, exercise.checks[name].why, how])
        failed = next((name for name, r in results.items() if r[0]), None)
        if failed:
            mistake, mine = course.diagnose(exercise, results, target, seed), results[failed][1]
            crashed = isinstance(mine, Raised) and not isinstance(mine.error, Wrong)
            if mistake:
                hint = mistake["says"]
            elif not crashed and "type" not in exercise.checks[failed].kinds:
                whole = parsed(source_of(target, course.texts))
                hint = suspect(answer, whole) or in_general(mine, course.expected[failed, seed])
        tell(done=target, checks=checks, hint=hint)


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
    from checks import PICTURE_SECONDS, Raised, TimeLimit, TooLong, Wrong

    written = own_answers(course, exercise, request)
    for how, value in course.run(exercise, written, 0).values():  # a loop that never ends is found sooner by the checks
        if isinstance(value, Raised) and isinstance(value.error, TooLong):
            return {"failed": f"no picture: {how}"}
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
