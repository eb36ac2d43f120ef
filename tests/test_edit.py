"""Editing, inpainting and super-resolution: the first is diffusers' image-to-image, the others leave alone what they
are to leave alone, and pictures of any kind go in.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

import hipa
import sample
from conftest import quiet_pipeline, run_sample
from parity import LIMIT, assert_same, normal
from vae import to_pil, to_tensor


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return quiet_pipeline(StableDiffusionImg2ImgPipeline, checkpoint)


@pytest.fixture(scope="module")
def small(sd15_like):
    return hipa.load(sd15_like)  # draws 32 x 32 pixels of 8 x 8 latents


def pictures(*shape, seed=0):
    """Smooth ones in [-1, 1], with a few hard edges"""
    x = F.interpolate(normal(*shape[:2], 5, 6, seed=seed), size=shape[2:], mode="bicubic")
    return torch.where(x > 1, 1.0, x).clamp(-1, 1)


def seen_by_unet(model, draw):
    """What draw() gives to the UNet: [(x, timesteps)]"""
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].clone(), inputs[1].clone())))
    try:
        draw()
    finally:
        hook.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------- editing
@pytest.mark.parametrize(
    "strength, timestep", [(1, 999), (0.7, 699), (0.5, 500), (0.3, 300), (0.9, 899), (0.001, 1), (0.0001, 0)]
)
def test_strength(small, strength, timestep):
    """t = round(999 strength), and one step is one look of the network, at that."""
    draw = partial(hipa.edit, small, pictures(2, 3, 32, 32), ["a cat", "a dog"], [0, 1], strength)
    [(x, timesteps)] = seen_by_unet(small, draw)
    assert x.shape == (2, 4, 8, 8) and timesteps.tolist() == [timestep] * 2


@pytest.mark.parametrize("strength, steps, guidance", [(0.7, 1, 1.0), (0.3, 1, 1.0), (0.7, 1, 4.0), (0.8, 6, 3.0)])
def test_edit(model, pipeline, strength, steps, guidance):
    """diffusers' image-to-image, its scheduler made to take our timesteps: same noise, same picture. 40 x 24 pixels."""
    source, prompts, seeds = pictures(2, 3, 24, 40), ["a cat and a dog", ""], [3, 2**40]
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    timesteps = model.schedule.timesteps(steps, round(strength * 999))
    latent = pipeline.vae.encode(source).latent_dist.mean * pipeline.vae.config.scaling_factor
    made = pipeline(
        prompts, latent, strength=1.0, timesteps=timesteps, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
    ).images  # fmt: skip
    theirs = pipeline.vae.decode(made / pipeline.vae.config.scaling_factor).sample
    ours = hipa.edit(model, source, prompts, seeds, strength, steps=steps, guidance=guidance)
    what = f"edit, {model.schedule.prediction_type}, strength {strength}, {steps} steps, guidance {guidance}"
    assert_same(what, ours, theirs, relative=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_and_decode(sd15_like, small, dtype):
    """Latents and pictures are float32 whatever the networks are, and about the same."""
    model, source = hipa.load(sd15_like, dtype=dtype), pictures(2, 3, 24, 40)
    latent = model.encode(source)
    again = model.decode(latent)
    assert model.dtype == dtype and latent.dtype == again.dtype == torch.float32
    assert latent.shape == (2, 4, 6, 10) and again.shape == source.shape
    limit = 0 if dtype == torch.float32 else 0.05
    for ours, expected in ((latent, small.vae.encode(source)), (again, small.vae.decode(latent))):
        assert (ours - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (4, 3), (40, 30)])
def test_pil_pictures(size):
    """to_tensor and to_pil are inverse; what is out of [-1, 1] is cut off."""
    picture = photo(*size)
    tensor = to_tensor(picture)
    assert tensor.shape == (3, *size[::-1]) and -1 <= tensor.min() <= tensor.max() <= 1
    assert to_tensor(picture.convert("L")).shape == (1, *size[::-1])
    for made, expected in zip(to_pil(torch.stack([tensor, tensor * 9])), (tensor, (tensor * 9).clamp(-1, 1))):
        assert (to_tensor(made) - expected).abs().max() < 1 / 255
    assert to_pil(tensor[None])[0] == picture


# ---------------------------------------------------------------------------------------------------------- inpainting
def hole(height, width, top, left, bottom, right, batch=1):
    mask = torch.zeros(batch, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (7, 13), (1, 9)])
def test_fill(height, width):
    """The hole's own content does not count. Nothing is above or below the surroundings, and slopes go on."""
    mask, x = hole(height, width, 0, 3, max(1, height // 2), 7, batch=2), normal(2, 3, height, width)
    filled = hipa.fill(x, mask)
    assert torch.equal(filled, hipa.fill(torch.where(mask > 0, 99.0, x), mask))
    assert torch.equal(filled * (1 - mask), x * (1 - mask))
    known = torch.where(mask > 0, torch.nan, x).flatten(2)
    assert (filled.flatten(2) <= known.nan_to_num(-9).amax(2, keepdim=True)).all()
    assert (filled.flatten(2) >= known.nan_to_num(9).amin(2, keepdim=True)).all()
    flat = torch.full((2, 3, height, width), 0.3)
    torch.testing.assert_close(hipa.fill(flat, mask), flat)
    ramp = torch.arange(width).expand(2, 3, height, width) / width
    torch.testing.assert_close(hipa.fill(ramp, mask), ramp, atol=1.2 / width, rtol=0)


def test_fill_of_nothing_and_of_everything():
    x = normal(2, 3, 24, 40)
    assert torch.equal(hipa.fill(x, torch.zeros(2, 1, 24, 40)), x)
    assert torch.equal(hipa.fill(x, torch.ones(2, 1, 24, 40)), torch.zeros_like(x))
    one = torch.stack([torch.zeros(1, 24, 40), torch.ones(1, 24, 40)])  # each picture has a hole of its own
    assert torch.equal(hipa.fill(x, one)[0], x[0]) and not hipa.fill(x, one)[1].any()


@pytest.mark.parametrize("steps", [1, 3])
def test_inpaint_leaves_the_surroundings_and_does_not_see_the_hole(small, steps):
    """White is drawn: there the old content does not matter at all. Black stays to the bit."""
    mask, source = hole(24, 40, 5, 9, 17, 30, batch=2), pictures(2, 3, 24, 40)
    other = torch.where(mask > 0, pictures(2, 3, 24, 40, seed=1), source)
    ours, again = (hipa.inpaint(small, x, mask, ["a cat", "a dog"], [0, 1], steps=steps) for x in (source, other))
    outside = mask.expand_as(ours) == 0
    assert torch.equal(ours[outside], source[outside]) and torch.equal(ours, again)
    assert (ours - source)[~outside].abs().mean() > 0.05
    different = hipa.inpaint(small, source, mask, ["a cat", "a dog"], [2, 3], steps=steps)
    assert (ours - different)[~outside].abs().max() > 0.01, "the hole is drawn from the noise"


def test_inpaint_of_nothing_and_of_everything(small):
    source = pictures(1, 3, 24, 40)
    assert torch.equal(hipa.inpaint(small, source, torch.zeros(1, 1, 24, 40), ["a cat"], [0]), source)
    everything = [hipa.inpaint(small, x, torch.ones(1, 1, 24, 40), ["a cat"], [0]) for x in (source, -source)]
    assert torch.equal(*everything) and everything[0].std() > 0


def test_further_steps_see_the_surroundings(small):
    """At each of them the latents beside the hole are the picture's own, noised to that timestep by the same noise."""
    mask, source = hole(32, 32, 8, 8, 16, 20), pictures(1, 3, 32, 32)
    draw = partial(hipa.inpaint, small, source, mask, ["a cat"], [0], 0.8, steps=4, guidance=1.0)
    latent, noise = small.vae.encode(hipa.fill(source, mask)), hipa.noise([0], 4, 8, 8)
    beside = F.max_pool2d(mask, 4).expand(1, 4, 8, 8) == 0
    assert beside.sum() == 4 * (64 - 2 * 3)
    seen = seen_by_unet(small, draw)
    assert len(seen) == 4
    for x, timesteps in seen:
        expected = small.schedule.add_noise(latent, timesteps.item(), noise)
        assert (x - expected)[beside].abs().max() < LIMIT
        assert timesteps == 799 or (x - expected)[~beside].abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------- super-resolution
def resize(x, size):
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 36, 40, 56, 57, 80, 1000])
def test_tiles(small, length):
    """They cover the length, begin at whole latents, overlap by a quarter or more, and are as few as can be."""
    starts = hipa.tiles(small, length)
    assert starts[0] == 0 and starts[-1] == max(0, -(-length // 4) * 4 - 32)
    assert all(start % 4 == 0 for start in starts)
    assert all(0 < b - a <= 24 for a, b in zip(starts, starts[1:]))
    assert len(starts) == 1 + max(0, -(-(-(-length // 4) * 4 - 32) // 24))


def local(model, pictures, eps, *_, **__):
    """In the place of `hipa.redraw`: a network that sees no further than a pixel, and its noise"""
    return 0.8 * pictures + 0.1 * F.interpolate(eps[:, :3], scale_factor=4)


@pytest.mark.parametrize("size, scale", [((20, 31), 4), ((9, 50), 3), ((8, 8), 4), ((3, 5), 2)])
def test_tiles_join(small, monkeypatch, size, scale):
    """Where the tiles are does not show: with a network that sees no further than a pixel, the result is as untiled.

    (3, 5) doubled is smaller than the model's pictures: drawn as large as they are, 32 pixels, then reduced.
    """
    monkeypatch.setattr(hipa, "redraw", local)
    source, whole = pictures(2, 3, *size), [length * scale for length in size]
    large = whole if max(whole) >= 32 else [round(32 * length / max(size)) for length in size]
    enlarged = F.pad(resize(source, large), (0, -large[1] % 4, 0, -large[0] % 4), mode="replicate")
    drawn = local(None, enlarged, hipa.noise([0, 1], 4, enlarged.shape[2] // 4, enlarged.shape[3] // 4))
    drawn = resize(drawn[..., : large[0], : large[1]], whole).clamp(-1, 1)
    ours = hipa.upscale(small, source, scale, ["a cat"] * 2, [0, 1])
    assert ours.shape == (2, 3, *whole)
    torch.testing.assert_close(ours, drawn + resize(source - resize(drawn, size), whole), atol=1e-5, rtol=0)


def test_one_tile_is_an_edit(small):
    """8 x 8 to 32 x 32, the model's own size: enlarged, edited, corrected."""
    source = pictures(2, 3, 8, 8)
    drawn = hipa.edit(small, resize(source, (32, 32)), ["a cat", "a dog"], [3, 4], 0.3).clamp(-1, 1)
    ours = hipa.upscale(small, source, 4, ["a cat", "a dog"], [3, 4], 0.3)
    torch.testing.assert_close(ours, drawn + resize(source - resize(drawn, (8, 8)), (32, 32)), atol=1e-5, rtol=0)


def test_upscale_agrees_with_the_small_picture(small):
    """Reduced again it is nearly what was given, whatever a network with random weights has drawn."""
    source, calls = pictures(1, 3, 20, 31), []
    large = hipa.upscale(small, source, 4, ["a cat"], [0], 0.9, progress=calls.append)
    assert large.shape == (1, 3, 80, 124)
    error, of_nothing = (resize(large, (20, 31)) - source).abs().mean(), source.abs().mean()
    assert error < 0.15 * of_nothing
    assert sum(calls) == len(hipa.tiles(small, 80)) * len(hipa.tiles(small, 124)) == 3 * 5


@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
def test_tiles_in_batches(small, at_once):
    """However many tiles are drawn together, each has its own noise and its own picture's prompt."""
    source, prompts = pictures(2, 3, 20, 31), ["a cat", "a dog"]
    expected = hipa.upscale(small, source, 4, prompts, [0, 1], 0.6, at_once=1, steps=2)
    ours = hipa.upscale(small, source, 4, prompts, [0, 1], 0.6, at_once=at_once, steps=2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_the_networks_see_tiles_only(small):
    """Their memory does not grow with the picture."""
    seen = seen_by_unet(small, lambda: hipa.upscale(small, pictures(1, 3, 20, 31), 4, ["a cat"], [0], at_once=4))
    assert [len(x) for x, _ in seen] == [4, 4, 4, 3] and {x.shape[1:] for x, _ in seen} == {(4, 8, 8)}


# ---------------------------------------------------------------------------------------------------- the command line
@pytest.fixture
def cli(sd15_like, tmp_path, capsys, monkeypatch):
    """Runs the command line in tmp_path, the small checkpoint, one step -> code, out, err, pictures (RGB arrays)"""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code, out, err = run_sample(["--model", sd15_like, "--out", "out", "--steps", "1", *argv], capsys)
        drawn = [np.asarray(Image.open(path).convert("RGB")) for path in out if path.endswith(".png")]
        return SimpleNamespace(code=code, out=out, err=err, pictures=drawn)

    return call


def photo(width, height, mode="RGB"):
    """Colours that run to the right and down, so that a turned picture shows"""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2).astype("uint8")
    return Image.fromarray(rgb).convert(mode)


def test_three_jobs(cli):
    """Edited and inpainted to its own size, 45 x 37, and enlarged; each says what it was made from."""
    photo(45, 37).save("photo.png")
    mask = np.zeros((37, 45), "uint8")
    mask[10:20, 20:] = 255
    Image.fromarray(mask).save("mask.png")
    edited = cli("a cat", "--image", "photo.png", "--strength", "0.5")
    inpainted = cli("a cat", "--image", "photo.png", "--mask", "mask.png", "-n", "2")
    enlarged = cli("--image", "photo.png", "--scale", "3")
    assert [job.code for job in (edited, inpainted, enlarged)] == [0, 0, 0]
    source = np.asarray(photo(45, 37))
    assert edited.pictures[0].shape == source.shape and not np.array_equal(edited.pictures[0], source)
    first, second, grid = inpainted.pictures
    for picture in (first, second):
        assert np.array_equal(picture[mask == 0], source[mask == 0]), "to the bit"
        assert (picture[mask > 0].astype(int) - source[mask > 0]).any()
    assert not np.array_equal(first, second) and grid.shape == (37, 90, 3)
    assert enlarged.pictures[0].shape == (111, 135, 3)
    words = [Image.open(job.out[0]).text["parameters"] for job in (edited, inpainted, enlarged)]
    assert "Image: photo.png, Denoising strength: 0.5" in words[0] and "Size: 44x36" in words[0]
    assert "Denoising strength: 0.9, Mask: mask.png" in words[1]
    assert words[2].startswith("\nSteps: 1") and "Denoising strength: 0.3, Scale: 3" in words[2]


@pytest.mark.parametrize("like, expected", [
    ((32, 32), (32, 32)), ((45, 37), (44, 36)), ((24, 24), (24, 24)), ((1024, 768), (36, 28)), ((10, 8), (36, 28)),
    ((1, 5000), (4, 2264)),
])  # fmt: skip
def test_size_of_the_drawing(sd15_like, like, expected):
    """About the picture's own if that is half to twice the model's area, 32 x 32; else that area in its shape."""
    assert sample.picture_size(sd15_like, like=like) == expected
    assert sample.picture_size(sd15_like, (40, 24), like=like) == (40, 24)


KINDS = {
    "RGB.png": {}, "RGB.jpg": {"quality": 95}, "RGB.webp": {"lossless": True}, "L.png": {}, "1.png": {}, "P.png": {},
    "P.gif": {}, "CMYK.jpg": {"quality": 95}, "CMYK.tif": {}, "YCbCr.jpg": {"quality": 95}, "LA.png": {},
    "RGBA.png": {},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures(tmp_path, name):
    mode = name.split(".")[0]
    made = photo(40, 30, mode)
    made.save(tmp_path / name, **KINDS[name])
    read = sample.read_picture(tmp_path / name)
    assert read.mode == "RGB" and read.size == (40, 30)
    error = np.abs(np.asarray(read).astype(int) - np.asarray(made.convert("RGB"))).mean()
    assert error == 0 if name.endswith("png") else error < 8


def test_transparency_is_white_in_a_picture_and_black_in_a_mask(tmp_path):
    half = photo(40, 30, "RGBA")
    half.putalpha(Image.fromarray(np.tile(np.where(np.arange(40) < 20, 0, 255).astype("uint8"), (30, 1))))
    half.save(tmp_path / "half.png")
    read = np.asarray(sample.read_picture(tmp_path / "half.png"))
    assert (read[:, :20] == 255).all() and np.array_equal(read[:, 20:], np.asarray(photo(40, 30))[:, 20:])
    white = Image.new("RGBA", (40, 30), "white")
    white.putalpha(half.getchannel("A"))
    white.save(tmp_path / "mask.png")
    mask = np.asarray(sample.read_mask(tmp_path / "mask.png", (40, 30)))
    assert not mask[:, :20].any() and (mask[:, 20:] == 255).all()
    photo(40, 30, "P").save(tmp_path / "palette.png", transparency=0)  # a transparent entry of the palette
    sample.read_picture(tmp_path / "palette.png")


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits(tmp_path, name):
    """The upper 8 of them count; Pillow alone would cut everything above 255 to white."""
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype("uint16")
    Image.fromarray(values).save(tmp_path / name)
    read = np.asarray(sample.read_picture(tmp_path / name))[..., 0]
    assert np.abs(read - values / 257).max() <= 0.5
    mask = np.asarray(sample.read_mask(tmp_path / name, (40, 30)))
    assert set(np.unique(mask)) == {0, 255} and mask.mean() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """As viewers show it, which is what the camera's owner saw."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photo(40, 30)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(sample.read_picture(tmp_path / "photo.png")), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "LA"])
@pytest.mark.parametrize("size", [(40, 30), (20, 15), (400, 300), (7, 5)])
def test_mask_of_any_mode_and_size(tmp_path, mode, size):
    """It is stretched over the picture, and then black or white."""
    half = Image.fromarray(np.tile(np.where(np.arange(size[0]) * 2 < size[0], 0, 255).astype("uint8"), (size[1], 1)))
    half.convert(mode).save(tmp_path / "mask.png")
    mask = np.asarray(sample.read_mask(tmp_path / "mask.png", (40, 30)))
    assert mask.shape == (30, 40) and set(np.unique(mask)) == {0, 255}
    assert not mask[:, :19].any() and (mask[:, 23:] == 255).all()


BAD = {
    "no such picture": (["a cat", "--image", "missing.png"], "missing.png: No such file"),
    "a folder": (["a cat", "--image", "."], "Is a directory"),
    "no picture": (["a cat", "--image", "text.png"], "text.png is no picture"),
    "a picture cut short": (["a cat", "--image", "cut.png"], "cut.png: "),
    "a decompression bomb": (["a cat", "--image", "bomb.png"], "bomb.png has more than"),
    "no such mask": (["a cat", "--image", "photo.png", "--mask", "missing.png"], "missing.png: No such file"),
    "strength of nothing": (["a cat", "--strength", "0.5"], "--strength needs --image"),
    "mask of nothing": (["a cat", "--mask", "photo.png"], "--mask needs --image"),
    "scale of nothing": (["a cat", "--scale", "2"], "--scale needs --image"),
    "scale and mask": (["--image", "photo.png", "--scale", "2", "--mask", "photo.png"], "--scale goes with neither"),
    "scale and size": (["--image", "photo.png", "--scale", "2", "--size", "64"], "--scale goes with neither"),
    "scale into gigabytes": (["--image", "wide.png", "--scale", "64"], "--scale 64 makes more than"),
    "no prompt": (["--image", "photo.png"], "give one prompt"),
} | {
    f"{option} {value}": (["a cat", "--image", "photo.png", f"--{option}={value}"], f"--{option}")
    for option, values in {"strength": ["0", "1.01", "nan", "-0.5"], "scale": ["0", "1", "2.5", "65"]}.items()
    for value in values
}


@pytest.mark.parametrize("argv, word", BAD.values(), ids=BAD)
def test_bad_input(cli, monkeypatch, argv, word):
    """One line that says what is wrong, exit code 2, before the model loads."""
    photo(40, 30).save("photo.png")
    Image.new("1", (5000, 400)).save("wide.png")
    Image.new("1", (12000, 12000)).save("bomb.png")
    Path("text.png").write_text("a cat")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:100])
    monkeypatch.setattr(hipa, "load", None)
    monkeypatch.setattr(hipa, "find_checkpoint", lambda *_, **__: pytest.fail("a download could begin here"))
    result = cli(*argv)
    assert result.code == 2 and result.out == [] and len(result.err) == 1, result
    assert "error: " in result.err[0] and word in result.err[0]
    assert not list(Path.cwd().glob("out/*"))
