"""The peer in `emoji/lcm.py` is what it is said to be: latent consistency distillation, as diffusers has it."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hipa
import lora
import train

EMOJI = Path(hipa.__file__).parent / "emoji"
sys.path.insert(0, str(EMOJI))

import lcm  # noqa: E402
from parity import assert_same  # noqa: E402
from test_devices import Accelerator  # noqa: E402

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def model():
    return hipa.load("emoji")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sampling_equals_diffusers(model, steps):
    """Two pictures with noise of their own, against diffusers' scheduler around the same network, one at a time."""
    from diffusers import LCMScheduler

    prompts, seeds, expected = ["a cat", "a rocket on a blue background"], [3, 4], []
    for prompt, seed in zip(prompts, seeds):
        scheduler = LCMScheduler(**NOISE, prediction_type=model.schedule.prediction_type)
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 4, 16, 16, generator=generator)
        with torch.no_grad():
            context = model.encode_text([prompt])
            for t in scheduler.timesteps:
                x, denoised = scheduler.step(
                    model.unet(x, t.expand(1), context), t, x, generator=generator, return_dict=False
                )
            expected.append(model.vae.decode(denoised))
    with torch.no_grad():
        drawn = lcm.sample_consistency(model, prompts, seeds, steps)
    assert_same(f"consistency sampling, {steps} steps", drawn, torch.cat(expected))


def test_the_teachers_step_equals_diffusers():
    """From the noise, from the middle, and the last one, which ends at timestep 0."""
    from diffusers import DDIMScheduler

    schedule = hipa.Schedule()
    scheduler = DDIMScheduler(**NOISE, set_alpha_to_one=False, clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(1000 // lcm.SKIP)
    start, (x, x0) = torch.tensor([999, 499, 19]), torch.randn(2, 3, 4, 8, 8)
    ours = lcm.ddim(schedule, x, x0, start, (start - lcm.SKIP).clamp(min=0))
    theirs = [scheduler.step(x0[i], start[i], x[i]).prev_sample for i in range(3)]
    assert_same("step of DDIM", ours, torch.stack(theirs))


def test_the_boundary_equals_diffusers():
    from diffusers import LCMScheduler

    timesteps = torch.tensor([0, 1, 19, 499, 999])
    theirs = LCMScheduler(**NOISE).get_scalings_for_boundary_condition_discrete(timesteps)
    assert_same("boundary", torch.stack(lcm.boundary(timesteps)), torch.stack(theirs))


@pytest.fixture
def distillation(model):
    """The loss alone, of a student that is the teacher with adaptors still at zero."""
    student = hipa.load("emoji")
    parameters = lora.add_lora(student.unet, 4, "all")
    self = SimpleNamespace(model=student, student=student, args=SimpleNamespace(seed=0, guidance=2.0), step=0)
    x0 = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def loss():
        return lcm.LatentConsistency.loss_of(self, None, None, x0, ["a cat"] * 6, False)["consistency"]

    return SimpleNamespace(loss=loss, run=self, parameters=parameters)


def test_the_loss_is_that_of_two_points_of_the_teachers_trajectory(distillation, model):
    """Written out once more with diffusers' schedulers, one picture at a time. The adaptors are not at zero."""
    from diffusers import DDIMScheduler, LCMScheduler

    for parameter in distillation.parameters:
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(2))
    self, kind = distillation.run, model.schedule.prediction_type
    generator = train.seeded("consistency", 0, 0)
    starts = 20 * torch.randint(1, 51, (6,), generator=generator) - 1
    noises = torch.randn(6, 4, 16, 16, generator=generator)
    x0 = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    lcm, ddim = (
        LCMScheduler(**NOISE),
        DDIMScheduler(**NOISE, prediction_type=kind, clip_sample=False, set_alpha_to_one=False),
    )
    ddim.set_timesteps(50)
    losses = []
    for t, noise, clean in zip(starts, noises, x0):
        with torch.no_grad():
            x = lcm.add_noise(clean[None], noise[None], t[None])
            states = model.encode_text(["", "a cat"])
            without, with_text = model.unet(torch.cat([x, x]), t.expand(2), states).chunk(2)
            later = ddim.step(without + 2.0 * (with_text - without), t, x).prev_sample

        def f(x, t, states=states[1:]):
            alpha, sigma = lcm.alphas_cumprod[t] ** 0.5, (1 - lcm.alphas_cumprod[t]) ** 0.5
            c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(t)
            v = self.student.unet(x, t.expand(1), states)
            return c_skip * x + c_out * (alpha * x - sigma * v)

        difference = f(x, t) - f(later, (t - 20).clamp(min=0)).detach()
        losses.append(((difference**2 + 0.001**2) ** 0.5 - 0.001).mean())
    ours = distillation.loss()
    assert kind == "v_prediction"
    assert_same("loss, times 100", 100 * ours, 100 * torch.stack(losses).mean(), relative=True)
    gradient, expected = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, distillation.parameters)])
        for loss in (ours, torch.stack(losses).mean())
    )
    # Relative to the largest. Sums over the batch are in another order here: two threads were seen to make it 1.2e-5.
    assert (gradient - expected).abs().max() < 3e-5 * expected.abs().max()


def test_only_the_adaptors_learn(distillation):
    distillation.loss().backward()
    learned = {name for name, p in distillation.run.model.unet.named_parameters() if p.grad is not None}
    assert learned and all(".lora_" in name for name in learned)


def test_everything_is_on_the_models_device():
    """Training and sampling, on a device that is not the CPU."""
    with Accelerator():
        model = hipa.load("emoji", "meta")
        parameters = lora.add_lora(model.unet, 2)
        run = SimpleNamespace(model=model, student=model, args=SimpleNamespace(seed=0, guidance=2.0), step=0)
        x0 = torch.zeros(2, 4, 16, 16, device="meta")
        terms = lcm.LatentConsistency.loss_of(run, x0, None, x0, ["a cat"] * 2, False)
        sum(terms.values()).backward()
        assert all(parameter.grad.is_meta for parameter in parameters)
        with torch.no_grad():
            assert lcm.sample_consistency(model, ["a cat"] * 2, [0, 1], 2).is_meta


def test_the_command_that_trains_it(tmp_path):
    """Two updates, by the same command line as train.py's; its adaptors are read by sample.py."""
    out = tmp_path / "run"
    command = [sys.executable, EMOJI / "lcm.py", "--data", "emoji", "--out", out, "--pairs", "4", "--steps", "2"]
    subprocess.run([*command, "--teacher-steps", "2", "--batch", "4"], check=True, capture_output=True)
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and all(float(row["consistency"]) > 0 for row in rows)
    assert lora.load_lora(out / train.LORA_NAME, hipa.load("emoji").unet)
