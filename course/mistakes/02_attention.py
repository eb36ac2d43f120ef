"""Wrong and other right answers to exercise 2."""

A = "unet.Attention.forward"
HEAD = """
def forward(self, x, context):
    q, k, v = {q}, {k}, {v}
    q, k, v = ({split} for t in (q, k, v))
    w = ({score}).softmax({axis})
    out = w @ v
    return {end}
"""
SCORE = "q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5"
BASE = dict(q="self.to_q(x)", k="self.to_k(context)", v="self.to_v(context)",
            split="t.unflatten(-1, (self.heads, -1)).transpose(1, 2)", score=SCORE,
            axis="-1", end="self.to_out[0](out.transpose(1, 2).flatten(2))")  # fmt: skip


def code(**changes):
    return {A: HEAD.format(**{**BASE, **changes})}


MISTAKES = [
    {"name": "not scaled", "caught": "cross", "code": code(score="q @ k.transpose(-1, -2)"),
     "says": "Your scores are not scaled. How does a sum of n products grow with n, and what does softmax make of large scores?"},
    {"name": "scaled by all channels", "caught": "cross", "code": code(score="q @ k.transpose(-1, -2) / (q.shape[-1] * self.heads) ** 0.5"),
     "says": "You divide by the root of all C channels. Over how many products does the score of ONE head sum?"},
    {"name": "scaled up", "caught": "cross", "code": code(score="q @ k.transpose(-1, -2) * q.shape[-1] ** 0.5"),
     "says": "Your scores grow with the number of channels: you multiply by the root. Is that what keeps softmax soft?"},
    {"name": "divided by d", "caught": "cross", "code": code(score="q @ k.transpose(-1, -2) / q.shape[-1]"),
     "says": "You divide by the number of channels itself. The standard DEVIATION of a sum of n products grows more slowly than n: how?"},
    {"name": "scaled after the softmax", "caught": "one_token", "code": code(score="q @ k.transpose(-1, -2)", axis="-1) / (q.shape[-1] ** 0.5"),
     "says": "You scale the weights, after the softmax, so that they no longer sum to 1. What was to be scaled?"},
    {"name": "softmax over places", "caught": "one_token", "code": code(axis="-2"),
     "says": "Your weights sum to 1 over the picture's places, so tokens share out their attention. Who is to share it out?"},
    {"name": "softmax over heads", "caught": "one_token", "code": code(axis="1"),
     "says": "Your softmax runs over the heads. The heads do not know of each other: among what does each place choose?"},
    {"name": "heads cut along the places", "caught": "cross", "code": code(split="t.reshape(t.shape[0], self.heads, t.shape[1], -1)"),
     "says": "reshape to (B, heads, L, C / heads) in one go mixes places. Which axis is to be split, and which two are then exchanged?"},
    {"name": "heads not put back", "caught": "cross", "code": code(end="self.to_out[0](out.reshape(x.shape))"),
     "says": "At the end your heads are not side by side: out is (B, heads, L, C / heads), and reshape keeps that order. Which axes must change places first?"},
    {"name": "one head", "caught": "cross", "code": code(split="t[:, None]"),
     "says": "You use one head with all channels. What can self.heads heads do at the same place that one cannot?"},
    {"name": "causal", "caught": "cross", "code": code(score=f"({SCORE}).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1) > 0, -1e9)"),
     "says": "You hide later tokens, as the text encoder does. Does a place in a picture come before or after a word?"},
    {"name": "naked exponentials", "caught": "sharp", "code": {A: """
def forward(self, x, context):
    q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
    w = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp()
    w = w / w.sum(-1, keepdim=True)
    return self.to_out[0]((w @ v).transpose(1, 2).flatten(2))
"""},
     "says": "Your exponentials overflow when scores are large. Softmax does not change if the same number is taken off all scores of a row: which number would help?"},
    {"name": "softmax over everything", "caught": "one_token", "code": code(score=f"({SCORE}).flatten(1)", axis="-1).unflatten(1, (self.heads, q.shape[2], -1)"),
     "says": "ALL your weights of a picture sum to 1 together. For how many places and heads is each sum to be 1 by itself?"},
    {"name": "scores clamped", "caught": "sharp", "code": code(score=f"({SCORE}).clamp(max=20)"),
     "says": "You cap large scores, so that two large ones look equal. Which number may be taken off all scores of a row instead?"},
    {"name": "weights from the left", "caught": "cross", "code": code(q="x @ self.to_q.weight"),
     "says": "You multiply by the weight itself, and nn.Linear multiplies by its transpose. What does calling the layer do?"},
    {"name": "heads cut and joined without an exchange", "caught": "one_token", "code": code(split="t.reshape(t.shape[0], self.heads, t.shape[1], -1)", end="self.to_out[0](out.reshape(x.shape))"),
     "says": "view and reshape alone keep the order in memory: your heads are stretches of places. What is to be split, what exchanged?"},
    {"name": "root before the division", "caught": "cross", "code": code(score="q @ k.transpose(-1, -2) / ((q.shape[-1] * self.heads) ** 0.5 / self.heads)"),
     "says": "You divide by sqrt(C) / heads. How many channels has ONE head, and of what is the root to be taken?"},
    {"name": "as many tokens as places", "caught": "cross", "code": code(split="t.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)"),
     "says": "You split keys and values as if there were as many tokens as places. How many rows has `context`?"},
]  # fmt: skip
RIGHT = [
    {"name": "by hand", "code": code()},
    {"name": "einsum", "code": {A: """
def forward(self, x, context):
    d = x.shape[2] // self.heads
    q = self.to_q(x).view(*x.shape[:2], self.heads, d)
    k = self.to_k(context).view(*context.shape[:2], self.heads, d)
    v = self.to_v(context).view(*context.shape[:2], self.heads, d)
    w = torch.einsum("blhd,bshd->bhls", q, k).mul(d**-0.5)
    w = (w - w.amax(-1, keepdim=True)).exp()
    w = w / w.sum(-1, keepdim=True)
    return self.to_out[0](torch.einsum("bhls,bshd->blhd", w, v).reshape(x.shape))
"""}},
    {"name": "head by head", "code": {A: """
def forward(self, x, context):
    found = []
    for q, k, v in zip(*(layer(t).chunk(self.heads, dim=2) for layer, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))):
        found.append(torch.softmax(torch.bmm(q, k.mT) / math.sqrt(q.shape[2]), dim=2) @ v)
    return self.to_out[0](torch.cat(found, dim=2))
"""}},
]  # fmt: skip
