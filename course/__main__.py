"""The course: thirteen exercises, cut from the project's own files.

In the students' folder:
    python course                        # the board: what is done, what is next
    python course check 5                # checks exercise 5; before it is begun: what is to be done
    python course check 5 --picture      # a picture of what your code of exercise 5 makes
    python course project A FOLDER       # the score of a project

In the project, for teachers:
    python course cut FOLDER             # the students' folder, or hand-out.zip
    python course cut FILE.zip --autograder    # for Gradescope
    python course grade FOLDER --seed S  # the points of a student's files
    python course prove                  # that the checks can be trusted
    python course project A FOLDER       # the score of a project
"""

import argparse
import base64
import json
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cutting import FILES, answers, fingerprint, line_of, split  # noqa: E402
from running import ROOT, SEALED, Project, UserError, check, check_all, picture, student_files  # noqa: E402

PRINTED = 20  # lines of a student's own output that are shown
OUTPUTS = ROOT / "outputs"
KEPT = OUTPUTS / "course.json"  # what the board remembers of the last check of each exercise


# --------------------------------------------------------------------------------------------------------- for students
def board(project):
    """What is done, what it counts, and what is next."""
    if not project.is_cut:
        listing(project)
        return
    paths, texts = student_files(ROOT)
    kept, total, begun, fresh = read_kept(), 0, [], []
    marks = {e.number: fingerprint(e, texts, project.texts) for e in project.exercises}
    new = [e for e in project.exercises if kept.get(str(e.number), {}).get("mark") != marks[e.number]]
    results = check_all(project, new, paths, texts)
    for exercise in project.exercises:
        if exercise in new:
            keep(kept, next(results), marks[exercise.number])
        points, state = kept[str(exercise.number)]["points"], kept[str(exercise.number)]["state"]
        print(f"{row(exercise)}  {number(points):>5} of {exercise.POINTS:2}   {state}".rstrip(), flush=True)
        total += points
        if points < exercise.POINTS:
            (begun if state else fresh).append(exercise.number)
    write_kept(kept)
    most = sum(exercise.POINTS for exercise in project.exercises)
    print(f"\n{number(total)} of {most} points. ", end="")
    if begun or fresh:
        print(f"Next: python course check {[*begun, *fresh][0]}")
    else:
        print('All done. This runs your own code: python sample.py "a cat"')


def number(points):
    return f"{points:.2f}".rstrip("0").rstrip(".")


def row(exercise):
    return f"{exercise.number:2}  {exercise.TITLE:<36} {exercise.MINUTES:3} minutes"


def state_of(result):
    if result.failed:
        return "cannot be checked"
    if not result.begun:
        return ""
    wrong = sum(state == "wrong" for state in result.state.values())
    empty = sum(state == "empty" for state in result.state.values())
    if wrong:
        return f"{wrong} of {len(result.state)} functions wrong"
    return f"{empty} of {len(result.state)} functions not written yet" if empty else "done"


def listing(project):
    for exercise in project.exercises:
        print(f"{row(exercise)}  {exercise.POINTS:2} points")
    print("\nThis is the project itself, with all solutions. The students' folder: python course cut FOLDER")


def read_kept():
    try:
        kept = json.loads(KEPT.read_text("utf-8"))
        return {
            number: dict(mark=e["mark"], points=float(e["points"]), state=str(e["state"])) for number, e in kept.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # then everything is checked again


def keep(kept, result, mark):
    mark = None if result.failed else mark  # what could not be judged is judged again
    kept[str(result.exercise.number)] = {"mark": mark, "points": result.points, "state": state_of(result)}


def write_kept(kept):
    try:
        OUTPUTS.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1), "utf-8")
    except OSError:
        pass  # then the board checks again


def check_one(project, number, with_picture):
    """Returns the exit code: 0 if all is right."""
    exercise = find_exercise(project, number)
    paths, texts = student_files(ROOT)
    written = answers(exercise, texts, project.texts)
    if not any(written.values()):
        print(introduction(exercise, texts))
        if with_picture:
            print(f"There is no picture yet: none of exercise {number} is written.")
        return 1
    if with_picture:
        show(exercise, picture(project, exercise, paths, texts))
        return 0
    result = check(project, exercise, paths, texts)
    print(report(result))
    if project.is_cut:
        kept = read_kept()
        keep(kept, result, fingerprint(exercise, texts, project.texts))
        write_kept(kept)
    return 0 if result.points == exercise.POINTS else 1


def find_exercise(project, number):
    found = [exercise for exercise in project.exercises if exercise.number == number]
    if not found:
        raise UserError(f"there is no exercise {number}: they have the numbers 1 to {len(project.exercises)}")
    return found[0]


def heading(exercise):
    line = f"Exercise {exercise.number}: {exercise.TITLE} ({exercise.POINTS} points, about {exercise.MINUTES} minutes)"
    return f"{line}\n{'-' * len(line)}"


def introduction(exercise, texts):
    """The exercise's text, and where the functions to write stand, in the order of the files."""
    lines, files = [heading(exercise), exercise.text, "", "To be written:"], [split(t)[0] for t in exercise.TARGETS]
    places = [(files.index(split(t)[0]), line_of(t, texts) or 0, *split(t)) for t in exercise.TARGETS]
    for _, line, module, name in sorted(places):
        lines.append(f"  {name} in {FILES[module]}{f', line {line}' if line else ''}")
    return "\n".join([*lines, "", f"Then: python course check {exercise.number}"])


def report(result):
    """What a student reads about a checked exercise."""
    exercise = result.exercise
    lines = [heading(exercise)]
    if result.printed.strip():  # above the checks, so that what matters comes last
        printed = result.printed.rstrip().split("\n")
        more = [f"  ... {len(printed) - PRINTED} lines more"] if len(printed) > PRINTED else []
        lines += ["", "Your code printed:", *(f"  {line}" for line in printed[:PRINTED]), *more]
    for target, state in result.state.items():
        module, name = split(target)
        lines += ["", f"{name} ({FILES[module]})"]
        if target in result.problems:
            lines += wrapped(result.problems[target], "  NO   ", "       ")
        elif state == "empty":
            lines.append("  not written yet")
        lines += lines_of_checks([c for c in result.checks if c[0] == target])
        if result.hints.get(target):
            lines += ["", *wrapped(result.hints[target], "       ", "       ")]
    if result.failed:
        first, *rest = result.failed.split("\n")
        lines += ["", *wrapped(first, "  NO   ", "       "), *(f"       {line}" for line in rest)]
    points = f"{number(result.points)} of {exercise.POINTS} points."
    if result.points == exercise.POINTS:
        points += f" See what you have made: python course check {exercise.number} --picture"
    return "\n".join([*lines, "", points])


def lines_of_checks(checks):
    """The first check that fails is shown in full: it is the one to look at. Those after it may fail for its reason."""
    lines, first = [], True
    for _, _, why, how in checks:
        lines.append(f"  {'ok' if how is None else 'NO'}   {why}")
        if how and first:
            lines += [line for part in how.split("\n") for line in wrapped(part, "       ", "       ")]
            first = False
    return lines


def wrapped(text, first, then):
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=then) or [first]


def show(exercise, event):
    """Saves the picture under a name of its own."""
    number, name = exercise.number, exercise.path.stem.split("_")[1]
    try:
        OUTPUTS.mkdir(exist_ok=True)
        for k in range(1, 10_000):
            path = OUTPUTS / f"{number:02}-{name}{f'-{k}' if k > 1 else ''}.png"
            if not path.exists():
                path.write_bytes(base64.b64decode(event["png"]))
                break
    except OSError as error:
        raise UserError(f"cannot write to {OUTPUTS}: {error.strerror}") from None
    print(f"{os.path.relpath(path)}\n\n{event['words']}")


# --------------------------------------------------------------------------------------------------------- for teachers
def grade(project, folder, seed, out):
    """Checks all exercises of a student's folder. With `out` it writes Gradescope's results.json, from the start on."""
    tests = [
        {"number": str(e.number), "name": e.TITLE, "score": 0, "max_score": e.POINTS, "output": "not graded"}
        for e in project.exercises
    ]
    write_results(tests, out)
    try:
        paths, texts = student_files(folder)
    except UserError as error:
        for test in tests:
            test["output"] = str(error)
        write_results(tests, out)
        raise
    for result, test in zip(check_all(project, project.exercises, paths, texts, seed), tests):
        test["score"], test["output"] = result.points, report(result)
        write_results(tests, out)
        line = f"{row(result.exercise)}  {number(result.points):>5} of {result.exercise.POINTS:2}   {state_of(result)}"
        print(line.rstrip(), flush=True)
    total, most = sum(test["score"] for test in tests), sum(test["max_score"] for test in tests)
    print(f"\n{number(total)} of {most} points")
    if not out:  # Gradescope may show to students what is printed
        from answers import collect

        print(f"\n{collect(folder)}")


def write_results(tests, out):
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"tests": tests, "visibility": "visible"}, indent=1, ensure_ascii=False), "utf-8")


def prove_all(number, seeds):
    """A line for each exercise, and the sums; exit code 1 if anything is not proven."""
    import torch

    torch.set_num_threads(1)
    from checks import Course
    from proof import prove

    course, total, kinds, problems = Course(ROOT), Counter(), Counter(), []
    for n in [e.number for e in Project().exercises if number in (None, e.number)]:
        exercise = course.exercise(n)
        for seed in seeds:
            counts, of_kinds, seconds, found = prove(course, exercise, seed)
            problems += [f"exercise {n}, seed {seed}: {problem}" for problem in found]
        total, kinds = total + counts, kinds + of_kinds
        print(f"{n:2}  {exercise.TITLE:<36} {listed(counts)}; a check takes {seconds:.1f} s", flush=True)
    named = kinds.pop("named", 0)
    print(f"\nSeeds {', '.join(map(str, seeds))}: {listed(total)}; {len(problems)} problems")
    print(f"Bad conduct: {listed(kinds)}; {named} of {sum(kinds.values())} told by its kind")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


def listed(counts):
    return ", ".join(f"{count} {name}" for name, count in counts.items())


# ----------------------------------------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help shows all options)")


def parse_args(argv, is_cut):
    """In a students' folder, where `is_cut`, only what works there is offered."""
    text = __doc__.split("\nIn the project")[0] if is_cut else __doc__
    parser = Parser("python course", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, words):
        return commands.add_parser(name, help=words, description=words).add_argument

    add = command("check", "checks an exercise; before it is begun: what is to be done")
    add("number", type=int, metavar="N", help="its number, 1 to 13")
    add("--picture", action="store_true", help="saves a picture of what your code makes, right or wrong")
    if not is_cut:
        add = command("cut", "makes the students' folder")
        add("folder", type=Path, help="a new folder, or a new .zip file")
        add("--autograder", action="store_true", help="makes Gradescope's autograder.zip instead")
        add = command("grade", "checks all exercises of a student's folder")
        add("folder", type=Path)
        add("--seed", type=int, default=0, help="of the numbers in the checks (%(default)s, as the students')")
        add("--out", type=Path, metavar="FILE", help="Gradescope's results.json")
        add = command("prove", "proves that the checks can be trusted")
        add("number", type=int, nargs="?", metavar="N", help="one exercise (all)")
        add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], metavar="S", help="(0 1 2 3)")
    add = command("project", "the score of a project under its rules")
    add("name", choices=["A", "B", "C"])
    add("folder", type=Path, help="what the student hands in")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv, is_cut=SEALED.exists())
    project = Project()
    if args.command is None:
        board(project)
    elif args.command == "check":
        return check_one(project, args.number, args.picture)
    elif args.command == "cut":
        from handing import cut_autograder, cut_folder

        print((cut_autograder if args.autograder else cut_folder)(project, args.folder))
    elif args.command == "grade":
        grade(project, args.folder, args.seed, args.out)
    elif args.command == "prove":
        return prove_all(args.number, args.seeds)
    else:
        from projects import score

        score(project, args.name, args.folder, args.seed)
    return 0


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
