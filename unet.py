"""UNet2DConditionModel: noisy latent, timestep, text states -> the network's prediction (epsilon or v).

Follows diffusers' `UNet2DConditionModel` as Stable Diffusion 1.x and 2.x use it. Attribute names are the checkpoint's
keys, so official weights load with strict=True. Left out: the block types, embeddings and attention variants of other
models, such as SDXL's additional embeddings.

B batch, C channels, H and W height and width at the level at hand, L = H*W, S text length, D text width, T time width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class UNetConfig:
    """The settings of `unet/config.json` that differ between supported checkpoints. Defaults: SD 1.5."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    # The NUMBER of heads, per level or for all, in spite of its name: a mistake of 2022 that the files preserve.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # proj_in and proj_out as Linear (SD 2.x) or as 1x1 convolution (SD 1.x)
    in_channels: int = 4
    out_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 64  # side of the latent the model was trained on; only the default size of pictures

    # Settings that are built in: any other value would change the maths, so the loader refuses it.
    FIXED = {
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
        "downsample_padding": 1,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
        "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
    }
    # `upcast_attention` asks for float32 attention scores, which scaled_dot_product_attention accumulates in anyway;
    # the other has no effect without an `addition_embed_type`, which is refused.
    IGNORED = {"upcast_attention", "addition_embed_type_num_heads"}

    REQUIRED = ("cross_attention_dim",)  # diffusers' default is not Stable Diffusion's

    def heads(self, level):
        return self.attention_head_dim if isinstance(self.attention_head_dim, int) else self.attention_head_dim[level]


def sinusoidal_embedding(timestep, dim):
    """Timesteps (B,) -> (B, dim): cosines, then sines, of frequencies 1 ... 1/10000 (Ho et al. 2020, cosines first)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angle = timestep.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_dim, dim):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):  # (B, C) -> (B, T)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, time_dim, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # The residual needs a 1x1 convolution only where the channel count changes; no key exists elsewhere.
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, time_emb):  # (B, C_in, H, W), (B, T) -> (B, C_out, H, W)
        # In place: without gradients, a new tensor of this size would cost more time than the SiLU itself.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h.add_(self.time_emb_proj(F.silu(time_emb))[:, :, None, None])
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x to `context`: to itself (attn1) or to the text (attn2)."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list because diffusers' holds a dropout too

    def forward(self, x, context):  # (B, L, C), (B, S, D) -> (B, L, C)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L or S, C/heads)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim, inner_dim):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)  # values and gates in one product

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # Position 1 is diffusers' dropout: it has no weights, but it moves the second Linear's key to `net.2`.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context):  # (B, L, C), (B, S, D) -> (B, L, C)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """One transformer block over the positions of a feature map, with a residual around it."""

    def __init__(self, channels, context_dim, heads, groups, linear):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the resnets
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):  # (B, C, H, W), (B, S, D) -> (B, C, H, W)
        h = self.norm(x)
        if isinstance(self.proj_in, nn.Conv2d):
            h = self.proj_in(h).flatten(2).transpose(1, 2)  # (B, L, C)
            h = self.transformer_blocks[0](h, context)
            return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))
        h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, L, C)
        h = self.proj_out(self.transformer_blocks[0](h, context))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        """(B, C, H, W) -> (B, C, *size): twice as large, or one less where the way down rounded up."""
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Block(nn.Module):
    """The layers of one level: resnets, each followed by a transformer if the level attends to the text."""

    def __init__(self, cfg, in_channels, out_channels, level, attends):
        super().__init__()
        time_dim, groups = 4 * cfg.block_out_channels[0], cfg.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, time_dim, groups) for c in in_channels)
        if attends:
            self.attentions = nn.ModuleList(
                Transformer2D(
                    out_channels, cfg.cross_attention_dim, cfg.heads(level), groups, cfg.use_linear_projection
                )
                for _ in in_channels
            )

    def layer(self, j, x, time_emb, context):  # (B, C_in, H, W) -> (B, C_out, H, W)
        x = self.resnets[j](x, time_emb)
        return self.attentions[j](x, context) if hasattr(self, "attentions") else x


class DownBlock(Block):
    def __init__(self, cfg, in_channels, out_channels, level, attends, last):
        super().__init__(cfg, [in_channels] + [out_channels] * (cfg.layers_per_block - 1), out_channels, level, attends)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])

    def forward(self, x, time_emb, context, skips):
        """Appends to `skips` what the way up will need."""
        for j in range(len(self.resnets)):
            x = self.layer(j, x, time_emb, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpBlock(Block):
    def __init__(self, cfg, in_channels, out_channels, level, attends, last):
        super().__init__(cfg, in_channels, out_channels, level, attends)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x, time_emb, context, skips):
        """Takes from the end of `skips` what the way down left, one per layer."""
        for j in range(len(self.resnets)):
            x = self.layer(j, torch.cat([x, skips.pop()], dim=1), time_emb, context)
        return self.upsamplers[0](x, skips[-1].shape[2:]) if hasattr(self, "upsamplers") else x


class MidBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        channels, time_dim = cfg.block_out_channels[-1], 4 * cfg.block_out_channels[0]
        groups, heads = cfg.norm_num_groups, cfg.heads(-1)
        self.attentions = nn.ModuleList(
            [Transformer2D(channels, cfg.cross_attention_dim, heads, groups, cfg.use_linear_projection)]
        )
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, time_dim, groups) for _ in range(2))

    def forward(self, x, time_emb, context):
        x = self.attentions[0](self.resnets[0](x, time_emb), context)
        return self.resnets[1](x, time_emb)


class UNet2DConditionModel(nn.Module):
    def __init__(self, cfg=None):
        super().__init__()
        self.config = cfg = cfg or UNetConfig()
        channels, layers = cfg.block_out_channels, cfg.layers_per_block
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]  # what each skip connection carries, in the order the way down makes them
        for i, c in enumerate(channels):
            attends = cfg.down_block_types[i] == "CrossAttnDownBlock2D"
            self.down_blocks.append(DownBlock(cfg, channels[max(i - 1, 0)], c, i, attends, i == last))
            skip_channels += [c] * (layers if i == last else layers + 1)  # + 1: the downsampler's output

        self.mid_block = MidBlock(cfg)

        self.up_blocks = nn.ModuleList()
        previous = channels[-1]
        for i, c in enumerate(reversed(channels)):
            attends = cfg.up_block_types[i] == "CrossAttnUpBlock2D"
            incoming = [(previous if j == 0 else c) + skip_channels.pop() for j in range(layers + 1)]
            self.up_blocks.append(UpBlock(cfg, incoming, c, last - i, attends, i == last))
            previous = c

        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], cfg.out_channels, 3, padding=1)

    def forward(self, latent, timestep, context):
        """Latent (B, 4, H, W), timesteps (B,) in 0..999, text states (B, S, D) -> prediction (B, 4, H, W).

        What is predicted (epsilon or v) is the checkpoint's choice, written in its scheduler's config.
        """
        # The embedding is computed in float32 (half precision would blur neighbouring timesteps), then cast.
        embedding = sinusoidal_embedding(timestep, self.config.block_out_channels[0])
        time_emb = self.time_embedding(embedding.to(latent.dtype))  # (B, T)

        x = self.conv_in(latent)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time_emb, context, skips)
        x = self.mid_block(x, time_emb, context)
        for block in self.up_blocks:
            x = block(x, time_emb, context, skips)
        x = x.to(self.conv_out.weight.dtype)  # the loader keeps the last layer in float32, see `hipa.load`
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))
