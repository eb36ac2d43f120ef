"""The embedded model: diffusers samples the same, its prompts cover what a person types, its measures measure."""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import hipa
import sample
from conftest import ROOT, quiet_pipeline, run_sample

EMOJI = ROOT / "emoji"
sys.path.insert(0, str(EMOJI))

import evaluate  # noqa: E402
import make  # noqa: E402

GLYPHS = evaluate.read_glyphs()
needs_font = pytest.mark.skipif(not Path(make.FONT).exists(), reason="apt-get install fonts-noto-color-emoji")


@pytest.fixture(scope="module")
def model():
    return hipa.load("emoji")


@pytest.fixture(scope="module")
def adapted():
    model = hipa.load("emoji")
    sample.apply_lora(model, EMOJI / sample.LORA_NAME)
    return model


@pytest.fixture(scope="module")
def evaluation(model):
    return evaluate.Evaluation(model, per_class=1)


# ---------------------------------------------------------------------------------------------------------- checkpoint
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "adaptors"])
def test_diffusers_samples_the_same(model, adapted, lora):
    """The adaptors of the shipped file are merged here, and beside the layers there. Guidance is the model's own."""
    pipeline = quiet_pipeline(StableDiffusionPipeline, EMOJI)
    if lora:
        pipeline.load_lora_weights(EMOJI)
    for steps, guidance in ((1, 1.0), (5, 2.0)):
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        theirs = pipeline("a cat", generator=torch.Generator().manual_seed(3), **options).images
        ours = hipa.sample(adapted if lora else model, ["a cat"], [3], steps)
        assert (ours.clamp(-1, 1) / 2 + 0.5 - theirs).abs().max() < 1e-5, steps


def test_the_first_command_of_the_readme(tmp_path, monkeypatch, capsys):
    """From another folder, without a network, without options: one step, with the adaptors."""
    monkeypatch.chdir(tmp_path)
    code, [path], _ = run_sample(["a cat"], capsys)
    picture = Image.open(path)
    assert code == 0 and picture.size == (64, 64) and path.startswith("outputs")
    assert "Steps: 1," in picture.text["parameters"] and sample.LORA_NAME in picture.text["parameters"]


def test_every_word_a_person_types_is_known(model):
    """Each is a token of its own, as it was in training; hyphens separate."""
    prompts = ["a cat on a blue background", "a small dog", "a cat and a dog"]
    prompts += [name for _, names in GLYPHS for name in names]
    unknown = [word for prompt in prompts for word, tokens in model.tokenizer.tokenize(prompt) if len(tokens) != 1]
    assert not unknown


def test_the_repository_stays_small():
    files = [path for path in EMOJI.rglob("*") if path.is_file() and "build" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20


# ------------------------------------------------------------------------------------------------------------ measures
def test_frechet_distance():
    """Zero between equal sets; for independent features sum (difference of means)^2 + (difference of deviations)^2."""
    a = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # mean 0, covariance 1, exactly
    shift, scale = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 3.0, 0.5])
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(a, a * scale + shift) == pytest.approx(5 + 4 + 0.25, abs=1e-9)


def test_sharpness_is_asked_of_edges():
    """A blurred disc has less high-frequency energy, at edges too; speckle raises it, but least at edges."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    distance = torch.hypot(x - 31.5, y - 31.5)
    crisp = (distance < 20).float().expand(1, 3, 64, 64) * 2 - 1
    blurred = torch.sigmoid((20 - distance) / 3).expand(1, 3, 64, 64) * 2 - 1
    speckled = blurred + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    (at_edges, everywhere), blur = evaluate.high_frequency_energy(crisp), evaluate.high_frequency_energy(blurred)
    speckle = evaluate.high_frequency_energy(speckled)
    assert blur[0] < 0.1 * at_edges and blur[1] < 0.1 * everywhere
    assert speckle[1] / everywhere > 1.5 * speckle[0] / at_edges


def test_damage_is_seen(evaluation):
    """Real pictures are recognised, by their labels. When they are damaged, the measures that should see it do."""
    real, labels = evaluation.real
    weak, strong = (evaluate.blurred(real, sigma) for sigma in (0.5, 1.5))
    ghost, smear, others = evaluate.doubled(real, 2, 2), evaluate.smeared(real, 20, 20), real.roll(1, 0)
    figures = [evaluation.measure(pictures, labels) for pictures in (real, weak, strong, ghost, smear, others)]
    recognised, distance, edges = zip(*figures)
    assert recognised[0] > 95 and edges[0] > 1 and recognised[5] < 5 and distance[5] == pytest.approx(distance[0])
    assert distance[0] < distance[3] < distance[2] and edges[0] > edges[1] > edges[2]
    masked = evaluate.sharpened(weak, 0.5, 1.0)  # brings back what the blur took
    assert edges[1] < evaluation.measure(masked, labels)[2] < edges[0]
    differences = [evaluation.difference(pictures, real) for pictures in (real, smear, strong, others)]
    assert differences[0] == pytest.approx(0, abs=1e-6) and differences == sorted(differences)


def test_where_a_thing_is():
    """Its middle and its longer side, on any colour; a speck far away does not count. Enlarged, it fills the middle."""
    pictures = torch.full((2, 3, 64, 64), -0.5)
    pictures[0, :, 10:20, 30:50], pictures[1, 1, 40:64, 0:12], pictures[0, :, 60, 3] = 1.0, 0.3, 1.0
    boxes = evaluate.boxes(pictures)
    assert boxes.tolist() == [[40, 15, 20], [6, 52, 24]]
    assert evaluate.background(pictures).flatten().eq(-0.5).all()
    x, y, length = evaluate.boxes(evaluate.enlarged(pictures[:1]))[0]
    assert abs(x - 32) < 1 and abs(y - 32) < 1 and abs(length - 53) < 2


@needs_font
@pytest.mark.parametrize("varied", [False, True])
def test_real_pictures_show_what_their_prompts_say(model, varied):
    """Pairs and small things as the font has them, on white and on colours: all but a few are found, pairs in either
    order, because a varied picture can be mirrored. Not if they are another pair, or as large as things alone."""
    evaluation, rng = evaluate.Evaluation(model, per_class=2), random.Random(3)
    alone, asked, _ = np.split(np.array(evaluation.prompts), 3)
    assert evaluation.alone == list(alone) and not {*asked} & {
        *(EMOJI / "captions.txt").read_text("utf-8").splitlines()
    }

    def drawn(fits, classes):
        scene = next(scene for scene in iter(lambda: make.Scene.sample(rng, varied=varied), None) if fits(scene))
        return sample.to_tensor(dataclasses.replace(scene, classes=classes, mirrored=False).draw())

    pairs = [drawn(lambda scene: len(scene.classes) == 2, pair) for pair in evaluation.pairs.tolist()]
    labels = evaluation.labels.tolist()
    small = [drawn(lambda scene: scene.small, [label]) for label in labels]
    large = [drawn(lambda scene: not scene.small and len(scene.classes) == 1, [label]) for label in labels]
    pairs, small, large = map(torch.stack, (pairs, small, large))
    *_, both, little, spread = evaluation.measure_all(torch.cat([evaluation.real[0], pairs, small]))
    assert both > 95 and little > 95 and 1.5 < spread < 3
    *_, both, _, _ = evaluation.measure_all(torch.cat([evaluation.real[0], pairs.roll(32, 3), small]))
    assert both > 95
    *_, both, little, _ = evaluation.measure_all(torch.cat([evaluation.real[0], pairs.roll(1, 0), large]))
    assert both < 5 and little < 5


@pytest.mark.slow
def test_one_step_is_crisp(model, adapted, evaluation):
    """What the project is about, on a picture of every glyph: plain one step is a blur, with the adaptors it is not."""
    drawn = [evaluate.draw(each, evaluation.alone, 0, 1) for each in (model, adapted)]
    (_, plain_distance, plain_edges), figures = (evaluation.measure(x, evaluation.labels) for x in drawn)
    recognised, distance, edges = figures
    assert recognised > 95 and distance < plain_distance / 2
    assert plain_edges < 0.2 and 0.75 < edges < 1.2


@pytest.mark.slow
def test_halves(evaluation, monkeypatch, capsys):
    """float16 is nearer to float32 than bfloat16 is; the adaptors' row is of other pictures."""
    monkeypatch.setattr(evaluate, "draw", lambda model, *_: hipa.sample(model, ["a cat", "an owl"], [0, 1], 1))
    evaluate.halves(EMOJI, (EMOJI / sample.LORA_NAME, 1.0), evaluation)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[1] for cells in rows] == ["bfloat16", "float16"] * 2
    quality = [float(cells[2].removesuffix(" dB")) for cells in rows]
    assert 40 < quality[0] < quality[1] - 10 and 40 < quality[2] < quality[3] - 10
    assert quality[:2] != quality[2:]


# ---------------------------------------------------------------------------------------------------------- the making
def test_normalised_latents_change_no_picture(model):
    """The scaled latents get mean 0 and variance 1 in each channel; decoded, they give the same pictures."""
    torch.manual_seed(0)
    vae, pictures = make.AutoencoderKL(model.vae.config), torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, (_, logvar) = vae.encode(pictures), vae.moments(pictures)
        copies, mean, std = vae.decode(before), before.mean(dim=(0, 2, 3)), before.std(dim=(0, 2, 3))
        make.normalise_latents(vae, before)
        after = vae.encode(pictures)
        assert torch.allclose(after, (before - mean[:, None, None]) / std[:, None, None], atol=1e-4)
        assert torch.allclose(vae.decode(after), copies, atol=1e-5)
        spread = torch.exp(0.5 * (vae.moments(pictures)[1] - logvar))  # the noise shrinks with the latent
        assert torch.allclose(spread, (1 / std)[:, None, None].expand_as(spread), rtol=1e-3)


def test_the_tokenizer_learns_whole_words():
    tokenizer = make.train_tokenizer(["a cat and a dog"] * 3 + ["a café"], 32)
    assert [len(tokens) for _, tokens in tokenizer.tokenize("a dog and a café")] == [1, 1, 1, 1, 1]
    assert len(tokenizer.tokenize("dogs")[0][1]) > 1  # a word it has not seen falls into pieces


def test_a_scene_and_its_caption_agree():
    rng = random.Random(0)
    for scene in [make.Scene.sample(rng) for _ in range(50)]:
        caption = scene.caption(rng)
        for index in scene.classes:
            assert any(make.without_article(name) in caption for name in GLYPHS[index][1])
        assert scene.background is None or scene.background in caption


@pytest.mark.slow
@pytest.mark.skipif(not Path(make.FONT).exists(), reason="apt-get install fonts-noto-color-emoji")
def test_varied_scenes():
    """Half are mirrored, as whole pictures; what is alone can be anywhere in the frame, and does not leave it."""
    rng = random.Random(0)
    scenes = [make.Scene.sample(rng, varied=True) for _ in range(400)]
    assert 160 < sum(scene.mirrored for scene in scenes) < 240
    alone = [scene for scene in scenes if len(scene.classes) == 1]
    reach = torch.tensor([[x - size / 2, x + size / 2] for scene in alone for x, _, size, _ in scene.places])
    assert 0 <= reach.min() < 1 and 63 < reach.max() <= 64
    scene = make.Scene([0], [(24, 36, 40, 5)], "red")
    mirrored = dataclasses.replace(scene, mirrored=True)
    assert np.array_equal(np.asarray(mirrored.draw()), np.asarray(scene.draw())[:, ::-1])
