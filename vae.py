"""AutoencoderKL: a picture (B, 3, H, W) in [-1, 1]  <->  a latent (B, 4, H/8, W/8).

Follows diffusers' `AutoencoderKL` (itself from CompVis' latent-diffusion). Attribute names are the checkpoint's keys,
so official weights load with strict=True. Left out: tiling, slicing and the other block types diffusers knows.

B batch, C channels, H and W height and width at the level at hand, L = H*W.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

EPS = 1e-6  # every GroupNorm of the VAE; the UNet's resnets use 1e-5


@dataclass
class VAEConfig:
    """The settings of `vae/config.json` that differ between supported checkpoints."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    # Multiplies the latent so that its variance is about 1. Not in the official files: 0.18215 is diffusers' default.
    scaling_factor: float = 0.18215

    # Settings that are built in: any other value would change the maths, so the loader refuses it.
    FIXED = {
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "down_block_types": {"DownEncoderBlock2D"},
        "up_block_types": {"UpDecoderBlock2D"},
    }
    # Settings that do not touch encode() and decode() as written here.
    IGNORED = {"sample_size", "force_upcast"}

    @property
    def downscale(self):
        """Pixels per latent cell: every level but the last halves the picture (8 for Stable Diffusion)."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # The residual needs a 1x1 convolution only where the channel count changes; no key exists elsewhere.
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):  # (B, C_in, H, W) -> (B, C_out, H, W)
        # In place: without gradients, a new tensor of this size would cost more time than the SiLU itself.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual. The projections have biases."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because diffusers' holds a dropout too

    def forward(self, x):  # (B, C, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        q, k, v = (proj(h)[:, None] for proj in (self.to_q, self.to_k, self.to_v))  # (B, 1 head, L, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):  # (B, C, H, W) -> (B, C, H/2, W/2)
        # One pixel on the right and below only, as latent-diffusion did; padding both sides shifts the picture.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The resnets of one resolution, then (unless it is the last) the change of resolution."""

    def __init__(self, in_channels, out_channels, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if j == 0 else out_channels, out_channels, groups) for j in range(layers)
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in [*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = resample(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x):  # (B, C, H, W)
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        channels, groups = cfg.block_out_channels, cfg.norm_num_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, cfg.layers_per_block, groups, down=i < last)
            for i, c in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        # Two numbers per latent value: the mean and the log-variance of a Gaussian.
        self.conv_out = nn.Conv2d(channels[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W) -> (B, 8, H/8, W/8)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)), inplace=True))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        channels, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(  # one resnet more than the encoder's levels have
            Level(channels[max(i - 1, 0)], c, cfg.layers_per_block + 1, groups, up=i < last)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], cfg.out_channels, 3, padding=1)

    def forward(self, z):  # (B, 4, H/8, W/8) -> (B, 3, H, W)
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class AutoencoderKL(nn.Module):
    def __init__(self, cfg=None):
        super().__init__()
        self.config = cfg = cfg or VAEConfig()
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def moments(self, picture):
        """Mean and log-variance (each (B, 4, H/8, W/8), unscaled) of the latent of `picture` (B, 3, H, W) in [-1, 1].

        H and W must be multiples of `config.downscale`.
        """
        picture = picture.contiguous(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
        mean, logvar = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps likewise

    def encode(self, picture, generator=None):
        """Picture (B, 3, H, W) in [-1, 1] -> latent (B, 4, H/8, W/8), times the scaling factor.

        The mean of the posterior, or a sample from it if a `generator` is given.
        """
        latent, logvar = self.moments(picture)
        if generator is not None:
            noise = torch.randn(latent.shape, generator=generator, dtype=latent.dtype, device=generator.device)
            latent = latent + torch.exp(0.5 * logvar) * noise.to(latent.device)
        return latent * self.config.scaling_factor

    def decode(self, latent):
        """Scaled latent (B, 4, H/8, W/8) -> picture (B, 3, H, W), about [-1, 1]; unclamped, for losses' gradients."""
        latent = latent.contiguous(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))

    @staticmethod
    def rename(state_dict):
        """Official files of 2022 spell the attention `query key value proj_attn`; this gives today's names."""
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

        def new_name(key):
            head, _, last = key.rpartition(".")  # "decoder.mid_block.attentions.0.query", ".", "weight"
            block, _, name = head.rpartition(".")
            return f"{block}.{old[name]}.{last}" if "attentions" in block and name in old else key

        return {new_name(key): tensor for key, tensor in state_dict.items()}


# ---------------------------------------------------------------------------------------------------- PIL's pictures
def to_tensor(picture):
    """PIL picture -> (3, H, W) in [-1, 1]; a mask -> (1, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1) / 127.5 - 1


def to_pil(pictures):
    """Pictures (B, 3, H, W) in [-1, 1] -> PIL pictures."""
    array = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def grid(pictures, columns=None):
    """PIL pictures of one size -> one picture, filled row by row; about square, or of so many columns."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * width, k // columns * height))
    return sheet
