"""Proves that the checks can be trusted: `python course prove`.

For each exercise and seed: the reference passes; other right answers pass; every known mistake fails the check that is
to catch it, and is told its own misconception; every small mechanical change of the reference fails, or is declared to
change nothing, with the reason; and every check catches something. So are five kinds of bad conduct, put into the
reference: what is cut from the gradient, of another type, on the CPU; an argument or a setting that is changed.
"""

import ast
import copy
import time
from collections import Counter

import torch
from torch.utils._pytree import tree_map_only

from checks import SECONDS, Raised, value_of
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


def become(node, text):
    """Makes another expression of a node of a tree, in its place."""
    new = ast.parse(text, mode="eval").body
    node.__class__, node.__dict__ = type(new), vars(new)


def differs(original, tree):
    """The first line that differs, before and after."""
    lines = zip(ast.unparse(original).splitlines(), ast.unparse(tree).splitlines())
    return next(((b.strip(), a.strip()) for b, a in lines if a != b), ("?", "?"))


def left_out(node, defaults):
    """What a node of a tree becomes if it is forgotten: of f(x, ...) remains x, of x.f(...) remains x; of an argument
    its default value."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in defaults:
        yield defaults[node.id]
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
        yield ast.unparse(node.args[0])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield ast.unparse(node.func.value)


def mutants(source):
    """The text of a function -> (what has changed, its tree) for each mechanical change."""
    original = parsed(source)
    given = original.args.args[::-1]
    defaults = {a.arg: ast.unparse(d) for a, d in zip(given, original.args.defaults[::-1])}
    defaults |= {original.args.kwarg.arg: "{}"} if original.args.kwarg else {}
    for i, node in enumerate(ast.walk(original)):
        tree = copy.deepcopy(original)
        if changed(list(ast.walk(tree))[i]):
            yield "  ->  ".join(differs(original, tree)), tree
        for text in left_out(node, defaults):
            tree = copy.deepcopy(original)
            become(list(ast.walk(tree))[i], text)
            yield "  ->  ".join(differs(original, tree)), tree


# ---------------------------------------------------------------------------------------------------------- bad conduct
MADE = []  # not empty: a fault was really made, in a tensor that has a gradient, or is on another device, and so on
SET = [
    lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    lambda: torch.manual_seed(9), lambda: torch.set_grad_enabled(False),
]  # fmt: skip


def put(value, where, change):
    """A value, with its tensors changed for which `where` holds."""
    return tree_map_only(torch.Tensor, lambda t: [change(t), MADE.append(1)][0] if where(t) else t, value)


def cut(value):
    return put(value, lambda t: t.requires_grad, lambda t: t.detach())


def double(value):
    return put(value, lambda t: t.is_floating_point() and t.dtype != torch.float64, lambda t: t.double())


def to_cpu(value):
    return put(value, lambda t: t.is_meta and t.ndim, lambda t: t.cpu())


def spoil(result, value):
    """Changes an argument in place, after the result is computed: a tensor, a list or dict, or one in an object."""
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        inside = value.parameters() if isinstance(value, torch.nn.Module) else vars(value).values()
        value = next((v for v in inside if isinstance(v, (torch.Tensor, dict))), None)
    if isinstance(value, torch.Tensor) and not value.is_meta:
        MADE.append(value.detach().add_(1))
    elif isinstance(value, (dict, list)) and value:
        MADE.append(value.popitem() if isinstance(value, dict) else value.pop())
    return result


def badly(source):
    """The text of a function -> (kind, what has changed, its tree) for each place where its conduct can be made bad."""
    original, proof = parsed(source), "__import__('proof')."
    bound = {n.id for n in ast.walk(original) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    values = {id(n.value): n for n in ast.walk(original) if isinstance(n, (ast.Assign, ast.Return)) and n.value}
    bare = {id(n.value) for n in ast.walk(original) if getattr(n, "attr", "") in ("device", "dtype", "shape", "ndim")}
    bare |= {id(n.args[0]) for n in ast.walk(original) if isinstance(n, ast.Call) and ast.unparse(n.func) == "len"}
    for i, node in enumerate(ast.walk(original)):
        wraps, of = [], values.get(id(node))
        if of or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in bare:
            wraps.append(("gradient", "cut({})"))
        if of:
            wraps.append(("device", "to_cpu({})"))
        if isinstance(of, ast.Return):
            wraps += [("argument", f"spoil({{}}, {a.arg})") for a in original.args.args if a.arg not in bound]
        if isinstance(of, ast.Return) or of and isinstance(of.targets[0], ast.Attribute):
            wraps.append(("type", "double({})"))
        for kind, wrap in wraps:
            tree = copy.deepcopy(original)
            become(list(ast.walk(tree))[i], proof + wrap.format(ast.unparse(node)))
            yield kind, differs(original, tree)[1].replace(proof, ""), tree
    for k in range(len(SET) - bool(original.decorator_list)):  # no_grad puts back what the last one sets
        tree = copy.deepcopy(original)
        tree.body.insert(0, ast.parse(f"{proof}MADE.append({proof}SET[{k}]())").body[0])
        yield "setting", f"SET[{k}]", tree


def prove_conduct(course, exercise, seed):
    """Yields (target, kind, what has changed, whether it was caught, whether it was told) for each real fault."""
    for target in exercise.TARGETS:
        checks = [exercise.checks[f"{what} of {target}"] for what in ("changes", "conduct")]
        right = [s for s in checks[1].rights[seed] if s]
        can = {
            "gradient": any(s["gradients"] for s in right),
            "device": any("meta" in s["devices"].values() for s in right),
            "SET[2]": not any(s["settings"] for s in right),  # else the function is to draw numbers
        }
        for kind, what, tree in badly(source_of(target, course.texts)):
            MADE.clear()
            if can.get(kind, True) and can.get(what, True):
                check = checks[kind not in checks[0].kinds]
                value = value_of(check, course.graft({target: Answer(tree)}), seed, SECONDS)
            if MADE:
                told = (value.error.args or [None])[-1] if isinstance(value, Raised) else None
                run = {} if told else course.run(exercise, {target: Answer(tree)}, seed)
                yield target, kind, what, told or any(r[0] for r in run.values()), told == kind


def prove(course, exercise, seed):
    """-> how many there were of what, and of each kind of bad conduct; seconds of all checks; problems: sentences."""
    start, problems, useful, equivalent = time.process_time(), [], set(), set()
    whole = {target: Answer(parsed(source_of(target, course.texts))) for target in exercise.TARGETS}
    reference = course.run(exercise, whole, seed)
    seconds = time.process_time() - start
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
        named = course.diagnose(exercise, results, exercise.checks[mistake["caught"]].target, seed)
        if named is not mistake:
            problems.append(f"mistake {mistake['name']!r} is told what is wrong with {named and named['name']!r}")

    def judge(what, found, words):
        """A fault is found, or declared to change nothing."""
        known = {part for part in exercise.equivalent if part in what}
        equivalent.update(known)
        if bool(found) == bool(known):
            problems.append(f"{words} {'is found, and declared to change nothing' if known else 'survives'}: {what}")

    count, kinds, names = 0, Counter(), {name for name, f in exercise.checks.items() if not f.kinds}
    for target in exercise.TARGETS:
        for what, node in mutants(source_of(target, course.texts)):
            count += 1
            results = course.run(exercise, {target: Answer(node)}, seed, seconds=ENDLESS, short=names <= useful)
            useful |= (failed := {name for name, r in results.items() if r[0]})
            judge(what, failed, f"a mutant of {target}")
    for target, kind, what, found, by_kind in prove_conduct(course, exercise, seed):
        kinds += Counter({kind: 1, "named": by_kind})
        judge(what, found, f"bad conduct of {target}, {kind},")
    unused = {*exercise.equivalent} - equivalent
    problems += [f"there is no {part!r}, which is declared to change nothing" for part in unused]
    problems += [f"the check {name} catches nothing" for name in names - useful]
    counts = {"checks": exercise.checks, "mistakes": exercise.mistakes, "other right answers": exercise.right}
    counts = {name: len(found) for name, found in counts.items()} | {"mutants": count, "no change": len(equivalent)}
    return Counter(counts), kinds, seconds, problems
