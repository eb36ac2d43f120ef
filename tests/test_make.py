"""`emoji/make.py` in a short form: from the font to a model that samples, killed and continued, and trained further."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hipa
from conftest import ROOT

sys.path.insert(0, str(ROOT / "emoji"))

import evaluate  # noqa: E402
import make  # noqa: E402

needs_font = pytest.mark.skipif(not Path(make.FONT).exists(), reason="apt-get install fonts-noto-color-emoji")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Of `emoji/` only what people wrote: no weights, tokenizer, captions or pictures. Fewer pictures are held out."""
    trained = "build", "*.safetensors", "*.png", "captions.txt", "vocab.json", "merges.txt", "__pycache__"
    folder = tmp_path_factory.mktemp("made") / "emoji"
    shutil.copytree(ROOT / "emoji", folder, ignore=shutil.ignore_patterns(*trained))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "HERE", folder)
        patch.setattr(make, "HELD_OUT", 64)
        yield folder


def run(*options):
    make.main(["--device", "cpu", "--pictures", "64", *map(str, options)])


def progress(path, part):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[part])


def samples(folder):
    return hipa.sample(hipa.load(folder), ["a cat"], [0], 2).std() > 0


@needs_font
@pytest.mark.slow
def test_from_the_font_to_a_picture(home, monkeypatch, capsys):
    """Killed when the VAE is written first; the same command continues from there, and ends with a model."""
    command = "--minutes", 0.1, 0.02, 0.02, 0.02
    write_weights = make.write_weights

    def killed(folder, network, header=None):
        write_weights(folder, network, header)
        if header:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make, "write_weights", killed)
        run(*command)
    assert not (home / "vae" / WEIGHTS).exists()  # emoji/ is not touched before all is there
    [path] = home.glob(f"build/model-*/vae/{WEIGHTS}")
    first, _ = progress(path, "vae"), capsys.readouterr()
    run(*command)
    assert capsys.readouterr().out.count("vae:") == 1  # only the second half
    last = progress(home / "vae" / WEIGHTS, "vae")
    assert 0 < first["step"] < last["step"] and last["minutes"] >= 0.1 and last["samples"] == 16 * last["step"]
    assert samples(home) and len((home / "captions.txt").read_text("utf-8").splitlines()) > 370
    mean, std = (f(make.Data("cpu", 64).latents(hipa.load(home).vae), dim=(0, 2, 3)) for f in (torch.mean, torch.std))
    assert mean.abs().max() < 0.1 and (std - 1).abs().max() < 0.1


@needs_font
@pytest.mark.slow
@pytest.mark.parametrize("part, network", [("unet", "text_encoder"), ("decoder", "vae")])
def test_training_further(home, capsys, part, network):
    """What is there goes on, with the minutes it has had; what another part trains stays as it is."""
    path = make.weights_file(home / network)
    first = progress(path, part)
    run("--improve", part, first["minutes"] + 0.02)
    last = progress(path, part)
    assert capsys.readouterr().out.count(f"{part}:") == 1  # and not from the beginning
    assert last["minutes"] >= first["minutes"] + 0.02 and last["step"] > first["step"] and samples(home)


@needs_font
@pytest.mark.slow
@pytest.mark.parametrize("part", ["epsilon", "varied"])
def test_a_copy(home, part):
    """Its training is its own. It has real pictures of its own if it is for others; `emoji/` stays as it is."""
    before = {path: path.read_bytes() for path in home.glob("*/*.safetensors")}
    run("--improve", part, 0.02)
    folder, glyphs = home / "build" / part, evaluate.read_glyphs()
    assert progress(folder / "unet" / WEIGHTS, part)["step"] < 10 and samples(folder)
    model = hipa.load(folder)
    assert model.guidance == 2.0 and (model.schedule.prediction_type == "epsilon") == (part == "epsilon")
    ours, theirs = (evaluate.real_pictures(glyphs, path)[0][0] for path in (home, folder))
    assert ours.equal(theirs) == (part == "epsilon")
    assert before == {path: path.read_bytes() for path in home.glob("*/*.safetensors")}


def test_one_timestep_from_each_equally_likely_part():
    parts = torch.sigmoid(0.3 + 1.3 * torch.special.ndtri(torch.arange(9) / 8)) * 1000
    for _ in range(50):
        timesteps = make.draw_timesteps(8, 1000, "cpu")
        assert (parts[:-1].long() <= timesteps).all() and (timesteps <= parts[1:]).all() and timesteps.max() < 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_0_for_what_the_schedule_asks_for(kind):
    """With the true noise, or v, the way back leads to x0; any other prediction costs its distance, squared."""
    schedule = hipa.Schedule("scaled_linear", 0.00085, 0.012, prediction_type=kind)
    x0, noise, timesteps = torch.randn(3, 4, 5, 7), torch.randn(3, 4, 5, 7), torch.tensor([0, 500, 999])
    alpha, sigma = schedule.alpha_sigma(timesteps)
    true, x = noise if kind == "epsilon" else alpha * noise - sigma * x0, schedule.add_noise(x0, timesteps, noise)
    assert torch.allclose(schedule.predict_x0(x, timesteps, true), x0, atol=1e-4)

    def network(noisy, t, context):
        assert noisy.equal(x) and t is timesteps and context == "text"
        return true + 0.5

    assert make.diffusion_loss(network, schedule, x0, "text", timesteps, noise).item() == pytest.approx(0.25)


@pytest.mark.parametrize("what", [("unett", "5"), ("unet", "soon"), ("unet", "-1"), ("decoder", "nan")], ids="-".join)
def test_a_typo_is_told_at_once(what):
    with pytest.raises(hipa.UserError, match="--improve takes one of unet, decoder, epsilon|expected 2 arguments"):
        make.main(["--improve", *what])
