"""How a function behaves, beside its values: two checks for every function, made from the exercise's own checks.

Two calls of the function in each check are watched, in the reference's modules and in the student's. What holds of the
reference there has to hold of the student's: the gradients, the types, the devices, and what is left changed.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from cutting import split

# With gradients; all on another device; only layers and models on another device; all in half precision.
WAYS = "here", "there", "apart", "half"
SETTINGS = {  # of the whole program: how they are read, and set
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "whether gradients are computed": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the state of the random numbers": (torch.get_rng_state, torch.set_rng_state),
    "the default device": (torch.get_default_device, torch.set_default_device),
}


@contextlib.contextmanager
def settings_kept(changed=None):
    """Puts back what has changed, and only that; appends its names to `changed`."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    try:
        yield
    finally:
        for name, (read, put) in SETTINGS.items():
            if not same(before[name], read()):
                put(before[name])
                changed is None or changed.append(name)


class Mixed(RuntimeError):
    """Tensors of two devices met."""


class Accelerator(TorchDispatchMode):
    """Makes torch's "meta" device, whose tensors have no values, as strict as a GPU: tensors of both devices do not
    mix, but for the CPU's numbers. Every value that the CPU asks for is 1, or True."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim or t.is_meta}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if function is torch.ops.aten._to_copy.default:
            if args[0].is_meta and str(kwargs.get("device") or "meta") == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif function is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]  # into a tensor on the CPU: a GPU allows this, and what follows is on the CPU
        elif function is not torch.ops.aten.copy_.default and len(devices) > 1:
            raise Mixed
        return function(*args, **kwargs)


def leaves(value, path, above=()):
    """Yields (path, leaf) for the tensors and simple values in containers, layers, and other objects."""
    if value is None or isinstance(value, (torch.Tensor, str, int, float)):
        yield path.replace("._parameters.", ".").replace("._modules.", ".").replace("._buffers.", "."), value
    elif id(value) not in above and not any(f(value) for f in (inspect.isroutine, inspect.ismodule, inspect.isclass)):
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for k, v in enumerate(value) if isinstance(value, (list, tuple)) else inside.items():
            if isinstance(k, (str, int, tuple)) and k != "asked":  # what a check's own objects note of their calls
                yield from leaves(v, f"{path}.{k}", (*above, id(value)))


def same(a, b):
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and (a == b or a != a and b != b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def moved(value, tensors=True, to="meta"):
    """On the device "meta", or of a type, a copy: of a layer, of what has a device; of another tensor if `tensors`."""
    if isinstance(value, torch.device):
        return torch.device("meta") if to == "meta" else value
    if isinstance(value, torch.Tensor):
        return value.to(to) if tensors and (to == "meta" or value.is_floating_point()) else value
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(to)
    if not isinstance(getattr(value, "device", None), torch.device):
        return value
    new = type(value).__new__(type(value))
    what = {"device": torch.device("meta")} if to == "meta" else {"dtype": to}
    vars(new).update(tree_map(functools.partial(moved, to=to), vars(value)), **what)
    return new


# ------------------------------------------------------------------------------------------------------------- watching
class Enough(BaseException):
    """Ends a check after the call that was to be seen."""


class Watch:
    """Stands in the place of a function. After `skip` calls it ends the check with one that is watched; if that returns
    a function, with the first call of this one. `names`: of the arguments."""

    def __init__(self, function, names, way, skip):
        self.function, self.names, self.way, self.skip = function, names, way, skip
        self.given, self.before, self.seen = {}, {}, {"changed": set(), "settings": []}

    def __call__(self, *args, **kwargs):
        if self.skip:
            self.skip -= 1
            return self.function(*args, **kwargs)
        if self.way == "here":
            with torch.enable_grad(), settings_kept(self.seen["settings"]):
                result = self.call(*tree_map_only(torch.Tensor, fresh, (args, kwargs)))
        elif self.way == "half":
            self.seen["half"] = True
            args, kwargs = tree_map(functools.partial(moved, to=torch.bfloat16), (args, kwargs))
            result = self.function(*args, **kwargs)
        else:
            args, kwargs = tree_map(functools.partial(moved, tensors=self.way == "there"), (args, kwargs))
            with Accelerator():
                result = self.function(*args, **kwargs)
        if callable(result):
            self.function, self.names = result, [f"argument {k} of the function that it returns" for k in range(1, 9)]
            return self
        found = leaves(args[0] if result is None and args else result, "")
        found = {path: v for path, v in sorted(found, key=lambda leaf: leaf[0]) if isinstance(v, torch.Tensor)}
        self.seen |= {
            "types": {p: v.dtype for p, v in found.items()},
            "devices": {p: v.device.type for p, v in found.items()},
        }
        self.seen["gradients"] = self.gradients(v for v in found.values() if v.grad_fn)
        raise Enough

    def call(self, args, kwargs):
        """The function's result; sees what it changes."""
        self.given |= dict(zip(self.names, args)) | kwargs
        for path, v in self.inputs().items():
            if isinstance(v, torch.nn.Parameter):
                v.requires_grad_()
            self.before.setdefault(path, v.detach().clone() if isinstance(v, torch.Tensor) else v)
        result = self.function(*args, **kwargs)
        after = self.inputs()
        self.seen["changed"] |= {p for p, v in self.before.items() if p not in after or not same(v, after[p])}
        containers = {p.rpartition(".")[0] for p in self.before} - self.given.keys()  # what has grown
        self.seen["changed"] |= {p for p in after if p not in self.before and p.rpartition(".")[0] in containers}
        return result

    def inputs(self):
        return {path: v for name, value in self.given.items() for path, v in leaves(value, name)}

    def gradients(self, found):
        """{path: the gradient of a fixed sum of the results, or None}; {} if nothing can be learned by them."""
        g, found = torch.Generator().manual_seed(0), list(found)
        inputs = {p: v for p, v in self.inputs().items() if isinstance(v, torch.Tensor) and v.requires_grad}
        if not found or not inputs:
            return {}
        total = sum((v.double() * torch.rand(v.shape, generator=g, dtype=torch.float64)).sum() for v in found)
        return dict(zip(inputs, torch.autograd.grad(total, [*inputs.values()], allow_unused=True)))


def fresh(tensor):
    """A copy that needs a gradient, and can be changed in place."""
    return tensor.detach().clone().requires_grad_().clone() if tensor.is_floating_point() else tensor


def watch(exercise, target, modules, seed, stop, ways, names):
    """Yields what was seen of the function: of two calls in each check. `stop`: exceptions that are raised.

    `names`: of the arguments, filled the first time: a student may call them otherwise.
    """
    module, name = split(target)
    *classes, last = name.split(".")
    holder = functools.reduce(getattr, classes, getattr(modules, module))
    function = getattr(holder, last)
    names += [] if names else inspect.signature(function).parameters
    checks = [f for f in exercise.checks.values() if f.target == target and not f.kinds]
    for way, skip, f in itertools.product(ways, (0, 1), checks):
        one = Watch(function, names, way, skip)
        # A function, not the object itself: only functions become methods.
        setattr(holder, last, lambda *args, one=one, **kwargs: one(*args, **kwargs))
        torch.manual_seed(seed + 12345)  # not what a student may set it to
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), settings_kept():
                f(modules, torch.Generator().manual_seed(seed))
        except Enough:
            pass
        except stop:
            raise
        except BaseException as error:
            one.seen["error"] = error
        finally:
            setattr(holder, last, function)
        yield one.seen


# -------------------------------------------------------------------------------------------------------------- judging
CUT = "what on the way cuts it (detach, no_grad, .data, torch.tensor(...), a number taken out of a tensor)?"
WRITES = "which of your calls ends in _ or says inplace, or which line assigns with self.x =, *=, += or []?"
ELSEWHERE = "with tensors on another device, such as a GPU,"


def faults(name, right, mine):
    """Yields (kind, sentence) of what differs in a function's conduct. `right`, `mine`: of one call, by `watch`."""
    error = mine.get("error")
    for what in [what for what in mine["settings"] if what not in right["settings"]]:
        yield "setting", f"your {name} changes a setting of the whole program: {what}"
    for path in sorted(mine["changed"] - right["changed"]):
        yield "argument", f"your {name} changes {path} itself, which the caller reads again: {WRITES}"
    for path, dtype in right["types"].items():
        if mine.get("types", {}).get(path, dtype) != dtype:
            yield "type", f"the result of your {name} is {mine['types'][path]}; right is {dtype}"
    if "half" in mine and error is not None:
        yield "type", f"in half precision your {name} raises {type(error).__name__}: {error}"
    if isinstance(error, Mixed) or "tensor type" in str(error) or "tensor to numpy" in str(error):
        yield "device", f"{ELSEWHERE} something that your {name} makes or reads is on the CPU"
    if any(mine.get("devices", {}).get(path, device) != device for path, device in right["devices"].items()):
        yield "device", f"{ELSEWHERE} the result of your {name} is on the wrong one"
    gradients = {p: g for p, g in right["gradients"].items() if g is not None and g.isfinite().all()}
    least = max([1e-6, *(1e-3 * g.abs().max() for g in gradients.values())])
    for path, wanted in sorted(gradients.items(), key=lambda item: item[0].count(".")):  # arguments themselves first
        size, got = wanted.abs().max(), mine.get("gradients", {}).get(path)
        if got is not None and not got.isfinite().all():
            yield (
                "gradient",
                f"the gradient of your {name} to {path} is NaN or infinite: a root of 0?",
            )
        elif size < least:
            continue
        elif error is not None:
            yield "gradient", f"where gradients are wanted, your {name} raises {type(error).__name__}: {error}"
        elif got is None or not got.any():
            yield "gradient", f"no gradient flows through your {name} to {path}: {CUT}"
        elif not (got - wanted).abs().max() < (0.01 if wanted.dtype == torch.float32 else 0.1) * size:
            yield "gradient", f"only a part of the gradient flows through your {name} to {path}: {CUT}"


def conduct_check(exercise, target, stop, wrong, kinds, ways, why):
    """A check of a function's conduct. It runs on the reference first, and remembers, for each seed."""
    rights, names = {}, []

    def conduct(modules, g):
        seen = watch(exercise, target, modules, g.initial_seed(), stop, ways, names)
        if g.initial_seed() not in rights:
            rights[g.initial_seed()] = [s if "types" in s and "error" not in s else None for s in seen]
        for right, mine in zip(rights[g.initial_seed()], seen):
            for kind, says in faults(split(target)[1], right, mine) if right else ():
                if kind in kinds:
                    raise wrong(says, kind)
        return True

    conduct.target, conduct.why, conduct.kinds, conduct.rights = target, why, kinds, rights
    return conduct


def conduct_checks(exercise, *how):
    """{name: check}, twice: what comes before a function's other checks, because it can spoil them; what comes last."""
    why = "arguments and torch's settings are left as they are", "it fits into the program: gradients, types, devices"
    kinds, first, last = (("argument", "setting"), ("type", "device", "gradient")), {}, {}
    for t in exercise.TARGETS:
        first[f"changes of {t}"] = conduct_check(exercise, t, *how, kinds[0], WAYS[:1], why[0])
        last[f"conduct of {t}"] = conduct_check(exercise, t, *how, kinds[1], WAYS, why[1])
    return first, last
