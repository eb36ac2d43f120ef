"""A network that is given a prompt follows it only loosely. Classifier-free guidance asks it twice, once with the
prompt and once without, and exaggerates the difference: what the words change is made larger.

predictor(model, prompts, guidance=1.0, negative=""), in hipa.py: returns a FUNCTION predict_x0(x, timestep) -> x0,
of latents x (B, 4, h, w), one for each of the B prompts. `timestep` is an int, or a tensor (B,).

Inside, model.unet(x, timesteps, context) is the network. It takes as many timesteps, in a tensor on x's device, and
as many text states as there are latents. model.encode_text(list of strings) gives the text states; they are the same
at every step, so compute them once. model.schedule.predict_x0(x, timestep, prediction) makes x0 of the network's
answer.

With guidance 1 or less, ask once. With guidance above 1, ask about both in ONE batch of 2B: first the B latents
with the `negative` prompt ("" by default), then the same latents with the prompts. The answer is without + guidance
* (with - without).

What goes into the network is of type model.dtype, which may be half precision; all arithmetic after it is float32.
"""

from types import SimpleNamespace

import torch

from checks import Wrong, check
from drawing import sheet

TITLE = "Guidance"
MINUTES = 35
POINTS = 8
TARGETS = ["hipa.predictor"]
P = TARGETS[0]


class Model(SimpleNamespace):
    """A model small enough to see through: its text states and its answer are simple sums, and it counts questions."""

    def __init__(self, m, prediction="epsilon", dtype=torch.float32):
        schedule = m.hipa.Schedule("scaled_linear", 0.00085, 0.012, prediction_type=prediction)
        super().__init__(dtype=dtype, device=torch.device("cpu"), schedule=schedule, asked=[], encoded=0)
        self.text, self.net = (torch.nn.Parameter(torch.tensor(1.0), requires_grad=False) for _ in range(2))

    def encode_text(self, prompts):
        self.encoded += 1
        sums = [sum(map(ord, prompt)) % 97 / 97.0 for prompt in prompts]
        states = torch.tensor(sums, dtype=self.dtype, device=self.device)[:, None, None].expand(-1, 2, 3)
        return states * self.text

    def unet(self, x, timesteps, context):
        shape = tuple(timesteps.shape) if torch.is_tensor(timesteps) else repr(timesteps)
        if shape != (len(x),) or len(context) != len(x):
            raise Wrong(
                f"the network was given {len(x)} latents, timesteps {shape}, the states of {len(context)} texts"
            )
        if x.dtype != self.dtype:
            raise Wrong(f"the network computes in {self.dtype} and was given {x.dtype}")
        self.asked.append(len(x))
        shift = context.mean((1, 2))[:, None, None, None]
        return torch.tanh(self.net * x * (1 + shift) + (timesteps / 1000).to(x.dtype)[:, None, None, None])


def latent(g):
    return torch.randn(3, 4, 3, 3, generator=g)


PROMPTS = ["a cat", "a rocket", "an owl"]


@check(P, "without guidance: one question, half the cost")
def plain(m, g):
    model, x = Model(m), latent(g)
    cases = {"the default guidance": (), "guidance 1": (1.0,), "guidance 0.5": (0.5,)}
    out = {name: m.hipa.predictor(model, PROMPTS, *guidance)(x, 700) for name, guidance in cases.items()}
    if model.asked != [3, 3, 3]:
        raise Wrong(f"with guidance 1, 1, 0.5 the network was asked about {model.asked} latents; right is 3 each time")
    return out


@check(P, "with guidance, and with a negative prompt")
def guided(m, g):
    x = latent(g)
    cases = {"guidance 3": (3.0, ""), "guidance 1.5, negative 'a dog'": (1.5, "a dog")}
    return {name: m.hipa.predictor(Model(m), PROMPTS, *how)(x, 700) for name, how in cases.items()}


@check(P, "a timestep for each picture; a network that predicts v")
def own_timesteps(m, g):
    x, t = latent(g), torch.tensor([999, 30, 400])
    return {f"guidance {s:g}": m.hipa.predictor(Model(m, "v_prediction"), PROMPTS, s)(x, t) for s in (1.0, 4.0)}


@check(P, "both halves in one batch; the texts are encoded before the first step, and never again")
def cost(m, g):
    model, x = Model(m), latent(g)
    ask = m.hipa.predictor(model, PROMPTS, 2.0)
    counts = [[ask(x, t), model.encoded][1] for t in (900, 500, 100)]
    if model.asked != [6, 6, 6]:
        raise Wrong(f"in three guided steps the network was asked about {model.asked} latents; right is 6 a step")
    if counts[2] > counts[0]:
        raise Wrong(f"after three steps encode_text was called {counts[2]} times, after one {counts[0]} times")
    return True


@check(P, "half precision goes in, float32 comes out")
def half(m, g):
    return m.hipa.predictor(Model(m, dtype=torch.bfloat16), PROMPTS, 2.0)(latent(g), 700)


def show(m):
    model, scales, prompt = m.hipa.load("emoji"), [1, 1.5, 2, 3, 5, 8], "a panda on a blue background"
    with torch.no_grad():
        x = m.hipa.noise([0], 4, 16, 16)
        rows = [m.hipa.dpm_solver(m.hipa.predictor(model, [prompt], s), x, model.schedule, 8) for s in scales]
        pictures = model.decode(torch.cat(rows))
    return sheet(m, pictures, columns=len(scales)), (
        f"'{prompt}' with guidance {scales}, from the same noise.\n"
        "What becomes of the colours on the right? What does the formula do to a difference that is already large?"
    )
