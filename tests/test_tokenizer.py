"""Our tokenizer gives the ids of transformers' CLIPTokenizer, whatever the prompt.

Live, with the embedded model's vocabulary of 903 tokens. And with CLIP's own of 49,408, which the official checkpoints
use: golden.json has the part of it that these prompts can need, and transformers' ids (see golden.py).
"""

import itertools
import json
import random
import shutil
import warnings

import ftfy
import pytest
from transformers import AddedToken, CLIPTokenizer

from clip import BEGIN, END, Tokenizer, byte_characters
from conftest import ROOT

EMOJI = ROOT / "emoji" / "tokenizer"
PADS = {"sd15": END, "sd21": "!"}  # what each family fills a row with

NAMED = {
    "empty": "",
    "upper case": "A CAT On The Mat",
    "contractions": "it's they'll I'd we've you're I'm don't ''s 'S 'Re ''t",
    "digits": "2024 3.14159 1,000,000 x2y3 ٣٤ ½ Ⅷ ²",
    "punctuation": "wow!!! ...what?!?! -- (a) [b] {c} <d> #tag @at 50% a_b __ ~~",
    "whitespace": " a\tb\nc\r\nd\x0be\x0cf\u00a0g\u2003h\u3000i\u2028j\u200bk\ufeffl ",
    "NUL and controls": "a\x00b\x01c\x1bd\x7fe \x1b[31mred\x1b[0m",
    "composed accents": "café naïve Ångström Tiếng Việt",
    "combining accents": "cafe\u0301 nai\u0308ve A\u030angstro\u0308m q\u0307\u0323",
    "CJK": "一只猫 猫が好き 고양이 그림 ｆｕｌｌｗｉｄｔｈ \u1112\u1161\u11ab",
    "right to left": "قطة على السجادة \u200fחתול\u200e שָׁלוֹם",
    "Indic": "बिल्ली का चित्र பூனை",
    "emoji": "🐱 😀😀 ❤️ 🇩🇪 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀 𝒜 𐐀 𝟘 🂡",
    "final sigma, dotted I, sharp s": "ΟΔΥΣΣΕΥΣ ΣΑΣ İSTANBUL ıI STRAẞE straße ﬁne ŒUVRE ǅ",
    "quotes and HTML": "“a cat’s ‘hat’” — … «x» fish &amp; chips &lt;b&gt; &eacute;",
    "special tokens inside": "a<|endoftext|>b <|startoftext|> c<|ENDOFTEXT|>d hi! wow!!cat",
    "as long as fits": "cat " * 75,
    "one token too long": "cat " * 76,
    "one word of 1000 letters": "abcdefghij" * 100,
    "cut inside a word": "cat " * 74 + "pneumonoultramicroscopic",
}

PIECES = [
    *"a an the of on cat dog astronaut horse blue Background PHOTO painting supercalifragilistic".split(),
    *"'s 't 're 've 'm 'll 'd don't I'M ' '' 7 42 1999 3.5 ½ ٣ Ⅷ ! !! ?! ... , ; : -".split(),
    *"-- _ / \\ | @ # $ % ^ & * ( ) [ ] { } ~ ` + = < >".split(),
    *"é ñ ü Ø ß Æ þ Œ ł ž Ж щ Я λ Σ ς Ω İ ı ǆ ﬁ ａ 猫 犬 日本 ね カ 한 글 ア قط ة חת ף बि ल् பூ ไทย ქა".split(),
    *["e\u0301", "a\u0308", "q\u0323", "\u0301", "\u200d", "\ufe0f", "\u200f", "\u200b"],
    *"😀 🐱 ❤️ 👍🏽 👩‍🚀 👨‍👩‍👧 🇯🇵 🏳️‍🌈 𝒜 ♥ → ★ ✓ “ ” ‘ ’ — … « » € © ™".split(),
    *["\x00", "\x07", "\x1b", "\x7f", "<|startoftext|>", "<|endoftext|>", "<|", "|>", "&amp;"],
]
SPACES = ["", "", " ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028"]


def generated():
    """Random prompts of 1 to 90 pieces. Those that happen to be broken encoding are left out: see the test of it."""
    rng = random.Random(0)
    while True:
        prompt = "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(rng.choice((1, 3, 8, 20, 90))))
        if ftfy.fix_encoding(prompt) == prompt:
            yield prompt


def golden_prompts():
    return [*NAMED.values(), *itertools.islice(generated(), 25)]


def write_official(folder, merges, pad):
    """The four files of an official repository. merges: {"left right": id of the token that it makes}, best first."""
    characters = list(byte_characters().values())
    vocab = {token: i for i, token in enumerate(characters + [c + "</w>" for c in characters])}
    vocab |= {merge.replace(" ", ""): i for merge, i in merges.items()} | {BEGIN: 49406, END: 49407}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), "utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    # As in the real SD 2.x: this file names the wrong pad token, and special_tokens_map.json wins.
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
    return folder


def ours(tokenizer, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is too long: a test of its own
        return tokenizer([prompt])[0].tolist()


def theirs(oracle, prompt, padding="max_length"):
    return oracle(prompt, padding=padding, truncation=True, max_length=oracle.model_max_length)["input_ids"]


@pytest.fixture(scope="module")
def emoji():
    return Tokenizer.load(EMOJI)


# -------------------------------------------------------------------------------------------------------- the same ids
@pytest.mark.parametrize("family", PADS)
def test_official_vocabulary(family, tmp_path):
    """transformers' ids for the whole vocabulary, in the files and with the padding of each official family."""
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["tokenizer"]
    tokenizer = Tokenizer.load(write_official(tmp_path, golden["merges"], PADS[family]))
    pad = {"sd15": 49407, "sd21": 0}[family]
    for prompt, ids in zip(golden_prompts(), golden["ids"][family], strict=True):
        assert ours(tokenizer, prompt) == ids + [pad] * (77 - len(ids)), prompt
    assert ours(tokenizer, "a cat")[:5] == [49406, 320, 2368, 49407, pad]  # as published with CLIP


@pytest.mark.parametrize("pad", PADS.values())
def test_embedded_vocabulary(pad, tmp_path):
    """Live: the official files (which pad with end-of-text), and `tokenizer.json`, as transformers 5 saves it."""
    oracle = CLIPTokenizer.from_pretrained(EMOJI, pad_token=pad)
    oracle.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    forms = [Tokenizer.load(tmp_path)] + [Tokenizer.load(EMOJI)] * (pad == END)
    for prompt in [*NAMED.values(), *itertools.islice(generated(), 100)]:
        for tokenizer in forms:
            assert ours(tokenizer, prompt) == theirs(oracle, prompt), prompt


LEARNED = ["<cat-toy>", "<Raw>", "<special>", "MyWord", "<cat>", "<cat-toy>x"]


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"])
def test_learned_tokens(form, tmp_path):
    """Tokens that a checkpoint was taught, where transformers 5, 4 and 3 keep them. Most are found in any case, the
    longest first; each is one token, wherever it stands."""
    shutil.copytree(EMOJI, tmp_path, dirs_exist_ok=True)
    first = max(json.loads((EMOJI / "vocab.json").read_text("utf-8")).values()) + 1
    if form == "tokenizer.json":
        oracle = CLIPTokenizer.from_pretrained(EMOJI)
        oracle.add_tokens([AddedToken("<Raw>", normalized=False), AddedToken("<special>", special=True), *LEARNED])
        shutil.rmtree(tmp_path)
        oracle.save_pretrained(tmp_path)
    elif form == "added_tokens.json":
        (tmp_path / form).write_text(json.dumps({token: first + k for k, token in enumerate(LEARNED)}))
    else:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        settings[form] = {
            str(first + k): flags | {"content": t, "normalized": t != "<Raw>", "special": t == "<special>"}
            for k, t in enumerate(LEARNED)
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    oracle, tokenizer = CLIPTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    prompts = ["a {}", "{}", "a{}dog", "{}{} x", "{}_1", "a {} and a {}s", "{}x"]
    spelled = [f(token) for token in LEARNED for f in (str, str.lower, str.upper)]
    for prompt in [prompt.replace("{}", token) for prompt in prompts for token in spelled]:
        assert ours(tokenizer, prompt) == theirs(oracle, prompt), prompt
    assert first in ours(tokenizer, "a <cat-toy>") or form == "tokenizer.json"


# -------------------------------------------------------------------------------------- where ours differs, on purpose
@pytest.mark.parametrize(
    "broken, meant", {"a cafÃ©": "a café", "an â€œapple": "an “apple", "ðŸ˜€": "😀", "5 \x80": "5 €"}.items()
)
def test_broken_encoding_is_repaired(emoji, broken, meant):
    """As CLIP did in training; transformers' tokenizer of today does not."""
    oracle = CLIPTokenizer.from_pretrained(EMOJI)
    assert ours(emoji, broken) == ours(emoji, meant) == theirs(oracle, meant) != theirs(oracle, broken)


@pytest.mark.parametrize("prompt", ["a \ud83d cat", "\udcff", "\ude00\ud83d", "x\udfff" * 100])
def test_lone_surrogates_do_not_crash(emoji, prompt):
    """Half a character, as bytes of the command line that are no UTF-8 arrive. transformers refuses them."""
    ids = ours(emoji, prompt)
    assert len(ids) == 32 and ids[0] == emoji.begin and emoji.end in ids


# ------------------------------------------------------------------------------------------------------ length and rows
def test_only_a_prompt_that_is_too_long_is_cut(emoji, recwarn):
    """30 words, begin and end fit. More are cut, and one warning names them."""
    fits = "cat " * 30
    ids = emoji(["a cat", fits]).tolist()
    assert ids[1] == [emoji.begin, *[emoji.vocab["cat</w>"]] * 30, emoji.end] and not recwarn.list
    assert emoji(["a cat", fits + "a horse"]).tolist() == ids
    assert len(recwarn.list) == 1 and str(recwarn[0].message).endswith("left out: a horse")


@pytest.mark.parametrize("length, expected", [(8, 8), (10**30, 10**6), (None, 77)])
def test_length_is_the_checkpoints(length, expected, tmp_path):
    """`model_max_length`. transformers writes 1e30 for "no limit": `hipa.load` then asks the text encoder."""
    shutil.copytree(EMOJI, tmp_path, dirs_exist_ok=True)
    config = {} if length is None else {"model_max_length": length}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).length == expected
