"""Wrong and other right answers to exercise 12."""

R, P = "hipa.redraw", "hipa.inpaint"
T = "round(strength * (model.schedule.num_train_timesteps - 1))"
NOISED = "model.schedule.add_noise(latent, first, eps.to(model.device))"
POOL = "F.max_pool2d(mask, model.vae.config.downscale)"
WHERE = "torch.where(mask > 0, drawn + fill(pictures - drawn, mask), pictures)"
MISTAKES = [
    {"name": "strength upside down", "caught": "strength", "code": {R: [(T, T.replace("strength *", "(1 - strength) *"))]},
     "says": "Strength is upside down in yours. How much of the picture is left at strength 1?"},
    {"name": "thousand timesteps", "caught": "one_step", "code": {R: [(T, "round(strength * model.schedule.num_train_timesteps)")]},
     "says": "At strength 1 you ask for timestep 1000. Which is the last one there is?"},
    {"name": "rounded down", "caught": "strength", "code": {R: [(T, T.replace("round", "int"))]},
     "says": "Your timesteps come out one too small: you cut them off instead of rounding. Which whole number is nearest to 99.9?"},
    {"name": "drawn from 999", "caught": "one_step", "code": {R: [("generate(model, prompts, x, first,", "generate(model, prompts, x, None,")]},
     "says": "You noise to one timestep and tell generate another: it believes that x is pure noise."},
    {"name": "not noised", "caught": "one_step", "code": {R: [(NOISED, "latent")]},
     "says": "Your latent is not noised. The network will look for noise that is not there: what does it take for noise?"},
    {"name": "noise only", "caught": "one_step", "code": {R: [(NOISED, "eps.to(model.device)")]},
     "says": "You begin with the noise alone. How could anything of the picture be kept?"},
    {"name": "new noise", "caught": "one_step", "code": {R: [("eps.to(model.device)", "torch.randn_like(eps)")]},
     "says": "You draw new noise instead of using `eps`: the same seed gives another picture each time."},
    {"name": "options dropped", "caught": "several", "code": {R: [("x, first, **options)", "x, first)")]},
     "says": "The options (steps, guidance) do not reach generate."},
    {"name": "mask upside down", "caught": "masked", "code": {R: [("torch.lerp(latent, x0, hole)", "torch.lerp(x0, latent, hole)")]},
     "says": "The mask is upside down: in yours the hole stays and its surroundings are drawn."},
    {"name": "mean of the mask", "caught": "masked", "code": {R: [("F.max_pool2d(mask", "F.avg_pool2d(mask")]},
     "says": "A cell that the hole touches is kept in part in yours. What of the old picture then shines through?"},
    {"name": "smallest hole", "caught": "masked", "code": {R: [(POOL, "-F.max_pool2d(-mask, model.vae.config.downscale)")]},
     "says": "Only cells that lie in the hole altogether are drawn in yours. What happens at its rim?"},
    {"name": "corner of each cell", "caught": "masked",
     "code": {R: [(POOL, "mask[..., :: model.vae.config.downscale, :: model.vae.config.downscale]")]},
     "says": "You look at one pixel of each cell. What if the hole covers the others?"},
    {"name": "mask not used", "caught": "masked", "code": {R: [("    if mask is not None:\n", "    if False:\n")]},
     "says": "The mask has no effect: everything is drawn anew."},
    {"name": "noised latents put back", "caught": "masked", "code": {R: [("torch.lerp(latent, x0, hole)", "torch.lerp(x, x0, hole)")]},
     "says": "You put NOISY latents back. What does constrain correct: x, or predictions of x0?"},
    {"name": "drawn everywhere", "caught": "outside",
     "code": {P: [(WHERE, "drawn + fill(pictures - drawn, mask)")]},
     "says": "Outside of the hole your pixels have gone through the VAE. Whose pixels belong there?"},
    {"name": "hole not filled first", "caught": "unseen", "code": {P: [("fill(pictures, mask), eps", "pictures, eps")]},
     "says": "What the hole held is encoded with the rest, and below strength 1 something of it survives. When must it go?"},
    {"name": "hole grey", "caught": "outside", "code": {P: [("fill(pictures, mask), eps", "pictures * (1 - mask), eps")]},
     "says": "You set the hole to 0, a grey that shows at strength 0.9. By what does `fill` replace it?"},
    {"name": "hole emptied in place", "caught": "untouched",
     "code": {P: [("    eps = noise_for", "    pictures *= 1 - mask\n    eps = noise_for")]},
     "says": "You empty the hole in the caller's own pictures, in place. Which of your lines writes into them?"},
    {"name": "seam", "caught": "outside", "code": {P: [("drawn + fill(pictures - drawn, mask)", "drawn")]},
     "says": "There is a seam at the rim: what is drawn does not quite meet what stays. How far is it off there, and how could "
             "that be carried on into the hole?"},
    {"name": "no mask inside", "caught": "outside", "code": {P: [("strength, mask, **options", "strength, **options")]},
     "says": "redraw is not told of the mask, so the surroundings change while the hole is drawn, and do not fit it."},
    {"name": "strength ignored", "caught": "unseen", "code": {P: [("prompts, strength, mask", "prompts, 0.9, mask")]},
     "says": "`strength` has no effect on your inpaint."},
]  # fmt: skip
RIGHT = [
    {"name": "where", "code": {R: """
def redraw(model, pictures, eps, prompts, strength, mask=None, **options):
    t = int(strength * (model.schedule.num_train_timesteps - 1) + 0.5)
    z = model.encode(pictures)
    a, s = model.schedule.alpha_sigma(t)
    if mask is not None:
        touched = F.avg_pool2d(mask, model.vae.config.downscale) > 0
        def keep(x0):
            return torch.where(touched, x0, z)
        options = {**options, "constrain": keep}
    return generate(model, prompts, a * z + s * eps, first=t, **options).to(pictures.device)
""", P: """
def inpaint(model, pictures, mask, prompts, seeds, strength=0.9, **options):
    eps = noise_for(model, pictures, seeds)
    drawn = redraw(model, fill(pictures, mask), eps, prompts, strength, mask=mask, **options)
    drawn = drawn + fill(pictures - drawn, mask)
    return pictures * (1 - mask) + drawn * mask
"""}},
]  # fmt: skip
