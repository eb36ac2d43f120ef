"""Wrong and other right answers to exercise 8."""

H, S, P = "losses.high_pass", "losses.sobel", "evaluate.radial_power"
DOWN, ACROSS = (
    "torch.fft.fftfreq(height, device=x.device)[:, None] * 2",
    "torch.fft.rfftfreq(width, device=x.device)[None] * 2",
)
BORDER = """    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=-2)
    padded = torch.cat([x[..., :1], x, x[..., -1:]], dim=-1)
"""
LENGTH = "(gradient.square().sum(2) + 1e-8).sqrt()"
MISTAKES = [
    {"name": "low pass", "caught": "waves", "code": {H: [("> radius", "<= radius")]},
     "says": "You keep the disc and throw away the rest: that is a blur. Which of the two was to go?"},
    {"name": "a square hole", "caught": "waves", "code": {H: [("torch.hypot(vertical, horizontal)", "torch.maximum(vertical.abs(), horizontal.abs())")]},
     "says": "Your hole is a square. How many cycles along its own direction has a wave of 3 down and 3 across?"},
    {"name": "a diamond hole", "caught": "waves", "code": {H: [("torch.hypot(vertical, horizontal)", "vertical.abs() + horizontal.abs()")]},
     "says": "Your hole is a diamond: you add the two frequencies. How far from zero is the point (down, across)?"},
    {"name": "cycles per pixel", "caught": "waves", "code": {H: [(DOWN, DOWN[:-4]), (ACROSS, ACROSS[:-4])]},
     "says": "fftfreq counts cycles per pixel, at most 1/2. How large is the Nyquist frequency in that unit, and how large is your disc then?"},
    {"name": "size forgotten", "caught": "high", "code": {H: [(", s=(height, width)", "")]},
     "says": "An odd width comes back one pixel narrower. From the half spectrum alone irfft2 cannot know it: what does it take besides?"},
    {"name": "one axis only", "caught": "waves", "code": {H: [("torch.hypot(vertical, horizontal)", "horizontal.expand(height, -1)")]},
     "says": "You look at the horizontal frequency alone. What of a wave that is quick downwards?"},
    {"name": "frequencies without a sign", "caught": "waves", "code": {H: [(DOWN, "torch.arange(height, device=x.device)[:, None] * 2 / height")]},
     "says": "In the second half of the rows the FFT holds the NEGATIVE frequencies. How far from zero is the last row?"},
    {"name": "zeros at the border", "caught": "step", "code": {S: [(BORDER, "    padded = F.pad(x, (1, 1, 1, 1))\n")]},
     "says": "You pad with zeros, which draws a frame around every picture. With what must the border go on so that there is no edge?"},
    {"name": "sum for length", "caught": "edges", "code": {S: [(LENGTH, "gradient.abs().sum(2)")]},
     "says": "|across| + |down| makes a diagonal edge stronger than a straight one. How long is the vector (across, down)?"},
    {"name": "one direction", "caught": "step", "code": {S: [("[kernel, kernel.T]", "[kernel, kernel]")]},
     "says": "Edges that run across are not seen: both your kernels look in the same direction."},
    {"name": "not squared", "caught": "step", "code": {S: [(LENGTH, "gradient.sum(2)")]},
     "says": "You add the two derivatives with their signs, so that they can cancel. How long is the vector (across, down)?"},
    {"name": "amplitude", "caught": "power", "code": {P: [(".abs().square()", ".abs()")]},
     "says": "Yours is the amplitude |.|. What of it is the power?"},
    {"name": "sum over rings", "caught": "power", "code": {P: [("(total / torch.bincount(bins))", "total")]},
     "says": "Your rings are sums. An outer ring has more places: does a sum compare rings fairly?"},
    {"name": "no window", "caught": "power", "code": {P: [(" * window * window[:, None]", "")]},
     "says": "You use no window. The FFT takes the picture as one of many side by side: what does it see where the right side meets the left?"},
    {"name": "window in one direction", "caught": "power", "code": {P: [(" * window * window[:, None]", " * window")]},
     "says": "Your window falls off to the left and right only. What of above and below?"},
    {"name": "mean kept", "caught": "power", "code": {P: [("(grey - grey.mean(dim=(1, 2), keepdim=True))", "grey")]},
     "says": "The mean is still in the picture, and the window spreads it over the first rings."},
    {"name": "mean of the batch", "caught": "power", "code": {P: [("grey.mean(dim=(1, 2), keepdim=True)", "grey.mean()")]},
     "says": "You subtract the mean of ALL pictures. What is left of a picture that is brighter than the others?"},
    {"name": "mean before the square", "caught": "power", "code": {P: [(".abs().square().mean(dim=0)", ".mean(dim=0).abs().square()")]},
     "says": "You take the mean over the pictures before the square, and waves of opposite sign cancel there. Of what is the mean wanted?"},
    {"name": "zero frequency in the middle", "caught": "power", "code": {P: [("torch.fft.fft2(grey)", "torch.fft.fftshift(torch.fft.fft2(grey), dim=(1, 2))")]},
     "says": "fftshift moves zero frequency to the middle, and your radii count from the corner."},
    {"name": "not clamped", "caught": "power", "code": {P: [("pictures.clamp(-1, 1).mean", "pictures.mean")]},
     "says": "Values beyond [-1, 1] count in yours; no file or screen could hold them."},
    {"name": "border mirrored", "caught": "edges", "code": {S: [(BORDER, '    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")\n')]},
     "says": "You mirror the picture at its border, so that the derivative across it is 0 there. What was to be repeated?"},
]  # fmt: skip
RIGHT = [
    {"name": "full fft", "code": {H: """
def high_pass(x, radius):
    fy, fx = (torch.fft.fftfreq(n, 0.5, device=x.device) for n in x.shape[2:])
    keep = (fy[:, None] ** 2 + fx[None] ** 2) > radius**2
    return torch.fft.ifft2(torch.fft.fft2(x.float()) * keep).real
"""}},
    {"name": "slices", "code": {S: """
def sobel(x):
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = p[..., 2:] - p[..., :-2], p[..., 2:, :] - p[..., :-2, :]
    gx = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4
    gy = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    return torch.sqrt(gx * gx + gy * gy + 1e-8)
"""}},
    {"name": "loop over rings", "code": {P: """
def radial_power(pictures):
    grey = pictures.clamp(-1, 1).mean(1)
    n = grey.shape[-1]
    w = torch.hann_window(n, periodic=False)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * torch.outer(w, w)
    power = torch.fft.fft2(grey).abs().pow(2).mean(0)
    f = torch.fft.fftfreq(n) * n
    r = (f[:, None] ** 2 + f**2).sqrt().round()
    return torch.stack([power[r == k].mean() for k in range(n // 2 + 1)])
"""}},
]  # fmt: skip
EQUIVALENT = {
    "kernel = cut(x)": "of x only type and device are taken",
    "zeros(bins.max() + 1)": "a tensor of one whole number is a size, too",
    "x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=-2)  ->  x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=+2)": "pictures have four axes",
    "height, width = x.shape[-2:]  ->  height, width = x.shape[+2:]": "pictures have four axes",
    "side = grey.shape[-1]  ->  side = grey.shape[+1]": "grey pictures have three axes, and are square",
    "side = grey.shape[-1]  ->  side = grey.shape[-2]": "pictures are square here",
}
