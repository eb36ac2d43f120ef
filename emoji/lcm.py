"""Latent consistency distillation (LCM-LoRA), HiPA's peer in `table.py`: the same targets and adaptors, another loss.

    python emoji/lcm.py --data emoji --lr 2e-4 --out runs/lcm      # the options are train.py's

A consistency model maps every point of a trajectory from noise to picture to its end (Song et al. 2023). Distilled
from a guided diffusion model of latents: Luo et al. 2023, arXiv 2310.04378; as adaptors: arXiv 2311.05556. Constants as
in their code and diffusers' `LCMScheduler`.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from lora import lora_off  # noqa: E402
from sample import run  # noqa: E402
from train import Run, main, seeded  # noqa: E402

SKIP = 20  # timesteps between the two points of a trajectory that must agree: one step of DDIM with 50 steps
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER = 0.001


def boundary(timestep):
    """c_skip and c_out: f(x, t) = c_skip x + c_out x0(x, t), so that f is the identity at t = 0."""
    scaled = TIMESTEP_SCALING * timestep
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5


def consistency(predict_x0, x, timesteps):
    """f(x (B, 4, h, w), timesteps (B,)): the end of the trajectory through x."""
    c_skip, c_out = (c[:, None, None, None] for c in boundary(timesteps))
    return c_skip * x + c_out * predict_x0(x, timesteps)


def ddim(schedule, x, x0, start, end):
    """x at the timesteps `end` of x at `start` and the predicted x0: the same noise, less of it (Song et al. 2020)."""
    alpha, sigma = schedule.alpha_sigma(start)
    return schedule.add_noise(x0, end, (x - alpha * x0) / sigma)


class LatentConsistency(Run):
    """`train.Run` with the loss of latent consistency distillation. The pictures are the same targets; noise is new."""

    def loss_of(self, x, timesteps, x0, prompts, head_start):
        schedule, generator = self.model.schedule, seeded("consistency", self.args.seed, self.step)
        start = SKIP * torch.randint(1, schedule.num_train_timesteps // SKIP + 1, (len(x0),), generator=generator) - 1
        start = start.to(x0.device)
        end = (start - SKIP).clamp(min=0)
        student = hipa.predictor(self.student, prompts)
        x_start = schedule.add_noise(x0, start, torch.randn(x0.shape, generator=generator).to(x0.device))
        with torch.no_grad():
            with lora_off(self.model.unet):  # one guided step of DDIM by the teacher
                teacher_x0 = hipa.predictor(self.model, prompts, self.args.guidance)(x_start, start)
            target = consistency(student, ddim(schedule, x_start, teacher_x0, start, end), end)
        error = consistency(student, x_start, start) - target
        return {"consistency": ((error.square() + HUBER**2).sqrt() - HUBER).mean()}


def sample_consistency(model, prompts, seeds, steps, guidance=1.0):
    """Multistep consistency sampling: f's picture, noised again to the next timestep, and so on. `guidance` was learned
    and is not used."""
    side = model.unet.config.sample_size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise():
        return torch.cat([torch.randn(1, 4, side, side, generator=g) for g in generators]).to(model.device)

    predict_x0 = hipa.predictor(model, prompts)
    places = range(model.schedule.num_train_timesteps // SKIP, 0, -1)
    timesteps = [SKIP * places[k * len(places) // steps] - 1 for k in range(steps)]
    x = noise()
    for k, t in enumerate(timesteps):
        x = consistency(predict_x0, x, torch.full((len(x),), t, device=x.device))
        if k + 1 < steps:
            x = model.schedule.add_noise(x, timesteps[k + 1], noise())
    return model.decode(x)


if __name__ == "__main__":
    run(main, LatentConsistency)
