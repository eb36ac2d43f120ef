"""Project C, the baseline: `hipa.edit` at its own strength."""

import hipa


def edit(model, pictures, prompts, eps):
    """The model with its adaptors, pictures (B, 3, H, W), prompts (B strings), noise eps (B, 4, h, w) -> pictures."""
    return hipa.edit(model, pictures, prompts, None, eps=eps)
