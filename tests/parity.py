"""What the parity tests share: the comparison, and random weights under which no mistake can hide."""

import torch

import hipa
from clip import CLIPTextConfig, CLIPTextModel
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL, VAEConfig

LIMIT = 1e-5  # a GroupNorm with eps 1e-5 in place of 1e-6 is already further off, as test_networks.py shows
OURS = {  # by the name that diffusers and transformers give theirs
    "AutoencoderKL": (AutoencoderKL, VAEConfig),
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "UNet2DConditionModel": (UNet2DConditionModel, UNetConfig),
}

# The output of these layers reaches a norm, directly or by way of the residuals. It is made small, about 0.01, so that
# the norm's eps (1e-5 or 1e-6, beside a variance of 1e-4) counts; the norm then makes it large again.
BEFORE_A_NORM = (
    "conv_in", "conv1", "conv2", "time_emb_proj", "proj_in", "to_out.0", "net.2", "out_proj", "fc2", "_embedding",
)  # fmt: skip
QUERIES_AND_KEYS = ("to_q", "to_k", "q_proj", "k_proj")  # made large: attention far from uniform shows its heads


@torch.no_grad()
def randomise(network, seed=0):
    """Gives every parameter a random value: as initialised, norms do nothing and biases are often zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        layer = name.rpartition(".")[0]
        random = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            gain = 0.01 if layer.endswith(BEFORE_A_NORM) else 1.5 if layer.endswith(QUERIES_AND_KEYS) else 1
            parameter.copy_(random.mul_(gain * parameter[0].numel() ** -0.5))
        elif "norm" in layer:
            parameter.copy_(random.mul_(0.1).add_(name.endswith("weight")))  # weights around 1, biases around 0
        else:
            parameter.copy_(random.mul_(0.002))
    return network.eval().requires_grad_(False)


def ours_from(theirs, folder):
    """Our network, built from the config.json that theirs writes into `folder`, with theirs' own tensors in it."""
    save_config = getattr(theirs, "save_config", None) or theirs.config.save_pretrained  # diffusers or transformers
    save_config(folder)
    network, config = OURS[type(theirs).__name__]
    with torch.device("meta"):
        ours = network(hipa.read_config(config, folder / "config.json"))
    weights = theirs.state_dict()
    ours.load_state_dict(network.rename(weights) if hasattr(network, "rename") else weights, strict=True, assign=True)
    return ours.eval().requires_grad_(False)


def assert_same(what, ours, theirs, relative=False):
    """Prints the largest error, as a part of the largest value if `relative`, and asserts that it is within LIMIT."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    largest, error = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    assert 0.05 < largest < float("inf"), f"{what}: values up to {largest}; a comparison would show nothing"
    if relative:
        error /= largest
    print(f"{what}: largest {'relative ' if relative else ''}error {error:.1e}, largest value {largest:.1f}")
    assert error <= LIMIT, f"{what}: error {error:.1e}, and at most {LIMIT:.0e} is allowed"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(config, height=13, width=18, length=7):
    """Latents, timesteps and text states for a UNet: two of each, not square, and at odd sizes on every level."""
    latent = normal(2, config.in_channels, height, width)
    return latent, torch.tensor([999, 17]), normal(2, length, config.cross_attention_dim, seed=1)
