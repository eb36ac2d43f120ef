"""To teach a network something new one need not change all its weights. LoRA leaves W as it is and trains two thin
matrices beside it: y = W x + B A x, where A leads down to a few numbers (the rank) and B back up. That is far less
to train and to store, and switched off, the network is the old one: teacher and student in one. All is in lora.py.

LoRALinear.forward(x): the layer's own result, super().forward(x), plus B A x, unless self.enabled is False. A is
self.lora_A.weight (rank, in), B is self.lora_B.weight (out, rank). Both are float32 and x may be half precision: the
result has the type of x, so use converted copies, weight.to(x.dtype). The parameters themselves stay float32: half
precision would round the small changes of training away. LoRAConv2d, the same for a convolution, is given.

Adapted.adapt(A, B): an adapted layer takes its factors, two layers without bias. A.weight is drawn anew with
nn.init.kaiming_uniform_(A.weight, a=5**0.5), B.weight becomes 0: so an adaptor changes nothing at first. They become
self.lora_A and self.lora_B, float32 whatever the base layer is, on the device of self.weight; self.enabled = True.

add_lora(net, rank, targets): freezes `net` (requires_grad) and adapts each layer whose type is exactly nn.Linear or
nn.Conv2d, and whose path in net.named_modules() ends in one of `targets`, a tuple; if targets is "all", every one. A
layer stays the same object: set its __class__ to LoRALinear or LoRAConv2d, then call its add(rank). Returns the list
of what is to be trained: A, then B of each layer, as factors(net) finds them.

delta(A, B): the change of W that the two amount to, B A in the shape of W, in float32. Of a linear layer: A (rank,
in), B (out, rank). Of a convolution: A (rank, in, k, k), B (out, rank, 1, 1).

merge(net, loras, weight): adds weight * delta(A, B) to net.get_submodule(path).weight, for each path and (A, B) of the
dict `loras`. The sum is made in float32, on the weight's device, and rounded once to the weight's type. Assign it to
the parameter's .data: the old tensor may be the file's own memory, and must stay. If the shapes of any A and B do not
fit their layer, raise ValueError before anything is changed.
"""

import torch

from checks import Wrong, check
from drawing import adaptors, sheet

TITLE = "LoRA"
MINUTES = 40
POINTS = 10
TARGETS = ["lora.LoRALinear.forward", "lora.Adapted.adapt", "lora.add_lora", "lora.delta", "lora.merge"]
LINEAR, ADAPT, ADD, DELTA, MERGE = TARGETS


def linear(m, g):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    m.lora.add_lora(net, 3, "all")
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return net[0], torch.randn(4, 6, generator=g)


@check(LINEAR, "the base layer's result plus B A x")
def beside(m, g):
    layer, x = linear(m, g)
    return layer(x)


@check(LINEAR, "switched off it is the base layer, bitwise")
def switch(m, g):
    layer, x = linear(m, g)
    layer.enabled = False
    if not torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)):
        raise Wrong("with self.enabled = False the result is not bitwise that of the layer without adaptors")
    return True


@check(LINEAR, "a base layer in half precision; A and B stay float32")
def half(m, g):
    layer, x = linear(m, g)
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    return f"with x in torch.bfloat16 the result is {layer(x.bfloat16()).dtype}"


@check(ADAPT, "A is drawn anew, evenly, by the number of its inputs; B is 0; both float32; the adaptor is on")
def begin(m, g):
    nn, found = torch.nn, {}
    for layer, A, B in (
        (m.lora.LoRALinear(100, 8), nn.Linear(100, 80, bias=False), nn.Linear(80, 8, bias=False)),
        (m.lora.LoRAConv2d(20, 8, 3), nn.Conv2d(20, 40, 3, bias=False), nn.Conv2d(40, 8, 1, bias=False)),
    ):
        nn.init.constant_(A.weight, 7.0)
        layer.to(torch.bfloat16).adapt(A, B)
        a, name = layer.lora_A.weight, type(layer).__name__
        low, high, spread = (v * a[0].numel() ** 0.5 for v in (a.min(), a.max(), a.std()))  # -1, 1 and 0.577
        if not (-1.005 < low < -0.97 and 0.97 < high < 1.005 and 0.55 < spread < 0.605):
            raise Wrong(f"{name}: A times the root of its inputs is {low:.2g} to {high:.2g}; right is evenly -1 to 1")
        found |= {f"{name}: B": layer.lora_B.weight, f"{name}: enabled": layer.enabled}
        pairs = [(n, p) for n, p in layer.named_parameters() if "lora_" in n]
        found |= {f"{name}: type of {n}, whether it is trained": [str(p.dtype), p.requires_grad] for n, p in pairs}
    return found


@check(ADAPT, "A and B are where the base layer is")
def home(m, g):
    layer = m.lora.LoRALinear(6, 5, device="meta")
    layer.adapt(torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 5, bias=False))
    return [layer.lora_A.weight.device.type, layer.lora_B.weight.device.type]


class Mine(torch.nn.Linear):
    pass


def net():
    nn = torch.nn
    one = nn.ModuleDict({"to_q": nn.Linear(3, 3), "to_out": nn.ModuleList([nn.Linear(3, 3), nn.Dropout(0)])})
    conv, other = nn.Conv2d(3, 4, 3), nn.ModuleDict({"to_q": Mine(3, 3), "to_q2": nn.Linear(3, 3)})
    return nn.ModuleDict({"a": one, "conv": conv, "b": other, "norm": nn.LayerNorm(3), "attn": nn.Linear(3, 2)})


@check(ADD, "which layers are adapted, and with what rank")
def which(m, g):
    found = {}
    for targets in (("to_q", "to_out.0"), ("conv",), ("nothing",), "all"):
        own = net()
        m.lora.add_lora(own, 5, targets)
        found[str(targets)] = [f"{path} {tuple(p.shape)}" for path, p in own.named_parameters() if "lora_" in path]
    own = net()
    m.lora.add_lora(own)
    return found | {"nothing said": [f"{path} {p.shape[0]}" for path, p in own.named_parameters() if "lora_A" in path]}


@check(ADD, "layers and base weights stay the same objects, frozen; A, then B of each layer comes back")
def frozen(m, g):
    own = net()
    before = {**dict(own.named_modules()), **dict(own.named_parameters())}
    got = m.lora.add_lora(own, 5, "all")
    now = {**dict(own.named_modules()), **dict(own.named_parameters())}
    if other := [path for path, what in before.items() if now.get(path) is not what]:
        raise Wrong(f"{other[-1]} is another object than before, or gone: who held it holds the old one")
    names = {id(p): path for path, p in own.named_parameters()}
    return {
        "the types": [type(now[path]).__name__ for path in ("attn", "conv", "b.to_q")],
        "trained are": [path for path, p in own.named_parameters() if p.requires_grad],
        "what comes back": [names.get(id(p), "something else") for p in got],
    }


@check(DELTA, "the values and the shape, for a linear layer and a convolution")
def product(m, g):
    shapes = {"linear": ((3, 6), (5, 3)), "convolution": ((2, 3, 3, 3), (4, 2, 1, 1))}
    return {k: m.lora.delta(*(torch.randn(shape, generator=g) for shape in pair)) for k, pair in shapes.items()}


def base(g, dtype=torch.float32):
    """A net and its adaptors, of whole numbers, so that float32 sums them exactly in any order."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Conv2d(3, 4, 3)).to(dtype)
    for layer in net:
        layer.weight.data.copy_(torch.randint(-99, 99, layer.weight.shape, generator=g))
    shapes = {"0": ((2, 6), (5, 2)), "1": ((2, 3, 3, 3), (4, 2, 1, 1))}
    return net, {k: tuple(torch.randint(-30, 30, s, generator=g).float() for s in pair) for k, pair in shapes.items()}


@check(MERGE, "the values, at weight 1 if nothing is said; in half precision rounded once; old tensors stay")
def added(m, g):
    found = {}
    for dtype, weight in ((torch.float32, ()), (torch.float32, (-0.5,)), (torch.bfloat16, (0.25,))):
        own, loras = base(g, dtype)
        old = [layer.weight.data for layer in own]
        before = [t.clone() for t in old]
        m.lora.merge(own, loras, *weight)
        if not all(map(torch.equal, old, before)):
            raise Wrong("your merge writes into the old tensors, which may be the memory of the checkpoint's file")
        found |= {f"weight {weight or 1}, {layer.weight.dtype}, {layer}": layer.weight for layer in own}
    m.lora.merge(own.to("meta"), loras)  # as where a GPU has the net, and the file's adaptors are on the CPU
    return found


@check(MERGE, "adaptors for another network are refused, and then nothing has changed")
def refused(m, g):
    own, loras = base(g)
    before = [p.clone() for p in own.parameters()]
    shapes = ((2, 7), (5, 2)), ((2, 6), (9, 2)), ((2, 6), (5, 1)), ((1, 6), (5, 2)), ((2, 1), (5, 2)), ((2, 5), (6, 2))
    for A, B in shapes:
        try:
            m.lora.merge(own, {"1": loras["1"], "0": (torch.ones(A), torch.ones(B))})
            raise Wrong(f"A {A} and B {B} are merged into a weight (5, 6); a ValueError is expected")
        except ValueError:
            pass
        if not all(map(torch.equal, before, own.parameters())):
            raise Wrong(f"A {A} and B {B} do not fit the second layer; by then the first one has been changed")
    return True


def show(m):
    weights, rows = [0, 0.25, 0.5, 0.75, 1, 1.5], []
    model, names = m.hipa.load("emoji"), ["a cat", "a rocket"]
    loras = adaptors(m, model)
    x, before = m.hipa.noise([0, 1], 4, 16, 16), 0
    with torch.no_grad():
        for w in weights:
            m.lora.merge(model.unet, loras, w - before)
            before = w
            rows.append(model.decode(m.hipa.predictor(model, names)(x, 999)))
        model = m.hipa.load("emoji")
        m.lora.add_lora(model.unet, 16, tuple(loras))
        for path, factors in m.lora.factors(model.unet).items():
            for mine, read in zip(factors, loras[path]):
                mine.copy_(read)
        rows.append(model.decode(m.hipa.predictor(model, names)(x, 999)))
    pictures = torch.stack(rows, 1).flatten(0, 1)
    count = sum(a.numel() + b.numel() for a, b in loras.values())
    return sheet(m, pictures, columns=len(rows)), (
        f"ONE step, with HiPA's adaptors ({count:,} numbers) added by your delta at weights {weights}.\n"
        "Last column: W as it was, and the adaptors beside it by your forward. It should be as at weight 1.\n"
        "At 1.5 it is too much. What grows first, and what does that tell of what the adaptors have learned?"
    )
