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
FILES["evaluate"] = "emoji/evaluate.py"
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
    """A function as a student wrote it, and what else of the file it may use."""

    node: ast.FunctionDef
    extras: list = field(default_factory=list)  # further statements of the module: imports, helpers, constants
    methods: list = field(default_factory=list)  # further functions of the function's class


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
        tree = parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Answer(lift(text, name, file, error))
    try:
        holder, node = find(tree, name)
    except KeyError:
        raise Problem(f"{file} has no {name} any more: the function's name and place must stay") from None
    old = parse(reference[module])
    names = {n.name for n in old.body if hasattr(n, "name")}
    known = {ast.unparse(n) for n in old.body if not hasattr(n, "name")}
    kinds = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
    extras = [n for n in tree.body if isinstance(n, kinds) and getattr(n, "name", None) not in names]
    extras = [n for n in extras if ast.unparse(n) not in known]
    methods = []
    if holder is not tree:
        there = {n.name for n in find(old, name)[0].body if isinstance(n, FUNCTIONS)}
        methods = [n for n in holder.body if isinstance(n, FUNCTIONS) and n.name not in there]
    return Answer(node, extras, methods)


def lift(text, name, file, error):
    """The function out of a file that does not parse: the mistake may be in another exercise. Raises Problem."""
    lines, start, depth = text.splitlines(), 0, 0
    for part in name.split("."):
        word = "def" if part == name.split(".")[-1] else "class"
        pattern = re.compile(rf"( {{{depth}}})(async )?{word} {part}\b")
        start = next((i for i in range(start, len(lines)) if pattern.match(lines[i])), len(lines))
        depth += 4
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or re.match(rf" {{{depth}}}|\s*[\])}}]", lines[end])):
        end += 1
    try:
        tree = ast.parse(textwrap.dedent("\n".join(lines[start:end])))
        node = ast.increment_lineno(tree, start).body[0]
        return node if isinstance(node, FUNCTIONS) else 1 / 0
    except (SyntaxError, IndexError, ZeroDivisionError):
        line = getattr(error, "lineno", None)
        place = f"{file}, line {line}" if line else file
        raise Problem(f"{place}: Python cannot read this file: {getattr(error, 'msg', error)}") from None


def uses(answer, word):
    trees = [answer.node, *answer.extras, *answer.methods]
    names = {getattr(n, "attr", getattr(n, "id", getattr(n, "name", None))) for t in trees for n in ast.walk(t)}
    return word in names


def fingerprint(exercise, texts, reference):
    """Changes if and only if what a student wrote for an exercise changes, or the exercise does."""
    parts = [exercise.path.read_text("utf-8")]
    for answer in answers(exercise, texts, reference).values():
        trees = [answer.node, *answer.extras, *answer.methods] if isinstance(answer, Answer) else []
        parts.append(repr([ast.dump(tree) for tree in trees] or str(answer)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
