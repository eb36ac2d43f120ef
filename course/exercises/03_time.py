"""The same network cleans pictures that are nearly pure noise and pictures that are nearly clean. It has to be told
which: the timestep t, from 0 (clean) to 999 (noise), goes into every block.

sinusoidal_embedding(timestep, dim), in unet.py: timesteps (B,) -> (B, dim). A single number is hard to read for a
network, so it becomes many clocks, some fast and some slow: with dim / 2 frequencies, frequency k is
10000^(-k / (dim / 2)), for k = 0, 1, ..., the row is first the cosines of t * frequency, then the sines. In float32, on
the timesteps' device.

ResnetBlock.forward(x, time_emb), in unet.py: x (B, C_in, H, W), time_emb (B, T) -> (B, C_out, H, W).

    h = conv1(silu(norm1(x)))
    h = h + time_emb_proj(silu(time_emb)), one number per channel, the same at every place
    h = conv2(silu(norm2(h)))
    the result is h + conv_shortcut(x), the residual: around the block there is a way that changes nothing

All layers are in self. x itself must stay as it is, for the way up of the UNet reads it again.
"""

import torch
from PIL import Image

from checks import check
from drawing import stack

TITLE = "Time, and the residual block"
MINUTES = 35
POINTS = 8
TARGETS = ["unet.sinusoidal_embedding", "unet.ResnetBlock.forward"]
EMBED, BLOCK = TARGETS


@check(EMBED, "the values, for some timesteps and widths")
def values(m, g):
    t = torch.randint(0, 1000, (5,), generator=g)
    found = {"at t = 0": m.unet.sinusoidal_embedding(torch.tensor([0, 999]), 16)[0]}
    return found | {f"dim = {dim}": m.unet.sinusoidal_embedding(t, dim) for dim in (8, 32)}


def block(m, g, c_in=8, c_out=12):
    net = m.unet.ResnetBlock(c_in, c_out, 6, 4).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return net, torch.randn(2, c_in, 5, 6, generator=g), torch.randn(2, 6, generator=g)


@check(BLOCK, "the values, where the number of channels changes and where it does not")
def result(m, g):
    cases = {"from 8 to 12 channels": block(m, g), "from 8 to 8 channels": block(m, g, 8, 8)}
    return {name: net(x, t) for name, (net, x, t) in cases.items()}


@check(BLOCK, "another timestep gives another result, and each picture has its own")
def time_counts(m, g):
    net, x, t = block(m, g)
    return net(x, t.flip(0)) - net(x, t)


def show(m):
    t = torch.arange(0, 1000, 4)
    e = m.unet.sinusoidal_embedding(t, 128)
    alike = e @ e.T / 64
    tiles = [
        Image.fromarray(((v.clamp(-1, 1) + 1) * 127.5).byte().numpy()).resize((500, height), 0)
        for v, height in ((e.T.flip(0), 256), (alike, 500))
    ]
    return stack(*tiles), (
        "Above: your embedding; time runs from left to right. Below: how alike two timesteps look.\n"
        "What would go wrong if the slowest clock came round within the 1000 timesteps?"
    )
