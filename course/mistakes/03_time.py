"""Wrong and other right answers to exercise 3."""

E, R = "unet.sinusoidal_embedding", "unet.ResnetBlock.forward"
CAT = "torch.cat([angle.cos(), angle.sin()], dim=1)"
BLOCK = """
def forward(self, x, time_emb):
    h = {first}
    {time}
    h = {second}
    return {end}
"""
TIME = "self.time_emb_proj(F.silu(time_emb))[:, :, None, None]"
BASE = dict(first="self.conv1(F.silu(self.norm1(x)))", time=f"h = h + {TIME}",
            second="self.conv2(F.silu(self.norm2(h)))", end="h + self.conv_shortcut(x)")  # fmt: skip


def code(**changes):
    return {R: BLOCK.format(**{**BASE, **changes})}


MISTAKES = [
    {"name": "sines first", "caught": "values", "code": {E: [(CAT, "torch.cat([angle.sin(), angle.cos()], dim=1)")]},
     "says": "Sines come first in yours, as in the transformer paper. The weights of the next layer were trained with another order; look at the row of t = 0."},
    {"name": "interleaved", "caught": "values", "code": {E: [(CAT, "torch.stack([angle.cos(), angle.sin()], dim=2).flatten(1)")]},
     "says": "Cosine and sine take turns in your rows. In which order were they asked for?"},
    {"name": "half - 1", "caught": "values", "code": {E: [("/ half)", "/ (half - 1))")]},
     "says": "Your last frequency is exactly 1/10000: you divide by dim / 2 - 1, as another code base does. What is frequency k for the last k by the formula above?"},
    {"name": "dim for half", "caught": "values", "code": {E: [("/ half)", "/ dim)")]},
     "says": "Your frequencies stop at 1/100: the slowest clock comes round after 630 timesteps. By what is k divided?"},
    {"name": "with 2 pi", "caught": "values", "code": {E: [("timestep.float()[:, None] * frequency", "2 * math.pi * timestep.float()[:, None] * frequency")]},
     "says": "Your angles are 2 pi times as large. Is t * frequency in turns, or already an angle?"},
    {"name": "exponent doubled", "caught": "values", "code": {E: [("/ half)", "* 2 / half)")]},
     "says": "Your exponents are twice as large. Two formulas are mixed: where k is divided by dim / 2, by what would 2k be divided?"},
    {"name": "x for the shortcut", "caught": "result", "code": code(end="h + x if h.shape == x.shape else h"),
     "says": "Where the number of channels changes, your residual is missing. Which layer brings x to the new number?"},
    {"name": "time at the end", "caught": "result", "code": code(time=f"t = {TIME}", second="self.conv2(F.silu(self.norm2(h))) + t"),
     "says": "Time comes after the second convolution in yours. Could conv2 then do anything that depends on it?"},
    {"name": "SiLU after the convolution", "caught": "result", "code": code(first="F.silu(self.conv1(self.norm1(x)))", second="F.silu(self.conv2(self.norm2(h)))"),
     "says": "Norm, convolution, SiLU is your order. Then the block can add hardly anything negative; which order was asked for?"},
    {"name": "no SiLU", "caught": "result", "code": code(first="self.conv1(self.norm1(x))", second="self.conv2(self.norm2(h))"),
     "says": "There is no SiLU between norm and convolution. What are two linear layers in a row worth?"},
    {"name": "shortcut of h", "caught": "result", "code": code(end="h + self.conv_shortcut(F.silu(self.norm1(x)))"),
     "says": "Your shortcut takes what norm and SiLU made of x. What is it to take, so that the block can leave x as it is?"},
    {"name": "time multiplied", "caught": "result", "code": code(time=f"h = h * {TIME}"),
     "says": "You multiply by the time. Other networks do; what does this block do with it?"},
]  # fmt: skip
RIGHT = [
    {"name": "powers", "code": {E: """
def sinusoidal_embedding(timestep, dim):
    k = torch.arange(dim // 2).to(timestep.device)
    a = torch.outer(timestep.float(), 10000.0 ** (-2 * k / dim))
    return torch.hstack([torch.cos(a), torch.sin(a)])
"""}},
    {"name": "not in place", "code": code()},
    {"name": "sigmoid", "code": code(first="self.conv1(self.norm1(x) * self.norm1(x).sigmoid())")},
]  # fmt: skip
PLACE = "in place or not, the values are the same"
EQUIVALENT = {
    "h = self.conv1(F.silu(self.norm1(x), inplace=True))  ->  h = self.conv1(F.silu(self.norm1(x), inplace=False))": PLACE,
    "h = self.conv2(F.silu(self.norm2(h), inplace=True))  ->  h = self.conv2(F.silu(self.norm2(h), inplace=False))": PLACE,
    "angle = timestep[:, None]": "whole numbers times float32 are float32",
}
