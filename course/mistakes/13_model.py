"""Wrong and other right answers to exercise 13."""

T, L = "make.draw_timesteps", "make.diffusion_loss"
Q = "(torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch"
SHARE = "torch.sigmoid(0.3 + 1.3 * torch.special.ndtri(quantile))"
TARGET = 'noise if schedule.prediction_type == "epsilon" else alpha * noise - sigma * x0'
NOISY, ASK = (
    "schedule.add_noise(x0, timestep, noise)",
    "network(schedule.add_noise(x0, timestep, noise), timestep, context)",
)
MISTAKES = [
    {"name": "all t alike", "caught": "parts", "code": {T: [(SHARE, "quantile")]},
     "says": "Your timesteps are spread evenly. Which two functions bend [0, 1)?"},
    {"name": "independent", "caught": "parts", "code": {T: [("torch.special.ndtri(quantile)", "torch.randn(batch, device=device)")]},
     "says": "Your draws are independent: some parts get two and others none. To which part does number k belong?"},
    {"name": "middles of the parts", "caught": "parts", "code": {T: [("torch.rand(batch, device=device)", "0.5")]},
     "says": "Your timesteps lie all at the same place of their parts. How many u are there?"},
    {"name": "parts from 1", "caught": "parts", "code": {T: [("torch.arange(batch, device=device)", "torch.arange(1, batch + 1, device=device)")]},
     "says": "Your k begins at 1, so that nothing is in the lowest part, and something above the highest."},
    {"name": "rounded", "caught": "limits", "code": {T: [("(share * total).long()", "(share * total).round().long()")]},
     "says": "You round to the nearest timestep. To which shares do 0 and the last one belong then, and how long are they?"},
    {"name": "floats", "caught": "parts", "code": {T: [(".long()", ".floor()")]},
     "says": "Your timesteps are rounded and still floats. alphas_cumprod is indexed by them: what do indices have to be?"},
    {"name": "always the noise", "caught": "values", "code": {L: [(TARGET, "noise")]},
     "says": "You always ask for the noise. What does this schedule's network predict?"},
    {"name": "x0 is to be predicted", "caught": "values", "code": {L: [(TARGET, "x0")]},
     "says": "You ask for x0. What has the network been asked for, by its schedule?"},
    {"name": "other noise", "caught": "values", "code": {L: [(NOISY, "schedule.add_noise(x0, timestep, torch.randn_like(x0))")]},
     "says": "You add one noise and ask for another: nobody can know it."},
    {"name": "sum", "caught": "values", "code": {L: [("F.mse_loss(", "F.mse_loss(reduction='sum', input="), ("context), target)", "context), target=target)")]},
     "says": "You sum the squares. Would the learning rate fit another batch size?"},
]  # fmt: skip
RIGHT = [
    {"name": "other words", "code": {T: """
def draw_timesteps(batch, total, device):
    q = torch.stack([(k + torch.rand(())) / batch for k in range(batch)])
    z = 2**0.5 * torch.special.erfinv(2 * q - 1)
    t = torch.floor(total / (1 + torch.exp(-0.3 - 1.3 * z)))
    return torch.minimum(t, torch.tensor(total - 1.0)).to(device, torch.int64)[torch.randperm(batch).to(device)]
""", L: """
def diffusion_loss(network, schedule, x0, context, timestep, noise):
    a, s = schedule.alpha_sigma(timestep)
    said = network(a * x0 + s * noise, timestep, context)
    if schedule.prediction_type != "epsilon":
        noise = a * noise - s * x0
    return (said - noise).square().mean()
"""}},
]  # fmt: skip
EQUIVALENT = {
    f"share = {SHARE}  ->  share = {SHARE.replace('0.3 +', '0.3 -')}": "z and -z have the same distribution",
}
