"""The method itself. The frozen model, the teacher, has made pictures in many steps; the student, the same network
with adaptors, begins with the same noise, has one step, and learns by the difference of the two pictures.

adaptation_loss(model, loss, predicted, target), in hipa.py: the student's latents `predicted` and the teacher's
`target`, both (B, 4, h, w) -> what loss(student's picture, teacher's picture) gives, a dict of terms. model.decode
makes a picture of a latent. The target needs no gradient: decode it under torch.no_grad().

loss_of(args, model, loss, step, batch), in train.py: one step of the student -> a dict of terms. The batch has
prompts, x (noisy latents), timesteps (how noisy they are), and x0 (the teacher's latents). hipa.student(model, prompts,
x, timesteps) predicts. The head start lasts as long as `step` is below args.head_start * args.steps.
- "latent": F.mse_loss of prediction and x0, times args.latent. In the head start this term is alone, and has weight
  1 if args.latent is 0. Otherwise weight 0 means that it is left out.
- After the head start the terms of hipa.adaptation_loss(model, loss, ...) join it. They are left out, and no picture
  is decoded, if all values of the dict loss.weights are 0.

schedule_of_lr(step, steps), in train.py: the share of the full learning rate, from 0 to 1. It rises along a line
over the first steps // 20 steps (at least 1): the first step has 1 / warm, the last of them 1. Then it falls to 0
along half a cosine, which begins at 1 at step `warm`.

descend(optimizer, lr), in train.py: one step of the optimizer. Clip the gradients of all groups together to a
length of 1 (torch.nn.utils.clip_grad_norm_), set the rate in every one of optimizer.param_groups, step, clear the
gradients. Return the length before clipping, a float. If it is not finite, leave the parameters as they are; the
gradients are cleared all the same.
"""

import math
from types import SimpleNamespace

import torch

from checks import Wrong, check
from drawing import plot, sheet, stack

TITLE = "Training"
MINUTES = 60
POINTS = 12
TARGETS = ["hipa.adaptation_loss", "train.loss_of", "train.schedule_of_lr", "train.descend"]
ADAPT, LOSS, LR, DESCEND = TARGETS


class Loss:
    def __init__(self, **weights):
        self.weights = weights or {"spatial": 1.0, "sobel": 0.0}

    def __call__(self, picture, target):
        return {"spatial": ((picture - target).abs() * (1 + picture)).mean()}


class Model:
    """A network of one number per channel."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, m):
        self.p = torch.full((4, 1, 1), 0.1, requires_grad=True)
        self.schedule = m.hipa.Schedule("scaled_linear", 0.00085, 0.012, prediction_type="v_prediction")
        self.decoded = []  # for each picture, whether with gradients

    def encode_text(self, prompts):
        return torch.ones(len(prompts), 2, 3)

    def unet(self, x, timesteps, context):
        return self.p * x - 0.3 * (timesteps / 999)[:, None, None, None]

    def decode(self, z):
        self.decoded.append(torch.is_grad_enabled())
        return torch.tanh(z[:, :3])


def latents(g, n=3):
    return torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 4, 2, 2, generator=g)


def loss_at(m, g, step, loss=None, latent=2.0):
    """The model and the terms at a step of a training of 10 steps, of which 5 are the head start."""
    model, args, (x, x0) = Model(m), SimpleNamespace(head_start=0.5, steps=10, latent=latent), latents(g)
    batch = m.train.Batch(["a cat"] * 3, x, torch.tensor([999, 400, 999]), x0)
    return model, dict(sorted(m.train.loss_of(args, model, loss or Loss(), step, batch).items()))


@check(ADAPT, "the loss of both pictures, the student's first")
def pictures(m, g):
    return m.hipa.adaptation_loss(Model(m), Loss(), *latents(g))


@check(ADAPT, "a gradient for the student, none for the target")
def which_gradient(m, g):
    model, (predicted, target) = Model(m), latents(g)
    predicted.requires_grad_(), target.requires_grad_()
    terms = m.hipa.adaptation_loss(model, Loss(), predicted, target)
    if not terms["spatial"].requires_grad:
        raise Wrong("the loss has no gradient: nothing can be learned by it")
    terms["spatial"].backward()
    if sorted(model.decoded) != [False, True]:
        count = sum(model.decoded)
        raise Wrong(
            f"{len(model.decoded)} pictures were decoded, {count} with gradients; right is one with and one without"
        )
    return predicted.grad


@check(LOSS, "in the head start, here steps 0 to 4 of 10: the latents' error alone")
def head_start(m, g):
    terms = {}
    for step, weight in ((0, 2.0), (4, 0.0), (4, 0.5)):
        model, terms[f"step {step}, args.latent = {weight:g}"] = loss_at(m, g, step, latent=weight)
        if model.decoded:
            raise Wrong(f"at step {step}, in the head start, {len(model.decoded)} pictures are decoded; right is none")
    return terms


@check(LOSS, "after it: all terms")
def afterwards(m, g):
    cases = (5, 2.0), (5, 0.0), (9, 0.5)
    return {f"step {step}, args.latent = {w:g}": loss_at(m, g, step, latent=w)[1] for step, w in cases}


@check(LOSS, "if all weights of the pictures' loss are 0, no picture is decoded")
def savings(m, g):
    model, terms = loss_at(m, g, 5, Loss(spatial=0.0, energy=0.0))
    if model.decoded:
        raise Wrong(f"all weights of the pictures' loss are 0, and {len(model.decoded)} pictures are decoded")
    return terms


@check(LOSS, "gradients reach the student")
def gradient(m, g):
    model, terms = loss_at(m, g, 5)
    if not sum(terms.values()).requires_grad:
        raise Wrong("the loss has no gradient: nothing can be learned by it")
    sum(terms.values()).backward()
    return model.p.grad


@check(LR, "the values, for long, short and very short trainings")
def rates(m, g):
    return {f"step {k} of {n}": float(m.train.schedule_of_lr(k, n)) for n in (100, 37, 1, 2) for k in range(n)}


@check(LR, "the first step does something, the top is 1, the end is near 0")
def ends(m, g):
    rates = [m.train.schedule_of_lr(k, 200) for k in range(200)]
    if rates[0] <= 0:
        raise Wrong("at step 0 the share is 0: the first step does nothing")
    if not 0.999 < max(rates) < 1.0001 or not 0 <= rates[-1] < 0.01:
        raise Wrong(
            f"of 200 steps the largest share is {max(rates):.3f}, the last {rates[-1]:.3f}; right are 1 and 0.0001"
        )
    return True


def optimizer(g, scale=1.0, nan=False):
    ps = [torch.nn.Parameter(torch.randn(5, generator=g)) for _ in range(2)]
    for p in ps:
        p.grad = torch.randn(5, generator=g) * scale
    if nan:
        ps[0].grad[0] = float("nan")
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


@check(DESCEND, "the gradients are cleared for the next step")
def cleared(m, g):
    for nan, when in ((False, "after the step"), (True, "where one gradient was NaN")):
        ps, opt = optimizer(g, nan=nan)
        m.train.descend(opt, 0.1)
        if any(p.grad is not None and p.grad.count_nonzero() for p in ps):
            raise Wrong(f"{when} the gradients are still there: the next ones would be added to them")
    return True


@check(DESCEND, "a gradient that is not finite changes nothing")
def not_finite(m, g):
    ps, opt = optimizer(g, nan=True)
    before = [p.detach().clone() for p in ps]
    norm = m.train.descend(opt, 0.1)
    if not all(torch.equal(p, q) for p, q in zip(ps, before)):
        raise Wrong("one gradient was NaN, and the parameters were changed")
    if norm is None or math.isfinite(norm):
        raise Wrong(f"one gradient was NaN, and the length that you return is {norm}; the caller looks there")
    return True


@check(DESCEND, "twenty steps lower a loss")
def twenty(m, g):
    p = torch.nn.Parameter(torch.randn(6, generator=g))
    opt, losses = torch.optim.AdamW([p], lr=0.0), []
    for k in range(20):
        loss = (p - 0.3).square().sum()
        loss.backward()
        m.train.descend(opt, 0.05 * (k + 1) / 2)
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise Wrong(f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}")
    return losses


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
        f"ONE step of two noises before your {steps} steps of training, of the same two after, and the 8 steps it "
        "learned from.\n"
        f"The latents' error fell from {losses[0]:.3f} to {losses[-1]:.3f}. The first noise it has seen, the "
        "other never: what "
        "has it learned, and what by heart?"
    )
