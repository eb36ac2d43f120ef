"""Proves that the checks can be trusted: `python course prove`.

For each exercise and seed: the reference passes; other right answers pass; every known mistake fails the check that is
to catch it, and is told its own misconception; every small mechanical change of the reference fails, or is declared to
change nothing, with the reason; and every check catches something.
"""

import ast
import copy
import time

from checks import Raised
from cutting import Answer, parsed, source_of

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.Gt: ast.GtE,
    ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ENDLESS = 0.5  # seconds after which a mutant counts as caught: many never end


def changed(node):
    """Changes a node of a tree in one small way: another operator, another number, no minus, no `not`. True if
    it can."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        node.value = not node.value
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1
    else:
        return False
    return True


def mutants(source):
    """The text of a function -> (what has changed, its tree) for each mechanical change."""
    original = parsed(source)
    before = ast.unparse(original).splitlines()
    for i in range(len(list(ast.walk(original)))):
        tree = copy.deepcopy(original)
        if changed(list(ast.walk(tree))[i]):
            after = ast.unparse(tree).splitlines()
            lines = [(b.strip(), a.strip()) for b, a in zip(before, after) if a != b]
            yield "  ->  ".join(lines[0]) if lines else "?", tree


def prove(course, exercise, seed):
    """-> a row of the table, and its "problems": sentences; none if all is proven"""
    start, problems, useful, caught, named_right = time.process_time(), [], set(), 0, 0
    whole = {target: Answer(parsed(source_of(target, course.texts))) for target in exercise.TARGETS}
    reference = course.run(exercise, whole, seed)
    of_checks = time.process_time() - start
    for name, (how, _) in reference.items():
        value = course.expected[name, seed]
        if how or isinstance(value, Raised):
            problems.append(f"the reference fails {name}: {how or value.text}")
    for right in exercise.right.values():
        results = course.run(exercise, course.mistaken(right), seed)
        problems += [f"a right answer ({right['name']}) fails {name}: {r[0]}" for name, r in results.items() if r[0]]
    if len(exercise.mistakes) < 5:
        problems.append(f"only {len(exercise.mistakes)} mistakes")
    for mistake in exercise.mistakes.values():
        results = course.run_mistake(exercise, mistake, seed)
        failed = [name for name, r in results.items() if r[0]]
        useful |= set(failed)
        if mistake["caught"] not in failed:
            problems.append(f"mistake {mistake['name']!r}: {mistake['caught']} does not catch it ({failed} do)")
            continue
        caught += 1
        named = course.diagnose(exercise, results, exercise.checks[mistake["caught"]].target, seed)
        named_right += named is mistake
        if named is not mistake:
            problems.append(f"mistake {mistake['name']!r} is told what is wrong with {named and named['name']!r}")
    count, equivalent = 0, set()
    for target in exercise.TARGETS:
        for what, node in mutants(source_of(target, course.texts)):
            count += 1
            results = course.run(exercise, {target: Answer(node)}, seed, seconds=ENDLESS)
            failed = [name for name, r in results.items() if r[0]]
            useful |= set(failed)
            if not failed and what in exercise.equivalent:
                equivalent.add(what)
            elif not failed:
                problems.append(f"a mutant of {target} survives: {what}")
            elif what in exercise.equivalent:
                problems.append(f"declared to change nothing, and fails {failed[0]}: {what}")
    problems += [
        f"no mutant is {what!r}, which is declared to change nothing"
        for what in exercise.equivalent.keys() - equivalent
    ]
    problems += [f"the check {name} catches nothing" for name in exercise.checks.keys() - useful]
    return {
        "checks": len(exercise.checks), "mistakes": len(exercise.mistakes), "right": len(exercise.right),
        "mutants": count, "equivalent": len(equivalent), "caught": caught, "named": named_right,
        "problems": problems, "of_checks": of_checks,
    }  # fmt: skip
