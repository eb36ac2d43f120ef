"""Project A, the baseline: adaptors of rank 4, trained in `train.py`'s way, but shorter, and with other weights."""

import torch
import torch.nn.functional as F

import hipa
from lora import add_lora, factors
from losses import HiPALoss
from train import descend, load_distance, schedule_of_lr

PAIRS, STEPS, BATCH = 640, 800, 8


def train(model, prompts):
    """The frozen model, and captions (strings) -> adaptors {module path: (A, B)}."""
    prompts = [prompts[k % len(prompts)] for k in range(PAIRS)]
    noise = hipa.noise(range(10**9, 10**9 + PAIRS), 4, 16, 16)  # seeds that no measuring uses
    parts = [slice(i, i + 16) for i in range(0, PAIRS, 16)]
    x0 = torch.cat([hipa.teacher(model, prompts[part], noise[part], 10, 2.0) for part in parts])

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(add_lora(model.unet, 4, "all"), betas=(0.9, 0.99), weight_decay=0.0)
    loss = HiPALoss(load_distance("dists", hipa.find_checkpoint("emoji")), 1.0, 3.0, 1.0, 0.4)
    for step in range(STEPS):
        rows = torch.randperm(PAIRS)[:BATCH]
        predicted = hipa.student(model, [prompts[k] for k in rows], noise[rows], 999)
        total = 2.0 * F.mse_loss(predicted, x0[rows])
        if step >= STEPS // 2:
            total = total + sum(hipa.adaptation_loss(model, loss, predicted, x0[rows]).values())
        total.backward()
        descend(optimizer, 6e-3 * schedule_of_lr(step, STEPS))
    return factors(model.unet)
