"""The paper's diagnosis: one step draws the low frequencies of a picture right (colours, large shapes), and the high
ones (edges, texture) are missing. You write the tools that show it; two of them are part of the paper's loss.

high_pass(x, radius), in losses.py: (B, C, H, W) without its low frequencies, same shape, float32. Transform each
channel (torch.fft.rfft2), set to 0 what lies within `radius` of zero frequency, transform back (torch.fft.irfft2).
Frequencies are measured in Nyquist frequencies (1 = half a cycle per pixel), in both directions; what lies exactly
ON the circle goes too. H and W may be odd, and different.

sobel(x), in losses.py: (B, C, H, W) -> same shape, the strength of edges: for each channel by itself, the length of
the gradient by Sobel's two kernels, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]] / 4 and its transpose. At the border the
outermost pixels are repeated. A step from 0 to 1 gives 1. Add 1e-8 under the root. Both make what they need on x's
device.

radial_power(pictures), in emoji/evaluate.py: (B, 3, H, H) in [-1, 1] -> H/2 + 1 numbers, the power at 0, 1, ... H/2
cycles per picture. Clamp to [-1, 1] and take the mean over the colours; subtract each picture's mean; multiply by
torch.hann_window(H, periodic=False) in both directions; torch.fft.fft2; square of the absolute value; mean over the
pictures. Number k is the mean power where the distance from zero, in cycles per picture, rounds to k; the corners
beyond H/2 are dropped.
"""

import math

import torch

from checks import Wrong, check
from drawing import adaptors, plot, sheet, stack

TITLE = "The diagnosis"
MINUTES = 60
POINTS = 10
TARGETS = ["losses.high_pass", "losses.sobel", "evaluate.radial_power"]
HIGH, SOBEL, POWER = TARGETS


def wave(h, w, down, right):
    """(1, 1, h, w): so many cycles down and to the right."""
    y, x = torch.arange(h)[:, None], torch.arange(w)
    return torch.cos(2 * math.pi * (down * y / h + right * x / w) + 0.7)[None, None]


@check(HIGH, "a slow wave goes, a quick one stays, across, down and on the diagonal")
def waves(m, g):
    for down, right, radius, stays in (
        (0, 3, 0.25, False), (3, 0, 0.25, False), (0, 5, 0.25, True), (5, 0, 0.25, True), (3, 3, 0.25, True),
        (0, 4, 0.25, False), (0, 0, 0.0, False), (10, 1, 0.5, True), (1, 10, 0.5, True), (2, 7, 0.5, False),
    ):  # fmt: skip
        x = wave(32, 32, down, right)
        out = m.losses.high_pass(x, radius)
        if out.shape != x.shape:
            raise Wrong(f"x has shape {tuple(x.shape)}, your result {tuple(out.shape)}")
        left = (out.norm() / x.norm()).item()
        if (out - (x if stays else 0)).abs().max() > 1e-4:
            what = f"{down} cycles down and {right} across 32 pixels should {'stay' if stays else 'go'}"
            raise Wrong(f"{what} at radius {radius}, which is {radius * 16:g} cycles; {100 * left:.0f} % are left")
    return True


@check(HIGH, "the values, for sizes that are odd and not square")
def high(m, g):
    sizes = (15, 22), (16, 9), (12, 12)
    return {f"{h} x {w} pixels": m.losses.high_pass(torch.rand(2, 3, h, w, generator=g), 0.45) for h, w in sizes}


@check(SOBEL, "a step from 0 to 1 gives 1, across and down; a flat picture gives 0, at the border too")
def step(m, g):
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4:] = 1
    across, down, flat = m.losses.sobel(x), m.losses.sobel(1 - x.mT), m.losses.sobel(torch.full((1, 1, 6, 6), 0.7))
    if flat.shape == (1, 1, 6, 6) and flat.max() > 1e-3:
        place = [i.item() for i in torch.unravel_index(flat.argmax(), flat.shape)][2:]
        raise Wrong(f"in a flat picture of 0.7 you find an edge of {flat.max():.2f}, at row and column {place}")
    return {"a step from left to right": across, "a step from above to below": down, "a flat picture": flat}


@check(SOBEL, "the values, channel by channel")
def edges(m, g):
    return m.losses.sobel(torch.rand(2, 3, 7, 9, generator=g))


@check(POWER, "the values, over several pictures")
def power(m, g):
    return m.evaluate.radial_power(torch.rand(3, 3, 32, 32, generator=g) * 2.4 - 1.2)


def show(m):
    model, names = m.hipa.load("emoji"), ["a cat", "an owl", "a rocket", "a house", "a robot", "a pizza"]
    x = m.hipa.noise(range(6), 4, 16, 16)
    with torch.no_grad():
        many = m.hipa.dpm_solver(m.hipa.predictor(model, names, 2.0), x, model.schedule, 8)
        one = m.hipa.predictor(model, names)(x, 999)
        m.lora.merge(model.unet, adaptors(m, model))
        adapted = m.hipa.predictor(model, names)(x, 999)
        ways = {"one step": model.decode(one), "8 steps": model.decode(many), "one step, HiPA": model.decode(adapted)}
    cycles = [k / 32 for k in range(1, 33)]
    series = {name: (cycles, m.evaluate.radial_power(p)[1:].tolist()) for name, p in ways.items()}
    views = [v for p in ways.values() for q in p[:3] for v in (q, 2 * m.losses.high_pass(q[None] / 2 + 0.5, 0.25)[0])]
    chart = plot(series, "frequency, 1 = Nyquist", "power", logarithmic=True)
    return stack(sheet(m, torch.stack(views), columns=6), chart), (
        "Rows: one step, 8 steps, one step with HiPA's adaptors; with your high_pass. Below: your spectra.\n"
        "From which frequency on does one step fall behind? Why then does the paper's loss look there?"
    )
