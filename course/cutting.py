"""The exercises as text: which functions they are, how `cut` empties them, and what a student wrote into them.

An exercise names functions of the project's own files ("hipa.Schedule.add_noise"). There is no second copy of any
solution: the project is the reference. This file reads text only and imports no torch, so that the board answers at
once.
"""

import ast
import functools
import hashlib
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

# The files that exercises are cut from, in the order in which they import each other.
FILES = {name: f"{name}.py" for name in ("clip", "unet", "vae", "lora", "losses", "hipa", "sample", "train")}
FILES |= {"evaluate": "emoji/evaluate.py", "make": "emoji/make.py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
parse = functools.lru_cache(ast.parse)  # for trees that are only read


class Problem(Exception):
    """What keeps an answer from being read, in a sentence for the student."""


@dataclass
class Exercise:
    """What an exercise's file says at its top: literals, so that they can be read without running it."""

    number: int
    path: Path
    text: str  # the exercise, for the student
    TITLE: str
    MINUTES: int
    POINTS: int
    TARGETS: list[str]  # the functions to write, as "module.Class.function"
    FORBIDDEN: dict[str, str] = field(default_factory=dict)  # {a name that the answer must not use: why}


def read_exercise(path):
    tree = ast.parse(path.read_text("utf-8"))
    known = Exercise.__dataclass_fields__
    found = {}
    for node in tree.body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name.isupper() and name in known:
            found[name] = ast.literal_eval(node.value)
    return Exercise(int(path.stem.split("_")[0]), path, ast.get_docstring(tree), **found)


def exercises(folder, number=None):
    """All exercises in course/exercises, or the one of that number, in a list."""
    paths = sorted((folder / "exercises").glob("*.py"))
    return [read_exercise(path) for path in paths if number in (None, int(path.stem.split("_")[0]))]


def split(target):
    """ "hipa.Schedule.add_noise" -> ("hipa", "Schedule.add_noise")"""
    module, _, name = target.partition(".")
    return module, name


def find(tree, name):
    """The class or module that holds the function "Class.function", and the function. Raises KeyError."""
    *classes, last = name.split(".")
    for cls in classes:
        tree = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls), None)
        if tree is None:
            raise KeyError(name)
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and node.name == last:
            return tree, node
    raise KeyError(name)


def source_of(target, texts):
    """The text of a function, from its first decorator to its end. `texts`: {module: text}."""
    module, name = split(target)
    _, node = find(parse(texts[module]), name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(texts[module].splitlines()[first - 1 : node.end_lineno]) + "\n"


def parsed(source):
    """The text of one function, of any indentation -> its tree."""
    return ast.parse(textwrap.dedent(source)).body[0]


# --------------------------------------------------------------------------------------------------------------- to cut
def after_docstring(node):
    return node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body


def stub(text, name, number):
    """A module's text with the body of one function emptied. All else stays, byte for byte."""
    _, node = find(ast.parse(text), name)
    lines = text.splitlines(keepends=True)
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    else:  # comments before the first statement are part of the answer: cut from where `def f(...):` ends
        first = node.body[0].lineno - 1
        while not lines[first - 1].split("  #")[0].rstrip().endswith(":"):
            first -= 1
    indent = " " * node.body[0].col_offset
    todo = f'{indent}raise NotImplementedError("exercise {number}: python course check {number}")\n'
    return "".join([*lines[:first], todo, *lines[node.end_lineno :]])


def cut(texts, all_exercises):
    """{module: text} with the functions of all exercises emptied."""
    texts = dict(texts)
    for exercise in all_exercises:
        for target in exercise.TARGETS:
            module, name = split(target)
            texts[module] = stub(texts[module], name, exercise.number)
    return texts


def is_stub(node):
    first = after_docstring(node)[0]
    empty = isinstance(first, ast.Pass) or isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (
        empty
        and len(after_docstring(node)) == 1
        or (isinstance(first, ast.Raise) and "NotImplementedError" in ast.unparse(first))
    )


def line_of(target, texts):
    """The line on which a function begins in a student's file, or None."""
    module, name = split(target)
    try:
        return find(parse(texts[module]), name)[1].lineno
    except (KeyError, SyntaxError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------------------ an answer
@dataclass
class Answer:
    """A function as a student wrote it, and what else of the file it may use: statements that the project has not, each
    with the number of the project's own statement after which it stands (-1: before all)."""

    node: ast.FunctionDef
    extras: list = field(default_factory=list)  # of the module: imports, helpers, constants
    methods: list = field(default_factory=list)  # of the function's class

    @property
    def trees(self):
        return [self.node, *(node for _, node in (*self.extras, *self.methods))]


def added(body, old):
    """The statements of a module or class that are not in the project's, [(number, statement)]: what prints, calls or
    asserts at the top is left out."""
    known = {getattr(node, "name", None) or ast.unparse(node): i for i, node in enumerate(old)}
    found, place = [], -1
    for node in body:
        key = getattr(node, "name", None) or ast.unparse(node)
        place = known.get(key, place)
        if key not in known and not isinstance(node, (ast.Expr, ast.Assert, ast.Raise)):
            first = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            found.append((-1 if first else place, node))
    return found


def together(old, extras):
    """The project's statements with those of students among them, `from __future__` first."""
    extras = sorted(extras, key=lambda e: (e[0], getattr(e[1], "module", None) != "__future__"))
    return [
        n for i, node in enumerate([None, *old], -1) for n in ([node] * (i >= 0) + [e for k, e in extras if k == i])
    ]


def answers(exercise, texts, reference):
    """What a student wrote: {target: Answer, None where nothing is written yet, or Problem}.

    texts       {module: text} of the student's files
    reference   the project's own {module: text}, to tell what the student has added
    """
    found = {}
    for target in exercise.TARGETS:
        try:
            answer = read_answer(target, texts, reference)
            found[target] = None if is_stub(answer.node) else answer
            for word in exercise.FORBIDDEN if found[target] else ():
                if uses(answer, word):
                    raise Problem(f"{split(target)[1]} uses {word}: {exercise.FORBIDDEN[word]}")
        except Problem as problem:
            found[target] = problem
    return found


def read_answer(target, texts, reference):
    module, name = split(target)
    file, text = FILES[module], texts.get(module)
    if text is None:
        raise Problem(f"{file} is missing")
    try:
        tree, error = parse(text), None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:  # it may be in another exercise
        tree, error = ast.Module(salvage(text.splitlines()), []), problem
    old = parse(reference[module])
    try:
        holder, node = find(tree, name)
    except KeyError:
        if error is None:
            raise Problem(f"{file} has no {name} any more: the function's name and place must stay") from None
        line = getattr(error, "lineno", None)
        place = f"{file}, line {line}" if line else file
        raise Problem(f"{place}: Python cannot read this file: {getattr(error, 'msg', error)}") from None
    methods = added(holder.body, find(old, name)[0].body) if holder is not tree else []
    return Answer(node, added(tree.body, old.body), methods)


def salvage(lines, first=0, depth=0):
    """The statements, at an indentation, of a file that does not parse: all that do alone. `first`: lines before."""
    starts = [
        i for i, line in enumerate(lines) if re.match(rf" {{{depth}}}(?!(else|elif|except|finally)\b)[^\s#)\]}}]", line)
    ]
    starts = [i for k, i in enumerate(starts) if not k or not lines[starts[k - 1]].strip().startswith("@")]
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        part = lines[start:end]
        try:
            found += ast.increment_lineno(ast.parse(textwrap.dedent("\n".join(part))), first + start).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            head = next((k for k, line in enumerate(part) if re.match(r" *class .*:", line)), None)
            if head is not None:
                (holder,) = ast.parse(textwrap.dedent("\n".join([*part[: head + 1], " " * (depth + 1) + "pass"]))).body
                holder.body = salvage(part[head + 1 :], first + start + head + 1, depth + 4) or holder.body
                found.append(holder)
    return found


def uses(answer, word):
    names = {getattr(n, "attr", getattr(n, "id", getattr(n, "name", None))) for t in answer.trees for n in ast.walk(t)}
    return word in names


def fingerprint(exercise, texts, reference):
    """Changes if and only if what a student wrote for an exercise changes, or the exercise does."""
    parts = [exercise.path.read_text("utf-8")]
    for answer in answers(exercise, texts, reference).values():
        trees = answer.trees if isinstance(answer, Answer) else []
        parts.append(repr([ast.dump(tree) for tree in trees] or str(answer)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
