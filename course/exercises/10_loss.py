"""What should one step be trained by? The mean squared error of pixels would be lowest for a blur: where an edge may
lie a pixel further left or right, half of both is the safest bet. HiPA uses a perceptual distance, which compares
features instead of pixels, of the pictures and of their high frequencies.

DISTS.forward(x, y), in losses.py: pictures x, y (B, 3, H, W) in [0, 1] -> their distances (B,). Compare the
pictures themselves and each feature map of the list self.vgg(picture, l2_pool), channel by channel. Over all places
of a channel, with means m, variances v, the covariance cov, and c = 1e-6:

    texture = (2 mx my + c) / (mx^2 + my^2 + c)          structure = (2 cov + c) / (vx + vy + c)

Both are 1 for equal channels. self.alpha and self.beta hold a weight for each channel of the list [picture, first
feature map, ...], in that order, and sum to 1 together. The distance is 1 minus the sum of alpha * texture + beta *
structure. Variances and covariance are means of squared differences from the mean (and of their products), not divided
by n - 1, in float32.

HiPALoss.forward(picture, target), in losses.py: pictures in [-1, 1] -> a dict of up to four terms, scalars. Scale
the pictures to [0, 1] first, as float32; do not clamp. P is self.distance; self.radius belongs to high_pass:

    "spatial"  P of the two pictures
    "fourier"  P of their high_pass plus 0.5 (grey, so that it is a picture)
    "sobel"    P of their sobel
    "energy"   the square of log(E(picture)) - log(E(target)), with E(p) = 1e-6 + mean of high_pass(p)^2, one number
               per picture

Each is a mean over the batch, times its weight in self.weights. A term of weight 0 is left out and not computed.
"""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from checks import Wrong, check
from drawing import real

TITLE = "The loss"
MINUTES = 60
POINTS = 10
TARGETS = ["losses.DISTS.forward", "losses.HiPALoss.forward"]
DISTS, HIPA = TARGETS


def dists(m, g):
    vgg = m.losses.VGG(m.losses.VGGConfig(channels=(4, 6), convs=(1, 1))).requires_grad_(False)
    for p in vgg.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return m.losses.DISTS(vgg, torch.rand(13, generator=g) * 2, torch.rand(13, generator=g))


def pair(g, n=2, side=12):
    x = torch.rand(n, 3, side, side, generator=g)
    return x, (x + 0.3 * torch.rand(n, 3, side, side, generator=g)).clamp(0, 1)


@check(DISTS, "the distance, one for each pair")
def distance(m, g):
    return dists(m, g)(*pair(g))


@check(DISTS, "0 between equal pictures, also flat and black ones; the same both ways")
def equal(m, g):
    d, (x, y) = dists(m, g), pair(g)
    for what, same in (("", x), (" flat", torch.full_like(x, 0.4)), (" black", torch.zeros_like(x))):
        own = d(same, same).abs().max()
        if not own <= 1e-4:  # NaN is never within
            raise Wrong(f"a{what} picture's distance to itself is {own:.3f}; right is 0")
    return d(x, y) - d(y, x)


@check(DISTS, "a darker picture differs in texture and structure, a mirrored one in structure alone")
def apart(m, g):
    d, (x, _) = dists(m, g), pair(g)
    return {"half as bright": d(x, 0.5 * x), "mirrored": d(x, x.flip(3)), "negative": d(x, 1 - x)}


@check(DISTS, "where there is hardly any contrast, or light, c counts; features of a large mean, in half precision")
def extremes(m, g):
    d, (x, y) = dists(m, g), pair(g)
    found = {"hardly any contrast": d(0.5 + x / 1000, 0.5 + y / 1000), "hardly any light": d(x / 1000, y / 1000)}
    features, of = d.vgg.forward, {"of mean 50": lambda f: 50 + f / 10, "in half precision": torch.Tensor.bfloat16}
    for name, change in of.items():
        d.vgg.forward = lambda *how, change=change, **more: [change(f) for f in features(*how, **more)]
        found[f"features {name}"] = d(x, y)
    return found


class Recorder(torch.nn.Module):
    """A distance that is easy to see through, the mean difference plus 0.1. It keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, y):
        self.seen.append((x.detach(), y.detach()))
        return (x - y).abs().mean((1, 2, 3)) + 0.1


def loss(m, **weights):
    return m.losses.HiPALoss(Recorder(), **{"spatial": 1.0, "fourier": 3.0, "sobel": 0.5, "energy": 0.2, **weights})


@check(HIPA, "the four terms with their weights")
def terms(m, g):
    x, y = (p * 2 - 1 for p in pair(g))
    cases = {
        "radius 0.25": (0.25, x, y),
        "radius 0.4": (0.4, x, y),
        "half precision": (0.4, x.bfloat16(), y.bfloat16()),
    }
    cases["a flat picture"] = 0.4, torch.zeros_like(x), y
    return {name: dict(sorted(loss(m, radius=r)(a, b).items())) for name, (r, a, b) in cases.items()}


@check(HIPA, "the distance is given pictures in [0, 1], where they are not beyond, and views of both")
def ranges(m, g):
    net, (x, y) = loss(m), pair(g)
    net(x * 2.4 - 1.2, y * 2.4 - 1.2)
    seen = sorted(net.distance.seen, key=lambda both: both[0].double().sum().item())  # in whatever order you compute
    return [torch.stack([torch.stack([t.mean((1, 2, 3)), t.std((1, 2, 3))]) for t in both]) for both in seen]


@check(HIPA, "a term of weight 0 is not there, and not computed")
def left_out(m, g):
    found, (x, y) = {}, pair(g)
    for off in (("fourier", "energy"), ("spatial", "sobel"), ("spatial", "fourier", "sobel")):
        net = loss(m, **dict.fromkeys(off, 0))
        found[f"without {' and '.join(off)}"] = dict(sorted(net(x * 2 - 1, y * 2 - 1).items()))
        count = 3 - len({"spatial", "fourier", "sobel"} & set(off))
        if len(net.distance.seen) != count:
            how = f"{' and '.join(off)} have weight 0, and self.distance was called"
            raise Wrong(f"{how} {len(net.distance.seen)} times; right is {count}")
    return found


def show(m):
    x = real(m, "a pig")
    net = m.losses.HiPALoss(m.train.load_distance("dists", m.hipa.SHORT_NAMES["emoji"]), energy=0.2)
    blur = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    others = {"itself": x, "moved 1 pixel": x.roll(1, 3), "noise": x + 0.12 * noise, "blurred": blur}
    pictures, lines = [], []
    for name, y in others.items():
        with torch.no_grad():
            terms = net(y, x)
        pictures += m.sample.to_pil(y)
        error = (y - x).square().mean()
        lines.append("\n".join([name, f"MSE {error:.4f}", *(f"{k} {v.abs():.4f}" for k, v in terms.items())]))
    row = m.sample.grid(pictures, columns=4).resize((4 * 150, 150), 0)
    out = Image.new("RGB", (600, 250), "white")
    out.paste(row, (0, 0))
    for k, text in enumerate(lines):
        ImageDraw.Draw(out).text((150 * k + 6, 154), text, fill="black")
    return out, (
        "The squared error and your terms, for three ways of going wrong.\n"
        "The eye minds the blur most. Which numbers agree with it, and which would you train one step by?"
    )
