"""What HiPA trains on: how different two pictures look, and how different their high frequencies look.

    loss = HiPALoss(DISTS(vgg))
    terms = loss(picture, target)          # {"spatial": ..., "fourier": ..., "sobel": ...}, scalars

Pictures are (B, 3, H, W). The distances and views work on values in [0, 1]; only `HiPALoss` takes the [-1, 1] that the
rest of the code draws in. `VGG` has torchvision's layout, so the official VGG16 weights load by name; a small feature
net for small pictures is the same class with other sizes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------------------------------- features
@dataclass
class VGGConfig:
    """Sizes of the five stages and what the input is normalised with; the defaults are those of torchvision's VGG16."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    FIXED = {}
    IGNORED = set()


class VGG(nn.Module):
    """The convolutional part of VGG (Simonyan & Zisserman 2015); keys are torchvision's `features.<index>.weight`."""

    def __init__(self, cfg=None):
        super().__init__()
        self.config = cfg = cfg or VGGConfig()
        layers, before = [], 3
        for stage, (width, count) in enumerate(zip(cfg.channels, cfg.convs, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)

    def forward(self, x, pool=None):
        """Pictures (B, 3, H, W) in [0, 1] -> the last feature map of each stage, [(B, C_i, ~H / 2^i, ~W / 2^i)].

        `pool`: what stands in the place of max pooling.
        """
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        x, stages = (x - mean) / std, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(x)
                layer = pool or layer
            x = layer(x)
        return [*stages, x]


def l2_pool(x):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)): root of the local mean square under a 3x3 Hann window (DISTS).

    Max pooling jumps as an edge moves by a pixel; this does not alias.
    """
    hann = x.new_tensor([0.25, 0.5, 0.25])
    window = (hann[:, None] * hann).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


# --------------------------------------------------------------------------------------------------------- distances
class DISTS(nn.Module):
    """Structure and texture similarity (Ding et al. 2020, arXiv 2004.07728): 0 for equal pictures, about 1 at most.

    Per channel of the picture and of five VGG stages it compares the means (texture) and the correlation over all
    positions (structure). alpha and beta weigh them, (3 + channels of all stages,) each; the official ones, made for
    VGG16, are in `losses.safetensors`. Without: every stage counts alike, and texture five times as much as structure
    (the official sums: seven times); weighting structure more gives pale results.
    """

    def __init__(self, vgg, alpha=None, beta=None):
        super().__init__()
        self.vgg = vgg
        channels = (3, *vgg.config.channels)
        alike = torch.cat([torch.full((c,), 1 / c) for c in channels])
        alpha = 5 * alike if alpha is None else alpha
        beta = alike if beta is None else beta
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / total)
        self.register_buffer("beta", beta / total)

    def forward(self, x, y):
        """Pictures x and y (B, 3, H, W) in [0, 1] -> (B,)"""
        means, covariances = [], []  # of each stage: [x's mean, y's mean], [x's variance, y's variance, covariance]
        for a, b in zip([x, *self.vgg(x, l2_pool)], [y, *self.vgg(y, l2_pool)]):
            a, b = a.float().flatten(2), b.float().flatten(2)  # differences of means need float32: (B, C, positions)
            mean_a, mean_b = a.mean(2), b.mean(2)
            a, b = a - mean_a[..., None], b - mean_b[..., None]
            means.append(torch.stack([mean_a, mean_b]))
            covariances.append(torch.stack([a.square().mean(2), b.square().mean(2), (a * b).mean(2)]))
        mean_x, mean_y = torch.cat(means, dim=2)
        var_x, var_y, cov = torch.cat(covariances, dim=2)
        texture = (2 * mean_x * mean_y + 1e-6) / (mean_x.square() + mean_y.square() + 1e-6)
        structure = (2 * cov + 1e-6) / (var_x + var_y + 1e-6)
        return 1 - (self.alpha * texture + self.beta * structure).sum(1)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924): differences of unit-length VGG features.

    `weights`: one (C_i,) per stage; the official ones for VGG16 are in `losses.safetensors`. Without: all 1.
    """

    def __init__(self, vgg, weights=None):
        super().__init__()
        self.vgg = vgg
        weights = weights or [torch.ones(c) for c in vgg.config.channels]
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, x, y):
        """Pictures x and y (B, 3, H, W) in [0, 1] -> (B,)"""
        distance = 0
        for a, b, weight in zip(self.vgg(x), self.vgg(y), self.weights):
            a, b = (f.float() / (f.float().norm(dim=1, keepdim=True) + 1e-10) for f in (a, b))
            distance = distance + torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean(dim=(1, 2))
        return distance


# ------------------------------------------------------------------------------------------- high-frequency views
def high_pass(x, radius):
    """What is left of (B, C, H, W) without its low frequencies: a disc around zero is cut out of its Fourier transform.

    `radius` is a fraction of the Nyquist frequency; 0 takes out nothing but the mean.
    """
    height, width = x.shape[-2:]
    vertical = torch.fft.fftfreq(height, device=x.device)[:, None] * 2  # 1 = Nyquist
    horizontal = torch.fft.rfftfreq(width, device=x.device)[None] * 2
    outside = torch.hypot(vertical, horizontal) > radius
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * outside, s=(height, width))


def sobel(x):
    """Strength of edges of (B, C, H, W), same shape: length of the Sobel gradient; a step from 0 to 1 gives 1."""
    kernel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([kernel, kernel.T])[:, None].repeat(x.shape[1], 1, 1, 1)  # per channel: horizontal, vertical
    # The border is repeated by hand: torch's compiler for CPUs fails on the gradient of F.pad(mode="replicate").
    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=-2)
    padded = torch.cat([x[..., :1], x, x[..., -1:]], dim=-1)
    gradient = F.conv2d(padded, kernels, groups=x.shape[1]).unflatten(1, (x.shape[1], 2))
    return (gradient.square().sum(2) + 1e-8).sqrt()  # the root's slope at 0 is infinite


class HiPALoss(nn.Module):
    """The paper's adaptation loss: a perceptual distance P of two pictures, and of their high-frequency views,

        P(x, y) + fourier * P(H(x), H(y)) + sobel * P(S(x), S(y)),    H = high_pass, S = sobel

    The paper names the terms; P = DISTS, the disc's radius and the weights are this project's choices. H(x) has both
    signs, so grey is added: it is then a picture, as P expects. One more term is the project's:

        energy * (log |H(x)|^2 - log |H(y)|^2)^2

    Under uncertainty P prefers a blurred edge; this term penalises the missing energy.
    """

    def __init__(self, distance, spatial=1.0, fourier=1.0, sobel=1.0, energy=0.0, radius=0.25):
        super().__init__()
        self.distance = distance.requires_grad_(False)
        self.radius = radius
        self.weights = {"spatial": spatial, "fourier": fourier, "sobel": sobel, "energy": energy}

    def forward(self, picture, target):
        """Pictures (B, 3, H, W) in [-1, 1] -> the weighted terms by name, means over the batch; their sum is the loss.

        Terms of weight 0 are left out. Gradients flow into `picture`; `target` usually needs none.
        """
        weights, P = self.weights, self.distance
        x, y = picture.float() / 2 + 0.5, target.float() / 2 + 0.5
        terms = {}
        if weights["spatial"]:
            terms["spatial"] = P(x, y)
        if weights["fourier"] or weights["energy"]:
            high_x, high_y = high_pass(x, self.radius), high_pass(y, self.radius)
        if weights["fourier"]:
            terms["fourier"] = P(high_x + 0.5, high_y + 0.5)
        if weights["sobel"]:
            terms["sobel"] = P(sobel(x), sobel(y))
        if weights["energy"]:
            energy_x, energy_y = (high.square().mean(dim=(1, 2, 3)) + 1e-6 for high in (high_x, high_y))
            terms["energy"] = (energy_x.log() - energy_y.log()).square()
        return {name: weights[name] * term.mean() for name, term in terms.items()}
