"""Editing needs no new network: begin with a picture instead of pure noise. What the noise does not destroy is kept
(SDEdit). And with a mask, only a part is made anew (inpainting).

edit(model, pictures, prompts, seeds, strength, mask=None, eps=None, **options), in hipa.py: pictures (B, 3, H, W)
-> pictures. model.encode(pictures) gives latents; model.schedule.add_noise noises them with `eps` to the timestep
round(strength * 999), where 999 is model.schedule.num_train_timesteps - 1. If `eps` is None, noise(seeds, channels,
height, width) makes it, in the shape of the latents. Then denoise(model, prompts, x, first, **options) makes pictures
of the noisy latents x; `first` is that timestep. Move `eps` to model.device, and the result to pictures.device.

With a mask (B, 1, H, W), 1 where something is to be made anew, denoise takes one option more, keep=(latents, hole):
in the hole (B, 1, h, w), where it is 1, the network is free; where it is 0, the given latents stay. They are those of
the pictures. A cell of the latent stands for model.vae.config.downscale pixels in both directions, and belongs to the
hole if ANY of these is masked.

inpaint(model, pictures, mask, prompts, seeds, strength, **options), in hipa.py: edit, with the mask. What the hole
held must have no effect: fill(pictures, mask) replaces it by its surroundings first. Outside of the hole the result is
the pictures' own pixels, bitwise. Inside it is what edit painted, plus fill(pictures - painted, mask), which spreads
the difference at the rim smoothly into the hole. `pictures` and `mask` themselves must stay as they are, for the
caller reads them again.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from checks import Wrong, check
from drawing import adaptors, real, sheet

TITLE = "Editing and inpainting"
MINUTES = 45
POINTS = 10
TARGETS = ["hipa.edit", "hipa.inpaint"]
EDIT, INPAINT = TARGETS


class Net:
    """Stands for the UNet: every cell sees its neighbour, the timestep and the text. Keeps the timesteps asked."""

    config = SimpleNamespace(in_channels=4, sample_size=6)

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, context):
        self.asked.append(int(t[0]))
        return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1) + t[:, None, None, None] / 1000 + context.mean())


def model(m):
    """A model whose VAE is a mean over 4 x 4 pixels, and whose text states are the prompts' lengths."""

    def encode_text(prompts):
        return torch.full((len(prompts), 2, 3), len(prompts[-1]) / 20)

    return SimpleNamespace(
        vae=SimpleNamespace(config=SimpleNamespace(downscale=4)),
        schedule=m.hipa.Schedule("scaled_linear", 0.00085, 0.012), device=torch.device("cpu"),
        dtype=torch.float32, guidance=2.0, guidance_at=lambda steps: 1.0 if steps == 1 else 2.0,
        encode=lambda p: F.avg_pool2d(p, 4)[:, [0, 1, 2, 0]] * 0.8,
        decode=lambda z: F.interpolate(z[:, :3], scale_factor=4) / 0.8,
        encode_text=encode_text, unet=Net(),
    )  # fmt: skip


def inputs(g):
    return torch.rand(2, 3, 16, 24, generator=g) * 2 - 1, torch.randn(2, 4, 4, 6, generator=g)


def hole(n=2):
    """A hole that cuts through cells of the latent."""
    mask = torch.zeros(n, 1, 16, 24)
    mask[..., 5:10, 9:15] = 1
    return mask


def edit(m, g, strength, mask=None, **options):
    pictures, eps = inputs(g)
    return m.hipa.edit(model(m), pictures, ["a cat", "a dog"], [0, 0], strength, mask, eps, **options)


@check(EDIT, "editing in one step, at several strengths")
def one_step(m, g):
    return {f"strength {s}": edit(m, g, s) for s in (0.3, 0.7, 1.0)}


@check(EDIT, "editing in several steps, with guidance: the options reach denoise")
def several(m, g):
    return edit(m, g, 0.6, steps=5, guidance=2.0)


@check(EDIT, "strengths 0.1, 0.5, 0.9 begin at the timesteps 100, 500, 899")
def strength(m, g):
    (pictures, eps), net = inputs(g), model(m)
    for s in (0.1, 0.5, 0.9):
        m.hipa.edit(net, pictures, ["a", "b"], [0, 0], s, eps=eps)
    if net.unet.asked != [100, 500, 899]:
        raise Wrong(
            f"with strengths 0.1, 0.5, 0.9 the network is asked at t = {net.unet.asked}; right are 100, 500, 899"
        )
    return True


@check(EDIT, "without eps, the noise is that of the seeds, one for each picture")
def seeds(m, g):
    return m.hipa.edit(model(m), inputs(g)[0], ["a cat", "a dog"], [3, 8], 0.7)


@check(EDIT, "with a mask, latents outside of the hole stay; a cell that the hole touches is made anew")
def masked(m, g):
    return {f"steps = {steps}": edit(m, g, 0.9, hole(), steps=steps) for steps in (1, 4)}


@check(INPAINT, "the pictures and the mask are left as they were")
def untouched(m, g):
    (pictures, _), mask = inputs(g), hole()
    before = pictures.clone()
    m.hipa.inpaint(model(m), pictures, mask, ["a cat", "a dog"], [1, 2])
    if not torch.equal(pictures, before):
        error = (pictures - before).abs().max()
        raise Wrong(f"your inpaint changes the pictures that it was given, by up to {error:.2g}")
    if not torch.equal(mask, hole()):
        raise Wrong("your inpaint changes the mask that it was given")
    return True


@check(INPAINT, "outside of the hole every pixel is the picture's own, bitwise")
def outside(m, g):
    pictures, _ = inputs(g)
    out = m.hipa.inpaint(model(m), pictures, hole(), ["a cat", "a dog"], [1, 2], steps=2)
    if out.shape != pictures.shape:
        raise Wrong(f"the pictures have shape {tuple(pictures.shape)}, your result {tuple(out.shape)}")
    changed = (out != pictures).any(1, keepdim=True) & (hole() == 0)
    if changed.any():
        most = (out - pictures)[changed.expand_as(out)].abs().max()
        raise Wrong(f"{int(changed.sum())} pixels outside of the hole have changed, by up to {most:.2g}")
    return out


@check(INPAINT, "what the hole held has no effect; another seed and strength have")
def unseen(m, g):
    pictures, _ = inputs(g)
    other = torch.where(hole() > 0, -pictures, pictures)
    a, b = (m.hipa.inpaint(model(m), p, hole(), ["a cat", "a dog"], [1, 2]) for p in (pictures, other))
    if not torch.equal(a, b):
        raise Wrong(f"with other pixels in the hole your result changes by up to {(a - b).abs().max():.2g}")
    gentle = m.hipa.inpaint(model(m), pictures, hole(), ["a cat", "a dog"], [3, 4], strength=0.5)
    return {"strength 0.9": a, "strength 0.5, other seeds": gentle}


def show(m):
    net = m.hipa.load("emoji")
    m.lora.merge(net.unet, adaptors(m, net))
    rocket, panda, strengths = real(m, "a rocket"), real(m, "a panda"), [0.3, 0.5, 0.6, 0.7, 0.8]
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    with torch.no_grad():
        row = [rocket, *(m.hipa.edit(net, rocket, ["a sailboat"], [0], s) for s in strengths)]
        row += [panda, panda * (1 - mask), m.hipa.fill(panda, mask)]
        row += [m.hipa.inpaint(net, panda, mask, ["a panda"], [s]) for s in range(3)]
    return sheet(m, torch.cat(row), columns=6), (
        f"Above: a rocket becomes a sailboat, in ONE step, at strengths {strengths}.\n"
        "Below: a panda, its right half gone, filled, and made anew three times. What of the rocket stays "
        "longest, and why that?"
    )
