"""The sampler is diffusers' DPMSolverMultistepScheduler with "trailing" timesteps, and `hipa.sample` its pipeline.

THE METHOD is the sampler and one evaluation of the same network: teacher, student, and what compares the two.

Errors are printed (`pytest -rP`) and at most 1e-5 of the largest value in the latent or picture.
"""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import hipa
from conftest import SCHEDULE, quiet_pipeline, run_sample
from lora import add_lora, factors
from losses import DISTS, VGG, HiPALoss, VGGConfig
from parity import assert_same, normal

PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------ schedule
def schedule_of(prediction_type="epsilon"):
    return hipa.Schedule(**SCHEDULE, prediction_type=prediction_type)


def test_schedule():
    """The noise is diffusers', and at t = 999 an error in epsilon is 14.61 times as large in x0."""
    schedule = schedule_of()
    assert torch.equal(schedule.alphas_cumprod, DDPMScheduler(**SCHEDULE).alphas_cumprod)
    alpha, sigma = schedule.alpha_sigma(999)
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == sigma.shape == ()
    assert (alpha.item() ** 2, (sigma / alpha).item()) == pytest.approx((0.004660, 14.61), rel=1e-3)


@pytest.mark.parametrize("t", [0, 500, 999, [17, 999]], ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_noise_and_prediction(prediction_type, t):
    """add_noise is diffusers', and from the x it gives and a perfect prediction, predict_x0 gives back x0.

    At one timestep, or at one for each picture.
    """
    schedule, reference = schedule_of(prediction_type), DDPMScheduler(**SCHEDULE)
    x0, epsilon, timesteps = normal(2, 4, 6, 5), normal(2, 4, 6, 5, seed=1), torch.tensor(t).expand(2)
    t = torch.tensor(t) if isinstance(t, list) else t
    x = schedule.add_noise(x0, t, epsilon)
    assert_same(f"noised to {t}", x, reference.add_noise(x0, epsilon, timesteps))
    prediction = epsilon if prediction_type == "epsilon" else reference.get_velocity(x0, epsilon, timesteps)
    assert_same(f"x0, t = {t}", schedule.predict_x0(x, t, prediction), x0)


# -------------------------------------------------------------------------------------------------------------- solver
def diffusers_solver(prediction_type="epsilon"):
    return DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction_type, timestep_spacing="trailing")


def toy_network(x, t):
    """Stands for the UNet: smooth in x and t, and different for each value of the latent."""
    return torch.tanh((0.4 + t / 2000) * x + 0.3 * x.roll(1, -1) + 0.2)


def test_timesteps():
    """From 999, pure noise, down: diffusers' "trailing" spacing. 48, 96 and 112 steps have halves to round."""
    for steps in (*range(1, 61), 96, 112, 144, 1000):
        reference = diffusers_solver()
        reference.set_timesteps(steps)
        assert schedule_of().timesteps(steps) == reference.timesteps.tolist()


@pytest.mark.parametrize("first", [0, 5, 299, 998, 999])
@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_timesteps_from_any_first(first, steps):
    """Down from `first`, evenly, and not to -1, the clean picture; from 999 those of `sample`."""
    timesteps = schedule_of().timesteps(steps, first)
    assert timesteps[0] == first and len(timesteps) == min(steps, first + 1)
    strides = [a - b for a, b in zip(timesteps, [*timesteps[1:], -1])]
    assert min(strides) >= 1 and max(strides) - min(strides) <= 1
    assert first < 999 or timesteps == schedule_of().timesteps(steps)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_solver(steps, prediction_type):
    """Noise ends where diffusers' solver takes it, whatever the network predicts and however many steps there are.

    With one step, that is the closed form: x0 = (x_T - sigma epsilon) / alpha at t = 999, and nothing else.
    """
    schedule, reference = schedule_of(prediction_type), diffusers_solver(prediction_type)
    theirs = start = normal(2, 4, 6, 5)
    ours = hipa.dpm_solver(lambda x, t: schedule.predict_x0(x, t, toy_network(x, t)), start, schedule, steps)
    reference.set_timesteps(steps)
    for t in reference.timesteps:
        theirs = reference.step(toy_network(theirs, t.item()), t, theirs).prev_sample
    assert_same(f"solver, {prediction_type}, {steps} steps", ours, theirs, relative=True)
    if steps == 1:
        assert torch.equal(ours, schedule.predict_x0(start, 999, toy_network(start, 999)))


# ------------------------------------------------------------------------------------------------------------ pipeline
@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return quiet_pipeline(StableDiffusionPipeline, checkpoint)


def run_pipeline(pipeline, prompts, seeds, steps, guidance, negative="", size=(32, 32), output="latent"):
    """diffusers' pictures: PIL ones, or with "latent" (B, 3, H, W) in about [-1, 1], not clamped as its own are."""
    width, height = size
    made = pipeline(
        prompts, height, width, steps, guidance_scale=guidance, negative_prompt=[negative] * len(prompts),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type=output,
    ).images  # fmt: skip
    return pipeline.vae.decode(made / pipeline.vae.config.scaling_factor).sample if output == "latent" else made


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (1, 7.5), (3, 1.0), (12, 7.5)])
def test_sample(model, pipeline, steps, guidance):
    """From prompts and seeds to pictures, a batch of two, with guidance and without. `progress` hears of every step."""
    prompts, seeds, calls = ["a cat and a dog", ""], [3, 2**40], []
    given = {} if guidance == (1.0 if steps == 1 else 7.5) else {"guidance": guidance}  # the default need not be given
    ours = hipa.sample(model, prompts, seeds, steps, **given, progress=lambda: calls.append(1))
    theirs = run_pipeline(pipeline, prompts, seeds, steps, guidance)
    assert_same(f"sample, {steps} steps, guidance {guidance}", ours, theirs, relative=True)
    assert len(calls) == steps


def test_sample_with_a_negative_prompt_and_a_size(model, pipeline):
    """40 x 24 pixels are a latent of 10 x 6: levels of 5 x 3 and 3 x 2, which do not double evenly."""
    settings = {"steps": 3, "guidance": 5.0, "negative": "a red dog", "size": (40, 24)}
    ours = hipa.sample(model, ["a cat", "a dog"], [0, 1], **settings)
    assert ours.shape == (2, 3, 24, 40)
    assert_same("sample 40x24", ours, run_pipeline(pipeline, ["a cat", "a dog"], [0, 1], **settings), relative=True)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_does_not_depend_on_its_batch(model, guidance):
    """The same prompt and seed give the same picture alone and among others.

    But for rounding, which differs with the batch's size, and which guidance of 7.5 would enlarge about 14 times.
    """
    together = hipa.sample(model, ["a cat", "a dog", "the end"], [7, 8, 9], 3, guidance)
    assert_same("alone", hipa.sample(model, ["a dog"], [8], 3, guidance), together[1:2])


@pytest.mark.parametrize("steps", [1, 6])
def test_command_line(checkpoint, pipeline, steps, tmp_path, capsys):
    """`sample.py` writes the pipeline's pictures, from seeds 0 and 1, each byte within 1, and both in a grid."""
    argv = ["a cat", "--model", checkpoint, "--out", tmp_path, "--device", "cpu", "--steps", steps, "-n", 2]
    code, paths, err = run_sample(argv, capsys)
    assert code == 0, err
    *paths, grid = paths
    theirs = run_pipeline(pipeline, ["a cat"] * 2, [0, 1], steps, 1.0 if steps == 1 else 7.5, output="pil")
    ours = [np.asarray(Image.open(path), dtype=int) for path in paths]
    assert len(ours) == 2
    error = max(np.abs(a - np.asarray(b, dtype=int)).max() for a, b in zip(ours, theirs))
    print(f"command line, {steps} steps: largest error {error} of 255")
    assert error <= 1
    assert np.array_equal(np.asarray(Image.open(grid)), np.concatenate(ours, axis=1))


@pytest.mark.parametrize("form", ["transformers 5", "added_tokens.json"])
def test_sample_with_learned_tokens(checkpoint, tmp_path, form):
    """A checkpoint that was taught "<toy>", in three vectors, and "<hat>": the pictures are diffusers'."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    text_encoder, first = CLIPTextModel.from_pretrained(tmp_path / "text_encoder"), len(tokenizer)
    learned = ["<toy>", "<toy>_1", "<hat>", "<toy>_2"]
    text_encoder.resize_token_embeddings(first + len(learned), mean_resizing=False)
    text_encoder.get_input_embeddings().weight.data[first:] = normal(len(learned), text_encoder.config.hidden_size)
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    if form == "transformers 5":
        tokenizer.add_tokens(learned)
        shutil.rmtree(tmp_path / "tokenizer")
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    else:
        (tmp_path / "tokenizer" / form).write_text(json.dumps({token: first + k for k, token in enumerate(learned)}))
    model, pipeline = hipa.load(tmp_path), quiet_pipeline(StableDiffusionPipeline, tmp_path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    prompts = ["a cat with a <hat>", "<toy> and a <Hat>"]
    ids = model.tokenizer(prompts)
    assert {first, first + 1, first + 3} <= set(ids[1].tolist()) and first + 2 in ids[0] and first + 2 in ids[1]
    ours, theirs = hipa.sample(model, prompts, [0, 1], 2), run_pipeline(pipeline, prompts, [0, 1], 2, 7.5)
    assert_same("sample with learned tokens", ours, theirs, relative=True)


# -------------------------------------------------------------------------------------------------------- as a library
def test_nothing_is_changed_silently(model):
    """A prompt in place of a list of them, and sides that the model cannot have."""
    with pytest.raises(AssertionError, match="list of strings"):
        hipa.sample(model, "a cat", [0])
    for size in ((66, 64), (64, 66)):
        with pytest.raises(AssertionError, match="multiples of 4"):
            hipa.sample(model, ["a cat"], [0], 1, size=size)
        with pytest.raises(AssertionError, match="no whole latents"):
            hipa.edit(model, torch.zeros(1, 3, *size), ["a cat"], [0])


def test_another_default_dtype(checkpoint, model):
    """The noise and the schedule do not depend on it, so the picture does not."""
    expected = hipa.sample(model, ["a cat"], [0], 2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(hipa.sample(hipa.load(checkpoint), ["a cat"], [0], 2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_can_be_pickled(model):
    """multiprocessing sends it to other processes."""
    again = pickle.loads(pickle.dumps(model))
    ours, theirs = (hipa.sample(m, ["a cat"], [0], 1) for m in (again, model))
    assert_same("unpickled", ours, theirs)  # tensors lie elsewhere in memory, so sums may round otherwise


# ---------------------------------------------------------------------------------------------------------- the method
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def adapted(model):
    """A copy of the model, with adaptors as if trained."""
    model = copy.copy(model)
    model.unet = copy.deepcopy(model.unet)
    add_lora(model.unet, 4)
    for seed, (_, B) in enumerate(factors(model.unet).values()):
        B.data = 0.2 * normal(*B.shape, seed=seed)
    return model


def test_teacher(model, adapted):
    """The frozen model's sampler: the adaptors are neither seen nor changed, and there is no gradient."""
    x_T = normal(2, 4, 8, 8).requires_grad_()
    with torch.enable_grad():
        target = hipa.teacher(adapted, PROMPTS, x_T, 3, 5.0)
        pictures = hipa.sample(model, PROMPTS, [0, 1], 3, 5.0)
        same = hipa.teacher(adapted, PROMPTS, hipa.noise([0, 1], 4, 8, 8), 3, 5.0)
    assert not target.requires_grad and torch.equal(model.decode(same), pictures)
    assert torch.equal(target, hipa.teacher(model, PROMPTS, x_T, 3, 5.0))
    assert not torch.equal(target, hipa.dpm_solver(hipa.predictor(adapted, PROMPTS, 5.0), x_T, model.schedule, 3))


@pytest.mark.parametrize("timestep", [999, [999, 300]], ids=str)
def test_student(adapted, timestep):
    """One evaluation of the adapted network, by the closed form; the gradient goes to the adaptors, and only there."""
    x, t = normal(2, 4, 8, 8), torch.tensor(timestep).expand(2)
    with torch.enable_grad():
        predicted = hipa.student(adapted, PROMPTS, x, t if isinstance(timestep, list) else timestep)
        predicted.square().mean().backward()
    prediction = adapted.unet(x, t, adapted.encode_text(PROMPTS))
    alphas_cumprod = adapted.schedule.alphas_cumprod[t][:, None, None, None]
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    v = adapted.schedule.prediction_type == "v_prediction"
    expected = alpha * x - sigma * prediction if v else (x - sigma * prediction) / alpha
    assert_same(f"student, t = {timestep}", predicted.detach(), expected, relative=True)
    for name, parameter in adapted.unet.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("lora_" in name), name
    for network in (adapted.text_encoder, adapted.vae):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_adaptation_loss(adapted):
    """HiPALoss of the decoded pictures; the gradient goes into the student's latent, and not into the target."""
    torch.manual_seed(0)
    loss = HiPALoss(DISTS(VGG(VGGConfig(channels=(6, 8), convs=(1, 2)))), energy=0.1)
    predicted, target = (normal(2, 4, 8, 8, seed=seed).requires_grad_() for seed in (0, 1))
    with torch.enable_grad():
        terms = hipa.adaptation_loss(adapted, loss, predicted, target)
        sum(terms.values()).backward()
    expected = loss(adapted.vae.decode(predicted), adapted.vae.decode(target))
    assert list(terms) == list(expected) == ["spatial", "fourier", "sobel", "energy"]
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    assert predicted.grad.abs().max() > 0 and target.grad is None
    picture, wanted = hipa.adaptation_loss(adapted, lambda *pictures: pictures, predicted, target)
    assert torch.equal(picture, adapted.decode(predicted)) and torch.equal(wanted, adapted.decode(target))
