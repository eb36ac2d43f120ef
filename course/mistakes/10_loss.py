"""Wrong and other right answers to exercise 10."""

D, L = "losses.DISTS.forward", "losses.HiPALoss.forward"
END = "1 - (self.alpha * texture + self.beta * structure).sum(1)"
CENTRE = "a, b = a - mean_a[..., None], b - mean_b[..., None]"
GREY = "P(high_x + 0.5, high_y + 0.5)"
UNIT = "picture.float() / 2 + 0.5, target.float() / 2 + 0.5"
OUT = "name: weights[name] * term.mean()"
MISTAKES = [
    {"name": "alpha and beta exchanged", "caught": "distance", "code": {D: [(END, "1 - (self.beta * texture + self.alpha * structure).sum(1)")]},
     "says": "alpha and beta are exchanged. Which of them weighs texture, the means?"},
    {"name": "likeness", "caught": "equal", "code": {D: [(END, END[4:])]},
     "says": "Yours is 1 for equal pictures: it says how ALIKE they are."},
    {"name": "max pooling", "caught": "distance", "code": {D: [("self.vgg(x, l2_pool)], [y, *self.vgg(y, l2_pool)]", "self.vgg(x)], [y, *self.vgg(y)]")]},
     "says": "Your feature net pools by the maximum, which jumps when an edge moves by a pixel. How is it told to pool differently?"},
    {"name": "pictures left out", "caught": "distance", "code": {D: [
        ("zip([x, *self.vgg(x, l2_pool)], [y, *self.vgg(y, l2_pool)])", "zip(self.vgg(x, l2_pool), self.vgg(y, l2_pool))"),
        (END, "1 - (self.alpha[3:] * texture + self.beta[3:] * structure).sum(1)")]},
     "says": "The pictures themselves are missing in your list: their three channels count too."},
    {"name": "not centred", "caught": "apart", "code": {D: [(CENTRE, "pass")]},
     "says": "The means are still in your variances and covariance. Is the mean of a * b a covariance?"},
    {"name": "square of the mean subtracted", "caught": "extremes", "code": {D: [(CENTRE, "pass"), (
        "a.square().mean(2), b.square().mean(2), (a * b).mean(2)",
        "a.square().mean(2) - mean_a.square(), b.square().mean(2) - mean_b.square(), (a * b).mean(2) - mean_a * mean_b")]},
     "says": "Your variance is a difference of two large numbers, E[x^2] - E[x]^2, in which rounding leaves little. What is to be squared?"},
    {"name": "constant too small", "caught": "extremes", "code": {D: [
        ("(2 * mean_a * mean_b + 1e-6) / (mean_a.square() + mean_b.square() + 1e-6)",
         "(2 * mean_a * mean_b + 1e-12) / (mean_a.square() + mean_b.square() + 1e-12)"),
        ("(2 * cov + 1e-6) / (var_a + var_b + 1e-6)", "(2 * cov + 1e-12) / (var_a + var_b + 1e-12)")]},
     "says": "Your c is another one: in nearly flat and nearly black pictures it decides. How large was it to be?"},
    {"name": "deviations for variances", "caught": "apart", "code": {D: [("var_a + var_b + 1e-6", "var_a.sqrt() + var_b.sqrt() + 1e-6")]},
     "says": "structure has deviations below the line and a covariance above it. Do their units cancel?"},
    {"name": "product below", "caught": "apart", "code": {D: [("var_a + var_b + 1e-6", "2 * (var_a * var_b).sqrt() + 1e-6")]},
     "says": "Yours is the correlation, which is 1 also if one picture has half the contrast. What stands below the line above?"},
    {"name": "no constant", "caught": "equal", "code": {D: [("(2 * cov + 1e-6) / (var_a + var_b + 1e-6)", "2 * cov / (var_a + var_b)")]},
     "says": "A flat picture has variance 0, and 0 / 0 is NaN. What is c for, and where does it belong?"},
    {"name": "divided by n - 1", "caught": "apart", "code": {D: [("(a * b).mean(2)", "(a * b).sum(2) / (a.shape[2] - 1)")]},
     "says": "Your covariance is divided by n - 1, your variances by n."},
    {"name": "mean over channels", "caught": "distance", "code": {D: [(END, "1 - (self.alpha * texture + self.beta * structure).mean(1)")]},
     "says": "You take the mean over the channels. alpha and beta sum to 1 together: what does that make of a mean?"},
    {"name": "no grey", "caught": "ranges", "code": {L: [(GREY, "P(high_x, high_y)")]},
     "says": "What a high pass leaves has both signs and the mean 0. P expects pictures in [0, 1]: how does it become one?"},
    {"name": "not in [0, 1]", "caught": "ranges", "code": {L: [(UNIT, "picture.float(), target.float()")]},
     "says": "Your pictures are still in [-1, 1]. What do P and the views work on?"},
    {"name": "half of the way to [0, 1]", "caught": "ranges", "code": {L: [(UNIT, "picture.float() + 0.5, target.float() + 0.5")]},
     "says": "Your pictures are in [-0.5, 1.5]: shifted, and not scaled."},
    {"name": "view of the difference", "caught": "ranges", "code": {L: [(GREY, "P(high_pass(x - y, self.radius) + 0.5, torch.zeros_like(x) + 0.5)")]},
     "says": "You filter the DIFFERENCE and compare it with grey. What does a perceptual distance see in a difference?"},
    {"name": "weights forgotten", "caught": "terms", "code": {L: [(OUT, "name: term.mean()")]},
     "says": "The weights have no effect on your terms."},
    {"name": "sum over the batch", "caught": "terms", "code": {L: [(OUT, "name: weights[name] * term.sum()")]},
     "says": "You sum over the batch. Would the same learning rate do for a batch twice as large?"},
    {"name": "zero weights computed", "caught": "left_out", "code": {L: [('if weights["spatial"]:', "if True:"), ('if weights["fourier"]:', 'if weights["fourier"] or weights["energy"]:')]},
     "says": "Terms of weight 0 are computed in yours: each costs a pass through the feature net."},
    {"name": "energy not in logarithms", "caught": "terms", "code": {L: [("(energy_x.log() - energy_y.log())", "(energy_x - energy_y)")]},
     "says": "You compare the energies themselves, which differ by thousandths. Which function turns a FACTOR into a difference?"},
    {"name": "energy over the batch", "caught": "terms", "code": {L: [("mean(dim=(1, 2, 3)) + 1e-6", "mean() + 1e-6")]},
     "says": "Your energy is that of the whole batch, so a sharp picture can make up for a blurred one."},
    {"name": "energy without its constant", "caught": "terms", "code": {L: [(" + 1e-6 for high", " for high")]},
     "says": "A flat picture has no energy in its high frequencies, and the logarithm of 0 is minus infinity. What keeps it finite?"},
    {"name": "clamped", "caught": "ranges", "code": {L: [
        (UNIT, "(picture.float() / 2 + 0.5).clamp(0, 1), (target.float() / 2 + 0.5).clamp(0, 1)")]},
     "says": "You clamp the pictures. What pulls a pixel back that is brighter than white?"},
    {"name": "sobel of the high pass", "caught": "ranges", "code": {L: [("P(sobel(x), sobel(y))", "P(sobel(high_pass(x, self.radius)), sobel(high_pass(y, self.radius)))")]},
     "says": "You look for edges in the high pass. Of what are the edges wanted?"},
    {"name": "no squares below", "caught": "distance", "code": {D: [("(mean_a.square() + mean_b.square() + 1e-6)", "(mean_a + mean_b + 1e-6)")]},
     "says": "texture has means below the line and a product of means above it. Do their units cancel?"},
]  # fmt: skip
RIGHT = [
    {"name": "map by map", "code": {D: """
def forward(self, x, y):
    like, start = 0, 0
    for a, b in zip([x] + list(self.vgg(x, l2_pool)), [y] + list(self.vgg(y, l2_pool))):
        a, b = a.float(), b.float()
        n = a.shape[1]
        ma, mb = a.mean((2, 3)), b.mean((2, 3))
        va, vb = a.var((2, 3), unbiased=False), b.var((2, 3), unbiased=False)
        cov = ((a - ma[..., None, None]) * (b - mb[..., None, None])).mean((2, 3))
        t, s = (2 * ma * mb + 1e-6) / (ma**2 + mb**2 + 1e-6), (2 * cov + 1e-6) / (va + vb + 1e-6)
        like = like + (t * self.alpha[start : start + n] + s * self.beta[start : start + n]).sum(1)
        start += n
    return 1 - like
"""}},
    {"name": "other order", "code": {L: """
def forward(self, picture, target):
    x, y, w, r = (picture.float() + 1) / 2, (target.float() + 1) / 2, self.weights, self.radius
    out = {}
    if w["energy"]:
        a, b = ((high_pass(p, r) ** 2).flatten(1).mean(1) + 1e-6 for p in (x, y))
        out["energy"] = w["energy"] * torch.log(a / b).pow(2).mean()
    if w["sobel"]:
        out["sobel"] = w["sobel"] * self.distance(sobel(x), sobel(y)).mean()
    if w["fourier"]:
        out["fourier"] = w["fourier"] * self.distance(0.5 + high_pass(x, r), 0.5 + high_pass(y, r)).mean()
    if w["spatial"]:
        out["spatial"] = w["spatial"] * self.distance(x, y).mean()
    return out
"""}},
]  # fmt: skip
MEAN = "differences from the mean sum to 0, so the mean has no part in the gradient"
EQUIVALENT = {"a - cut(mean_a)": MEAN, "b - cut(mean_b)": MEAN}
