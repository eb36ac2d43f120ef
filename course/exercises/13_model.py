"""How was the model trained that you have sampled from? By one regression, over and over: take a picture, add noise to
it, let the network say what the noise is (or v), and make the squared error smaller. emoji/make.py made the embedded
model in this way; you write how it draws t, and its loss. The step along the gradient is exercise 11.

draw_timesteps(batch, total, device), in emoji/make.py: (batch,) whole numbers from 0 to total - 1, on that device. The
loss is a mean over what is drawn, so how often t is drawn is its weight: here t around 700 counts most, where shapes
are decided. Independent draws would make the loss noisy, so there is one from each of `batch` equally likely parts:
1. q_k = (k + u_k) / batch for k = 0, 1, ..., with u_k of its own for each k, uniform in [0, 1).
2. z = torch.special.ndtri(q), the inverse of the normal distribution function: z is normally distributed.
3. total * sigmoid(0.3 + 1.3 z), rounded down; at most total - 1, also where q was rounded to 1.

diffusion_loss(network, schedule, x0, context, timestep, noise), in emoji/make.py: a scalar. Noise the latents x0
(B, 4, h, w) to the timesteps (B,) with schedule.add_noise, ask network(x, timestep, context) once, and take the mean
square error to what it should have said. If schedule.prediction_type is "epsilon", that is the noise; otherwise
v = alpha noise - sigma x0, with both weights from schedule.alpha_sigma(timestep).
"""

import dataclasses
from unittest import mock

import torch

from checks import Net, Wrong, check
from drawing import plot, real, stack

TITLE = "How the model was trained"
MINUTES = 30
POINTS = 8
TARGETS = ["make.draw_timesteps", "make.diffusion_loss"]
TIMES, LOSS = TARGETS


@check(TIMES, "one from each of the equally likely parts, at a random place in it")
def parts(m, g):
    t = m.make.draw_timesteps(400, 10**6, torch.device("cpu"))
    if t.shape != (400,) or t.dtype != torch.int64:
        raise Wrong(f"400 timesteps of 1,000,000 are {t.dtype} of shape {tuple(t.shape)}; right is torch.int64, (400,)")
    q = torch.special.ndtr((torch.logit((t.sort().values + 0.5).double() / 10**6) - 0.3) / 1.3)
    u = 400 * q - torch.arange(400)  # where in its part each one lies
    if not (-0.02 < u.min() and u.max() < 1.02):
        k = int(((u < -0.02) | (u > 1.02)).nonzero()[0])
        raise Wrong(f"of 400 timesteps of a million, in order, number {k} is {t.sort().values[k]}: not in its part")
    if abs(u.mean() - 0.5) > 0.1 or abs(u.std() - 0.289) > 0.05:
        raise Wrong(f"where they lie in their parts has mean {u.mean():.2f} and deviation {u.std():.2f}; not uniform")
    if torch.equal(t, m.make.draw_timesteps(400, 10**6, "cpu")):
        raise Wrong("two draws are the same: most timesteps would never be trained")
    return True


@check(TIMES, "rounded down, never above total - 1")
def limits(m, g):
    rand, few = torch.rand, torch.bincount(m.make.draw_timesteps(500, 4, "cpu"), minlength=4)
    below = 500 * torch.special.ndtr((torch.logit(torch.tensor([0.25, 0.5, 0.75])) - 0.3) / 1.3)
    if len(few) != 4 or (few.cumsum(0)[:3] - below).abs().max() > 1.1:
        raise Wrong(f"of 500 draws where there are 4 timesteps you have {few.tolist()} of each: not rounded down?")
    with mock.patch.object(torch, "rand", lambda *a, **k: rand(*a, **k).fill_(1 - 2**-24)):  # the most it can give
        most = m.make.draw_timesteps(32, 1000, "cpu").max().item()
    if most > 999:
        raise Wrong(f"where torch.rand gives its most, you draw timestep {most} of 1000, and 999 is the last")
    return True


def case(m, g, kind, scale=1.0):
    x0, noise = torch.randn(3, 4, 5, 6, generator=g) * scale, torch.randn(3, 4, 5, 6, generator=g)
    schedule = m.hipa.Schedule("scaled_linear", 0.00085, 0.012, prediction_type=kind)
    return schedule, x0, torch.randn(3, 2, 7, generator=g), torch.tensor([20, 500, 980]), noise


@check(LOSS, "the values, and what the network is asked, once: the noisy latents")
def values(m, g):
    found = {}
    for kind, scale in (("epsilon", 1.0), ("v_prediction", 1.0), ("v_prediction", 5.0)):
        net, how = Net(), f"{kind}, latents of size {scale:g}"
        found[f"{how}: the loss"] = m.make.diffusion_loss(net, *case(m, g, kind, scale))
        found |= {f"{how}: the network is asked, times": len(net.asked), f"{how}: of": net.asked[-1][0]}
    return found


def show(m):
    """The loss over t of what the embedded model says of 8 real pictures, as v, as noise and as x0; how t is drawn."""
    model, times = m.hipa.load("emoji"), [5, 20, 50, *range(100, 1000, 100), 960, 999]
    by_noise, curves = dataclasses.replace(model.schedule, prediction_type="epsilon"), {"v": [], "noise": [], "x0": []}
    names = ["a cat", "an owl", "a rocket", "a house", "a robot", "a pizza", "a pig", "a panda"]

    def noise_from_v(x, t, context):
        alpha, sigma = model.schedule.alpha_sigma(t)
        return sigma * x + alpha * model.unet(x, t, context)

    with torch.no_grad():
        x0, context = model.encode(torch.cat([real(m, name) for name in names])), model.encode_text(names)
        for t in (torch.full((8,), t) for t in times):
            rest = x0, context, t, m.hipa.noise(range(8), 4, 16, 16)
            curves["v"].append(m.make.diffusion_loss(model.unet, model.schedule, *rest).item())
            curves["noise"].append(m.make.diffusion_loss(noise_from_v, by_noise, *rest).item())
            curves["x0"].append(curves["v"][-1] * model.schedule.alpha_sigma(t)[1][0].item() ** 2)
    drawn = torch.bincount(m.make.draw_timesteps(4000, 1000, "cpu") // 50, minlength=20) / 200
    charts = [plot({name: (times, ys) for name, ys in curves.items()}, "t", "loss", logarithmic=True)]
    charts.append(
        plot({"": (range(25, 1000, 50), drawn.tolist())}, "t", "how often you draw it; 1: as if all were alike")
    )
    return stack(*charts), (
        "Above: your loss of the embedded model over t. It says v; the same answers are taken as noise, and as x0.\n"
        "Below: how often you draw a timestep. What is decided at those that you draw most (exercise 5's picture)?\n"
        "Why does the noise's loss fall to nearly nothing at t = 999, where one step has everything still to do?"
    )
