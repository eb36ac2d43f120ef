"""Wrong and other right answers to exercise 4."""

E, D = "vae.AutoencoderKL.encode", "vae.Downsample.forward"
STD, PAD = "torch.exp(0.5 * logvar)", "F.pad(x, (0, 1, 0, 1))"
DRAW = "torch.randn(latent.shape, generator=generator, dtype=latent.dtype, device=generator.device)"
MISTAKES = [
    {"name": "variance for deviation", "caught": "spread", "code": {E: [(STD, "torch.exp(logvar)")]},
     "says": "You multiply the noise by exp(logvar), the VARIANCE. By what must noise of variance 1 be multiplied to have "
             "the variance v?"},
    {"name": "log-variance as deviation", "caught": "spread", "code": {E: [(STD, "logvar")]},
     "says": "You multiply the noise by a logarithm, which may be negative. What undoes a logarithm?"},
    {"name": "root of the logarithm", "caught": "sample", "code": {E: [(STD, "logvar.abs().sqrt()")]},
     "says": "You take the root of the logarithm. It is the variance whose root is wanted."},
    {"name": "half forgotten the other way", "caught": "sample", "code": {E: [(STD, "torch.exp(2 * logvar)")]},
     "says": "You double the logarithm, which squares the variance. What does HALF a logarithm stand for?"},
    {"name": "always the mean", "caught": "sample", "code": {E: [("    if generator is not None:", "    if False:")]},
     "says": "With a generator yours gives the mean. What is the generator for?"},
    {"name": "not scaled", "caught": "mean", "code": {E: [("return latent * self.config.scaling_factor", "return latent")]},
     "says": "Your latent is not scaled: its variance is not about 1, which the UNet expects."},
    {"name": "divided", "caught": "mean", "code": {E: [("latent * self.config", "latent / self.config")]},
     "says": "You divide by the scaling factor. That is what decode does; and encode?"},
    {"name": "noise not scaled", "caught": "sample",
     "code": {E: [("latent = latent + ", "return latent * self.config.scaling_factor + ")]},
     "says": "You scale the mean and leave the noise as it is. What belongs to the sample?"},
    {"name": "the global generator", "caught": "sample", "code": {E: [(DRAW, "torch.randn_like(latent)")]},
     "says": "Your noise does not come from the generator that was given. Could anybody draw the same latent twice?"},
    {"name": "uniform noise", "caught": "sample", "code": {E: [("torch.randn(", "torch.rand(")]},
     "says": "Your noise is uniform in [0, 1): torch.rand. Which distribution do mean and variance describe here?"},
    {"name": "one noise for the batch", "caught": "sample",
     "code": {E: [(DRAW, DRAW.replace("latent.shape,", "latent.shape[1:],"))]},
     "says": "All pictures of a batch get the same noise in yours. How many numbers does a batch of latents have?"},
    {"name": "padded on all sides", "caught": "sees", "code": {D: [(PAD, "F.pad(x, (1, 1, 1, 1))")]},
     "says": "You pad on all four sides. The shape is right, which makes this the trap of the file; but every cell sees pixels "
             "one further up and left. After two levels, by how many pixels is the picture shifted?"},
    {"name": "padded above and left", "caught": "sees", "code": {D: [(PAD, "F.pad(x, (1, 0, 1, 0))")]},
     "says": "You pad above and on the left. In which order does F.pad count the sides?"},
    {"name": "padded below and left", "caught": "down", "code": {D: [(PAD, "F.pad(x, (1, 0, 0, 1))")]},
     "says": "You pad on the left instead of the right. In which order does F.pad count the sides?"},
    {"name": "padded above and right", "caught": "down", "code": {D: [(PAD, "F.pad(x, (0, 1, 1, 0))")]},
     "says": "You pad above instead of below. In which order does F.pad count the sides?"},
    {"name": "not padded", "caught": "down", "code": {D: [(PAD, "x")]},
     "says": "Without padding a 3x3 kernel with stride 2 fits into 8 pixels three times. How many more pixels does the fourth "
             "cell need?"},
    {"name": "edges repeated", "caught": "down", "code": {D: [(PAD, 'F.pad(x, (0, 1, 0, 1), mode="replicate")')]},
     "says": "You pad by repeating the edge's pixels. With what was Stable Diffusion's VAE trained?"},
    {"name": "root taken twice", "caught": "spread", "code": {E: [(STD, "torch.exp(0.25 * logvar)")]},
     "says": "You take the root twice. The deviation is the root of the variance: what then is the logarithm of the deviation?"},
]  # fmt: skip
RIGHT = [
    {"name": "sqrt of exp", "code": {E: [(STD, "logvar.exp().sqrt()")]}},
    {"name": "early return", "code": {E: """
def encode(self, picture, generator=None):
    mean, logvar = self.moments(picture)
    if generator is None:
        return self.config.scaling_factor * mean
    return self.config.scaling_factor * (mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator))
"""}},
    {"name": "cat of zeros", "code": {D: """
def forward(self, x):
    x = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    x = torch.cat([x, torch.zeros_like(x[..., :1, :])], -2)
    return self.conv(x)
"""}},
]  # fmt: skip
