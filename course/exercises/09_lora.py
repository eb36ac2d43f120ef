"""To teach a network something new one need not change all its weights. LoRA leaves W as it is and trains two thin
matrices beside it: y = W x + B A x, where A leads down to a few numbers (the rank) and B back up. That is far less
to train and to store, and switched off, the network is the old one: teacher and student in one.

LoRALinear.forward(x), in lora.py: the layer's own result, super().forward(x), plus B A x, unless self.enabled is
False. A is self.lora_A.weight (rank, in), B is self.lora_B.weight (out, rank). Both are float32 and x may be half
precision: the result has the type of x, so use converted copies, weight.to(x.dtype). The parameters themselves stay
float32: half precision would round the small changes of training away.

LoRAConv2d.forward(x), in lora.py: the convolution's own result, super().forward(x), plus B A x, unless self.enabled
is False; the result has the type of x. A is a convolution of the layer's own kernel, stride (self.stride) and padding
(self.padding) with `rank` output channels; B, a 1x1 convolution, follows. Neither has a bias.

delta(A, B), in lora.py: the change of W that the two amount to, B A in the shape of W, in float32. Of a linear
layer: A (rank, in), B (out, rank). Of a convolution: A (rank, in, k, k), B (out, rank, 1, 1).
"""

import torch

from checks import Wrong, check
from drawing import adaptors, sheet

TITLE = "LoRA"
MINUTES = 30
POINTS = 8
TARGETS = ["lora.LoRALinear.forward", "lora.LoRAConv2d.forward", "lora.delta"]
LINEAR, CONV, DELTA = TARGETS


def fill(layer, g):
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return layer


def linear(m, g):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    m.lora.add_lora(net, 3, "all")
    return fill(net, g)[0], torch.randn(4, 6, generator=g)


def conv(m, g, stride=2, padding=1):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, stride, padding))
    m.lora.add_lora(net, 2, "all")
    return fill(net, g)[0], torch.randn(2, 3, 7, 11, generator=g)


def off_is_base(layer, x):
    layer.enabled = False
    base = torch.nn.functional.linear if x.ndim == 2 else layer._conv_forward
    if not torch.equal(layer(x), base(x, layer.weight, layer.bias)):
        raise Wrong("with self.enabled = False the result is not bitwise that of the layer without adaptors")
    return layer(x)


def half_precision(layer, x):
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    kept = {name: getattr(layer, name).weight.clone() for name in ("lora_A", "lora_B")}
    y = layer(x.bfloat16())
    if y.dtype != torch.bfloat16:
        raise Wrong(f"x is torch.bfloat16 and your result {y.dtype}")
    for name, before in kept.items():
        after = getattr(layer, name).weight
        if after.dtype != before.dtype:
            raise Wrong(f"after your forward self.{name}.weight is {after.dtype}; it has to stay {before.dtype}")
        if not torch.equal(after, before):
            raise Wrong(f"your forward has changed self.{name}.weight by up to {(after - before).abs().max():.2g}")
    layer.weight.data, layer.bias.data = layer.weight.data.float(), layer.bias.data.float()
    error = ((y - layer(x)).abs().max() / y.abs().max()).item()
    if error > 0.03:
        raise Wrong(f"in half precision the result is {100 * error:.0f} % off that in float32")
    return True


@check(LINEAR, "the base layer's result plus B A x")
def beside(m, g):
    layer, x = linear(m, g)
    return layer(x)


@check(LINEAR, "switched off it is the base layer, bitwise")
def switch(m, g):
    return off_is_base(*linear(m, g))


@check(LINEAR, "gradients reach A and B; with B = 0 the adaptor changes nothing")
def gradients(m, g):
    layer, x = linear(m, g)
    layer(x).square().sum().backward()
    if layer.lora_A.weight.grad is None or layer.lora_B.weight.grad is None:
        raise Wrong("A or B gets no gradient, so it would never be trained")
    got = [layer.lora_A.weight.grad.clone(), layer.lora_B.weight.grad.clone()]
    layer.lora_B.weight.data.zero_()
    return {"gradient of A": got[0], "gradient of B": got[1], "with B = 0": layer(x)}


@check(LINEAR, "a base layer in half precision; A and B stay float32")
def half(m, g):
    return half_precision(*linear(m, g))


@check(CONV, "the base layer's result plus both convolutions, for other strides and paddings too")
def beside_conv(m, g):
    results = {}
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        layer, x = conv(m, g, stride, padding)
        results[f"stride {stride}, padding {padding}"] = layer(x)
    return results


@check(CONV, "switched off it is the base layer, bitwise")
def switch_conv(m, g):
    return off_is_base(*conv(m, g))


@check(CONV, "a base layer in half precision; A and B stay float32")
def half_conv(m, g):
    return half_precision(*conv(m, g))


@check(DELTA, "the values and the shape, for a linear layer and a convolution")
def product(m, g):
    def r(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "linear": m.lora.delta(r(3, 6), r(5, 3)),
        "convolution": m.lora.delta(r(2, 3, 3, 3), r(4, 2, 1, 1)),
        "factors in half precision": m.lora.delta(r(4, 5).half(), r(5, 4).half()),
    }


@check(DELTA, "added to the weight, the layer gives the same as with the adaptor beside it")
def merged(m, g):
    for layer, x in (linear(m, g), conv(m, g)):
        want = layer(x)
        layer.weight.data += m.lora.delta(layer.lora_A.weight, layer.lora_B.weight)
        layer.enabled = False
        error = (layer(x) - want).abs().max()
        if error > 1e-3:
            raise Wrong(f"{type(layer).__name__}: with delta added to the weight the result is {error:.2g} off")
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
        m.lora.add_lora(model.unet, 16, "all")
        for path, factors in m.lora.factors(model.unet).items():
            for mine, read in zip(factors, loras[path]):
                mine.copy_(read)
        rows.append(model.decode(m.hipa.predictor(model, names)(x, 999)))
    pictures = torch.stack(rows, 1).flatten(0, 1)
    count = sum(a.numel() + b.numel() for a, b in loras.values())
    return sheet(m, pictures, columns=len(rows)), (
        f"ONE step, with HiPA's adaptors ({count:,} numbers) added by your delta at weights {weights}.\n"
        "Last column: W as it was, and the adaptors beside it by your two forward. It should be as at weight 1.\n"
        "At 1.5 it is too much. What grows first, and what does that tell of what the adaptors have learned?"
    )
