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
    {"name": "ndtri forgotten", "caught": "parts", "code": {T: [("torch.special.ndtri(quantile)", "quantile")]},
     "says": "You put q itself into the sigmoid. Which function makes a normally distributed number of it?"},
    {"name": "middles of the parts", "caught": "parts", "code": {T: [("torch.rand(batch, device=device)", "0.5")]},
     "says": "Your timesteps lie all at the same place of their parts. How many u are there?"},
    {"name": "parts from 1", "caught": "parts", "code": {T: [("torch.arange(batch, device=device)", "torch.arange(1, batch + 1, device=device)")]},
     "says": "Your k begins at 1, so that nothing is in the lowest part, and something above the highest."},
    {"name": "no limit", "caught": "limits", "code": {T: [(".clamp(max=total - 1)", "")]},
     "says": "Float32 rounds a q just below 1 to 1, perhaps once in a day of training. Which t comes of it, and does the schedule have one?"},
    {"name": "rounded", "caught": "limits", "code": {T: [("(share * total).long()", "(share * total).round().long()")]},
     "says": "You round to the nearest timestep. To which shares do 0 and the last one belong then, and how long are they?"},
    {"name": "floats", "caught": "parts", "code": {T: [(".long()", ".floor()")]},
     "says": "Your timesteps are rounded and still floats. alphas_cumprod is indexed by them: what do indices have to be?"},
    {"name": "on the CPU", "caught": "limits", "code": {T: [(Q, "(torch.arange(batch) + torch.rand(batch)) / batch")]},
     "says": "What you draw is made on the CPU. What is `device` for?"},
    {"name": "always the noise", "caught": "values", "code": {L: [(TARGET, "noise")]},
     "says": "You always ask for the noise. What does this schedule's network predict?"},
    {"name": "exchanged", "caught": "values", "code": {L: [('== "epsilon"', '!= "epsilon"')]},
     "says": "The two cases are exchanged: v where noise is asked for."},
    {"name": "sign of v", "caught": "values", "code": {L: [("- sigma * x0", "+ sigma * x0")]},
     "says": "Your v has a plus. What are alpha noise + sigma x0 and x_t to each other, and what could v then not tell?"},
    {"name": "x0 is to be predicted", "caught": "values", "code": {L: [(TARGET, "x0")]},
     "says": "You ask for x0. What has the network been asked for, by its schedule?"},
    {"name": "not noised", "caught": "values", "code": {L: [(NOISY, "x0")]},
     "says": "The network sees the clean latents. Where is the noise that it is to find?"},
    {"name": "other noise", "caught": "values", "code": {L: [(NOISY, "schedule.add_noise(x0, timestep, torch.randn_like(x0))")]},
     "says": "You add one noise and ask for another: nobody can know it."},
    {"name": "sum", "caught": "values", "code": {L: [("F.mse_loss(", "F.mse_loss(reduction='sum', input="), ("context), target)", "context), target=target)")]},
     "says": "You sum the squares. Would the learning rate fit another batch size?"},
    {"name": "cut off", "caught": "conduct of make.diffusion_loss", "code": {L: [(ASK, ASK + ".detach()")]},
     "says": "detach() cuts off the network, or what it is told: nothing can be learned by your loss."},
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
    with torch.no_grad():
        if schedule.prediction_type != "epsilon":
            noise = a * noise - s * x0
    return (said - noise).square().mean()
"""}},
]  # fmt: skip
EQUIVALENT = {
    "target = cut({})".format(TARGET.replace('"', "'")): "nothing is learned by x0 or the noise",
    f"share = {SHARE}  ->  share = {SHARE.replace('0.3 +', '0.3 -')}": "z and -z have the same distribution",
}
