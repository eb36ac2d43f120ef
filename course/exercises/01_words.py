"""A network reads numbers, so a prompt is cut into tokens, pieces of words that have a number in a list. Common words
are one token; any other word is put together from pieces, so nothing is ever unknown. CLIP does this by byte-pair
encoding (BPE): training counted which neighbours stand together most often, merged them, counted again, and so on.
What it learned is a list of pairs in that order. You write how the list is used.

Tokenizer._bpe(word), in clip.py: a word, a string such as "cat" -> the list of its tokens.

1. Begin with the word's characters. The last one carries the mark "</w>": ["c", "a", "t</w>"].
2. Of all pairs of neighbours, take the one with the lowest rank. self.ranks is {(left, right): rank}; a pair that
   is not in it is never merged.
3. Merge that pair wherever it stands in the word, from left to right. A piece is used once.
4. Go on with step 2 until no pair of neighbours can be merged.
"""

import random

from PIL import Image, ImageDraw

from checks import check

TITLE = "Words become tokens"
MINUTES = 30
POINTS = 7
TARGETS = ["clip.Tokenizer._bpe"]
B = TARGETS[0]


def tokenizer(m, merges):
    return m.clip.Tokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, merges)


def tokens(m, *cases):
    """Cases (word, merge, merge, ...) -> {the case in words: its tokens}"""
    found = {}
    for word, *merges in cases:
        pairs = [tuple(pair.split()) for pair in merges]
        how = ", ".join(f"({left}, {right})" for left, right in pairs)
        found[f"'{word}' with the pairs {how}" if pairs else f"'{word}'"] = list(tokenizer(m, pairs)._bpe(word))
    return found


@check(B, "without merges: characters, the last one marked as the word's end")
def characters(m, g):
    return tokens(m, ["cat"], ["a"])


@check(B, "the pair of the lowest rank goes first, not the leftmost")
def best_first(m, g):
    return tokens(m, ["abc", "b c</w>", "a b"], ["abcd", "c d</w>", "b c", "a b"], ["abcd", "b c", "c d</w>"])


@check(B, "merged pieces are merged again, also by a pair of lower rank")
def again(m, g):
    return tokens(m, ["cat", "a t</w>", "c at</w>"], ["ababab", "a b", "ab ab"], ["cat", "c at</w>", "a t</w>"])


@check(B, "a pair is merged wherever it stands, from left to right, and no piece is used twice")
def everywhere(m, g):
    return tokens(m, ["abcabd", "a b", "ab c"], ["aaaab", "a a"], ["aaab", "a a", "a b</w>"], ["ababx", "ab a", "a b"])


@check(B, "the end of a word is another piece than its middle")
def end(m, g):
    return tokens(m, ["nana", "n a</w>"], ["an", "a n", "a n</w>"])


@check(B, "200 words with random merges")
def many(m, g):
    rng, cases = random.Random(int(g.initial_seed())), []
    for _ in range(40):
        pieces, merges = ["a", "b", "c", "a</w>", "b</w>", "c</w>"], []
        for _ in range(12):
            left, right = rng.choice([p for p in pieces if not p.endswith("</w>")]), rng.choice(pieces)
            if f"{left} {right}" not in merges and left + right not in pieces:
                merges.append(f"{left} {right}")
                pieces.append(left + right)
        cases += [("".join(rng.choices("abc", k=rng.randint(1, 9))), *merges) for _ in range(5)]
    return tokens(m, *cases)


def show(m):
    tokenizer = m.clip.Tokenizer.load(m.hipa.SHORT_NAMES["emoji"] / "tokenizer")
    sheet = Image.new("RGB", (520, 150), "white")
    draw, y = ImageDraw.Draw(sheet), 8
    for text in ("a cat on a blue background", "catastrophe", "strawberries and bees", "an unpronounceable word"):
        x = 10
        for word in text.split():
            for k, piece in enumerate(tokenizer._bpe(word)):
                shown = piece.replace("</w>", "")
                width = 7 * len(shown) + 6
                draw.rectangle((x, y, x + width, y + 18), fill=("#f0c0c0", "#c0d8f0", "#c8e8c0", "#f0e0b0")[k % 4])
                draw.text((x + 3, y + 3), shown, fill="black")
                x += width + 1
            x += 8
        y += 32
    return sheet, (
        "Your tokens, each in a colour of its own. The words that the model was trained on are one token each.\n"
        "What becomes of the others, and why is that better than a token for 'unknown'?"
    )
