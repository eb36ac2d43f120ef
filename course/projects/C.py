"""Project C, the baseline: `hipa.edit` at its own strength."""

import hipa


def edit(model, pictures, prompts, eps):
    """The model with its adaptors, pictures (B, 3, H, W), prompts (B strings), noise eps (B, 4, h, w) -> pictures."""
    return hipa.redraw(model, pictures, eps, prompts, hipa.STRENGTH["editing"])
