"""Each network gives what diffusers' or transformers' gives: in float32, to 1e-5, on the same random weights.

`pytest -rP tests/test_networks.py` shows the errors. The last test shows that the limit is tight enough: ten times too
large or too small an eps, in any one norm of the three networks, is noticed.
"""

import copy
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

import hipa
from parity import LIMIT, assert_same, normal, ours_from, randomise, unet_inputs

THEIRS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """The checkpoint with every parameter at random, written by diffusers and transformers."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("random") / checkpoint.name)
    for part, network in THEIRS.items():
        randomise(network.from_pretrained(checkpoint / part)).save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return hipa.load(folder)


def load_theirs(folder, part):
    return THEIRS[part].from_pretrained(folder / part).eval()


# ---------------------------------------------------------------------------------------------------------------- UNet
@pytest.mark.parametrize("height, width, length", [(13, 18, 7), (8, 8, 77), (6, 1, 1), (5, 20, 100)])
def test_unet(ours, folder, height, width, length):
    """Two timesteps in a batch; sizes that do not halve evenly, which the way up has to undo; any length of text."""
    inputs = unet_inputs(ours.unet.config, height, width, length)
    theirs = load_theirs(folder, "unet")(*inputs).sample
    assert_same(f"UNet {folder.name}-like, {height}x{width}, {length} tokens", ours.unet(*inputs), theirs)


UNETS = {  # channels of the levels; whether each attends to the text; heads; other settings
    "one level": ([8], [1], 2, {"layers_per_block": 1}),
    "three layers, linear": ([12], [1], 3, {"layers_per_block": 3, "use_linear_projection": True}),
    "attention in the middle block only": ([8, 16], [0, 0], 4, {}),
    "attention on the first level only": ([8, 12], [1, 0], [2, 3], {"layers_per_block": 3}),
    "attention on the last level only, linear": ([8, 12], [0, 1], [1, 3], {"use_linear_projection": True}),
    "all attend, odd heads": ([8, 12, 20, 28], [1, 1, 1, 1], [1, 3, 5, 7], {"layers_per_block": 1}),
    "four levels like SD 2.1": ([8, 12, 20, 20], [1, 1, 1, 0], [1, 3, 5, 5], {"use_linear_projection": True}),
    "levels that narrow": ([16, 8], [1, 1], [4, 2], {"layers_per_block": 1}),
    "nine channels in, four out": ([8, 12], [1, 0], 2, {"in_channels": 9}),
    "one group, so one mean for all channels": ([6, 9], [1, 1], 3, {"norm_num_groups": 1}),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_another_shape(name, tmp_path):
    """What config.json says of levels, layers, heads, channels and projections is followed."""
    channels, attends, heads, others = UNETS[name]
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    settings = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    settings |= {"attention_head_dim": heads, "cross_attention_dim": 20, "norm_num_groups": 4, "sample_size": 8}
    theirs = randomise(UNet2DConditionModel(**settings | others))
    inputs = unet_inputs(theirs.config)
    assert_same(f"UNet, {name}", ours_from(theirs, tmp_path)(*inputs), theirs(*inputs).sample)


# ----------------------------------------------------------------------------------------------------------------- VAE
def test_vae(ours, folder, tmp_path):
    """Its moments, latents and pictures. The log-variance is limited to -30 ... 20."""
    picture, latent, theirs = normal(2, 3, 24, 36), normal(2, 4, 5, 9), load_theirs(folder, "vae")
    scale, gaussian = ours.vae.config.scaling_factor, theirs.encode(picture).latent_dist
    mean, logvar = ours.vae.moments(picture)
    assert_same("VAE mean", mean, gaussian.mean)
    assert_same("VAE log-variance", logvar, gaussian.logvar)
    assert_same("VAE encode", ours.vae.encode(picture), gaussian.mean * scale)
    assert_same("VAE decode", ours.vae.decode(latent), theirs.decode(latent / scale).sample)
    theirs.quant_conv.bias[-2] += 100
    theirs.quant_conv.bias[-1] -= 100
    logvar = ours_from(theirs, tmp_path).moments(picture)[1]
    assert (logvar.max(), logvar.min()) == (20, -30)
    assert_same("VAE log-variance at its limits", logvar, theirs.encode(picture).latent_dist.logvar)


VAES = {
    "one level": ([8], {}),
    "two levels of three layers": ([8, 12], {"layers_per_block": 3}),
    "four levels of two layers": ([8, 12, 16, 16], {"layers_per_block": 2}),
    "levels that narrow": ([16, 8], {}),
    "grey pictures": ([8, 12], {"in_channels": 1, "out_channels": 1, "latent_channels": 8, "scaling_factor": 0.5}),
}


@pytest.mark.parametrize("name", VAES)
def test_vae_of_another_shape(name, tmp_path):
    channels, others = VAES[name]
    settings = {"down_block_types": ["DownEncoderBlock2D"] * len(channels), "norm_num_groups": 4}
    settings |= {"up_block_types": ["UpDecoderBlock2D"] * len(channels), "block_out_channels": channels}
    theirs = randomise(AutoencoderKL(**settings | others))
    ours, config = ours_from(theirs, tmp_path), theirs.config
    picture, latent = normal(2, config.in_channels, 16, 24), normal(2, config.latent_channels, 3, 2)
    mean = theirs.encode(picture).latent_dist.mean * config.scaling_factor
    assert_same(f"VAE encode, {name}", ours.encode(picture), mean)
    assert_same(f"VAE decode, {name}", ours.decode(latent), theirs.decode(latent / config.scaling_factor).sample)


# ---------------------------------------------------------------------------------------------------------------- text
def token_ids(config, *shape):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 9, 77])
def test_text_encoder(ours, folder, length):
    """Both activations: quick_gelu in SD 1.5, gelu in 2.1."""
    ids = token_ids(ours.text_encoder.config, 3, length)
    theirs = load_theirs(folder, "text_encoder")(ids).last_hidden_state
    assert_same(f"text encoder {folder.name}-like, {length} tokens", ours.text_encoder(ids), theirs)


# ------------------------------------------------------------------------------------------------- historic spellings
def vae_of_2022(weights):
    """The names of the attention's layers in the official VAE files."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for key, t in weights.items()}
    return weights


def text_encoder_of_2022(weights):
    """The official files have a prefix, and a buffer that only counts from 0 to 76."""
    weights = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in weights.items()}
    return weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def text_encoder_without_prefix(weights):
    """What transformers writes from 5.6 on."""
    return {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}


@pytest.mark.parametrize("respell", [vae_of_2022, text_encoder_of_2022, text_encoder_without_prefix])
def test_historic_spellings(ours, folder, tmp_path, respell):
    """A file with the names of another year holds the same network. So says diffusers of the VAE's."""
    part = "vae" if respell is vae_of_2022 else "text_encoder"
    old = shutil.copytree(folder, tmp_path / "old")
    [file] = (old / part).glob("*.safetensors")
    weights = respell(load_file(file))
    file.unlink()  # not overwritten: `weights` is mapped from it
    save_file(weights, file, {"format": "pt"})
    found, expected = (getattr(model, part).state_dict() for model in (hipa.load(old), ours))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if part == "vae":
        latent = normal(1, 4, 3, 4)
        theirs = load_theirs(old, "vae").decode(latent / ours.vae.config.scaling_factor).sample
        assert_same("VAE decode, spelling of 2022", ours.vae.decode(latent), theirs)


# --------------------------------------------------------------------------------------------------- is it tight enough
@pytest.mark.parametrize("part", THEIRS)
def test_a_wrong_eps_in_any_norm_is_noticed(ours, part):
    """GroupNorm and LayerNorm have 1e-5 here and 1e-6 there; one mistaken for the other exceeds the limit."""
    network = copy.deepcopy(getattr(ours, part))
    call = {
        "unet": lambda: network(*unet_inputs(network.config, 5, 6, 3)),
        "vae": lambda: torch.cat(
            [network.encode(normal(1, 3, 16, 24)).flatten(), network.decode(normal(1, 4, 3, 5)).flatten()]
        ),
        "text_encoder": lambda: network(token_ids(network.config, 3, 9)),
    }[part]
    right, shifts = call(), {}
    for name, norm in network.named_modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            eps = norm.eps
            norm.eps = {1e-5: 1e-6, 1e-6: 1e-5}[eps]
            shifts[name] = (call() - right).abs().max().item()
            norm.eps = eps
    least = min(shifts, key=shifts.get)
    print(f"{part}: a wrong eps in one of {len(shifts)} norms shows as {shifts[least]:.1e} or more ({least})")
    assert shifts[least] > 3 * LIMIT
