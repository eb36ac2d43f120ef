"""Editing is diffusers' image-to-image; inpainting and super-resolution keep what they are to keep."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

import hipa
from conftest import quiet_pipeline
from parity import LIMIT, assert_same, normal


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def small(sd15_like):
    return hipa.load(sd15_like)  # pictures of 32 x 32 pixels, latents of 8 x 8


def pictures(*shape, seed=0):
    """Smooth ones in [-1, 1], with a few hard edges"""
    x = F.interpolate(normal(*shape[:2], 5, 6, seed=seed), size=shape[2:], mode="bicubic")
    return torch.where(x > 1, 1.0, x).clamp(-1, 1)


def seen_by_unet(model, function, *args, **options):
    """function(model, *args) -> its result, and what the UNet gets meanwhile: [(x, timesteps)]"""
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].clone(), inputs[1].clone())))
    result = function(model, *args, **options)
    hook.remove()
    return result, seen


@pytest.mark.parametrize("strength, steps, guidance", [(0.7, 1, 1.0), (0.001, 1, 1.0), (0.3, 1, 4.0), (0.8, 6, 3.0)])
def test_edit(model, checkpoint, strength, steps, guidance):
    """diffusers' image-to-image, its scheduler made to take our timesteps: same noise, same picture. 40 x 24 pixels."""
    source, prompts, seeds = pictures(2, 3, 24, 40), ["a cat and a dog", ""], [3, 2**40]
    pipeline = quiet_pipeline(StableDiffusionImg2ImgPipeline, checkpoint)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    timesteps = model.schedule.timesteps(steps, round(strength * 999))
    latent = pipeline.vae.encode(source).latent_dist.mean * pipeline.vae.config.scaling_factor
    made = pipeline(
        prompts, latent, strength=1.0, timesteps=timesteps, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
    ).images  # fmt: skip
    theirs = pipeline.vae.decode(made / pipeline.vae.config.scaling_factor).sample
    ours = hipa.edit(model, source, prompts, seeds, strength, steps=steps, guidance=guidance)
    assert_same(f"edit, strength {strength}, {steps} steps, guidance {guidance}", ours, theirs, relative=True)


# ---------------------------------------------------------------------------------------------------------- inpainting
def hole(height, width, top, left, bottom, right, batch=1):
    mask = torch.zeros(batch, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (7, 13), (1, 9)])
def test_fill(height, width):
    """The hole's own content does not count. Nothing is above or below the surroundings, and slopes go on.

    Each picture has a hole of its own.
    """
    bottom, x = max(1, height // 2), normal(2, 3, height, width)
    mask = torch.cat([hole(height, width, 0, 3, bottom, 7), hole(height, width, 0, 5, bottom, 8)])
    filled = hipa.fill(x, mask)
    assert torch.equal(filled, hipa.fill(torch.where(mask > 0, 99.0, x), mask))
    assert torch.equal(filled * (1 - mask), x * (1 - mask))
    low, high = (torch.where(mask > 0, end, x).flatten(2) for end in (9.0, -9.0))
    assert (filled.flatten(2) >= low.amin(2, keepdim=True)).all()
    assert (filled.flatten(2) <= high.amax(2, keepdim=True)).all()
    assert torch.equal(hipa.fill(x, 0 * mask), x) and not hipa.fill(x, 0 * mask + 1).any()
    ramp = torch.arange(width).expand(2, 3, height, width) / width
    torch.testing.assert_close(hipa.fill(ramp, mask), ramp, atol=1.2 / width, rtol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_inpaint_leaves_the_surroundings_and_does_not_see_the_hole(small, steps):
    """The old content of the hole does not matter at all. Pixels beside it stay to the bit."""
    mask, source, prompts = hole(24, 40, 5, 9, 17, 30, batch=2), pictures(2, 3, 24, 40), ["a cat", "a dog"]
    other = torch.where(mask > 0, pictures(2, 3, 24, 40, seed=1), source)
    ours, again = (hipa.inpaint(small, x, mask, prompts, [0, 1], steps=steps) for x in (source, other))
    outside = mask.expand_as(ours) == 0
    assert torch.equal(ours[outside], source[outside]) and torch.equal(ours, again)
    assert (ours - source)[~outside].abs().mean() > 0.05
    different = hipa.inpaint(small, source, mask, prompts, [2, 3], steps=steps)
    assert (ours - different)[~outside].abs().max() > 0.01, "the noise counts"
    assert torch.equal(hipa.inpaint(small, source, 0 * mask, prompts, [0, 1], steps=steps), source)
    everything = [hipa.inpaint(small, x, 0 * mask + 1, prompts, [0, 1], steps=steps) for x in (source, -source)]
    assert torch.equal(*everything) and everything[0].std() > 0


def test_there_is_no_seam(small, monkeypatch):
    """An edit that is brighter everywhere, beside the hole too, is not brighter in the end."""
    monkeypatch.setattr(hipa, "edit", lambda model, pictures, *_: pictures + 0.5)
    mask, source = hole(24, 40, 5, 9, 17, 30), pictures(1, 3, 24, 40)
    torch.testing.assert_close(hipa.inpaint(small, source, mask, ["a cat"], [0]), hipa.fill(source, mask))


def test_further_steps_see_the_surroundings(small):
    """At each of them the latents beside the hole are the picture's own, noised to that timestep by the same noise."""
    mask, source = hole(32, 32, 8, 8, 16, 20), pictures(1, 3, 32, 32)
    latent, noise = small.vae.encode(hipa.fill(source, mask)), hipa.noise([0], 4, 8, 8)
    beside = F.max_pool2d(mask, 4).expand(1, 4, 8, 8) == 0
    assert beside.sum() == 4 * (64 - 2 * 3)
    _, seen = seen_by_unet(small, hipa.inpaint, source, mask, ["a cat"], [0], 0.8, steps=4, guidance=1.0)
    assert [timesteps.item() for _, timesteps in seen] == small.schedule.timesteps(4, 799)
    for x, timesteps in seen:
        expected = small.schedule.add_noise(latent, timesteps.item(), noise)
        assert (x - expected)[beside].abs().max() < LIMIT
        assert timesteps == 799 or (x - expected)[~beside].abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------- super-resolution
@pytest.mark.parametrize("length", [1, 31, 32, 33, 36, 40, 56, 57, 80, 1000])
def test_tiles(length):
    """They cover the length, begin at whole latents, overlap by a quarter or more, and are as few as can be."""
    starts, last = hipa.tile_starts(length, 32, 4), max(0, -(-length // 4) * 4 - 32)
    assert starts[0] == 0 and starts[-1] == last and len(starts) == 1 + -(-last // 24)
    assert all(start % 4 == 0 for start in starts)
    assert all(0 < b - a <= 24 for a, b in zip(starts, starts[1:]))


def local(model, pictures, prompts, seeds, strength, eps):
    """In the place of `hipa.edit`: a network that sees no further than a pixel, and its noise"""
    return 0.8 * pictures + 0.1 * F.interpolate(eps[:, :3], scale_factor=4)


@pytest.mark.parametrize("size, scale, strength, edit", [
    ((20, 31), 4, 0.3, local), ((9, 50), 3, 0.2, local), ((3, 5), 2, 0.3, local), ((8, 8), 4, 0.4, hipa.edit),
    ((8, 8), 4, 0.3, hipa.edit), ((20, 31), 4, 0.31, local),
])  # fmt: skip
def test_tiles_join(small, monkeypatch, size, scale, strength, edit):
    """Where the tiles are does not show: with a network that sees no further than a pixel, the result is as untiled.

    (3, 5) doubled is smaller than the model's pictures: made as large as they are, 32 pixels, then reduced. (8, 8) is
    one tile, so with any network the result is an edit. It is corrected where the given picture is to be trusted: up to
    a strength of 0.3.
    """
    monkeypatch.setattr(hipa, "edit", edit)
    source, whole, how = pictures(2, 3, *size), [length * scale for length in size], (["a cat", ""], [3, 4], strength)
    large = whole if max(whole) >= 32 else [round(32 * length / max(size)) for length in size]
    enlarged = F.pad(hipa.resize(source, large), (0, -large[1] % 4, 0, -large[0] % 4), mode="replicate")
    edited = edit(small, enlarged, *how, eps=hipa.noise([3, 4], 4, enlarged.shape[2] // 4, enlarged.shape[3] // 4))
    expected = hipa.resize(edited[..., : large[0], : large[1]], whole)
    for _ in range(6 if strength <= 0.3 else 0):
        expected = (expected + hipa.resize(source - hipa.resize(expected, size), whole)).clamp(-1, 1)
    torch.testing.assert_close(hipa.upscale(small, source, scale, *how), expected, atol=1e-5, rtol=0)


def test_tiles_fade_into_each_other(small, monkeypatch):
    """Three tiles in a row, dark, bright, dark: there is no edge between them."""
    greys = itertools.cycle([-0.5, 0.5])
    monkeypatch.setattr(hipa, "edit", lambda model, tile, *_, **__: torch.full_like(tile, next(greys)))
    large = hipa.upscale(small, torch.zeros(1, 3, 8, 20), 4, ["a cat"], [0])
    assert large.max() - large.min() > 0.1 and large.diff(dim=3).abs().max() < 0.1


def test_upscale_agrees_with_the_small_picture(small):
    """Reduced again it is nearly what was given, whatever a network with random weights has made.

    The networks see tiles only, one at a time: their memory does not grow with the picture.
    """
    source = pictures(1, 3, 20, 31)
    large, seen = seen_by_unet(small, hipa.upscale, source, 4, ["a cat"], [0])
    assert large.shape == (1, 3, 80, 124)
    assert (hipa.resize(large, (20, 31)) - source).abs().mean() < 0.04 * source.abs().mean()
    assert len(seen) == 3 * 5 and {x.shape for x, _ in seen} == {(1, 4, 8, 8)}
