"""SD 1.5's and 2.1-base's networks at their full size: what diffusers and transformers compute, on random weights.

Slow, a few minutes and up to 5 GB of memory: `pytest -m slow -rP tests/test_full_size.py`. Both networks share one set
of weights, and only one pair is in memory at a time.
"""

import pytest
import torch

from parity import assert_same, normal, ours_from, randomise, unet_inputs
from test_official_configs import OFFICIAL, build_theirs

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("model", ["sd15", "sd21base"])]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def full_size(model, part, folder):
    """Ours and theirs, with the same random tensors."""
    theirs = build_theirs(part, OFFICIAL / model / part).to_empty(device="cpu")
    for name, buffer in theirs.named_buffers():
        if name.endswith("position_ids"):  # the text encoder's only buffer, empty now
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return ours_from(randomise(theirs), folder), theirs


def test_unet(model, tmp_path):
    ours, theirs = full_size(model, "unet", tmp_path)
    inputs = unet_inputs(ours.config, height=16, width=24, length=77)
    assert_same(f"UNet {model}", ours(*inputs), theirs(*inputs).sample, relative=True)


def test_vae(model, tmp_path):
    ours, theirs = full_size(model, "vae", tmp_path)
    picture, latent = normal(1, 3, 64, 96), normal(1, 4, 16, 24)
    mean = theirs.encode(picture).latent_dist.mean * ours.config.scaling_factor
    assert_same(f"VAE encode {model}", ours.encode(picture), mean, relative=True)
    picture = theirs.decode(latent / ours.config.scaling_factor).sample
    assert_same(f"VAE decode {model}", ours.decode(latent), picture, relative=True)


def test_text_encoder(model, tmp_path):
    ours, theirs = full_size(model, "text_encoder", tmp_path)
    ids = torch.randint(ours.config.vocab_size, (1, 77), generator=torch.Generator().manual_seed(0))
    assert_same(f"text encoder {model}", ours(ids), theirs(ids).last_hidden_state, relative=True)
