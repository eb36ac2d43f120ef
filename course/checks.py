"""What exercises are checked with: `check` and `Wrong` for their files, and the running, comparing and diagnosing.

A check is a function (modules, generator) -> value. It is run twice, on modules with the student's function in them and
on the reference; the two values must be equal. Or it raises Wrong, with a sentence for the student.
"""

import _thread
import ast
import importlib.util
import math
import signal
import sys
import threading
import time
import types

import torch

from conduct import conduct_checks, settings_kept
from cutting import FILES, Answer, exercises, find, parsed, source_of, split, together

SECONDS = 6  # of processor time for one check; on a usual laptop the slowest takes less than one
PICTURE_SECONDS = 30  # the slowest takes 4


class Wrong(AssertionError):
    """Raised by a check: what is wrong, in a sentence for the student."""

    def __str__(self):
        return self.args[0]  # a second one is the kind of fault, for the proof


def check(target, why):
    """Marks a check of the function `target`. `why` tells the student what the check is about."""

    def mark(function):
        function.target, function.why, function.kinds = target, why, ()
        return function

    return mark


class Net(torch.nn.Module):
    """Stands for the UNet: every cell sees its neighbour, the timestep, the text. Keeps what it was asked, (x, t)."""

    config = types.SimpleNamespace(in_channels=4, sample_size=6)

    def __init__(self):
        super().__init__()
        self.p, self.asked = torch.nn.Parameter(torch.tensor(0.7)), []

    def forward(self, x, t, context):
        self.asked.append((x.detach(), t))
        shift = t[:, None, None, None] / 1000 + context.mean((1, 2))[:, None, None, None]
        return torch.tanh(self.p * x + 0.3 * x.roll(1, -1) + shift)


# ----------------------------------------------------------------------------------------------------------- time limit
class TooLong(BaseException):
    """A BaseException, so that an `except Exception` in an endless loop does not keep it from ending."""


class TimeLimit:
    """Within this context, TooLong is raised in the main thread after so many seconds of processor time.

    Processor time, so that a busy machine is not taken for an endless loop. A thread looks at the clock and simulates
    Ctrl-C, which works on every system. A loop inside of C code is not reached: for that the parent process waits.
    """

    def __init__(self, seconds):
        self.seconds, self.ended = seconds, threading.Event()

    def __enter__(self):
        self.expired, self.end = False, time.process_time() + self.seconds
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.ended.wait(0.1):
            if time.process_time() > self.end:
                self.expired = True
                _thread.interrupt_main()

    def interrupt(self, *_):
        if not self.expired:
            raise KeyboardInterrupt
        if not self.ended.is_set():
            raise TooLong

    def __exit__(self, *_):
        self.ended.set()
        signal.signal(signal.SIGINT, self.before)


# ---------------------------------------------------------------------------------------------------------- the modules
def load_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Course:
    """The reference's text, the exercises, and what is computed once.

    root      the project's folder: the reference, `emoji/`, `course/`
    """

    def __init__(self, root):
        self.root = root
        self.texts = {name: (root / file).read_text("utf-8") for name, file in FILES.items()}
        self.code = {name: compile(text, str(root / FILES[name]), "exec") for name, text in self.texts.items()}
        self.reference = self.graft({})
        self.expected, self.of_mistakes = {}, {}

    def exercise(self, number):
        """An exercise, with its checks {name: function} and its banks {name: entry}."""
        (exercise,) = exercises(self.root / "course", number)
        module = load_file(f"exercise_{number}", exercise.path)
        bank = load_file(f"mistakes_{number}", exercise.path.parent.parent / "mistakes" / exercise.path.name)
        exercise.checks = {name: f for name, f in vars(module).items() if hasattr(f, "why")}
        assert {c.target for c in exercise.checks.values()} == set(exercise.TARGETS), f"{exercise.path}: no check"
        first, last = conduct_checks(exercise, (TooLong, KeyboardInterrupt), Wrong)
        exercise.checks = first | exercise.checks | last
        exercise.show = module.show
        exercise.mistakes = {m["name"]: m for m in bank.MISTAKES}
        exercise.right = {m["name"]: m for m in bank.RIGHT}
        exercise.equivalent = getattr(bank, "EQUIVALENT", {})
        return exercise

    def graft(self, answers, paths=None):
        """The reference's modules with some functions replaced: {target: Answer} -> namespace of modules.

        All modules are made anew, because they import each other. `paths` {module: file name} for tracebacks.
        """
        trees, extras = {}, {}
        for target, answer in answers.items():
            module, name = split(target)
            tree = trees[module] if module in trees else trees.setdefault(module, ast.parse(self.texts[module]))
            holder = replace(tree, name, answer)
            ast.fix_missing_locations(answer.node)
            for place, added in ((tree, answer.extras), (holder, answer.methods)):
                extras.setdefault(id(place), (place, {}))[1].update({ast.unparse(n): (k, n) for k, n in added})
        for place, added in extras.values():
            place.body = together(place.body, added.values())
        saved = {name: sys.modules.pop(name, None) for name in FILES}
        made = types.SimpleNamespace()
        try:
            for name, file in FILES.items():
                module = types.ModuleType(name)
                module.__file__ = str(self.root / file)
                sys.modules[name] = module
                code = self.code[name]
                if name in trees:
                    where = (paths or {}).get(name, f"<{name}>")
                    code = compile(trees[name], where, "exec")
                exec(code, module.__dict__)
                setattr(made, name, module)
        finally:
            for name, module in saved.items():
                sys.modules.pop(name, None)
                if module is not None:
                    sys.modules[name] = module
        return made

    # --------------------------------------------------------------------------------------------------- running checks
    def run(self, exercise, answers, seed=0, paths=None, before=None, seconds=SECONDS, short=False):
        """{name of check: (None if right, else how it differs; the value)}, for the targets in `answers`.

        Each function is judged by itself, with the reference's in the places of all others: one mistake costs one
        function. `before(name)` is called before each check. `short`: a function's first failure is enough.
        """
        self.expect(exercise, seed)
        results = {}
        for target in exercise.TARGETS:
            if target not in answers:
                continue
            names = [name for name, f in exercise.checks.items() if f.target == target]
            try:
                with TimeLimit(seconds), settings_kept():
                    modules = self.graft({target: answers[target]}, paths)
            except BaseException as error:
                modules = Raised(error)
            for name in names:
                f, last = exercise.checks[name], "gradient" in exercise.checks[name].kinds
                if (last or short) and any(results[n][0] for n in names if n in results):
                    continue
                if before:
                    before(name)
                value = modules
                if not isinstance(modules, Raised):
                    value = value_of(f, modules, seed, seconds * (3 if last else 1 / 3 if f.kinds else 1))
                if isinstance(value, Raised) and isinstance(value.error, TooLong):
                    # An endless loop is waited for once. It is told by the checks of values: the other two call a
                    # function many times, and without values.
                    value, modules = (True, modules) if f.kinds else (value, value)
                how = value.says if isinstance(value, Raised) else difference(value, self.expected[name, seed])
                results[name] = how, value
        return results

    def expect(self, exercise, seed):
        """What the reference gives, before any code of a student runs."""
        if self.expected.get("exercise") is not exercise:
            self.expected, self.of_mistakes = {"exercise": exercise}, {}
        for name, function in exercise.checks.items():
            if (name, seed) not in self.expected:
                self.expected[name, seed] = value_of(function, self.reference, seed, 10 * SECONDS)

    def mistaken(self, entry):
        """A mistake or another right answer as {target: Answer}: edits of the reference's text, or whole functions."""
        found = {}
        for target, how in entry["code"].items():
            text = source_of(target, self.texts)
            if isinstance(how, str):
                text = how
            else:
                for old, new in how:
                    assert text.count(old) == 1, f"{entry['name']}: {old!r} is {text.count(old)} times in {target}"
                    text = text.replace(old, new)
            found[target] = Answer(parsed(text))
        return found

    def run_mistake(self, exercise, mistake, seed):
        """`run` of a known mistake, once for each seed."""
        key = mistake["name"], seed
        if key not in self.of_mistakes:
            self.of_mistakes[key] = self.run(exercise, self.mistaken(mistake), seed)
        return self.of_mistakes[key]

    def diagnose(self, exercise, results, target, seed=0):
        """The known mistake that gives what the student's function gives in every check that failed; else None.

        With two mistakes in a function no single one explains all: then one that explains the first failed check is
        taken, the one whose value the student is shown.
        """
        failed = {n: r[1] for n, r in results.items() if r[0] and exercise.checks[n].target == target}
        if all(
            isinstance(v, Raised) and isinstance(v.error, (NameError, SyntaxError, TooLong)) for v in failed.values()
        ):
            return None
        in_part = None
        for mistake in exercise.mistakes.values():
            if target not in mistake["code"]:
                continue
            theirs = {n: r[1] for n, r in self.run_mistake(exercise, mistake, seed).items() if r[0]}
            alike = {n for n in failed if n in theirs and difference(failed[n], theirs[n]) is None}
            if theirs.keys() == failed.keys() == alike:
                return mistake
            explains = next(iter(failed)) in alike and any(not isinstance(failed[n], Raised) for n in alike)
            if in_part is None and explains:
                in_part = mistake
        return in_part


def replace(tree, name, answer):
    """Puts an answer in the place of the function `name` of a module's tree -> the class or module that holds it."""
    holder, old = find(tree, name)
    answer.node.decorator_list = answer.node.decorator_list or old.decorator_list
    holder.body[holder.body.index(old)] = answer.node
    return holder


class Raised:
    """What a check gave, where it gave an exception."""

    def __init__(self, error):
        self.error, self.text = error, f"{type(error).__name__}: {error}"
        if isinstance(error, TooLong):
            self.says = f"still running after {SECONDS} seconds: is there a loop that never ends?"
        elif isinstance(error, SystemExit):
            self.says = "your code ends the program (sys.exit); a function returns its result instead"
        else:
            self.says = str(error) if isinstance(error, Wrong) else self.text


def value_of(function, modules, seed, seconds):
    torch.manual_seed(seed)
    try:
        with TimeLimit(seconds), settings_kept():
            return function(modules, torch.Generator().manual_seed(seed))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: an answer must not end the grader
        return Raised(error)


# ------------------------------------------------------------------------------------------------------------ comparing
def difference(a, b):
    """None if a is what b is, else in words how they differ (a is the student's)."""
    if isinstance(a, Raised) or isinstance(b, Raised):
        same = isinstance(a, Raised) and isinstance(b, Raised) and a.text == b.text
        return None if same else "an exception"
    if isinstance(b, torch.Tensor):
        return difference_of_tensors(a, b)
    if isinstance(b, float):
        if isinstance(a, torch.Tensor) and a.numel() == 1:
            a = a.item()
        if isinstance(a, bool) or not isinstance(a, (int, float)):
            return f"the result is of type {type(a).__name__}; a number is expected"
        if math.isnan(a) or math.isnan(b):
            return None if math.isnan(a) and math.isnan(b) else "the result is NaN"
        return None if a == b or abs(a - b) <= 1e-4 * abs(b) + 1e-7 else f"yours is {a:.5g}, right is {b:.5g}"
    if isinstance(b, dict):
        if not isinstance(a, dict):
            return f"the result is of type {type(a).__name__}; a dict is expected"
        if a.keys() != b.keys():
            return f"the result's names are {list(a)}; {list(b)} are expected"
        return next((f"{key}: {d}" for key in b if (d := difference(a[key], b[key]))), None)
    if isinstance(b, (list, tuple)):
        if not isinstance(a, (list, tuple)) or len(a) != len(b) or all(isinstance(x, str) for x in b) and list(a) != b:
            return f"yours is {a!r:.200}, right is {b!r:.200}"
        return next((d for x, y in zip(a, b) if (d := difference(x, y))), None)
    return None if type(a) is type(b) and a == b else f"yours is {a!r:.200}, right is {b!r:.200}"


def difference_of_tensors(a, b):
    if not isinstance(a, torch.Tensor):
        return f"the result is of type {type(a).__name__}; a tensor is expected"
    if a.shape != b.shape:
        return f"yours has shape {tuple(a.shape)}, right is {tuple(b.shape)}"
    if a.is_complex() != b.is_complex():
        return "the result has complex numbers; real ones are expected"
    a, b = a.detach().double(), b.detach().double()
    if not torch.isfinite(a).all():
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return f"the result has {(~torch.isfinite(a)).sum()} values that are NaN or infinite"
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)  # two mistakes alike
    if not a.numel():
        return None
    error, size = (a - b).abs(), b.abs().max().clamp(min=1e-6)
    if error.max() <= 1e-4 * size + 1e-7:
        return None
    k = error.argmax()
    place = [i.item() for i in torch.unravel_index(k, b.shape)]
    where = f", at {place} of shape {tuple(b.shape)}" if b.ndim else ""
    return f"yours is {a.flatten()[k].item():.4g}, right is {b.flatten()[k].item():.4g}{where}"


def in_general(a, b):
    """A guess at what is wrong that holds for any exercise: a factor, a sign, an order. None: no idea."""
    if isinstance(b, dict) and isinstance(a, dict) and a.keys() == b.keys():
        return next((guess for key in b if (guess := in_general(a[key], b[key]))), None)
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or not a.is_floating_point():
        return None
    if a.shape != b.shape:
        return "Your axes are in another order." if sorted(a.shape) == sorted(b.shape) else None
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    close = 1e-4 * b.abs().max()
    ends = a.min().item(), a.max().item()
    if len(a) > 20 and (a - b).abs().max() > close and (a - b.clamp(*ends)).abs().max() < close:
        return f"Your result is cut off at {ends[0]:.4g} and {ends[1]:.4g}."
    k = (a @ b / (b @ b).clamp(min=1e-12)).item()
    if (a - k * b).abs().max() < close and abs(k - 1) > 1e-3:
        return (
            "All signs are the wrong way round."
            if abs(k + 1) < 1e-3
            else f"Your result is {k:.4g} times the right one."
        )
    shift = (a - b).mean().item()
    if abs(shift) > close and (a - b - shift).abs().max() < close:
        return f"Your result is the right one plus {shift:.4g}, everywhere."
    if (a - b).abs().max() > close and (a.sort().values - b.sort().values).abs().max() < close:
        return "Your result has the right values in another order: look at the axes."
    return None


def suspect(answer, whole):
    """What the text of a wrong answer lets one suspect: something that it never reads, and the project's function
    (`whole`, its tree) does; or something that is kept from one call to the next. None: nothing."""

    nodes = [n for tree in answer.trees for n in ast.walk(tree)]
    defaults = [*answer.node.args.defaults, *filter(None, answer.node.args.kw_defaults)]

    def of_self(nodes, kind):
        found = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, kind))
        return [ast.unparse(n) for n in found if getattr(n.value, "id", None) == "self"]

    wanted = [n.arg for n in ast.walk(answer.node.args) if isinstance(n, ast.arg) and n.arg != "self"]
    wanted += of_self(ast.walk(whole), ast.Load)
    read = {n.id for n in nodes if isinstance(n, ast.Name)} | {*of_self(nodes, ast.Load)}
    if unread := [f"`{name}`" for name in dict.fromkeys(wanted) if name not in read]:
        return f"You do not use {', '.join(unread)}."
    mine = {n.id for n in ast.walk(answer.node) if isinstance(n, ast.Name)}
    boxes = [(ast.unparse(n.targets[0]), n.value) for _, n in answer.extras if isinstance(n, ast.Assign)]
    boxes = [("a default value", d) for d in defaults] + [(name, value) for name, value in boxes if name in mine]
    kept = [name for name, b in boxes if ast.unparse(b) in ("{}", "[]", "dict()", "list()", "set()")]
    kept += {*of_self(nodes, ast.Store)} - {*of_self(ast.walk(whole), ast.Store)}
    return f"What you keep in {kept[0]} from one call to the next may not fit the next one." if kept else None
