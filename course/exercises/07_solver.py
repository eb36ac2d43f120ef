"""The network's x0 at t = 999 is a blur, the mean of all cats there could be. So a solver goes part of the way, asks
again, and so on: 25 questions make a sharp cat. This one is DPM-Solver++(2M).

The path from noise to picture has a part that is known exactly; only how x0 changes on the way has to be guessed.
With lambda = log(alpha / sigma), which log_snr gives, and h = lambda_later - lambda_now, which is above 0:

    x_later = (sigma_later / sigma_now) x - alpha_later (exp(-h) - 1) D          torch.expm1(-h) is exp(-h) - 1

First order: D = x0, the network's prediction now. Second order: D is x0 at lambda_now + h / 2, on the straight line
(in lambda) through the last two predictions, prolonged. They lie lambda_now - lambda_before apart.

dpm_step(x, x0, now, later, before=None), in hipa.py: one step. `now` and `later` are pairs (alpha, sigma), tensors
of one number or, where each picture has levels of its own, (B, 1, 1, 1). `before` is None, or a pair: the x0 of the
step before, and the lambda at which it was predicted. No input may be changed.

dpm_solver(predict_x0, x, schedule, steps, first=None, progress=None), in hipa.py: all steps.
schedule.timesteps(steps, first) are the timesteps, from the noisiest on, first + 1 of them at most: where `first` is
small there are fewer than `steps`. schedule.alpha_sigma(t) gives the levels. At each one ask predict_x0(x, t) once,
and call progress(), if there is one. From each, dpm_step leads to the next one. The last step goes to zero noise,
where the formula becomes x = x0: there the result is the x0 just predicted, without dpm_step.
"""

import math

import torch

from checks import Wrong, check

TITLE = "From noise to picture: the solver"
MINUTES = 45
POINTS = 10
TARGETS = ["hipa.dpm_step", "hipa.dpm_solver"]
STEP, SOLVER = TARGETS


def latent(g):
    return torch.randn(2, 4, 3, 5, generator=g)


def network(schedule):
    """Stands for the network: x0 depends on x, and on how much noise there is, smoothly in lambda."""

    def predict_x0(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return torch.tanh(0.6 * x + 0.3 * (alpha / sigma).log() / 4 + 0.2)

    return predict_x0


@check(STEP, "the inputs x, x0 and before stay as they are")
def untouched(m, g):
    schedule, inputs = m.hipa.Schedule(), {"x": latent(g), "x0": latent(g), "the x0 in before": latent(g)}
    kept = {name: value.clone() for name, value in inputs.items()}
    first, now, later = map(schedule.alpha_sigma, (900, 600, 450))
    x, x0, x0_before = inputs.values()
    for before in (None, (x0_before, m.hipa.log_snr(*first))):
        m.hipa.dpm_step(x, x0, now, later, before)
        for name, value in inputs.items():
            if not torch.equal(value, kept[name]):
                raise Wrong(f"your dpm_step has changed its input: {name}")
    return True


@check(STEP, "first order: from noise and one prediction")
def first_order(m, g):
    schedule, x, x0 = m.hipa.Schedule(), latent(g), latent(g)
    cases = {"from t = 999 to 700": (999, 700), "from t = 500 to 20": (500, 20)}
    levels = {name: map(schedule.alpha_sigma, pair) for name, pair in cases.items()}
    return {name: m.hipa.dpm_step(x, x0, *now_and_later) for name, now_and_later in levels.items()}


@check(STEP, "if the network always says the same x0, a step of any length is exact: the same noise, less of it")
def exact(m, g):
    schedule, x0, noise = m.hipa.Schedule(), latent(g), latent(g)
    earlier = m.hipa.log_snr(*schedule.alpha_sigma(999)) - 1
    for t, t_next in ((999, 100), (600, 599)):
        (alpha, sigma), (alpha_next, sigma_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        for before in (None, (x0, earlier)):
            x = m.hipa.dpm_step(alpha * x0 + sigma * noise, x0, (alpha, sigma), (alpha_next, sigma_next), before)
            error = (x - alpha_next * x0 - sigma_next * noise).abs().max()
            if not error < 1e-3:
                raise Wrong(f"from t = {t} to {t_next} your x is {error:.2g} off alpha_later x0 + sigma_later noise")
    return True


@check(STEP, "second order, after a step of another length")
def second_order(m, g):
    schedule, x, x0, x0_before = m.hipa.Schedule(), latent(g), latent(g), latent(g)
    levels = [schedule.alpha_sigma(t) for t in (900, 600, 450)]
    return m.hipa.dpm_step(x, x0, levels[1], levels[2], (x0_before, m.hipa.log_snr(*levels[0])))


@check(STEP, "levels of their own for each picture")
def own_levels(m, g):
    schedule, x, x0, x0_before = m.hipa.Schedule(), latent(g), latent(g), latent(g)
    levels = [schedule.alpha_sigma(torch.tensor(t)) for t in ((900, 500), (600, 300), (450, 20))]
    return m.hipa.dpm_step(x, x0, levels[1], levels[2], (x0_before, m.hipa.log_snr(*levels[0])))


@check(STEP, "twice as many steps make the error four times smaller")
def order(m, g):
    def level(lambda_):
        return (1 + math.exp(-2 * lambda_)) ** -0.5, (1 + math.exp(2 * lambda_)) ** -0.5

    def solve(n):
        x, before, lambdas = start, None, torch.linspace(-2.5, 2.5, n + 1).tolist()
        for a, b in zip(lambdas, lambdas[1:]):
            now, later = (tuple(torch.tensor(v, dtype=torch.float64) for v in level(c)) for c in (a, b))
            x0 = torch.tanh(0.6 * x + 0.3 * a + 0.2)
            x = m.hipa.dpm_step(x, x0, now, later, before)
            before = x0, torch.tensor(a, dtype=torch.float64)
        return x

    start = latent(g).double()
    right = solve(640)
    errors = [(solve(n) - right).abs().mean().item() for n in (20, 40, 80)]
    slope = math.log2(errors[0] / max(errors[2], 1e-12)) / 2
    if not slope >= 1.6:
        shown = ", ".join(f"{error:.1e}" for error in errors)
        raise Wrong(f"with 20, 40, 80 steps the errors are {shown}: that is order {slope:.1f}, and second order has 2")
    return True


@check(SOLVER, "with one step the result is the network's x0 at t = 999")
def one_step(m, g):
    schedule, x = m.hipa.Schedule(), latent(g)
    return m.hipa.dpm_solver(network(schedule), x, schedule, 1)


@check(SOLVER, "many steps, from pure noise and from a later timestep")
def many(m, g):
    schedule, x = m.hipa.Schedule(), latent(g)
    cases = {"2 steps": (2, None), "3 steps": (3, None), "10 steps": (10, None), "5 steps from t = 600": (5, 600)}
    return {name: m.hipa.dpm_solver(network(schedule), x, schedule, *how) for name, how in cases.items()}


@check(SOLVER, "10 steps from t = 3, where there are only 4 timesteps")
def few(m, g):
    schedule, x = m.hipa.Schedule(), latent(g)
    return m.hipa.dpm_solver(network(schedule), x, schedule, 10, 3)


@check(SOLVER, "the network is asked once a step, at the right timesteps, and progress is called once a step")
def asked(m, g):
    schedule, calls = m.hipa.Schedule(), []
    predict = network(schedule)

    def record(x, t):
        calls.append(int(t))
        return predict(x, t)

    m.hipa.dpm_solver(record, latent(g), schedule, 4, progress=lambda: calls.append("progress"))
    return calls


def show(m):
    """One cat in 1, 2, 4, 8, 16 steps, and how the error falls with their number."""
    from drawing import plot, stack, twice

    model, counts = m.hipa.load("emoji"), [1, 2, 4, 8, 16]
    x, schedule = m.hipa.noise([4], 4, 16, 16), model.schedule
    with torch.no_grad():
        predict = m.hipa.predictor(model, ["a cat"])
        latents = [m.hipa.dpm_solver(predict, x, schedule, n) for n in (*counts, 40)]
        broken = [n for n, z in zip((*counts, 40), latents) if not z.isfinite().all()]
        if broken:
            raise Wrong(f"your solver gave NaN or infinite values with {broken} steps. At which step is the first?")
        pictures = m.vae.to_pil(model.decode(torch.cat(latents)))
    errors = [(z - latents[-1]).square().mean().sqrt().item() for z in latents[:-1]]
    chart = plot({"your solver": (counts, errors)}, "steps", "distance to 40 steps", logarithmic=True)
    return stack(twice(m.vae.grid(pictures, columns=len(pictures))), chart), (
        f"Your solver with {counts} and 40 steps, from the same noise. Below: the distance to the 40 steps.\n"
        "With one step no solver helps: it is the network's mean of all cats. What would have to change so that "
        "it is one cat?"
    )
