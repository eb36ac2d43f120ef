"""The network's x0 at t = 999 is a blur, the mean of all cats there could be. So a solver goes part of the way, asks
again, and so on: 25 questions make a sharp cat. This one is DPM-Solver++(2M).

dpm_solver(predict_x0, x, schedule, steps, first=None), in hipa.py: from noisy latents x to clean ones.
schedule.timesteps(steps, first) are the timesteps, from the noisiest on, first + 1 of them at most: where `first` is
small there are fewer than `steps`. At each timestep t ask predict_x0(x, t) once, then go on to the next one.

The path from noise to picture has a part that is known exactly; only how x0 changes on the way has to be guessed.
schedule.alpha_sigma(t) gives alpha and sigma, tensors of one number. With lambda = log(alpha / sigma), and
h = lambda_next - lambda_now, which is above 0, a step is

    x_next = (sigma_next / sigma_now) x - alpha_next (exp(-h) - 1) D          torch.expm1(-h) is exp(-h) - 1

First step: D = x0, the network's prediction now. Every later step is of second order: D is x0 at lambda_now + h / 2,
on the straight line (in lambda) through the last two predictions, prolonged. They lie lambda_now - lambda_before apart.

The last step goes to zero noise, where the formula becomes x = x0: so after the last question the result is the x0
just predicted. Neither x nor the network's predictions may be changed in place.
"""

import math

import torch

from checks import Wrong, check
from drawing import plot, sheet, stack

TITLE = "From noise to picture: the solver"
MINUTES = 60
POINTS = 10
TARGETS = ["hipa.dpm_solver"]
S = TARGETS[0]


def latent(g):
    return torch.randn(2, 4, 3, 5, generator=g)


def stable_diffusion(m):
    return m.hipa.Schedule("scaled_linear", 0.00085, 0.012)


class Levels:
    """A schedule whose timesteps 0, 1, ... have the given lambdas: steps as long as a check wants them."""

    def __init__(self, *lambdas):
        self.lambdas = torch.tensor(lambdas, dtype=torch.float64)

    def timesteps(self, steps, first=None):
        return list(range(len(self.lambdas)))

    def alpha_sigma(self, t):
        return torch.sigmoid(2 * self.lambdas[t]).sqrt(), torch.sigmoid(-2 * self.lambdas[t]).sqrt()


def network(schedule):
    """Stands for the network: x0 depends on x, and on how much noise there is, smoothly in lambda."""

    def predict_x0(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return torch.tanh(0.6 * x + 0.3 * (alpha / sigma).log() / 4 + 0.2)

    return predict_x0


def seen(m, x, schedule, answers):
    """The x of each question, if the network gives these answers."""
    asked = []

    def predict_x0(x, t):
        if len(asked) == len(answers):
            raise Wrong(f"with {len(answers)} timesteps the network is asked more than {len(answers)} times")
        asked.append(x.clone())
        return answers[len(asked) - 1]

    m.hipa.dpm_solver(predict_x0, x, schedule, len(answers))
    if len(asked) < len(answers):
        raise Wrong(f"with {len(answers)} timesteps the network is asked {len(asked)} times")
    return asked


@check(S, "with one step the result is the network's x0 at t = 999, or where `first` says")
def one_step(m, g):
    schedule, x = stable_diffusion(m), latent(g)
    return {f"first = {t}": m.hipa.dpm_solver(network(schedule), x, schedule, 1, t) for t in (None, 699)}


@check(S, "the network is asked once a step, at the right timesteps")
def asked(m, g):
    schedule, timesteps = stable_diffusion(m), []
    predict = network(schedule)

    def record(x, t):
        timesteps.append(t)
        return predict(x, t)

    m.hipa.dpm_solver(record, latent(g), schedule, 4)
    return timesteps


@check(S, "the first step: x at the second question")
def first_order(m, g):
    x, answers, cases = latent(g), [latent(g), latent(g)], ((-2, -1), (0, 3))
    return {f"from lambda = {a} to {b}": seen(m, x, Levels(a, b), answers)[1] for a, b in cases}


@check(S, "the second step, after one of another length: x at the third question, and at the fourth")
def second_order(m, g):
    answers = [latent(g) for _ in range(4)]
    return seen(m, latent(g), Levels(-2.5, -1, 1, 1.5), answers)[2:]


@check(S, "many steps, from pure noise and from a later timestep")
def many(m, g):
    schedule, x = stable_diffusion(m), latent(g)
    cases = {"2 steps": (2, None), "3 steps": (3, None), "10 steps": (10, None), "5 from t = 600": (5, 600)}
    cases["10 steps from t = 3, where there are only 4 timesteps"] = 10, 3
    return {name: m.hipa.dpm_solver(network(schedule), x, schedule, *how) for name, how in cases.items()}


def show(m):
    """One cat in 1, 2, 4, 8, 16 steps, and how the error falls with their number."""
    model, counts = m.hipa.load("emoji"), [1, 2, 4, 8, 16]
    x, schedule = m.hipa.noise([4], 4, 16, 16), model.schedule
    with torch.no_grad():
        predict = m.hipa.predictor(model, ["a cat"])
        latents = [m.hipa.dpm_solver(predict, x, schedule, n) for n in (*counts, 40)]
        broken = [n for n, z in zip((*counts, 40), latents) if not z.isfinite().all()]
        if broken:
            raise Wrong(f"your solver gave NaN or infinite values with {broken} steps. At which step is the first?")
        pictures = model.decode(torch.cat(latents))
    errors = [(z - latents[-1]).square().mean().sqrt().item() for z in latents[:-1]]
    powers = [math.log2(n) for n in counts]
    chart = plot({"your solver": (powers, errors)}, "log2 of the steps", "distance to 40 steps", logarithmic=True)
    return stack(sheet(m, pictures, columns=len(pictures)), chart), (
        f"Your solver with {counts} and 40 steps, from the same noise. Below: the distance to the 40 steps.\n"
        "With one step it is the mean of all cats. What would have to change so that it is one cat?"
    )
