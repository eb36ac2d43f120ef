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
hole if ANY of these is masked. The hole is on model.device, too.

inpaint(model, pictures, mask, prompts, seeds, strength, **options), in hipa.py: edit within the hole. What the hole
held must have no effect, and outside of it pixels stay bitwise. fill(x, mask) continues x smoothly into the hole: what
is it for before edit? With `painted` for what edit gives, painted + fill(pictures - painted, mask) has no seam at the
rim.
`pictures` and `mask` themselves must stay as they are, for the caller reads them again.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from checks import Net, Wrong, check
from drawing import adaptors, real, sheet

TITLE = "Editing and inpainting"
MINUTES = 45
POINTS = 10
TARGETS = ["hipa.edit", "hipa.inpaint"]
EDIT, INPAINT = TARGETS


class Model:
    """A model whose VAE is a mean over cell x cell pixels, and whose text states are the prompts' lengths."""

    device, dtype, guidance = torch.device("cpu"), torch.float32, 2.0

    def __init__(self, m, timesteps=1000, cell=4):
        self.cell, self.vae = cell, SimpleNamespace(config=SimpleNamespace(downscale=cell))
        self.schedule, self.unet = m.hipa.Schedule("scaled_linear", 0.00085, 0.012, timesteps), Net()

    def guidance_at(self, steps):
        return 1.0 if steps == 1 else 2.0

    def encode_text(self, prompts):
        return torch.full((len(prompts), 2, 3), len(prompts[-1]) / 20, device=self.device)

    def encode(self, pictures):
        return F.avg_pool2d(pictures.to(self.device), self.cell)[:, [0, 1, 2, 0]] * 0.8

    def decode(self, z):
        return F.interpolate(z[:, :3], scale_factor=self.cell) / 0.8


def inputs(g):
    return torch.rand(2, 3, 16, 24, generator=g) * 2 - 1, torch.randn(2, 4, 4, 6, generator=g)


def hole():
    """A hole of each picture, that cuts through cells of the latent."""
    mask = torch.zeros(2, 1, 16, 24)
    mask[0, :, 5:10, 9:15] = mask[1, :, 2:7, 14:22] = 1
    return mask


def edit(m, g, strength, mask=None, **options):
    pictures, eps = inputs(g)
    return m.hipa.edit(Model(m), pictures, ["a cat", "a dog"], [0, 0], strength, mask, eps, **options)


@check(EDIT, "editing at several strengths, with options and without")
def one_step(m, g):
    found = {f"strength {s}": edit(m, g, s) for s in (0.3, 0.7, 1.0)}
    found["with seeds, without eps"] = m.hipa.edit(Model(m), inputs(g)[0], ["a cat", "a dog"], [3, 8], 0.7)
    return found | {"with steps=5, guidance=2.0": edit(m, g, 0.6, steps=5, guidance=2.0)}


@check(EDIT, "strengths 0.1, 0.5, 0.9 begin at the timesteps 100, 500, 899; of 500 timesteps at 50, 250, 449")
def strength(m, g):
    pictures, eps = inputs(g)
    for net, right in ((Model(m), [100, 500, 899]), (Model(m, 500), [50, 250, 449])):
        for s in (0.1, 0.5, 0.9):
            m.hipa.edit(net, pictures, ["a", "b"], [0, 0], s, eps=eps)
        if (asked := [int(t[0]) for _, t in net.unet.asked]) != right:
            how = f"of {net.schedule.num_train_timesteps} timesteps, with strengths 0.1, 0.5, 0.9,"
            raise Wrong(f"{how} the network is asked at t = {asked}; right are {right}")
    return True


@check(EDIT, "with a mask, latents outside of the hole stay; a cell that the hole touches is made anew")
def masked(m, g):
    found = {f"steps = {steps}": edit(m, g, 0.9, hole(), steps=steps) for steps in (1, 4)}
    pictures, _ = inputs(g)
    found["cells of 8 pixels"] = m.hipa.edit(Model(m, cell=8), pictures, ["a cat", "a dog"], [0, 1], 0.9, hole())
    return found


@check(INPAINT, "outside of the hole every pixel is the picture's own, bitwise")
def outside(m, g):
    pictures, _ = inputs(g)
    out = m.hipa.inpaint(Model(m), pictures, hole(), ["a cat", "a dog"], [1, 2], steps=2)
    if out.shape != pictures.shape:
        raise Wrong(f"the pictures have shape {tuple(pictures.shape)}, your result {tuple(out.shape)}")
    changed = (out != pictures).any(1, keepdim=True) & (hole() == 0)
    if changed.any():
        most = (out - pictures)[changed.expand_as(out)].abs().max()
        raise Wrong(f"{int(changed.sum())} pixels outside of the hole have changed, by up to {most:.2g}")
    return True


@check(INPAINT, "inside of the hole: what edit paints, without a seam at the rim")
def inside(m, g):
    return m.hipa.inpaint(Model(m), inputs(g)[0], hole(), ["a cat", "a dog"], [1, 2], steps=2)


@check(INPAINT, "what the hole held has no effect; another seed and strength have")
def unseen(m, g):
    pictures, _ = inputs(g)
    other = torch.where(hole() > 0, -pictures, pictures)
    a, b = (m.hipa.inpaint(Model(m), p, hole(), ["a cat", "a dog"], [1, 2]) for p in (pictures, other))
    if not torch.equal(a, b):
        raise Wrong(f"with other pixels in the hole your result changes by up to {(a - b).abs().max():.2g}")
    gentle = m.hipa.inpaint(Model(m), pictures, hole(), ["a cat", "a dog"], [3, 4], strength=0.5)
    return {"strength 0.9": a, "strength 0.5, other seeds": gentle}


def show(m):
    net, name = m.hipa.load("emoji"), ["a panda on a green background"]
    with torch.no_grad():
        panda = m.hipa.sample(net, name, [0], 8)  # colour around it, so that a seam would be seen
    m.lora.merge(net.unet, adaptors(m, net))
    rocket, strengths = real(m, "a rocket"), [0.3, 0.5, 0.6, 0.7, 0.8]
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    with torch.no_grad():
        row = [rocket, *(m.hipa.edit(net, rocket, ["a sailboat"], [0], s) for s in strengths)]
        row += [panda, panda * (1 - mask), m.hipa.fill(panda, mask)]
        row += [m.hipa.inpaint(net, panda, mask, name, [s]) for s in range(3)]
    return sheet(m, torch.cat(row), columns=6), (
        f"Above: a rocket becomes a sailboat, in ONE step, at strengths {strengths}.\n"
        "Below: a panda, its right half gone, filled, made anew. What of the rocket stays longest, and why that?"
    )
