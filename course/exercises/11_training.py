"""The method itself. The frozen model, the teacher, has drawn pictures in many steps; the student, the same network
with adaptors, draws from the same noise in one step, and learns by the difference of the two pictures.

adaptation_loss(model, loss, predicted, target), in hipa.py: the student's latents `predicted` and the teacher's
`target`, both (B, 4, h, w) -> what loss(student's picture, teacher's picture) gives, a dict of terms. model.decode
makes a picture of a latent. The target needs no gradient: decode it under torch.no_grad().

Run.loss_of(self, x, timesteps, x0, prompts, head_start), in train.py: one step of the student -> a dict of terms.
hipa.student(self.student, prompts, x, timesteps) predicts; x0 is the teacher's latent.
- "latent": F.mse_loss of the two latents, times self.args.latent. In the head start this term is alone, and has weight
  1 if self.args.latent is 0. Otherwise weight 0 means that it is left out.
- After the head start the terms of hipa.adaptation_loss(self.model, self.loss, ...) join it. They are left out, and no
  picture is decoded, if all values of the dict self.loss.weights are 0.

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

TITLE = "Training"
MINUTES = 60
POINTS = 12
TARGETS = ["hipa.adaptation_loss", "train.Run.loss_of", "train.schedule_of_lr", "train.descend"]
ADAPT, LOSS, LR, DESCEND = TARGETS


class Student(torch.nn.Module):
    """A network of one number per channel, with all that `loss_of` asks of a model and of a run."""

    def __init__(self, m, **args):
        super().__init__()
        self.p = torch.nn.Parameter(torch.full((4, 1, 1), 0.1))
        self.schedule = m.hipa.Schedule(prediction_type="v_prediction")
        self.dtype, self.device, self.decoded = torch.float32, torch.device("cpu"), []
        self.args = SimpleNamespace(**{"latent": 2.0, **args})
        self.model, self.loss, self.asked = self, self.Loss(), 0
        parts = "schedule", "dtype", "device", "encode_text", "decode"
        self.student = SimpleNamespace(unet=self.wrapped, **{name: getattr(self, name) for name in parts})

    class Loss:
        weights = {"spatial": 1.0, "sobel": 0.0}

        def __call__(self, picture, target):
            return {"spatial": ((picture - target).abs() * (1 + picture)).mean()}

    def encode_text(self, prompts):
        return torch.ones(len(prompts), 2, 3)

    def unet(self, x, timesteps, context):
        return self.p * x - 0.3 * (timesteps / 999)[:, None, None, None]

    def wrapped(self, *args):
        """The network as of `self.student`. With several processes, what stands around it averages their gradients."""
        self.asked += 1
        return self.unet(*args)

    def decode(self, z):
        self.decoded.append(torch.is_grad_enabled())
        return torch.tanh(z[:, :3])


def latents(g, n=3):
    return torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 4, 2, 2, generator=g)


def loss_at(m, g, head_start, weights=None, **args):
    run = Student(m, **args)
    if weights:
        run.loss.weights = weights
    x, x0 = latents(g)
    return run, m.train.Run.loss_of(run, x, torch.tensor([999, 400, 999]), x0, ["a cat"] * 3, head_start)


def ordered(terms):
    return dict(sorted(terms.items()))


@check(ADAPT, "the loss of both pictures, the student's first")
def pictures(m, g):
    run, (predicted, target) = Student(m), latents(g)
    return m.hipa.adaptation_loss(run, run.loss, predicted, target)


@check(ADAPT, "a gradient for the student, none for the target")
def which_gradient(m, g):
    run, (predicted, target) = Student(m), latents(g)
    predicted.requires_grad_(), target.requires_grad_()
    terms = m.hipa.adaptation_loss(run, run.loss, predicted, target)
    if not terms["spatial"].requires_grad:
        raise Wrong("the loss has no gradient: nothing can be learned by it")
    terms["spatial"].backward()
    if sorted(run.decoded) != [False, True]:
        count = sum(run.decoded)
        raise Wrong(
            f"{len(run.decoded)} pictures were decoded, {count} with gradients; right is one with and one without"
        )
    return predicted.grad


@check(LOSS, "in the head start: the latents' error alone")
def head_start(m, g):
    found = {f"args.latent = {weight:g}": loss_at(m, g, True, latent=weight) for weight in (2.0, 0.0)}
    for run, _ in found.values():
        if run.decoded:
            raise Wrong(f"in the head start {len(run.decoded)} pictures are decoded; it is there to save that")
    return {name: terms for name, (_, terms) in found.items()}


@check(LOSS, "after it: all terms")
def afterwards(m, g):
    return {f"args.latent = {weight:g}": ordered(loss_at(m, g, False, latent=weight)[1]) for weight in (2.0, 0.0, 0.5)}


@check(LOSS, "if all weights of the pictures' loss are 0, no picture is decoded")
def savings(m, g):
    run, terms = loss_at(m, g, False, {"spatial": 0.0, "energy": 0.0})
    if run.decoded:
        raise Wrong(f"all weights of the pictures' loss are 0, and {len(run.decoded)} pictures are decoded")
    return terms


@check(LOSS, "self.student is asked, and gradients reach it")
def gradient(m, g):
    run, terms = loss_at(m, g, False)
    if not run.asked:
        raise Wrong("the network of self.student was never asked")
    if not sum(terms.values()).requires_grad:
        raise Wrong("the loss has no gradient: nothing can be learned by it")
    sum(terms.values()).backward()
    return run.p.grad


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
    """One prompt, one noise, a dozen steps of training, and what one step draws then, from other noise too."""
    from drawing import plot, stack, twice

    model, name = m.hipa.load("emoji"), "a cat"
    noise, other, steps, losses = m.hipa.noise([0], 4, 16, 16), m.hipa.noise([7], 4, 16, 16), 12, []

    def draw(x):
        return model.decode(m.hipa.predictor(model, [name])(x, 999)).detach()

    with torch.no_grad():
        x0 = m.hipa.dpm_solver(m.hipa.predictor(model, [name], 2.0), noise, model.schedule, 8)
        before = [draw(noise), draw(other)]
    torch.manual_seed(0)
    opt = torch.optim.AdamW(m.lora.add_lora(model.unet, 16, "all"), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    loss = m.losses.HiPALoss(m.train.load_distance("dists", m.evaluate.HERE), 1.0, 3.0, 1.0, 0.2)
    run = SimpleNamespace(student=model, model=model, args=SimpleNamespace(latent=2.0), loss=loss)
    for step in range(steps):
        terms = m.train.Run.loss_of(run, noise, torch.tensor([999]), x0, [name], step < steps // 2)
        sum(terms.values()).backward()
        losses.append(terms["latent"].item() / 2)
        m.train.descend(opt, 4e-3 * m.train.schedule_of_lr(step, steps))
    with torch.no_grad():
        pictures = [*before, draw(noise), draw(other), model.decode(x0)]
    sheet = twice(m.vae.grid(m.vae.to_pil(torch.cat(pictures)), columns=5))
    chart = plot({"latents' error": (range(steps), losses)}, "step", "mean square", logarithmic=True)
    return stack(sheet, chart), (
        f"ONE step of two noises before your {steps} steps of training, of the same two after, and the 8 steps it "
        "learned from.\n"
        f"The latents' error fell from {losses[0]:.3f} to {losses[-1]:.3f}. The first noise it has seen, the "
        "other never: what "
        "has it learned, and what by heart?"
    )
