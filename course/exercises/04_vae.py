"""Diffusion in pixels is slow, so Stable Diffusion works on a small copy of the picture, the latent: 4 channels, with
one cell for each 4x4 pixels (here) or 8x8 (Stable Diffusion). An autoencoder (VAE) makes it and undoes it.

AutoencoderKL.encode(picture), in vae.py: picture (B, 3, H, W) in [-1, 1] -> latent (B, 4, h, w).
self.moments(picture) gives two tensors: for each number of the latent the mean of a Gaussian, and the logarithm of
its variance. The latent is the mean, times self.config.scaling_factor, so that latents have a variance of about 1.

AutoencoderKL.decode(latent), in vae.py: the way back. First undo the scaling, then apply self.post_quant_conv, then
self.decoder. Do not clamp the picture to [-1, 1], because no gradient gets past a clamped value. The latent itself
must stay as it is, for the caller reads it again.

Downsample.forward(x), in vae.py: (B, C, H, W) -> (B, C, H/2, W/2). self.conv is a 3x3 convolution with stride 2
that pads nothing itself. Before it, pad x with zeros by one pixel on the RIGHT and one BELOW, and on no other side:
that is how Stable Diffusion's VAE was trained.
"""

import torch
from PIL import Image

from checks import Wrong, check
from drawing import real, sheet

TITLE = "The latent"
MINUTES = 30
POINTS = 7
TARGETS = ["vae.AutoencoderKL.encode", "vae.AutoencoderKL.decode", "vae.Downsample.forward"]
ENCODE, DECODE, DOWN = TARGETS


def vae(m, g):
    config = m.vae.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.3)
    net = m.vae.AutoencoderKL(config).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5))
    return net, torch.rand(2, 3, 8, 12, generator=g) * 3 - 1.5, torch.randn(2, 4, 4, 6, generator=g)


@check(ENCODE, "the mean, scaled, the same every time")
def mean(m, g):
    net, picture, _ = vae(m, g)
    return {"the first time": net.encode(picture), "the second time": net.encode(picture)}


@check(DECODE, "the picture of a latent")
def pictures(m, g):
    net, _, latent = vae(m, g)
    return net.decode(latent)


@check(DOWN, "the values, for even and odd numbers of pixels")
def down(m, g):
    net = m.vae.Downsample(3).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
    return {f"{h} x {w} pixels": net(torch.randn(1, 3, h, w, generator=g)) for h, w in ((8, 6), (7, 5))}


@check(DOWN, "the cell at row i, column j sees the rows 2i, 2i+1, 2i+2 and the columns 2j, 2j+1, 2j+2")
def sees(m, g):
    net, seen = m.vae.Downsample(1).requires_grad_(False), []
    net.conv.weight.fill_(1), net.conv.bias.zero_()
    for k in range(8):
        picture = torch.zeros(1, 1, 8, 8)
        picture[0, 0, k, 0] = 1
        out = net(picture)
        if out.shape != (1, 1, 4, 4):
            raise Wrong(f"8 x 8 pixels give {' x '.join(map(str, out.shape[2:]))} cells; right is 4 x 4")
        seen.append(out[0, 0, :, 0])
    cells = [int(column.argmax()) if column.any() else None for column in seen]
    if cells != [0, 0, 0, 1, 1, 2, 2, 3]:
        raise Wrong(f"rows 0 to 7 are first seen by the cells of rows {cells}; right is [0, 0, 0, 1, 1, 2, 2, 3]")
    return torch.stack(seen)


def show(m):
    model, picture = m.hipa.load("emoji"), real(m, "a cat")
    with torch.no_grad():
        z = model.vae.encode(picture)
        copy = model.vae.decode(z)
    channels = [((c / 6 + 0.5).clamp(0, 1) * 255).byte().numpy() for c in z[0]]
    channels = [Image.fromarray(c).convert("RGB").resize((64, 64), 0) for c in channels]
    error = (copy - picture).square().mean().item()
    return sheet(m, [*m.sample.to_pil(picture), *channels, *m.sample.to_pil(copy)], columns=6), (
        f"A picture, the four channels of your latent, your decode of them (mean square error {error:.4f}).\n"
        "Now pad one pixel on all four sides and look at this again: where does the picture go?"
    )
