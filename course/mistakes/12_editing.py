"""Wrong and other right answers to exercise 12."""

R, P = "hipa.edit", "hipa.inpaint"
T = "round(strength * (model.schedule.num_train_timesteps - 1))"
NOISED = "model.schedule.add_noise(latent, first, eps.to(model.device))"
POOL = "F.max_pool2d(mask, model.vae.config.downscale)"
NOISE = "noise(seeds, *latent.shape[1:]) if eps is None else eps"
WHERE = "torch.where(mask > 0, painted + fill(pictures - painted, mask), pictures)"
MISTAKES = [
    {"name": "strength upside down", "caught": "strength", "code": {R: [(T, T.replace("strength *", "(1 - strength) *"))]},
     "says": "Strength is upside down in yours. How much of the picture is left at strength 1?"},
    {"name": "thousand timesteps", "caught": "one_step", "code": {R: [(T, "round(strength * model.schedule.num_train_timesteps)")]},
     "says": "At strength 1 you ask for timestep 1000. Which is the last one there is?"},
    {"name": "999 for any schedule", "caught": "strength", "code": {R: [(T, "round(strength * 999)")]},
     "says": "You count on 1000 timesteps. Which number of them has the model's own schedule?"},
    {"name": "rounded down", "caught": "strength", "code": {R: [(T, T.replace("round", "int"))]},
     "says": "Your timesteps come out one too small: you cut them off instead of rounding. Which whole number is nearest to 99.9?"},
    {"name": "denoised from 999", "caught": "one_step", "code": {R: [("denoise(model, prompts, x, first,", "denoise(model, prompts, x, None,")]},
     "says": "You noise to one timestep and tell denoise another: it believes that x is pure noise."},
    {"name": "noise only", "caught": "one_step", "code": {R: [(NOISED, "eps.to(model.device)")]},
     "says": "You begin with the noise alone. How could anything of the picture be kept?"},
    {"name": "new noise", "caught": "one_step", "code": {R: [(NOISE, "torch.randn(latent.shape)")]},
     "says": "Your noise comes neither from `eps` nor from the seeds: the same seed gives another picture each time."},
    {"name": "one seed for all", "caught": "one_step", "code": {R: [("noise(seeds,", "noise(seeds[:1] * len(pictures),")]},
     "says": "Every picture gets the first picture's noise. What has `noise` one of for each seed?"},
    {"name": "mask upside down", "caught": "masked", "code": {R: [(POOL, f"1 - {POOL}")]},
     "says": "The mask is upside down: in yours the hole stays and its surroundings are made anew."},
    {"name": "one hole for all", "caught": "masked", "code": {R: [(POOL, POOL.replace("mask,", "mask[:1],"))]},
     "says": "Every picture gets the first picture's hole. The mask (B, 1, H, W) has one for each."},
    {"name": "mean of the mask", "caught": "masked", "code": {R: [("F.max_pool2d(mask", "F.avg_pool2d(mask")]},
     "says": "A cell that the hole touches is kept in part in yours. What of the old picture then shines through?"},
    {"name": "smallest hole", "caught": "masked", "code": {R: [(POOL, "-F.max_pool2d(-mask, model.vae.config.downscale)")]},
     "says": "Only cells that lie in the hole altogether are made anew in yours. What happens at its rim?"},
    {"name": "corner of each cell", "caught": "masked", "code": {R: [(POOL, "mask[..., :: model.vae.config.downscale, :: model.vae.config.downscale]")]},
     "says": "You look at one pixel of each cell. What if the hole covers the others?"},
    {"name": "noised latents put back", "caught": "masked", "code": {R: [("else (latent, F", "else (x, F")]},
     "says": "You keep the NOISY latents. What should be seen outside of the hole in the end?"},
    {"name": "painted everywhere", "caught": "outside", "code": {P: [(WHERE, "painted + fill(pictures - painted, mask)")]},
     "says": "Outside of the hole your pixels have gone through the VAE. Whose pixels belong there?"},
    {"name": "hole grey", "caught": "inside", "code": {P: [("fill(pictures, mask), prompts", "pictures * (1 - mask), prompts")]},
     "says": "You set the hole to 0, a grey that shows at strength 0.9. By what does `fill` replace it?"},
    {"name": "seam", "caught": "inside", "code": {P: [("painted + fill(pictures - painted, mask)", "painted")]},
     "says": "There is a seam at the rim: what is painted does not quite meet what stays. How far is it off there, and how could that be carried on into the hole?"},
    {"name": "no mask inside", "caught": "inside", "code": {P: [("strength, mask, **options", "strength, **options")]},
     "says": "edit is not told of the mask, so the surroundings change while the hole is painted, and do not fit it."},
]  # fmt: skip
RIGHT = [
    {"name": "where", "code": {R: """
def edit(model, pictures, prompts, seeds, strength=0.7, mask=None, eps=None, **options):
    t = int(strength * (model.schedule.num_train_timesteps - 1) + 0.5)
    z = model.encode(pictures)
    a, s = model.schedule.alpha_sigma(t)
    if eps is None:
        eps = noise(seeds, z.shape[1], z.shape[2], z.shape[3])
    if mask is not None:
        touched = F.avg_pool2d(mask, model.vae.config.downscale).to(model.device) > 0
        options = {**options, "keep": (z, touched.float())}
    return denoise(model, prompts, a * z + s * eps.to(z.device), first=t, **options).to(pictures.device)
""", P: """
def inpaint(model, pictures, mask, prompts, seeds, strength=0.9, **options):
    painted = edit(model, fill(pictures, mask), prompts, seeds, strength, mask=mask, **options)
    painted = painted + fill(pictures - painted, mask)
    return pictures * (1 - mask) + painted * mask
"""}},
]  # fmt: skip
EQUIVALENT = {
    "eps = to_cpu(noise(seeds, *latent.shape[1:]) if eps is None else eps)": "the next line moves it",
}
