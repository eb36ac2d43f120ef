"""Wrong and other right answers to exercise 4."""

E, B, D = "vae.AutoencoderKL.encode", "vae.AutoencoderKL.decode", "vae.Downsample.forward"
MEAN, PAD = "self.moments(picture)[0] * self.config.scaling_factor", "F.pad(x, (0, 1, 0, 1))"
BACK = "self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))"
SAMPLE = "(lambda mean, logvar: mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))(*self.moments(picture))"
MISTAKES = [
    {"name": "a sample", "caught": "mean", "code": {E: [("self.moments(picture)[0]", SAMPLE)]},
     "says": "You add noise, so the same picture has another latent each time. Which number describes a Gaussian best, if only one may be kept?"},
    {"name": "both moments", "caught": "mean", "code": {E: [("self.moments(picture)[0]", "torch.cat(self.moments(picture), dim=1)")]},
     "says": "Your latent holds mean and log-variance, twice as many channels as the UNet takes."},
    {"name": "unscaled too late", "caught": "pictures", "code": {B: [(BACK, "self.decoder(self.post_quant_conv(latent) / self.config.scaling_factor)")]},
     "says": "You undo the scaling after post_quant_conv, whose bias is then enlarged too. What did encode do LAST?"},
    {"name": "the picture unscaled", "caught": "pictures", "code": {B: [(BACK, "self.decoder(self.post_quant_conv(latent)) / self.config.scaling_factor")]},
     "says": "You divide the picture by the scaling factor. Of what is it the scale, of pictures or of latents?"},
    {"name": "picture clamped", "caught": "pictures", "code": {B: [(BACK, f"{BACK}.clamp(-1, 1)")]},
     "says": "You clamp the picture. Which slope has a clamped value, and what then learns from it?"},
    {"name": "padded on all sides", "caught": "sees", "code": {D: [(PAD, "F.pad(x, (1, 1, 1, 1))")]},
     "says": "You pad on all four sides: each cell sees pixels one further up and left. After two levels, how far is the picture shifted?"},
    {"name": "padded above and left", "caught": "sees", "code": {D: [(PAD, "F.pad(x, (1, 0, 1, 0))")]},
     "says": "You pad above and on the left. In which order does F.pad count the sides?"},
    {"name": "padded below and left", "caught": "down", "code": {D: [(PAD, "F.pad(x, (1, 0, 0, 1))")]},
     "says": "You pad on the left instead of the right. In which order does F.pad count the sides?"},
    {"name": "padded above and right", "caught": "down", "code": {D: [(PAD, "F.pad(x, (0, 1, 1, 0))")]},
     "says": "You pad above instead of below. In which order does F.pad count the sides?"},
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
EQUIVALENT = {
    "latent = latent": "only the order in memory is another",
}
