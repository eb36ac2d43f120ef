"""Wrong and other right answers to exercise 6."""

P = "hipa.predictor"
MIX = "without + guidance * (with_text - without)"
BOTH = "model.encode_text([negative] * len(prompts) + list(prompts) if guided else list(prompts))"
TIMES = "torch.as_tensor(timestep, device=x.device).expand(len(x))"
X0 = "return model.schedule.predict_x0(x, timestep, prediction)"
MISTAKES = [
    {"name": "the paper's w", "caught": "guided", "code": {P: [(MIX, "with_text + guidance * (with_text - without)")]},
     "says": "You begin at `with`: that is the paper's w, which counts from there. What must guidance = 1 give by the formula above, and what does yours give?"},
    {"name": "halves exchanged", "caught": "guided", "code": {P: [("without, with_text = prediction", "with_text, without = prediction")]},
     "says": "The halves are exchanged: yours leads AWAY from the prompt. Which half of the batch came first?"},
    {"name": "wrong direction", "caught": "guided", "code": {P: [(MIX, "without + guidance * (without - with_text)")]},
     "says": "Your difference points away from the prompt. From where to where is it to lead?"},
    {"name": "from the prompt on", "caught": "guided", "code": {P: [(MIX, "guidance * (with_text - without)")]},
     "says": "Yours is the difference alone. What becomes of all that both answers agree on?"},
    {"name": "mean", "caught": "guided", "code": {P: [(MIX, "(without + guidance * with_text) / (1 + guidance)")]},
     "says": "A weighted MEAN of both answers lies between them. Where is guidance to lead?"},
    {"name": "guided for ever", "caught": "plain", "code": {P: [("guided = guidance > 1", "guided = True")]},
     "says": "You always ask twice. With guidance 1, what does the formula leave of `without`?"},
    {"name": "the network's answer for x0", "caught": "plain", "code": {P: [(X0, "return prediction")]},
     "says": "You return the network's own answer, the noise or v. What was the function to return?"},
    {"name": "encoded at every step", "caught": "cost", "code": {P: [("        x_in, timesteps = x,", "        context = " + BOTH + "\n        x_in, timesteps = x,")]},
     "says": "You encode the text at every step, though it never changes. Which code runs once, and which at each step?"},
    {"name": "one timestep for all", "caught": "own_timesteps", "code": {P: [(TIMES, "torch.as_tensor(timestep).flatten()[:1].expand(len(x))")]},
     "says": "Every picture gets the first picture's timestep. A tensor (B,) has one for each."},
    {"name": "half precision arithmetic", "caught": "half", "code": {P: [(", context).float()", ", context)")]},
     "says": "The network's answer stays in half precision; guidance and the division by alpha enlarge its rounding. When is it converted?"},
    {"name": "texts taking turns", "caught": "guided", "code": {P: [("[negative] * len(prompts) + list(prompts) if guided",
                   "[t for p in prompts for t in (negative, p)] if guided")]},
     "says": "Your texts take turns (negative, prompt, negative, prompt, ...), your latents come all once, then all again. Which latent meets which text?"},
    {"name": "guided twice", "caught": "guided", "code": {P: [(MIX, "without + guidance**2 * (with_text - without)")]},
     "says": "The difference is made larger than `guidance` says."},
    {"name": "guided below 1", "caught": "plain", "code": {P: [("guided = guidance > 1", "guided = guidance != 1")]},
     "says": "Guidance 0.5 asks twice in yours. Is 1 the only guidance at which one question is enough?"},
    {"name": "timesteps taking turns", "caught": "own_timesteps", "code": {P: [("torch.cat([timesteps, timesteps])", "timesteps.repeat_interleave(2)")]},
     "says": "Your timesteps take turns (t1, t1, t2, t2, ...), your latents come all once, then all again. Which latent meets which timestep?"},
    {"name": "guidance in half precision", "caught": "half", "code": {P: [(", context).float()", ", context)"), (MIX, f"({MIX}).float()")]},
     "says": "You convert to float32 after the guidance, which enlarges the rounding of a small difference. What should come first?"},
]  # fmt: skip
RIGHT = [
    {"name": "guided x0", "code": {P: """
def predictor(model, prompts, guidance=1.0, negative=""):
    texts = list(prompts) if guidance <= 1 else [negative for _ in prompts] + list(prompts)
    states = model.encode_text(texts)
    def ask(x, timestep):
        k = len(texts) // len(x)
        t = torch.as_tensor(timestep, device=x.device)
        t = t.repeat(len(x)) if t.ndim == 0 else t
        answer = model.unet(x.repeat(k, 1, 1, 1).to(model.dtype), t.repeat(k), states).float()
        views = [model.schedule.predict_x0(x, timestep, a) for a in answer.split(len(x))]
        return views[0] if k == 1 else torch.lerp(views[0], views[1], guidance)
    return ask
"""}},
    {"name": "the texts encoded apart", "code": {P: [
        (BOTH, "torch.cat([model.encode_text(t) for t in ([[negative] * len(prompts)] if guided else []) + [list(prompts)]])")]}},
    {"name": "other order of terms", "code": {P: [(MIX, "guidance * with_text + (1 - guidance) * without")]}},
]  # fmt: skip
EQUIVALENT = {
    "if guided else prompts)": "prompts are a list",
    "+ prompts if guided": "prompts are a list",
}
