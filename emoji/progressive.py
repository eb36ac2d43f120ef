"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512), the abstract's own rival of HiPA.

    python emoji/progressive.py --data emoji --lr 3e-4 --steps 300 --out runs/progressive   # options are train.py's

Students of 16, 8, 4, 2 and 1 steps, one after the other, each with ALL weights of the UNet trained: one of its DDIM
steps must end where two of its teacher's do. The first teacher is the frozen model, with guidance, which its student
learns too (Meng et al. 2022, arXiv 2210.03142). The pictures are the targets that HiPA trains on; noise is new. The
loss is the error of v, "SNR + 1" in the paper; within a stage the rate falls along a line; the students of 2 and 1
steps get twice the updates, as there. Each student is kept as `unet-STEPS.safetensors`; --resume goes on after it.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hipa  # noqa: E402
from hipa import write_file  # noqa: E402
from sample import choose_device, run  # noqa: E402
from train import Pairs, descend, find_prompts, pairs_of_step, parse_args, seeded  # noqa: E402

SHARES = {16: 1, 8: 1, 4: 1, 2: 2, 1: 2}  # {steps of a student: its share of the updates}


def level(schedule, timestep):
    """alpha and sigma, each (B, 1, 1, 1), at timesteps (B,); -1 is the clean picture."""
    clean = (timestep < 0)[:, None, None, None]
    alpha, sigma = schedule.alpha_sigma(timestep.clamp(min=0))
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)


def ddim(schedule, x, x0, start, end):
    """x (B, 4, h, w) at timesteps `end` (B,) from x at `start` and the predicted x0 (Song et al. 2020)."""
    (alpha, sigma), (alpha_end, sigma_end) = level(schedule, start), level(schedule, end)
    return alpha_end * x0 + sigma_end / sigma * (x - alpha * x0)


def target(schedule, teacher, x, start, middle, end):
    """The x0 with which ONE step of DDIM from x at `start` ends where the teacher's two steps do."""
    halfway = ddim(schedule, x, teacher(x, start), start, middle)
    x_end = ddim(schedule, halfway, teacher(halfway, middle), middle, end)
    (alpha, sigma), (alpha_end, sigma_end) = level(schedule, start), level(schedule, end)
    return (x_end - sigma_end / sigma * x) / (alpha_end - sigma_end / sigma * alpha)


def timesteps(schedule, steps):
    return torch.tensor([*schedule.timesteps(steps), -1])


@torch.no_grad()
def sample_ddim(model, prompts, seeds, steps):
    """In the place of `hipa.sample`, by DDIM; without guidance, which was learned."""
    side, times = model.unet.config.sample_size, timesteps(model.schedule, steps).to(model.device)
    x = hipa.noise(seeds, 4, side, side).to(model.device)
    predict_x0 = hipa.predictor(model, prompts)
    for start, end in zip(times, times[1:]):
        start, end = start.expand(len(x)), end.expand(len(x))
        x = ddim(model.schedule, x, predict_x0(x, start), start, end)
    return model.decode(x)


def loss_of(teacher, student, steps, update, prompts, x0, guidance, seed=0):
    """The student's error of v at random places of its `steps` steps; x0 (B, 4, h, w) are pictures' latents."""
    schedule, generator = student.schedule, seeded("progressive", seed, steps, update)
    times = timesteps(schedule, 2 * steps)  # every second one is the student's
    k = 2 * torch.randint(steps, (len(x0),), generator=generator)
    start, middle, end = (times[k + i].to(x0.device) for i in range(3))
    x = schedule.add_noise(x0, start, torch.randn(x0.shape, generator=generator).to(x0.device))
    with torch.no_grad():
        wanted = target(schedule, hipa.predictor(teacher, prompts, guidance), x, start, middle, end)
    error = hipa.predictor(student, prompts)(x, start) - wanted
    return (error / schedule.alpha_sigma(start)[1]).square().mean()  # of x0; over sigma: of v


def main(argv=None):
    args = parse_args(argv)
    folder = hipa.find_checkpoint(args.model)
    teacher, guidance, first = hipa.load(folder, choose_device(args.device)), args.guidance, 0
    pairs = Pairs(args, teacher, find_prompts(args.data), folder)
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "settings.json", json.dumps(vars(args), indent=2, default=str).encode())
    pairs.make()
    for steps, share in SHARES.items():
        updates = max(1, round(args.steps * share / sum(SHARES.values())))
        student = replace(teacher, unet=copy.deepcopy(teacher.unet).requires_grad_(True))
        path = args.out / f"unet-{steps}.safetensors"
        if not path.exists():
            optimizer = torch.optim.Adam(student.unet.parameters(), args.lr, betas=(0.9, 0.99))
            for update in tqdm(range(updates), f"student of {steps} steps", unit="update"):
                some = pairs_of_step(first + update, args)
                batch = pairs.prompts(some), pairs.targets(some)
                loss_of(teacher, student, steps, update, *batch, guidance, args.seed).backward()
                descend(optimizer, args.lr * min(1, (update + 1) / 10) * (1 - update / updates))
            write_file(path, save({key: tensor.half() for key, tensor in student.unet.state_dict().items()}))
        hipa.read_weights(student.unet.requires_grad_(False), path, torch.float32)  # as it was kept
        student.unet.to(student.device)
        teacher, guidance, first = student, 1.0, first + updates
    print(path)


if __name__ == "__main__":
    run(main)
