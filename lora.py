"""Low-rank adaptors (Hu et al. 2021, arXiv 2106.09685): y = W x + B A x, with W frozen and A and B small and trained.

An adapted layer is a subclass of the layer it adapts, so the base weight keeps its name in the state dict, and the
network's own checkpoint loads with or without adaptors. Switched off, the network is bitwise the frozen one: teacher
and student are the same network, and there is no second copy in memory.

Files are diffusers' `pytorch_lora_weights.safetensors`: `unet.<module path>.lora_A.weight` and `.lora_B.weight`, the
scale alpha / rank folded into B. Files by peft, by older diffusers and by kohya are read too.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of attn1 and attn2: 3,319,808 parameters at rank 16 on SD 2.1-base


class Adapted:
    """What adapted layers share. The path through A and B runs beside the layer's own."""

    def adapt(self, A, B):
        """Takes the two factors. A starts random and B at zero, so an adaptor changes nothing until it is trained."""
        nn.init.kaiming_uniform_(A.weight, a=5**0.5)  # as nn.Linear and peft initialise
        nn.init.zeros_(B.weight)
        self.enabled = True  # of the layer, not the class: torch.compile would take the first change for a new model
        # float32 whatever the base is: half precision would swallow small updates. Cast where they are used.
        self.lora_A, self.lora_B = (factor.to(self.weight.device, torch.float32) for factor in (A, B))


class LoRALinear(Adapted, nn.Linear):
    def add(self, rank):
        A = nn.Linear(self.in_features, rank, bias=False)
        self.adapt(A, nn.Linear(rank, self.out_features, bias=False))

    def forward(self, x):
        y = super().forward(x)
        if not self.enabled:
            return y
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + F.linear(F.linear(x, A), B)


class LoRAConv2d(Adapted, nn.Conv2d):
    """A has the layer's kernel, stride and padding, B is 1x1: together one convolution of the layer's kind."""

    def add(self, rank):
        A = nn.Conv2d(self.in_channels, rank, self.kernel_size, self.stride, self.padding, bias=False)
        self.adapt(A, nn.Conv2d(rank, self.out_channels, 1, bias=False))

    def forward(self, x):
        y = super().forward(x)
        if not self.enabled:
            return y
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + F.conv2d(F.conv2d(x, A, None, self.stride, self.padding), B)


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def add_lora(net, rank=16, targets=ATTENTION):
    """Freezes `net` and gives each Linear and Conv2d whose module path ends in one of `targets` an adaptor of `rank`.

    `targets` may also be "all", or {module path: rank}. Returns the trainable parameters. Raises ValueError if nothing
    matches.
    """
    if adapted(net):
        raise ValueError("the network has adaptors already")
    net.requires_grad_(False)
    for path, module in list(net.named_modules()):
        if isinstance(targets, dict):
            wanted = path in targets
        else:
            wanted = targets == "all" or any(f".{path}".endswith(f".{target}") for target in targets)
        if type(module) not in KINDS or not wanted:
            continue
        module.__class__ = KINDS[type(module)]  # the same weights under the same names, with another forward
        module.add(targets[path] if isinstance(targets, dict) else rank)
    found = adapted(net)
    if not found:
        raise ValueError(f"no layer's path ends in any of {', '.join(targets)}")
    return [p for module in found.values() for p in (module.lora_A.weight, module.lora_B.weight)]


def adapted(net):
    """{module path: adapted layer}"""
    return {path: module for path, module in net.named_modules() if isinstance(module, Adapted)}


@contextlib.contextmanager
def lora_off(net):
    """Within this context the network is the frozen one: the teacher."""
    layers = adapted(net).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield net
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def factors(net):
    """{module path: (A, B)}, the tensors of all adaptors of `net`."""
    return {path: (layer.lora_A.weight, layer.lora_B.weight) for path, layer in adapted(net).items()}


def delta(A, B):
    """The change of the base weight that the two factors are: B A, in the shape of the base weight.

    Linear: A (rank, in), B (out, rank). Convolution: A (rank, in, k, k), B (out, rank, 1, 1).
    """
    return torch.einsum("or,r...->o...", B.flatten(1).float(), A.float())


@torch.no_grad()
def merge(net, loras, weight=1.0):
    """Adds `weight` times the adaptors {module path: (A, B)} to the base weights: they cost nothing from then on.

    Raises ValueError, before anything is changed, if a path or a shape does not fit the network.
    """
    modules = dict(net.named_modules())
    for path, (A, B) in loras.items():
        base = getattr(modules.get(path), "weight", None)
        if base is None:
            raise ValueError(f"the adaptors are for another network: this one has no layer {path}")
        shape = (B.shape[0], *A.shape[1:])
        if tuple(base.shape) != shape or A.shape[0] != B[0].numel():
            raise ValueError(f"the adaptors are for another network: {path} is {tuple(base.shape)} here, {shape} there")
    for path, (A, B) in loras.items():
        base = modules[path].weight
        # One rounding, after the sum. A new tensor: the old one may be the checkpoint's own memory-mapped file.
        base.data = (base.float() + weight * delta(A, B).to(base.device)).to(base.dtype)


# --------------------------------------------------------------------------------------------------------------- files
def save_lora(path, net, metadata=None):
    """Writes the adaptors of `net` for diffusers and this file to read; `metadata` {str: str} goes into the header."""
    tensors = {}
    for name, (A, B) in factors(net).items():
        tensors |= {f"unet.{name}.lora_A.weight": A.float(), f"unet.{name}.lora_B.weight": B.float()}
    save_atomically(tensors, path, {"format": "pt", **(metadata or {})})


def save_atomically(tensors, path, metadata=None, keep=None):
    """`write_file` of a safetensors file."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_file(path, save(tensors, metadata), keep)


def write_file(path, data, keep=None):
    """Writes bytes to a file that appears whole and on the disk, or not at all. The old one is renamed to `keep`."""
    part = f"{path}.{os.getpid()}.part"  # two processes may write the same file
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


# What each kind of file calls the two factors.
SPELLINGS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",  # peft, and diffusers today
    ".lora.down.weight": "A", ".lora.up.weight": "B",  # diffusers until 2023
    ".lora_down.weight": "A", ".lora_up.weight": "B",  # kohya
    ".alpha": "alpha",
}  # fmt: skip


# Settings of peft that make another kind of adaptor of the same tensors; only these values are plain LoRA.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}


def load_lora(path, net):
    """Reads adaptors for `net` from a safetensors file -> {module path: (A, B)}, float32.

    The scale alpha / rank is folded into B; it is 1 where the file does not say. Raises ValueError for what is no such
    file, for settings that mean another kind of adaptor, and if a tensor belongs to no layer of `net`: applied in part,
    adaptors would be silently wrong.
    """
    try:
        with safe_open(path, "pt") as file:
            # peft's settings, as diffusers writes them: {"unet.r": 16, "unet.lora_alpha": 8, ...}
            # Without "unet." where the UNet saved itself; peft itself writes them into a file beside this one.
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            settings = {key.removeprefix("unet."): value for key, value in settings.items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if any(key.startswith("base_model.model.") for key in tensors):
            beside = Path(path).with_name("adapter_config.json")
            if not beside.exists():
                raise ValueError(f"{beside.name} is missing beside it, which tells the adaptors' strength")
            settings = json.loads(beside.read_text("utf-8"))
        unknown = [key for key, plain in PLAIN.items() if settings.get(key, plain) not in (plain, None, False)]
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} = {settings[unknown[0]]!r} is not supported")
    # kohya writes module paths with "_" for ".", which only the network itself can undo.
    paths = {path: path for path, _ in net.named_modules()} | {p.replace(".", "_"): p for p, _ in net.named_modules()}
    found, unknown = {}, []
    for key, tensor in tensors.items():
        ending = next((e for e in SPELLINGS if key.endswith(e)), "")
        name = key.removesuffix(ending)
        for prefix in ("base_model.model.", "unet.", "lora_unet_", "lycoris_"):
            name = name.removeprefix(prefix)
        if not ending or name not in paths:
            unknown.append(key)
        else:
            found.setdefault(paths[name], {})[SPELLINGS[ending]] = tensor.float()
    incomplete = [name for name, parts in found.items() if not {"A", "B"} <= parts.keys()]
    if unknown or incomplete or not found:
        which = ", ".join((unknown or incomplete)[:5]) or "no tensors in it"
        raise ValueError(f"{path} holds no adaptors for this network's UNet, or others (text encoder?) too: {which}")
    loras = {}
    for name, parts in found.items():
        try:
            A, B, rank = parts["A"], parts["B"], parts["A"].shape[0]
            loras[name] = A, B * scale(settings, name, rank, parts.get("alpha"))
        except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
            raise ValueError(f"{path} is damaged at {name}: {error}") from None
    return loras


def scale(settings, name, rank, alpha=None):
    """alpha / rank: alpha as kept with the layer, else as peft's settings have it, else the rank."""
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
            raise ValueError(f"alpha_pattern {pattern[:50]!r} could take for ever to match")
        if alpha is None and re.match(rf"(.*\.)?({pattern})$", name):  # as peft matches: the end of a path, or a regex
            alpha = value
    alpha = settings.get("lora_alpha", rank) if alpha is None else alpha
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
