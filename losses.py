"""VGG features: what a perceptual distance between two pictures looks at.

The class has torchvision's layout, so the official VGG16 weights load by name; a small feature net for small pictures
is the same class with other sizes.
"""

from dataclasses import dataclass

from torch import nn


@dataclass
class VGGConfig:
    """Widths and numbers of convolutions of the five stages; the defaults are VGG16's (Simonyan & Zisserman 2015)."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)


class VGG(nn.Module):
    """The convolutional part of VGG; keys are torchvision's `features.<index>.weight`."""

    def __init__(self, cfg=None):
        super().__init__()
        self.config = cfg = cfg or VGGConfig()
        layers, before = [], 3
        for stage, (width, count) in enumerate(zip(cfg.channels, cfg.convs, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        """Pictures (B, 3, H, W) -> the last feature map of each stage, [(B, C_i, H / 2^i, W / 2^i)]."""
        stages = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(x)
            x = layer(x)
        return [*stages, x]
