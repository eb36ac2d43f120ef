"""SD 1.5's and 2.1-base's networks at their full size: what diffusers and transformers compute, on random weights.

Slow, and up to 5 GB of memory: `pytest -m slow -rP tests/test_full_size.py`. Both networks share one set of weights,
and only one pair is in memory at a time. (The VAE is the same in both models.)
"""

import pytest
import torch

from parity import assert_same, normal, ours_from, randomise, unet_inputs
from test_official_configs import OFFICIAL, build_theirs


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("model, part", [
    ("sd15", "unet"), ("sd21base", "unet"), ("sd15", "vae"), ("sd15", "text_encoder"), ("sd21base", "text_encoder"),
])  # fmt: skip
def test_full_size(model, part, tmp_path):
    theirs = build_theirs(part, OFFICIAL / model / part).to_empty(device="cpu")
    for name, buffer in theirs.named_buffers():
        if name.endswith("position_ids"):  # the text encoder's only buffer, empty now
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    ours = ours_from(randomise(theirs), tmp_path)
    if part == "unet":
        inputs = unet_inputs(ours.config, height=16, width=24, length=77)
        pairs = {"": (ours(*inputs), theirs(*inputs).sample)}
    elif part == "vae":
        picture, latent, scale = normal(1, 3, 64, 96), normal(1, 4, 16, 24), ours.config.scaling_factor
        pairs = {"encode": (ours.encode(picture), theirs.encode(picture).latent_dist.mean * scale)}
        pairs["decode"] = ours.decode(latent), theirs.decode(latent / scale).sample
    else:
        ids = torch.randint(ours.config.vocab_size, (1, 77), generator=torch.Generator().manual_seed(0))
        pairs = {"": (ours(ids), theirs(ids).last_hidden_state)}
    for name, (found, expected) in pairs.items():
        assert_same(f"{model} {part} {name}", found, expected, relative=True)
