"""Diffusion in pixels is slow, so Stable Diffusion works on a small copy of the picture, the latent: 4 channels, with
one cell for each 4x4 pixels (here) or 8x8 (Stable Diffusion). An autoencoder (VAE) makes it and undoes it.

AutoencoderKL.encode(picture, generator=None), in vae.py: picture (B, 3, H, W) -> latent (B, 4, h, w).
self.moments(picture) gives two tensors: for each number of the latent the mean of a Gaussian, and the LOGARITHM of
its VARIANCE. Without a generator the latent is the mean. With one it is a sample: the mean plus the standard
deviation times noise from torch.randn(shape, generator=generator). The result, whichever it is, is multiplied by
self.config.scaling_factor, so that latents have a variance of about 1.

Downsample.forward(x), in vae.py: (B, C, H, W) -> (B, C, H/2, W/2). self.conv is a 3x3 convolution with stride 2
that pads nothing itself. Before it, pad x with zeros by one pixel on the RIGHT and one BELOW, and on no other side:
that is how Stable Diffusion's VAE was trained.
"""

import torch

from checks import Wrong, check

TITLE = "The latent"
MINUTES = 30
POINTS = 7
TARGETS = ["vae.AutoencoderKL.encode", "vae.Downsample.forward"]
ENCODE, DOWN = TARGETS


def vae(m, g):
    config = m.vae.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.3)
    net = m.vae.AutoencoderKL(config).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5))
    return net, torch.rand(2, 3, 8, 12, generator=g) * 2 - 1


@check(ENCODE, "without a generator: the mean, scaled, the same every time")
def mean(m, g):
    net, picture = vae(m, g)
    return {"the first time": net.encode(picture), "the second time": net.encode(picture)}


@check(ENCODE, "with a generator: a sample, and the same generator gives the same sample")
def sample(m, g):
    net, picture = vae(m, g)
    cases = {"seed 1": 1, "seed 1 again": 1, "seed 2": 2}
    return {name: net.encode(picture, torch.Generator().manual_seed(seed)) for name, seed in cases.items()}


@check(ENCODE, "samples spread as the log-variance says")
def spread(m, g):
    net, picture = vae(m, g)
    mean, logvar = net.moments(picture)
    net.moments = lambda p: (mean.repeat(400, 1, 1, 1), logvar.repeat(400, 1, 1, 1))
    z = net.encode(picture, torch.Generator().manual_seed(0)).unflatten(0, (400, 2)) / 0.3
    ratio = z.std(0) / torch.exp(0.5 * logvar)
    if not (ratio - 1).abs().mean() < 0.1:
        how = f"{ratio.min():.2f} to {ratio.max():.2f} times the deviation that the log-variance stands for"
        raise Wrong(f"400 samples of the same picture spread by {how}")
    return True


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
        raise Wrong(
            f"the pixels of rows 0 to 7 are first seen by the cells of rows {cells}; right is [0, 0, 0, 1, 1, 2, 2, 3]"
        )
    return torch.stack(seen)


def show(m):
    import numpy as np
    from PIL import Image

    from drawing import twice

    model = m.hipa.load("emoji")
    sheet = np.asarray(Image.open(m.evaluate.HERE / "renders.png").convert("RGB"))
    picture = torch.from_numpy(sheet[:64, :64].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z = model.vae.encode(picture)
        copy = model.vae.decode(z)
    channels = [((c / 6 + 0.5).clamp(0, 1) * 255).byte().numpy() for c in z[0]]
    channels = [Image.fromarray(c).convert("RGB").resize((64, 64), 0) for c in channels]
    error = (copy - picture).square().mean().item()
    row = m.vae.grid([*m.vae.to_pil(picture), *channels, *m.vae.to_pil(copy)], columns=6)
    return twice(row), (
        "A picture, the four channels of your latent (16x16), what the decoder makes of them (mean square error "
        f"{error:.4f}).\n"
        "12,288 numbers became 1,024. Now pad one pixel on all four sides and draw this again: where does the "
        "picture go?"
    )
