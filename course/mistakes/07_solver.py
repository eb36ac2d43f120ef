"""Wrong and other right answers to exercise 7."""

S = "hipa.dpm_solver"
D = "x0 + (x0 - x0_before) * h / (2 * (lam - lam_before))"
X = "sigma_next / sigma * x - alpha_next * torch.expm1(-h) * direction"
LOOP = "for t, t_next in zip(timesteps, [*timesteps[1:], None]):"
TIMESTEPS = "schedule.timesteps(steps, first)"
MISTAKES = [
    {"name": "first order only", "caught": "second_order", "code": {S: [("if previous:", "if False:")]},
     "says": "You never use the step before: this is DDIM, of first order. How do the two last predictions tell x0 in the middle?"},
    {"name": "extrapolated to the end", "caught": "second_order", "code": {S: [(D, "x0 + (x0 - x0_before) * h / (lam - lam_before)")]},
     "says": "You extrapolate x0 to the END of the step. D stands for x0 over all of it: how far must you go?"},
    {"name": "ratio upside down", "caught": "second_order", "code": {S: [(D, "x0 + (x0 - x0_before) * (lam - lam_before) / (2 * h)")]},
     "says": "The ratio of the two steps is upside down. If this step is longer than the last, does x0 change by more or by less?"},
    {"name": "equal steps assumed", "caught": "second_order", "code": {S: [(D, "x0 + (x0 - x0_before) / 2")]},
     "says": "3/2 x0 - 1/2 x0_before is right if both steps have the same length in lambda. Have they?"},
    {"name": "interpolated backwards", "caught": "second_order", "code": {S: [(D, D.replace("x0 + (", "x0 - ("))]},
     "says": "From x0 you go towards x0_before, back to the noise. In which direction does the step lead?"},
    {"name": "mean of the last two", "caught": "second_order", "code": {S: [(D, "(x0 + x0_before) / 2")]},
     "says": "Your D is the mean of the last two predictions: that is x0 in the middle of the step BEFORE. Where on their straight line is the middle of this step?"},
    {"name": "slope without a length", "caught": "second_order", "code": {S: [(D, "x0 + (x0 - x0_before) / (2 * (lam - lam_before))")]},
     "says": "You add the slope of x0 (its change per lambda), halved. How far in lambda is it to the middle of this step?"},
    {"name": "memory of x", "caught": "second_order", "code": {S: [("previous = x0, lam", "previous = x, lam")]},
     "says": "You remember x of the step before. Between which two things is the straight line?"},
    {"name": "memory of the next level", "caught": "second_order", "code": {S: [("previous = x0, lam", "previous = x0, lam_next")]},
     "says": "You remember the lambda at which the step ended. At which lambda was x0 predicted?"},
    {"name": "memory of the first step", "caught": "second_order", "code": {S: [("previous = x0, lam", "previous = previous or (x0, lam)")]},
     "says": "You remember the first step for ever. Through which two predictions is the straight line?"},
    {"name": "x0 changed in place", "caught": "second_order", "code": {S: [(D, "x0.add_((x0 - x0_before) * h / (2 * (lam - lam_before)))")]},
     "says": "You change x0 in place (as += does, also under another name). The next step needs this prediction: what is in it by then?"},
    {"name": "exp for exp - 1", "caught": "first_order", "code": {S: [("torch.expm1(-h)", "torch.exp(-h)")]},
     "says": "Try a step of length h = 0: it must leave x as it is. What does your formula give?"},
    {"name": "sign of h", "caught": "first_order", "code": {S: [("h = lam_next - lam", "h = lam - lam_next")]},
     "says": "Either h or the argument of expm1 has the wrong sign. lambda = log(alpha / sigma): does it grow or fall as the noise goes?"},
    {"name": "sigmas exchanged", "caught": "first_order", "code": {S: [("sigma_next / sigma * x", "sigma / sigma_next * x")]},
     "says": "Your noise grows: sigma_now / sigma_next is above 1. In which direction does the step lead?"},
    {"name": "alphas in the ratio", "caught": "first_order", "code": {S: [("sigma_next / sigma * x", "alpha_next / alpha * x")]},
     "says": "You multiply x by alpha_next / alpha_now. If the noise in x is sigma_now, how much of it is there then, and how much should there be?"},
    {"name": "alpha and sigma exchanged", "caught": "first_order", "code": {S: [(X, "alpha_next / alpha * x - sigma_next * torch.expm1(-h) * direction")]},
     "says": "alpha and sigma are exchanged, as if D were the noise. How much of the noise in x must be left after the step?"},
    {"name": "alpha now", "caught": "first_order", "code": {S: [("alpha_next * torch", "alpha * torch")]},
     "says": "You weigh x0 by the alpha of now. With how much signal is x to arrive?"},
    {"name": "Euler's step", "caught": "first_order", "code": {S: [("x = " + X, "x = x + (x0 - x) * (1 - sigma_next / sigma)")]},
     "says": "A straight line from x to x0, Euler's step, keeps the noise's share right. Which share does the picture have then, and which should it have?"},
    {"name": "never to the end", "caught": "one_step", "code": {S: [("            return x0", "            return x")]},
     "says": "You return x as it was before the last question: with one step that is pure noise. What has the last question told?"},
    {"name": "asked at the next timestep", "caught": "asked", "code": {S: [("predict_x0(x, t)", "predict_x0(x, t if t_next is None else t_next)")]},
     "says": "You tell the network the timestep to come. How noisy is the x that it is given?"},
    {"name": "timesteps in a tensor", "caught": "asked", "code": {S: [("predict_x0(x, t)", "predict_x0(x, torch.tensor(t))")]},
     "says": "You hand the timestep on in a tensor. The network's function takes an int, or a tensor (B,): which did you get?"},
    {"name": "from 0 up", "caught": "asked", "code": {S: [(TIMESTEPS, TIMESTEPS + "[::-1]")]},
     "says": "You go from little noise to much. With what does sampling begin?"},
    {"name": "counted to steps", "caught": "many", "code": {S: [
        (LOOP, "for k in range(steps):\n        t, t_next = timesteps[k], timesteps[k + 1] if k + 1 < steps else None")]},
     "says": "You count to `steps`, and there may be fewer timesteps than that. By what else is the last one known?"},
]  # fmt: skip
RIGHT = [
    {"name": "DDIM's form, the paper's weights, the last step apart", "code": {S: """
def dpm_solver(predict_x0, x, schedule, steps, first=None):
    ts, old = schedule.timesteps(steps, first), None
    for t, t_next in zip(ts[:-1], ts[1:]):
        x0, now, later = predict_x0(x, t), schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        l0, l1 = now[0].log() - now[1].log(), later[0].log() - later[1].log()
        d = x0
        if old is not None:
            r = (l0 - old[1]) / (l1 - l0)
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old[0]
        x, old = later[0] * d + later[1] * (x - now[0] * d) / now[1], (x0, l0)
    return predict_x0(x, ts[-1])
"""}},
    {"name": "None at the end of the list", "code": {S: [(TIMESTEPS, TIMESTEPS + " + [None]"), ("[*timesteps[1:], None]", "timesteps[1:]")]}},
    {"name": "Python's own numbers", "code": {S: [("torch.expm1(-h)", "math.expm1(-h)")]}},
]  # fmt: skip
EQUIVALENT = {
    "if cut(previous)": "it is only asked whether there is one",
}
