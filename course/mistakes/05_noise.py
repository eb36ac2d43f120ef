"""Wrong and other right answers to exercise 5."""

POST, ADD, BACK = "hipa.Schedule.__post_init__", "hipa.Schedule.add_noise", "hipa.Schedule.predict_x0"
SUM = "alpha * x0 + sigma * noise"
EPS, V = "(x - sigma * prediction) / alpha", "alpha * x - sigma * prediction"
PRODUCT = "torch.cumprod(1 - betas, dim=0)"
FIRST = "self.alpha_sigma(int(timestep.flatten()[0]) if hasattr(timestep, 'flatten') else timestep)"
MISTAKES = [
    {"name": "linear betas", "caught": "alphas", "code": {POST: [("self.beta_start**0.5, self.beta_end**0.5", "self.beta_start, self.beta_end"), (") ** 2", ")")]},
     "says": "Your betas are equally spaced themselves, as in the first diffusion paper. What is equally spaced here?"},
    {"name": "forgot to square", "caught": "alphas", "code": {POST: [(") ** 2", ")")]},
     "says": "What you use as beta is its square root: all but a few timesteps are pure noise. What is still to be done to it?"},
    {"name": "no running product", "caught": "alphas", "code": {POST: [(PRODUCT, "1 - betas")]},
     "says": "This is the share that ONE timestep keeps. What is left of the picture after all timesteps up to t?"},
    {"name": "sum for product", "caught": "alphas", "code": {POST: [(PRODUCT, "1 - torch.cumsum(betas, dim=0)")]},
     "says": "You take the SUM of the betas off 1. Each timestep keeps a share of what is left: how do shares of shares combine?"},
    {"name": "root taken already", "caught": "alphas", "code": {POST: [(PRODUCT, PRODUCT + ".sqrt()")]},
     "says": "You take the square root here, and alpha_sigma takes it once more. Is alphas_cumprod alpha, or its square?"},
    {"name": "product of betas", "caught": "alphas", "code": {POST: [(PRODUCT, "torch.cumprod(betas, dim=0)")]},
     "says": "You multiply the betas, and have almost nothing left at t = 1. Is beta what a timestep takes away, or what it keeps?"},
    {"name": "backwards", "caught": "alphas", "code": {POST: [(PRODUCT, PRODUCT + ".flip(0)")]},
     "says": "Yours rises with t. At which end is pure noise?"},
    {"name": "shifted by one", "caught": "alphas", "code": {POST: [(PRODUCT, f"F.pad({PRODUCT}[:-1], (1, 0), value=1.0)")]},
     "says": "Each value of yours comes a timestep late: at t = 0 it is 1, as if nothing had been taken away yet. How many factors has the product at t = 0?"},
    {"name": "alpha and sigma exchanged", "caught": "one_timestep", "code": {ADD: [(SUM, "sigma * x0 + alpha * noise")]},
     "says": "alpha and sigma are exchanged: in yours the picture is clean at t = 999 and noise at t = 0."},
    {"name": "noise on top", "caught": "variance", "code": {ADD: [(SUM, "x0 + sigma * noise")]},
     "says": "You add noise and take nothing of the picture away, so the variance grows to 2. What must happen to the picture while the noise comes?"},
    {"name": "convex sum", "caught": "variance", "code": {ADD: [(SUM, "alpha * x0 + (1 - alpha) * noise")]},
     "says": "Your two weights sum to 1. If variances are to stay at 1, what of the weights must sum to 1?"},
    {"name": "variance for deviation", "caught": "one_timestep", "code": {ADD: [(SUM, "alpha * x0 + sigma**2 * noise")]},
     "says": "You multiply the noise by sigma^2. If noise of variance 1 is multiplied by s, what is its variance then?"},
    {"name": "squares of both", "caught": "variance", "code": {ADD: [(SUM, "alpha**2 * x0 + sigma**2 * noise")]},
     "says": "You use the squares of alpha and sigma as weights. Those sum to 1; do the variances then, too?"},
    {"name": "one timestep for all", "caught": "own_timesteps", "code": {ADD: [("self.alpha_sigma(timestep)", FIRST)]},
     "says": "Every picture gets the first picture's timestep. What does alpha_sigma give for a tensor of timesteps?"},
    {"name": "no division by alpha", "caught": "epsilon", "code": {BACK: [(EPS, "x - sigma * prediction")]},
     "says": "When the noise is taken off, what is left is not yet x0: at t = 999 yours is 14.65 times too faint. What is it?"},
    {"name": "noise alone divided", "caught": "epsilon", "code": {BACK: [(EPS, "x - sigma * prediction / alpha")]},
     "says": "You divide the noise alone by alpha. In x - b / a, which comes first, the difference or the division?"},
    {"name": "divided by sigma", "caught": "epsilon", "code": {BACK: [(EPS, "(x - alpha * prediction) / sigma")]},
     "says": "alpha and sigma are exchanged: you have solved x = sigma x0 + alpha noise."},
    {"name": "sigma forgotten", "caught": "epsilon", "code": {BACK: [(EPS, "(x - prediction) / alpha")]},
     "says": "You take off the whole noise. With which weight is it in x?"},
    {"name": "v taken for the noise", "caught": "velocity", "code": {BACK: [(V, EPS)]},
     "says": "With 'v_prediction' the network does not say the noise. Put both formulas into alpha x - sigma v: what falls out?"},
    {"name": "noise from v", "caught": "velocity", "code": {BACK: [(V, "sigma * x + alpha * prediction")]},
     "says": "sigma x + alpha v is the NOISE; put both formulas in and see. Which combination is left for x0?"},
    {"name": "v with the other sign", "caught": "velocity", "code": {BACK: [(V, "alpha * x + sigma * prediction")]},
     "says": "Look at the sign of v. Put both formulas into alpha x + sigma v: does the noise cancel?"},
    {"name": "one timestep too many", "caught": "alphas", "code": {POST: [("num_train_timesteps, dtype", "num_train_timesteps + 1, dtype"), (PRODUCT, PRODUCT + "[:-1]")]},
     "says": "Your betas end one step too late: the last of the timesteps has not quite beta_end."},
]  # fmt: skip
RIGHT = [
    {"name": "loop", "code": {POST: """
def __post_init__(self):
    kept, product = [], 1.0
    for i in range(self.num_train_timesteps):
        root = self.beta_start**0.5 + (self.beta_end**0.5 - self.beta_start**0.5) * i / (self.num_train_timesteps - 1)
        product *= 1 - root * root
        kept.append(product)
    self.alphas_cumprod = torch.tensor(kept)
"""}},
    {"name": "logarithms", "code": {POST: [(PRODUCT, "torch.cumsum((1 - betas).double().log(), 0).exp().float()")]}},
    {"name": "other order", "code": {ADD: [("return " + SUM, "return noise * sigma + torch.mul(x0, alpha)")]}},
    {"name": "v by way of the noise", "code": {BACK: [(V, "(x - sigma * (sigma * x + alpha * prediction)) / alpha")]}},
]  # fmt: skip
