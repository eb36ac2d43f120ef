"""The method itself. The frozen model, the teacher, has made pictures in many steps; the student, the same network
with adaptors, begins with the same noise, has one step, and learns by the difference of the two pictures.

adaptation_loss(model, loss, predicted, target), in hipa.py: the student's latents `predicted` and the teacher's
`target`, both (B, 4, h, w) -> what loss(student's picture, teacher's picture) gives, a dict of terms. model.decode
makes a picture of a latent. The target needs no gradient: decode it under torch.no_grad(). train.loss_of, which is
given, adds the latents' own error, and leaves the pictures out in the first steps.

schedule_of_lr(step, steps), in train.py: the share of the full learning rate, from 0 to 1. It rises along a line
over the first steps // 20 steps (at least 1): the first step has 1 / warm, the last of them 1. Then it falls to 0
along half a cosine, which begins at 1 at step `warm`.

descend(optimizer, lr), in train.py: one step of the optimizer. Clip the gradients of all groups together to a
length of 1 (torch.nn.utils.clip_grad_norm_), set the rate in every one of optimizer.param_groups, step, clear the
gradients. Return the length before clipping, a float. If it is not finite (NaN or infinite), leave the parameters as
they are and take no step; the gradients are cleared all the same.
"""

import math
from types import SimpleNamespace

import torch

from checks import Wrong, check
from drawing import plot, sheet, stack

TITLE = "Training"
MINUTES = 45
POINTS = 9
TARGETS = ["hipa.adaptation_loss", "train.schedule_of_lr", "train.descend"]
ADAPT, LR, DESCEND = TARGETS


def loss(picture, target):
    return {"spatial": ((picture - target).abs() * (1 + picture)).mean()}


class Model:
    """Its pictures are bent latents, also beyond [-1, 1]. Notes whether each picture that it decodes has gradients."""

    def __init__(self):
        self.decoded = []

    def decode(self, z):
        self.decoded.append(torch.is_grad_enabled())
        return 1.5 * torch.tanh(z[:, :3])


def latents(g, n=3):
    return torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 4, 2, 2, generator=g)


@check(ADAPT, "the loss of both pictures, the student's first")
def pictures(m, g):
    return m.hipa.adaptation_loss(Model(), loss, *latents(g))


@check(ADAPT, "a gradient for the student, none for the target")
def which_gradient(m, g):
    m.hipa.adaptation_loss(model := Model(), loss, *latents(g))
    if sorted(model.decoded) != [False, True]:
        how = f"{len(model.decoded)} pictures were decoded, {sum(model.decoded)} with gradients"
        raise Wrong(f"{how}; right is one with and one without")
    return True


@check(LR, "the values, for long, short and very short trainings")
def rates(m, g):
    return {f"step {k} of {n}": float(m.train.schedule_of_lr(k, n)) for n in (100, 37, 1, 2) for k in range(n)}


def optimizer(g, scale=1.0, broken=None):
    ps = [torch.nn.Parameter(torch.randn(5, generator=g)) for _ in range(2)]
    for p in ps:
        p.grad = torch.randn(5, generator=g) * scale
    if broken:
        ps[0].grad[0] = broken
    return ps, torch.optim.SGD([{"params": [ps[0]]}, {"params": [ps[1]]}], lr=123.0)


@check(DESCEND, "a step along long and short gradients, at the given rate")
def down(m, g):
    found = {}
    for how, scale in (("long", 30.0), ("short", 0.01)):
        ps, opt = optimizer(g, scale)
        norm = m.train.descend(opt, 0.1)
        if not isinstance(norm, float):
            raise Wrong(f"the length that you return is of type {type(norm).__name__}; a float is expected")
        found[f"{how} gradients: the rates of both groups"] = [float(group["lr"]) for group in opt.param_groups]
        found[f"{how} gradients: the parameters afterwards"] = torch.stack([p.detach() for p in ps])
        found[f"{how} gradients: the length"] = norm
    return found


@check(DESCEND, "a parameter without a gradient stays as it is")
def without(m, g):
    ps, opt = optimizer(g)
    ps[0].grad = None
    m.train.descend(opt, 0.1)
    return torch.stack([p.detach() for p in ps])


@check(DESCEND, "the gradients are cleared for the next step")
def cleared(m, g):
    for broken, when in ((None, "after the step"), (math.nan, "where one gradient was NaN")):
        ps, opt = optimizer(g, broken=broken)
        m.train.descend(opt, 0.1)
        if any(p.grad is not None and p.grad.count_nonzero() for p in ps):
            raise Wrong(f"{when} the gradients are still there: the next ones would be added to them")
    return True


@check(DESCEND, "a gradient that is not finite changes nothing")
def not_finite(m, g):
    found = {}
    for broken in (math.nan, math.inf):
        ps, opt = optimizer(g, broken=broken)
        before = [p.detach().clone() for p in ps]
        norm = m.train.descend(opt, 0.1)
        if not all(map(torch.equal, ps, before)):
            raise Wrong(f"one gradient was {broken}, and the parameters were changed")
        if norm is None or math.isfinite(norm):
            raise Wrong(f"one gradient was {broken}, and the length that you return is {norm}; the caller looks there")
        adam = torch.optim.AdamW(ps)  # it remembers the gradients that it has seen
        for wrong in (broken, 1.0):
            for p in ps:
                p.grad = torch.full_like(p, wrong)
            m.train.descend(adam, 0.1)
        found[f"after gradients that were {broken}, AdamW's next step"] = torch.stack([p.detach() for p in ps])
    return found


def show(m):
    """One prompt, one noise, a dozen steps of training, and what one step makes then, of other noise too."""
    model, name = m.hipa.load("emoji"), "a cat"
    noise, other, steps, losses = m.hipa.noise([0], 4, 16, 16), m.hipa.noise([7], 4, 16, 16), 12, []

    def one_step(x):
        return model.decode(m.hipa.predictor(model, [name])(x, 999)).detach()

    with torch.no_grad():
        x0 = m.hipa.dpm_solver(m.hipa.predictor(model, [name], 2.0), noise, model.schedule, 8)
        before = [one_step(noise), one_step(other)]
    torch.manual_seed(0)
    opt = torch.optim.AdamW(m.lora.add_lora(model.unet, 16, "all"), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    loss = m.losses.HiPALoss(m.train.load_distance("dists", m.hipa.SHORT_NAMES["emoji"]), 1.0, 3.0, 1.0, 0.2)
    args = SimpleNamespace(latent=2.0, head_start=0.5, steps=steps)
    for step in range(steps):
        terms = m.train.loss_of(args, model, loss, step, m.train.Batch([name], noise, torch.tensor([999]), x0))
        sum(terms.values()).backward()
        losses.append(terms["latent"].item() / 2)
        m.train.descend(opt, 4e-3 * m.train.schedule_of_lr(step, steps))
    with torch.no_grad():
        pictures = [*before, one_step(noise), one_step(other), model.decode(x0)]
    chart = plot({"latents' error": (range(steps), losses)}, "step", "mean square", logarithmic=True)
    return stack(sheet(m, torch.cat(pictures), columns=5), chart), (
        f"ONE step of two noises before your {steps} steps of training and after it; the 8 steps it learned from.\n"
        f"The latents' error fell from {losses[0]:.3f} to {losses[-1]:.3f}.\n"
        "The first noise it has seen, the other never: what has it learned, and what by heart?"
    )
