"""Diffusion destroys a picture step by step with noise, and a network learns the way back. A noisy latent is a weighted
sum, x_t = alpha_t x0 + sigma_t noise, where x0 is the clean latent and alpha_t^2 + sigma_t^2 = 1. So at t = 0 it is
nearly clean, at t = 999 nearly pure noise, and its variance is 1 throughout (latents have variance 1).

Schedule.__post_init__(), in hipa.py: sets self.alphas_cumprod, float32, one number for each of the
self.num_train_timesteps timesteps. It is alpha_t^2. Timestep t multiplies what is left of alpha^2 by (1 - beta_t).
Stable Diffusion's betas run from self.beta_start to self.beta_end, and are equally spaced in their SQUARE ROOTS.

Schedule.add_noise(x0, timestep, noise), in hipa.py: x_t. self.alpha_sigma(timestep) gives both weights, for an int
or for timesteps (B,), one for each picture. x0 and noise themselves must stay as they are, for the caller reads
them again.

Schedule.predict_x0(x, timestep, prediction), in hipa.py: the way back. If self.prediction_type is "epsilon", the
network says what the noise is. If it is "v_prediction", it says v = alpha noise - sigma x0. Solve for x0, on paper
first. For v: what is alpha times x? And sigma times v?
"""

import dataclasses

import torch

from checks import Wrong, check
from drawing import real, sheet

TITLE = "Noise, and the way back"
MINUTES = 35
POINTS = 9
TARGETS = ["hipa.Schedule.__post_init__", "hipa.Schedule.add_noise", "hipa.Schedule.predict_x0"]
POST, ADD, BACK = TARGETS


def latent(g, n=3):
    return torch.randn(n, 4, 5, 7, generator=g)


def schedule(m, prediction_type="epsilon", betas=(0.00085, 0.012), timesteps=1000):
    return m.hipa.Schedule("scaled_linear", *betas, timesteps, prediction_type)


@check(POST, "alphas_cumprod: 0.9991 at t = 0, 0.00466 at t = 999; right for any beta_start and beta_end")
def alphas(m, g):
    betas = 1e-4 + 1e-3 * torch.rand(2, generator=g).double() * torch.tensor([1, 15])
    other = schedule(m, betas=betas.tolist(), timesteps=200)
    a = schedule(m).alphas_cumprod
    found = {"at t = 0": a[0].item(), "at t = 999": a[-1].item()}
    return found | {"Stable Diffusion's betas": a, "other betas": other.alphas_cumprod}


@check(ADD, "x_t, with one timestep for all pictures")
def one_timestep(m, g):
    return schedule(m).add_noise(latent(g), 400, latent(g))


@check(ADD, "x_t, with a timestep for each picture")
def own_timesteps(m, g):
    return schedule(m).add_noise(latent(g), torch.tensor([20, 500, 999]), latent(g))


@check(ADD, "latents of variance 1 keep variance 1, however much noise there is")
def variance(m, g):
    x0, noise = (torch.randn(1, 4, 64, 64, generator=g) for _ in range(2))
    for t in (0, 300, 600, 999):
        now = schedule(m).add_noise(x0, t, noise).var().item()
        if not 0.95 < now < 1.05:
            raise Wrong(f"at t = {t} the variance of x_t is {now:.2f}; the network was trained on inputs of variance 1")
    return True


def both(m, g, kind):
    x, said, cases = latent(g), latent(g), {"t = 700": 700, "t = 5, 600, 999": torch.tensor([5, 600, 999])}
    return {name: schedule(m, kind).predict_x0(x, t, said) for name, t in cases.items()}


@check(BACK, "x0 from the noise (epsilon)")
def epsilon(m, g):
    return both(m, g, "epsilon")


@check(BACK, "x0 from v")
def velocity(m, g):
    return both(m, g, "v_prediction")


def show(m):
    """Above: a cat under more and more noise. Below: what the network, looking once, takes each for, twice."""
    model, times = m.hipa.load("emoji"), [0, 200, 400, 600, 700, 800, 900, 999]
    with torch.no_grad():
        x0, noise = model.encode(real(m, "a cat")), m.hipa.noise([0], 4, 16, 16)
        noisy = torch.cat([model.schedule.add_noise(x0, t, noise) for t in times])
        t = torch.tensor(times)
        v = model.unet(noisy, t, model.encode_text(["a cat"] * len(times)))
        alpha, sigma = model.schedule.alpha_sigma(t)
        by_noise = dataclasses.replace(model.schedule, prediction_type="epsilon")
        from_v = model.schedule.predict_x0(noisy, t, v)
        from_noise = by_noise.predict_x0(noisy, t, sigma * noisy + alpha * v)
        pictures = model.decode(torch.cat([noisy, from_v, from_noise]))
    return sheet(m, pictures, columns=len(times)), (
        f"Above: a real cat after your add_noise, at t = {times}.\n"
        'Of each the network, told "a cat", predicts v. In the middle: your predict_x0 of v. Below: your predict_x0\n'
        "of the noise that this v means; if both branches are right, these are the same pictures.\n"
        f"At t = 999 an error in the noise counts {(sigma / alpha)[-1].item():.1f} times in x0, one in v "
        f"{sigma[-1].item():.1f} times.\nFrom which t on is the picture soft, and why?"
    )
