"""Wrong and other right answers to exercise 11."""

T, R, D = "hipa.adaptation_loss", "train.schedule_of_lr", "train.descend"
COS = "0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))"
CLIP = "torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()"
END = "    return loss(model.decode(predicted), picture)"
HEAD = "    with torch.no_grad():\n        picture = model.decode(target)\n"
MISTAKES = [
    {"name": "the target twice", "caught": "pictures", "code": {T: [("model.decode(predicted), picture", "picture, picture")]},
     "says": "You compare the target with itself: the loss is always 0. Whose picture is missing?"},
    {"name": "exchanged", "caught": "pictures", "code": {T: [("model.decode(predicted), picture", "picture, model.decode(predicted)")]},
     "says": "The two pictures are exchanged. Whose comes first?"},
    {"name": "latents compared", "caught": "pictures", "code": {T: [(END, "    return loss(predicted, target)")]},
     "says": "You compare latents. Edges are seen in PICTURES: which function makes them?"},
    {"name": "student without gradient", "caught": "which_gradient", "code": {T: [(END, "    with torch.no_grad():\n        drawn = model.decode(predicted)\n    return loss(drawn, picture)")]},
     "says": "The student's picture is decoded under no_grad: by what is the student to learn?"},
    {"name": "target with gradient", "caught": "which_gradient", "code": {T: [(HEAD, "    picture = model.decode(target)\n")]},
     "says": "The target is decoded with gradients, which cost memory and time. Who needs them?"},
    {"name": "no warm-up", "caught": "rates", "code": {R: [("    if step < warm:\n        return (step + 1) / warm\n", "")]},
     "says": "Your rate does not rise at the beginning. What do Adam's averages know in the first steps?"},
    {"name": "first step lost", "caught": "rates", "code": {R: [("(step + 1) / warm", "step / warm")]},
     "says": "At step 0 your rate is 0. Steps are counted from 0: what share does the first one get?"},
    {"name": "straight down", "caught": "rates", "code": {R: [(COS, "1 - (step - warm) / max(1, steps - warm)")]},
     "says": "Your rate falls along a line. How does half a cosine fall at its two ends?"},
    {"name": "quarter of a cosine", "caught": "rates", "code": {R: [(COS, "math.cos(0.5 * math.pi * (step - warm) / max(1, steps - warm))")]},
     "says": "Your curve ends with its steepest fall: it is a quarter of a cosine. From where to where does half of one go?"},
    {"name": "cosine from step 0", "caught": "rates", "code": {R: [("(step - warm) / max(1, steps - warm)", "step / steps")]},
     "says": "Your cosine begins at step 0, so that the rate jumps where the warm-up ends. Where is it to begin?"},
    {"name": "no warm-up of short trainings", "caught": "rates", "code": {R: [("max(1, steps // 20)", "steps // 20"), ("max(1, steps - warm)", "(steps - warm)")]},
     "says": "With fewer than 20 steps your warm-up has none. How many is it to have at least?"},
    {"name": "gradients kept", "caught": "cleared", "code": {D: [("    optimizer.zero_grad()\n", "")]},
     "says": "The gradients are still there after the step. What will backward() do with the next ones?"},
    {"name": "cleared too early", "caught": "down", "code": {D: [("    norm = torch", "    optimizer.zero_grad(set_to_none=False)\n    norm = torch")]},
     "says": "You clear the gradients before the step. Along what does it then go?"},
    {"name": "rate not set", "caught": "down", "code": {D: [('        group["lr"] = lr\n', "        pass\n")]},
     "says": "`lr` has no effect: the optimizer goes on with its own rate."},
    {"name": "first group only", "caught": "down", "code": {D: [("    for group in optimizer.param_groups:\n", "    for group in optimizer.param_groups[:1]:\n")]},
     "says": "Only the first group of parameters is given the rate."},
    {"name": "clipped the first group", "caught": "down", "code": {D: [('for group in optimizer.param_groups for p in group["params"]', 'for p in optimizer.param_groups[0]["params"]')]},
     "says": "Only the gradients of the first group are clipped. How long are all of them together?"},
    {"name": "not clipped", "caught": "down", "code": {D: [("(parameters, 1.0)", "(parameters, 1e9)")]},
     "says": "Long gradients are not clipped: one strange batch would take one giant step."},
    {"name": "always of length 1", "caught": "down",
     "code": {D: [("    for group in optimizer.param_groups:\n", "    for p in parameters:\n        p.grad.div_(min(norm, 1.0))\n    for group in optimizer.param_groups:\n")]},
     "says": "You bring gradients to length 1 that were shorter. What is clipping to do to a short gradient?"},
    {"name": "clipped one by one", "caught": "down", "code": {D: [(CLIP, "max(torch.nn.utils.clip_grad_norm_(p, 1.0).item() for p in parameters)")]},
     "says": "You clip every parameter by itself, which bends the direction of the step. Of what is the length to be 1 at most?"},
    {"name": "not finite, stepped", "caught": "not_finite", "code": {D: [("    if math.isfinite(norm):\n", "    if True:\n")]},
     "says": "One NaN in the gradients makes every parameter NaN. What can you look at before you step?"},
    {"name": "infinity stepped", "caught": "not_finite", "code": {D: [("if math.isfinite(norm):", "if not math.isnan(norm):")]},
     "says": "NaN is found, and infinity is not: clipping divides by it. Which test finds both?"},
    {"name": "not finite, returned early", "caught": "cleared",
     "code": {D: [("    if math.isfinite(norm):\n        optimizer.step()\n", "    if not math.isfinite(norm):\n        return norm\n    optimizer.step()\n")]},
     "says": "Where a gradient is not finite you return before the end, and the gradients stay. What is NaN plus the next one?"},
    {"name": "a tensor returned", "caught": "down", "code": {D: [(".item()", "")]},
     "says": "clip_grad_norm_ returns a tensor, and so do you. How does a number come out of a tensor?"},
    {"name": "length after clipping", "caught": "down", "code": {D: [("    return norm", "    return min(norm, 1.0)")]},
     "says": "You return the length after clipping. Could one see by it that something is wrong?"},
    {"name": "clipped by value", "caught": "down",
     "code": {D: [("    for group in optimizer.param_groups:\n", "    torch.nn.utils.clip_grad_value_(parameters, 1.0)\n    for group in optimizer.param_groups:\n"), ("(parameters, 1.0).item()", "(parameters, 1e9).item()")]},
     "says": "You clip each NUMBER of the gradients, which bends the direction of the step. Of what is the length to be 1 at most?"},
]  # fmt: skip
RIGHT = [
    {"name": "other words", "code": {R: """
def schedule_of_lr(step, steps):
    warm = steps // 20 or 1
    done = (step - warm) / max(steps - warm, 1)
    return (step + 1) / warm if step < warm else math.cos(math.pi / 2 * done) ** 2
""", D: """
def descend(optimizer, lr):
    ps = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.sqrt(sum(p.grad.square().sum() for p in ps)).item()
    if math.isfinite(norm):
        for p in ps:
            p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
    for g in optimizer.param_groups:
        g["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    for p in ps:
        p.grad = None
    return norm
"""}},
    {"name": "two names", "code": {T: """
def adaptation_loss(model, loss, predicted, target):
    drawn = model.decode(predicted)
    with torch.no_grad():
        wanted = model.decode(target)
    return loss(drawn, wanted)
"""}},
]  # fmt: skip
EQUIVALENT = {
    "decode(cut(target))": "it stands under no_grad",
    f"return {COS}  ->  return {COS.replace('max(1', 'max(2')}": (
        "with one step after the warm-up, the only one has the numerator 0"
    ),
}
