"""In a picture of "a cat on a blue background", some places should listen to the word "cat" and others to "blue".
Attention decides that: each place of the picture sends out a query, each token offers a key, and where they fit, the
token's value is fetched. It is the only place where the words enter the picture.

Attention.forward(x, context), in unet.py: x (B, L, C), the picture's L places; context (B, S, D), the S tokens, or x
itself -> (B, L, C).

1. Queries are self.to_q(x), keys self.to_k(context), values self.to_v(context), each with C channels.
2. Split the C channels into self.heads groups of C / heads. Each head attends by itself: (B, heads, L or S, C /
   heads).
3. The score of a place and a token is the dot product of query and key, divided by sqrt(C / heads).
4. Softmax makes scores into weights: for each place, the weights of all tokens sum to 1.
5. Each place gets the sum of the values, times their weights. Put the heads side by side again and apply
   self.to_out[0].

Write it with matmul and softmax: F.scaled_dot_product_attention is what you are writing.
"""

import torch
from PIL import Image, ImageDraw

from checks import Wrong, check

TITLE = "Attention"
MINUTES = 40
POINTS = 9
TARGETS = ["unet.Attention.forward"]
FORBIDDEN = {
    "scaled_dot_product_attention": "that function is what this exercise is about",
    "MultiheadAttention": "that layer is what this exercise is about",
}


def layer(m, g, dim=12, context=10, heads=3):
    net = m.unet.Attention(dim, context, heads).requires_grad_(False)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (1.5 / p.shape[-1] ** 0.5))
    return net


def inputs(g, n=2, length=7, tokens=5, dim=12, context=10):
    return torch.randn(n, length, dim, generator=g), torch.randn(n, tokens, context, generator=g)


@check(TARGETS[0], "one token: whatever the query, each place gets that token's value")
def one_token(m, g):
    net, (x, context) = layer(m, g), inputs(g, tokens=1)
    out = net(x, context)
    if out.shape == x.shape and (out - net.to_out[0](net.to_v(context))).abs().max() > 1e-4:
        raise Wrong("with a single token its weight is 1, so each place gets to_out(to_v(token))")
    return out


@check(TARGETS[0], "cross-attention of 7 places to 5 tokens, 3 heads; self-attention")
def cross(m, g):
    found, (x, context) = {}, inputs(g)
    found["7 places to 5 tokens"] = layer(m, g)(x, context)
    return found | {"x to itself": layer(m, g, context=12)(x, x)}


@check(TARGETS[0], "with large queries each head takes one token, and nothing overflows")
def sharp(m, g):
    net, (x, context) = layer(m, g), inputs(g)
    return [net(30 * x, context), net(3000 * x, context)]


def show(m):
    """Where in the picture each word is looked at."""
    model, prompt = m.hipa.load("emoji"), "a cat on a blue background"
    words = [word for word, _ in model.tokenizer.tokenize(prompt)]
    seen, blocks = [], [block for block in model.unet.modules() if isinstance(block, m.unet.TransformerBlock)]

    def look(module, args):
        x, context = args
        q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (module.to_q(x), module.to_k(context)))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]  # (L, S)
        side = int(weights.shape[0] ** 0.5)
        seen.append(torch.nn.functional.interpolate(weights.T.reshape(1, -1, side, side), size=16, mode="bilinear")[0])

    with torch.no_grad():
        x0 = m.hipa.dpm_solver(m.hipa.predictor(model, [prompt], 2.0), m.hipa.noise([3], 4, 16, 16), model.schedule, 8)
        hooks = [block.attn2.register_forward_pre_hook(look) for block in blocks]
        x = model.schedule.add_noise(x0, 500, m.hipa.noise([5], 4, 16, 16))
        m.hipa.predictor(model, [prompt])(x, 500)
        for hook in hooks:
            hook.remove()
        maps = torch.stack(seen).mean(0)[1 : len(words) + 1]
        picture = m.sample.to_pil(model.decode(x0))[0]
    tiles = [picture.resize((128, 128), 0)]
    for each in maps:
        each = (each - each.min()) / (each.max() - each.min() + 1e-9)
        tiles.append(Image.fromarray((each * 255).byte().numpy()).convert("RGB").resize((128, 128), 0))
    sheet = m.sample.grid(tiles, columns=len(tiles))
    for k, word in enumerate(words):
        draw, x = ImageDraw.Draw(sheet), 128 * (k + 1)
        draw.rectangle((x, 0, x + 7 * len(word) + 6, 14), fill="black")
        draw.text((x + 4, 2), word, fill="white")
    return sheet, (
        "Left: a cat, drawn with your attention in every layer. Then, for each word, where it is looked at (bright).\n"
        "Which word finds the cat? Why may a word such as 'on' find it too? (Its state has seen the words before it.)"
    )
