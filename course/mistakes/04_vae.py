"""Wrong and other right answers to exercise 4."""

E, B, D = "vae.AutoencoderKL.encode", "vae.AutoencoderKL.decode", "vae.Downsample.forward"
MEAN, PAD = "self.moments(picture)[0] * self.config.scaling_factor", "F.pad(x, (0, 1, 0, 1))"
BACK = "self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))"
SAMPLE = "(lambda mean, logvar: mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))(*self.moments(picture))"
MISTAKES = [
    {"name": "not scaled", "caught": "mean", "code": {E: [(MEAN, "self.moments(picture)[0]")]},
     "says": "Your latent is not scaled: its variance is not about 1, which the UNet expects."},
    {"name": "divided", "caught": "mean", "code": {E: [(MEAN, MEAN.replace("*", "/"))]},
     "says": "You divide by the scaling factor. That is what decode does; and encode?"},
    {"name": "the variance's logarithm", "caught": "mean", "code": {E: [("[0]", "[1]")]},
     "says": "You return the logarithm of the variance. Which of the two tensors says where the Gaussian lies?"},
    {"name": "a sample", "caught": "mean", "code": {E: [("self.moments(picture)[0]", SAMPLE)]},
     "says": "You add noise, so the same picture has another latent each time. Which number describes a Gaussian best, if only "
             "one may be kept?"},
    {"name": "both moments", "caught": "mean", "code": {E: [("self.moments(picture)[0]", "torch.cat(self.moments(picture), dim=1)")]},
     "says": "Your latent holds mean and log-variance, twice as many channels as the UNet takes."},
    {"name": "not unscaled", "caught": "pictures", "code": {B: [(BACK, "self.decoder(self.post_quant_conv(latent))")]},
     "says": "You do not undo the scaling: encode multiplied by it last, so what comes first here?"},
    {"name": "scaled again", "caught": "pictures", "code": {B: [(BACK, BACK.replace("/", "*"))]},
     "says": "You multiply by the scaling factor once more. What undoes a multiplication?"},
    {"name": "unscaled too late", "caught": "pictures",
     "code": {B: [(BACK, "self.decoder(self.post_quant_conv(latent) / self.config.scaling_factor)")]},
     "says": "You undo the scaling after post_quant_conv, whose bias is then enlarged too. What did encode do LAST?"},
    {"name": "the picture unscaled", "caught": "pictures",
     "code": {B: [(BACK, "self.decoder(self.post_quant_conv(latent)) / self.config.scaling_factor")]},
     "says": "You divide the picture by the scaling factor. Of what is it the scale, of pictures or of latents?"},
    {"name": "one layer left out", "caught": "pictures", "code": {B: [(BACK, "self.decoder(latent / self.config.scaling_factor)")]},
     "says": "post_quant_conv is not used: it was trained together with the decoder."},
    {"name": "picture clamped", "caught": "pictures", "code": {B: [(BACK, f"{BACK}.clamp(-1, 1)")]},
     "says": "You clamp the picture. Which slope has a clamped value, and what then learns from it?"},
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
]  # fmt: skip
RIGHT = [
    {"name": "two lines", "code": {E: """
def encode(self, picture):
    mean, _ = self.moments(picture)
    return self.config.scaling_factor * mean
""", B: """
def decode(self, latent):
    z = self.post_quant_conv(latent / self.config.scaling_factor)
    return self.decoder(z)
"""}},
    {"name": "cat of zeros", "code": {D: """
def forward(self, x):
    x = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    x = torch.cat([x, torch.zeros_like(x[..., :1, :])], -2)
    return self.conv(x)
"""}},
]  # fmt: skip
