"""Our tokenizer gives the ids of transformers' CLIPTokenizer, on CLIP's real vocabulary, whatever the prompt.

The vocabulary is the file that OpenAI published with CLIP; the package open_clip_torch ships it. The package is never
imported (it wants torchvision): its file is read where pip put it.
"""

import gzip
import json
import random
import warnings

import ftfy
import pytest

from clip import Tokenizer, byte_characters
from conftest import INSTALL_ORACLES, ORACLES

PADS = {"sd15": "<|endoftext|>", "sd21": "!"}
BEGIN, END = 49406, 49407


# ----------------------------------------------------------------------------------------------- vocabulary and oracle
@pytest.fixture(scope="session")
def clip_vocabulary():
    """({token: id}, [(left, right)]) of CLIP, built from its merges as OpenAI's simple_tokenizer.py does."""
    path = ORACLES / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        pytest.skip(f"CLIP's vocabulary is missing: {INSTALL_ORACLES}")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    characters = list(byte_characters().values())
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_official(folder, vocabulary, pad, length=77):
    """The files of an official repository: vocab.json, merges.txt and two about the special tokens."""
    vocab, merges = vocabulary
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    # As in the real SD 2.x: this file names the wrong pad token, and special_tokens_map.json wins.
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special | {"pad_token": "<|endoftext|>"}))


@pytest.fixture(scope="session", params=PADS)
def tokenizers(request, clip_vocabulary, tmp_path_factory):
    """{file form: (our tokenizer, the oracle)}; both forms in the pad style of each official family."""
    from transformers import CLIPTokenizer

    official, saved = (tmp_path_factory.mktemp(f"{request.param}-{form}") for form in ("official", "saved"))
    pad = PADS[request.param]
    write_official(official, clip_vocabulary, pad)
    oracle = CLIPTokenizer.from_pretrained(official, pad_token=pad)
    oracle.save_pretrained(saved)
    assert not (saved / "vocab.json").exists() and (saved / "tokenizer.json").exists()  # what this form is about
    return {"official": (Tokenizer.load(official), oracle), "saved": (Tokenizer.load(saved), oracle)}


def ours(tokenizer, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is too long: shown by the tests of truncation
        return tokenizer([prompt])[0].tolist()


def theirs(oracle, prompt):
    return oracle(prompt, padding="max_length", truncation=True, max_length=77)["input_ids"]


# -------------------------------------------------------------------------------------------------------- the same ids
NAMED = {
    "empty": "",
    "a cat": "a cat",
    "upper case": "A CAT On The Mat",
    "contractions": "it's they'll I'd we've you're I'm don't ''s 'S 'Re ''t",
    "digits": "2024 3.14159 1,000,000 x2y3 ٣٤ ½ Ⅷ ²",
    "punctuation": "wow!!! ...what?!?! -- (a) [b] {c} <d> #tag @at 50% a_b __ ~~",
    "whitespace": " a\tb\nc\r\nd\x0be\x0cf\u00a0g\u2003h\u3000i\u2028j\u200bk\ufeffl ",
    "NUL and controls": "a\x00b\x01c\x1bd\x7fe",
    "composed accents": "café naïve Ångström Tiếng Việt",
    "combining accents": "cafe\u0301 nai\u0308ve A\u030angstro\u0308m q\u0307\u0323",
    "CJK": "一只猫 猫が好き 고양이 그림 ｆｕｌｌｗｉｄｔｈ",
    "Hangul jamo": "\u1112\u1161\u11ab",
    "right to left": "قطة على السجادة \u200fחתול\u200e שָׁלוֹם",
    "Indic": "बिल्ली का चित्र பூனை",
    "emoji": "🐱 😀😀 ❤️ 🇩🇪 👍🏽",
    "emoji joined by ZWJ": "👩‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀",
    "final sigma": "ΟΔΥΣΣΕΥΣ ΣΑΣ",
    "dotted I": "İSTANBUL ıI",
    "sharp s and ligatures": "STRAẞE straße ﬁne ŒUVRE ǅ",
    "curly quotes": "“a cat’s ‘hat’” — … «x»",
    "HTML": "fish &amp; chips &lt;b&gt; &eacute;",
    "terminal escapes": "\x1b[31mred\x1b[0m",
    "special tokens inside": "a<|endoftext|>b <|startoftext|> c<|ENDOFTEXT|>d",
    "pad token inside": "hi! wow!!cat",
    "outside the basic plane": "𝒜 𐐀 𝟘 🂡",
    "75 tokens": "cat " * 75,
    "76 tokens": "cat " * 76,
    "1000 tokens": "cat " * 1000,
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


def generated(count):
    """Random prompts of 0 to about 90 pieces, without such as happen to be broken encoding (see the test of it)."""
    rng = random.Random(0)
    prompts = []
    while len(prompts) < count:
        prompt = "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(rng.choice((1, 3, 8, 20, 90))))
        if ftfy.fix_encoding(prompt) == prompt:
            prompts.append(prompt)
    return prompts


def test_a_cat(tokenizers):
    """The ids that Stable Diffusion's own tokenizer files give."""
    tokenizer, oracle = tokenizers["official"]
    pad = {"<|endoftext|>": END, "!": 0}[oracle.pad_token]
    assert ours(tokenizer, "a cat") == [BEGIN, 320, 2368, END] + [pad] * 73
    assert len(tokenizer.vocab) == 49408


@pytest.mark.parametrize("form", ["official", "saved"])
@pytest.mark.parametrize("prompt", NAMED.values(), ids=NAMED)
def test_named_prompts(tokenizers, form, prompt):
    tokenizer, oracle = tokenizers[form]
    assert ours(tokenizer, prompt) == theirs(oracle, prompt)


@pytest.mark.parametrize("form", ["official", "saved"])
def test_200_generated_prompts(tokenizers, form):
    tokenizer, oracle = tokenizers[form]
    different = [prompt for prompt in generated(200) if ours(tokenizer, prompt) != theirs(oracle, prompt)]
    assert not different


# -------------------------------------------------------------------------------------- where ours differs, on purpose
@pytest.mark.parametrize(
    "broken, meant", {"a cafÃ©": "a café", "an â€œapple": "an “apple", "ðŸ˜€": "😀", "5 \x80": "5 €"}.items()
)
def test_broken_encoding_is_repaired(tokenizers, broken, meant):
    """As CLIP did in training; transformers' tokenizer of today does not."""
    tokenizer, oracle = tokenizers["official"]
    assert ours(tokenizer, broken) == ours(tokenizer, meant) == theirs(oracle, meant)
    assert theirs(oracle, broken) != theirs(oracle, meant)


@pytest.mark.parametrize("prompt", ["a \ud83d cat", "\udcff", "\ude00\ud83d", "x\udfff" * 100])
def test_lone_surrogates_do_not_crash(tokenizers, prompt):
    """Half a character, as bytes of the command line that are no UTF-8 arrive. The oracle refuses them."""
    ids = ours(tokenizers["official"][0], prompt)
    assert len(ids) == 77 and ids[0] == BEGIN and END in ids


# ---------------------------------------------------------------------------------------------------------- the length
def test_75_words_fit(tokenizers, recwarn):
    """75 words, begin and end: 77 exactly, and no warning."""
    ids = tokenizers["official"][0](["cat " * 74 + "dog"])[0].tolist()
    assert ids == [BEGIN] + [2368] * 74 + [1929, END] and not recwarn.list


def test_too_long_a_prompt_is_cut_and_the_warning_names_what_is_dropped(tokenizers):
    tokenizer, _ = tokenizers["official"]
    with pytest.warns(UserWarning, match=r"75 tokens; dropped: horse$"):
        ids = tokenizer(["cat " * 75 + "horse"])[0].tolist()
    assert ids == [BEGIN] + [2368] * 75 + [END]
    with pytest.warns(UserWarning, match=r"dropped: a blue horse$"):
        tokenizer(["cat " * 75 + "a blue horse"])


def test_only_the_long_prompt_of_several_is_cut(tokenizers):
    tokenizer, _ = tokenizers["official"]
    with pytest.warns(UserWarning, match="dropped: horse$") as caught:
        ids = tokenizer(["a cat", "cat " * 75 + "horse"])
    assert len(caught) == 1 and ids.shape == (2, 77) and ids[0, :4].tolist() == [BEGIN, 320, 2368, END]


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("saved_by_transformers", [False, True])
def test_the_checkpoints_own_length(clip_vocabulary, tmp_path, length, saved_by_transformers):
    """`model_max_length`, which is 77 in official checkpoints and 16 in a small one, say."""
    from transformers import CLIPTokenizer

    write_official(tmp_path, clip_vocabulary, "!", length)
    if saved_by_transformers:
        CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
        tmp_path /= "saved"
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer(["a cat"]).shape == (1, length)
    with pytest.warns(UserWarning, match=f"{length - 2} tokens; dropped: cat cat$"):
        assert tokenizer(["cat " * length])[0].tolist() == [BEGIN] + [2368] * (length - 2) + [END]


def test_several_prompts_are_rows(tokenizers):
    tokenizer, _ = tokenizers["official"]
    prompts = ["a cat", "", "🐱 " * 3]
    assert tokenizer(prompts).tolist() == [ours(tokenizer, prompt) for prompt in prompts]
