"""The sampler is diffusers' DPMSolverMultistepScheduler with "trailing" timesteps, and `hipa.sample` its pipeline.

Errors are printed (`pytest -rP`) and at most 1e-5 of the largest value in the latent or picture.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import hipa
from conftest import ROOT, SCHEDULE, quiet_pipeline
from parity import assert_same, normal

PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------ schedule
def test_schedule():
    """The noise is diffusers', and at t = 999 an error in epsilon grows 14.65 times in x0."""
    schedule = hipa.Schedule()
    assert torch.equal(schedule.alphas_cumprod, DDPMScheduler(**SCHEDULE).alphas_cumprod)
    alpha, sigma = schedule.alpha_sigma(999)
    assert schedule.alphas_cumprod[999].item() == pytest.approx(0.004660, abs=5e-7)
    assert (1 / alpha, sigma) == pytest.approx((14.65, 0.99767), abs=5e-3)
    assert schedule.alpha_sigma(-1) == (1, 0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_x0_from_the_prediction(prediction_type, t):
    """A network that predicts perfectly gives back the x0 that diffusers' add_noise and get_velocity started from."""
    reference, x0, epsilon, when = (
        DDPMScheduler(**SCHEDULE),
        normal(2, 4, 6, 5),
        normal(2, 4, 6, 5, seed=1),
        torch.tensor([t]),
    )
    x = reference.add_noise(x0, epsilon, when)
    prediction = epsilon if prediction_type == "epsilon" else reference.get_velocity(x0, epsilon, when)
    assert_same(f"x0, t = {t}", hipa.Schedule(prediction_type=prediction_type).predict_x0(x, t, prediction), x0)


# -------------------------------------------------------------------------------------------------------------- solver
def diffusers_solver(prediction_type="epsilon"):
    return DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction_type, timestep_spacing="trailing")


def toy_network(x, t):
    """Stands for the UNet: smooth in x and t, and different for each value of the latent."""
    return torch.tanh((0.4 + t / 2000) * x + 0.3 * x.roll(1, -1) + 0.2)


@pytest.mark.parametrize("steps", [*range(1, 61), 96, 112, 144, 1000])  # 48, 96, 112: halves to round
def test_timesteps(steps):
    """From 999, pure noise, down: diffusers' "trailing" spacing."""
    reference = diffusers_solver()
    reference.set_timesteps(steps)
    assert hipa.Schedule().timesteps(steps) == reference.timesteps.tolist()
    assert reference.timesteps[0] == 999


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50])
def test_solver(steps, prediction_type):
    """Noise ends where diffusers' solver takes it, whatever the network predicts and however many steps there are."""
    schedule, reference = hipa.Schedule(prediction_type=prediction_type), diffusers_solver(prediction_type)
    start, calls = normal(2, 4, 6, 5), []
    ours = hipa.dpm_solver(
        lambda x, t: schedule.predict_x0(x, t, toy_network(x, t)), start, schedule, steps, lambda: calls.append(1)
    )
    theirs = start
    reference.set_timesteps(steps)
    for t in reference.timesteps:
        theirs = reference.step(toy_network(theirs, t.item()), t, theirs).prev_sample
    assert_same(f"solver, {prediction_type}, {steps} steps", ours, theirs, relative=True)
    assert len(calls) == steps  # progress is told of every step


def test_one_step_is_the_closed_form():
    """With one step the solver is x0 = (x_T - sigma epsilon) / alpha at t = 999, and nothing else."""
    schedule, x = hipa.Schedule(), normal(2, 4, 6, 5)
    (alpha, sigma), epsilon = schedule.alpha_sigma(999), toy_network(x, 999)
    x0 = hipa.dpm_solver(lambda x, t: schedule.predict_x0(x, t, toy_network(x, t)), x, schedule, 1)
    assert_same("one step", x0, (x - sigma * epsilon) / alpha, relative=True)


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


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_sample(model, pipeline, steps, guidance):
    """From prompts and seeds to pictures, a batch of two, with guidance and without."""
    prompts, seeds = ["a cat and a dog", ""], [3, 2**40]
    ours = hipa.sample(model, prompts, seeds, steps, guidance)
    assert_same(
        f"sample, {model.schedule.prediction_type}, {steps} steps, guidance {guidance}",
        ours,
        run_pipeline(pipeline, prompts, seeds, steps, guidance),
        relative=True,
    )


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


@pytest.mark.parametrize("steps", [1, 25])
def test_command_line(checkpoint, pipeline, steps, tmp_path):
    """`sample.py` writes the pipeline's pictures, from seeds 0 and 1, each byte within 1, and both in a grid."""
    command = [sys.executable, ROOT / "sample.py", "a cat", "--model", checkpoint, "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run([*command, "--steps", str(steps), "-n", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *paths, grid = done.stdout.splitlines()
    theirs = run_pipeline(pipeline, ["a cat"] * 2, [0, 1], steps, 1.0 if steps == 1 else 7.5, output="pil")
    ours = [np.asarray(Image.open(path), dtype=int) for path in paths]
    assert len(ours) == 2
    error = max(np.abs(a - np.asarray(b, dtype=int)).max() for a, b in zip(ours, theirs))
    print(f"command line, {steps} steps: largest error {error} of 255")
    assert error <= 1
    assert np.array_equal(np.asarray(Image.open(grid)), np.concatenate(ours, axis=1))
