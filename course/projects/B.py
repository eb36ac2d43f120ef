"""Project B, the baseline: four steps of the project's own solver, without guidance."""

import hipa


def sample(model, prompts, x):
    """The frozen model, prompts (B strings), noise x (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1]."""
    return model.decode(hipa.dpm_solver(hipa.predictor(model, prompts), x, model.schedule, 4))
