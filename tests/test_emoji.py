"""The embedded model: diffusers draws the same, its prompts cover what a person types, its measures measure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import hipa
import sample
from conftest import quiet_pipeline
from vae import to_pil

EMOJI = Path(hipa.__file__).parent / "emoji"
sys.path.insert(0, str(EMOJI))

import evaluate  # noqa: E402
import make  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402

GLYPHS = evaluate.read_glyphs()


@pytest.fixture(scope="module")
def model():
    return hipa.load("emoji")


def adapted():
    model = hipa.load("emoji")
    sample.apply_lora(model, EMOJI / sample.LORA_NAME)
    return model


# ---------------------------------------------------------------------------------------------------------- checkpoint
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "adaptors"])
@pytest.mark.parametrize("steps, guidance", [(1, 7.5), (5, 7.5), (1, 1.0)])
def test_diffusers_draws_the_same(model, lora, steps, guidance):
    """The adaptors of the shipped file are merged here, and beside the layers there."""
    pipeline = quiet_pipeline(StableDiffusionPipeline, EMOJI)
    if lora:
        pipeline.load_lora_weights(EMOJI)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline("a cat", num_inference_steps=steps, generator=generator, guidance_scale=guidance).images[0]
    ours = to_pil(hipa.sample(adapted() if lora else model, ["a cat"], [3], steps, guidance))[0]
    largest = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()
    print(f"emoji, {steps} steps: largest difference {largest} of 255")
    assert largest <= 1


def test_the_first_command_of_the_readme(tmp_path):
    """From another folder, without a network, without options: one step, with the adaptors."""
    command = [sys.executable, EMOJI.parent / "sample.py", "a cat"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    path = tmp_path / done.stdout.strip()
    picture = Image.open(path)
    assert picture.size == (64, 64) and path.parent == tmp_path / "outputs"
    assert "Steps: 1," in picture.text["parameters"] and sample.LORA_NAME in picture.text["parameters"]


@pytest.mark.parametrize(
    "prompt",
    ["cat", "a cat", "a cat face", "a red apple", "a cat on a blue background", "a small dog", "a cat and a dog",
     *(name for _, names in GLYPHS for name in names)],
)  # fmt: skip
def test_every_word_a_person_types_is_known(model, prompt):
    """Each is a token of its own, as it was in training; hyphens separate."""
    for word, tokens in model.tokenizer.tokenize(prompt):
        assert len(tokens) == 1, word


def test_the_repository_stays_small():
    weights = [path for path in EMOJI.rglob("*") if path.is_file() and "build" not in path.parts]
    assert sum(path.stat().st_size for path in weights) <= 32 * 2**20


# ------------------------------------------------------------------------------------------------------------ measures
@pytest.mark.parametrize(
    "prompt, name",
    {
        "a cat": "a cat", "cat": "a cat", "A red apple": "an apple", "a green apple": "a green apple",
        "a cat, sitting": "a cat", "a cat on an orange background": "a cat", "a hedgehog": None,
        "a cat and a dog": None, "a small blue heart on pink": "a blue heart", "": None,
    }.items(),
)  # fmt: skip
def test_the_class_of_a_prompt(prompt, name):
    index = evaluate.class_of(prompt, GLYPHS)
    assert (GLYPHS[index][1][0] if index is not None else None) == name


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


def test_real_pictures_are_recognised(model):
    """The stored ones: one row of twelve for each class, in the order of prompts.txt."""
    evaluation = evaluate.Evaluation(model)
    recognised, distance, edges, _, defective = evaluation.measure(*evaluation.real)
    assert len(evaluation.real[0]) == len(GLYPHS) * evaluate.OTHER_VIEWS
    assert recognised > 95 and edges > 1
    shuffled = evaluation.measure(evaluation.real[0], evaluation.real[1].roll(evaluate.OTHER_VIEWS))
    assert shuffled[0] < 5 and shuffled[1] == pytest.approx(distance)
    assert defective < 5


def test_damage_is_seen(model):
    """Real pictures, damaged: the measures that should see it do, and the critic only what it is for."""
    evaluation = evaluate.Evaluation(model, 1)
    real, labels = evaluation.real
    weak, strong = (evaluate.blurred(real, sigma) for sigma in (0.5, 1.5))
    ghost, smear = evaluate.doubled(real, 2, 2), evaluate.smeared(real, 20, 20)
    others = real.roll(1, 0)
    figures = [evaluation.measure(pictures, labels) for pictures in (real, weak, strong, ghost, smear, others)]
    _, distance, edges, _, defective = zip(*figures)
    assert distance[0] < distance[3] < distance[2] and edges[0] > edges[1] > edges[2]
    assert defective[0] == defective[5] < 10 < defective[1] and defective[2] == defective[3] == 100
    assert defective[4] > 3 * defective[0]
    differences = [evaluation.difference(pictures, real) for pictures in (real, weak, strong, others)]
    assert differences[0] == pytest.approx(0, abs=1e-6) and differences == sorted(differences)
    point = torch.zeros(1, 1, 25, 25)
    point[..., 12, 12] = 1
    seen = evaluate.blurred(point, 1.5)[0, 0]
    variance = (seen.sum(0) * (torch.arange(25) - 12) ** 2).sum()
    assert seen.sum() == pytest.approx(1) and seen.T.allclose(seen) and variance == pytest.approx(1.5**2, rel=0.01)


def test_one_step_is_crisp(model):
    """What the project is about, on one picture of every glyph: plain one step is a blur, with the adaptors it is not,
    and it is nearer to real pictures. The README has the figures over more pictures."""
    evaluation = evaluate.Evaluation(model, 1)
    _, plain_distance, plain_edges, *_ = evaluation.measure(*evaluate.draw(model, evaluation, 1, 1.0, 0, 1))
    recognised, distance, edges, *_ = evaluation.measure(*evaluate.draw(adapted(), evaluation, 1, 1.0, 0, 1))
    print(f"recognised {recognised:.0f} %, distance {distance:.2f} from {plain_distance:.2f}, edges {edges:.2f}")
    assert recognised > 95 and distance < plain_distance / 2
    assert plain_edges < 0.2 and 0.75 < edges < 1.2


def test_every_variant_of_the_table_is_a_command():
    """The table trains with options that train.py has, and for whole updates at any length."""
    for options, updates, _ in [*table.MAIN.values(), *table.MORE.values()]:
        assert train.parse_args(["--data", "emoji", *options]).data == "emoji"
        assert round(0.1 * updates) > 0


@pytest.fixture
def quick_table(monkeypatch):
    """`table.main` with the given options, its trainings tiny and nothing drawn in more than two steps."""
    monkeypatch.setattr(table, "ALIKE", [*table.ALIKE, *"--pairs 4 --teacher-steps 2 --batch 4".split()])
    original = evaluate.draw

    def quick(model, evaluation, steps, *rest, **how):  # 25 take minutes
        return original(model, evaluation, min(steps, 2), *rest, **how)

    monkeypatch.setattr(evaluate, "draw", quick)
    monkeypatch.setattr(table, "draw", quick)
    names = ["**HiPA**", "as the paper trains", "LCM-LoRA"]
    monkeypatch.setattr(table, "MAIN", {name: (*table.MAIN[name][:2], [1]) for name in names})
    monkeypatch.setattr(table, "MORE", {"rank 4": table.MORE["rank 4"]})

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["table.py", "--seeds", "1", "--share", "0.002", *map(str, options)])
        table.main()

    return run


def names_of_rows(output):
    return [line.split("|")[1].strip() for line in output.splitlines()[2:]]


@pytest.mark.slow
def test_the_table(quick_table, monkeypatch, capsys, tmp_path):
    """Two tiny trainings of each row; what is trained is not trained again."""
    quick_table("--out", tmp_path, "--trainings", 2, "--more")
    made = sorted(tmp_path.glob("*/finished"))
    assert names_of_rows(capsys.readouterr().out) == [
        "25 steps", "plain 1 step", "the shipped adaptors, 1 step", "**HiPA**, 1 step, 2 updates",
        "as the paper trains, 1 step, 1 updates", "LCM-LoRA, 1 step, 1 updates", "rank 4, 1 step, 2 updates",
    ]  # fmt: skip
    assert len(made) == 2 + 3 * 2 + 1
    before = [path.stat().st_mtime_ns for path in made]
    monkeypatch.setattr(table, "of_pictures", lambda *_, **__: [[0.0] * 6])
    quick_table("--out", tmp_path, "--trainings", 2, "--more")
    assert [path.stat().st_mtime_ns for path in made] == before


@pytest.mark.slow
def test_a_table_of_a_copy(quick_table, monkeypatch, capsys, tmp_path):
    """Some rows, for another model that is measured beside real pictures of its own."""
    shutil.copytree(table.HERE, tmp_path / "varied", ignore=shutil.ignore_patterns("build", "pytorch_lora_weights*"))
    original, folders = evaluate.real_pictures, []

    def recorded(glyphs, folder):
        folders.append(folder)
        return original(glyphs, folder)

    monkeypatch.setattr(evaluate, "real_pictures", recorded)
    monkeypatch.chdir(tmp_path)
    quick_table("--model", tmp_path / "varied", "--rows", "hipa", "--trainings", 1)
    names = names_of_rows(capsys.readouterr().out)
    assert names == ["25 steps", "plain 1 step", "**HiPA**, 1 step, 2 updates"]
    settings = json.loads((tmp_path / "runs" / "table-varied" / "hipa-0-2" / "settings.json").read_text())
    assert settings["model"] == str(tmp_path / "varied")
    assert not (tmp_path / "runs" / "table-varied" / "targets-of-the-paper-0-1").exists()
    assert folders == [tmp_path / "varied"]


def test_halves(model, monkeypatch, capsys):
    """float16 is nearer to float32 than bfloat16 is; the adaptors' row is of other pictures."""
    drawn = []

    def two(parts, *_):
        drawn.append(hipa.sample(parts, ["a cat", "an owl"], [0, 1], 1, 1.0))
        return drawn[-1], None

    monkeypatch.setattr(evaluate, "draw", two)
    adaptors = {"plain": None, "with adaptors": (EMOJI / sample.LORA_NAME, 1.0)}
    evaluate.halves("emoji", adaptors, evaluate.Evaluation(model, 1))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[1] for cells in rows] == ["bfloat16", "float16"] * 2
    quality = [float(cells[2].removesuffix(" dB")) for cells in rows]
    assert 40 < quality[0] < quality[1] - 10 and 40 < quality[2] < quality[3] - 10
    assert (drawn[0] - drawn[3]).abs().mean() > 0.01


def test_radial_power():
    """A wave of 8 cycles across the picture has its power in bin 8, whichever way it runs."""
    angle = torch.arange(64) * 2 * torch.pi * 8 / 64
    for wave in (angle.cos().expand(64, 64), angle.cos().expand(64, 64).T):
        power = evaluate.radial_power(wave.expand(1, 3, 64, 64))
        assert len(power) == 33 and power.argmax() == 8


# ---------------------------------------------------------------------------------------------------------- the making
def test_normalised_latents_change_no_picture(model):
    """The scaled latents get mean 0 and variance 1 in each channel; decoded, they give the same pictures."""
    torch.manual_seed(0)
    vae, pictures = make.AutoencoderKL(make.VAE), torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, copies = vae.encode(pictures), vae.decode(vae.encode(pictures))
        _, logvar = vae.moments(pictures)
        mean, std = before.mean(dim=(0, 2, 3)), before.std(dim=(0, 2, 3))
        make.normalise_latents(vae, mean, std)
        after = vae.encode(pictures)
        assert torch.allclose(after, (before - mean[:, None, None]) / std[:, None, None], atol=1e-4)
        assert torch.allclose(vae.decode(after), copies, atol=1e-5)
        spread = torch.exp(0.5 * (vae.moments(pictures)[1] - logvar))  # the noise shrinks with the latent
        assert torch.allclose(spread, (1 / std)[:, None, None].expand_as(spread), rtol=1e-3)


def test_the_tokenizer_learns_whole_words():
    tokenizer = make.train_tokenizer(["a cat and a dog"] * 3 + ["a café"])
    assert [len(tokens) for _, tokens in tokenizer.tokenize("a dog and a café")] == [1, 1, 1, 1, 1]
    assert len(tokenizer.tokenize("dogs")[0][1]) > 1  # a word it has not seen falls into pieces


def test_a_scene_and_its_caption_agree():
    rng = make.random.Random(0)
    for _ in range(50):
        scene = make.Scene.sample(rng)
        caption = scene.caption(rng)
        for index in scene.classes:
            assert any(evaluate.without_article(name) in caption for name in GLYPHS[index][1])
        assert scene.background is None or scene.background in caption


def test_varied_scenes():
    """Half are mirrored, as whole pictures; what is alone can be anywhere in the frame, and does not leave it."""
    rng = make.random.Random(0)
    scenes = [make.Scene.sample(rng, varied=True) for _ in range(400)]
    assert 160 < sum(scene.mirrored for scene in scenes) < 240
    alone = [scene for scene in scenes if len(scene.classes) == 1]
    reach = torch.tensor([[x - size / 2, x + size / 2] for scene in alone for x, _, size, _ in scene.places])
    assert 0 <= reach.min() < 1 and 63 < reach.max() <= 64
    scene = make.Scene([0], [(24, 36, 40, 5)], "red")
    mirrored = make.dataclasses.replace(scene, mirrored=True)
    assert np.array_equal(np.asarray(mirrored.draw()), np.asarray(scene.draw())[:, ::-1])


@pytest.mark.parametrize("part", ["epsilon", "varied"])
def test_a_copy_begins_with_the_model(monkeypatch, tmp_path, part):
    """Its training is its own; real pictures of its own are there if it is for others; `emoji/` stays as it is."""
    told = {}

    def times():
        return {path: path.stat().st_mtime_ns for kind in ("png", "safetensors") for path in EMOJI.glob(f"**/*.{kind}")}

    def trained(device, build, tokenizer, vae, latents, ids, minutes, name, start, earlier, out):
        told.update(name=name, earlier=earlier, out=out)

    before = times()
    monkeypatch.setattr(make, "train_unet", trained)
    make.improve(part, "1", "cpu", tmp_path, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), [["a cat"]] * 4)
    folder = tmp_path / ("epsilon" if part == "epsilon" else "")
    assert told == {"name": part, "earlier": {}, "out": folder}
    ours, theirs = evaluate.real_pictures(GLYPHS)[0][0], evaluate.real_pictures(GLYPHS, folder)[0][0]
    assert ours.equal(theirs) == (part == "epsilon")
    assert sample.own_lora(folder, 1) == (None, 0.0) and hipa.load(folder)
    assert times() == before
