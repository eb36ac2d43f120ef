"""CLIP's text side: prompt -> tokens -> text states, which the UNet attends to.

Follows OpenAI's CLIP (byte-level BPE tokenizer, causal text transformer) as transformers packages it. Attribute names
are the checkpoint's keys, so official weights load with strict=True. Left out: the image side, the pooled embedding.

B batch, S text length (77 in official checkpoints), D width.
"""

import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------- tokenizer
# English contractions, a run of letters, one digit, a run of anything else that is no space.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters():
    """{byte: printable character that stands for it}, GPT-2's table, in the order of CLIP's vocabulary.

    BPE works on text, so each of the 256 bytes gets a visible character: itself where it is printable in Latin-1,
    otherwise the next free one from 256 up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def normalize(text):
    """Repairs broken encoding (only non-ASCII text can have it), composes accents (NFC), lower-cases.

    CLIP ran all of ftfy; transformers' tokenizer of today, which this one equals, changes no well-formed text. So only
    ftfy's repair of mojibake ("cafÃ©" -> "café") and of lone surrogates is on.
    """
    if not text.isascii():
        import ftfy  # here, because most prompts are ASCII and need not wait for the import

        off = dict.fromkeys(["uncurl_quotes", "fix_latin_ligatures", "fix_character_width", "fix_line_breaks"], False)
        keep = dict.fromkeys(["unescape_html", "remove_terminal_escapes", "remove_control_chars"], False)
        text = ftfy.fix_text(text, normalization="NFC", restore_byte_a0=False, **off, **keep)
    # One by one: str.lower() of a whole text treats a Greek final sigma specially, and CLIP's does not.
    return "".join(char.lower() for char in text)


class Tokenizer:
    """Byte-level BPE. `Tokenizer.load(folder)` reads a checkpoint's `tokenizer/`; calling it gives token ids."""

    def __init__(self, vocab, merges, length=77, pad=END, specials=(BEGIN, END)):
        """`vocab` {token: id}; `merges` [(left, right)], best first; `length` ids a prompt; `pad` the filling token."""
        self.vocab, self.length = vocab, length
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.begin, self.end, self.pad = vocab[BEGIN], vocab[END], vocab[pad]
        self.specials = {BEGIN, END, pad, *specials}  # these are one token wherever they stand in a prompt
        self.split_specials = regex.compile("(" + "|".join(map(regex.escape, sorted(self.specials))) + ")")
        self.byte_char = byte_characters()
        self.bpe = lru_cache(maxsize=10_000)(self._bpe)

    @classmethod
    def load(cls, folder):
        """Reads `vocab.json` + `merges.txt` (official files) or `tokenizer.json` (what transformers 5 saves)."""
        folder = Path(folder)
        if (folder / "vocab.json").exists():
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        else:
            model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
            vocab = model["vocab"]
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]

        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        special_map = folder / "special_tokens_map.json"
        if special_map.exists():  # it wins over tokenizer_config.json: SD 2.x says "!" here and end-of-text there
            settings |= json.loads(special_map.read_text("utf-8"))
        names = {}  # {"pad_token": "!", ...}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if settings.get(key):
                names[key] = settings[key]["content"] if isinstance(settings[key], dict) else settings[key]
        length = min(settings.get("model_max_length", 77), 10**6)  # transformers writes 1e30 for "no limit"
        return cls(vocab, merges, length, names.get("pad_token", END), tuple(names.values()))

    def _bpe(self, word):
        """One word of byte characters -> its tokens: merges the best-ranked neighbours until none is left."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, float("inf")))
            if pair not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == pair:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return parts

    def tokenize(self, text):
        """-> [(word, its token ids)], without begin, end, padding or limit."""
        found = []
        for piece in self.split_specials.split(text):
            if piece in self.specials:
                found.append((piece, [self.vocab[piece]]))
                continue
            for word in WORD.findall(normalize(piece)):
                characters = "".join(self.byte_char[byte] for byte in word.encode("utf-8", "replace"))
                found.append((word, [self.vocab.get(token, self.end) for token in self.bpe(characters)]))
        return found

    def __call__(self, prompts):
        """Prompts (a list of B strings) -> ids (B, length): begin, the text, end, padding.

        Too long a prompt is cut, with a warning that names the words that are lost.
        """
        rows = []
        for prompt in prompts:
            ids, dropped = [self.begin], []
            for word, tokens in self.tokenize(prompt):
                ids += tokens
                if len(ids) > self.length - 1:  # the last place is the end token's
                    dropped.append(word)
            if dropped:
                room = self.length - 2
                warnings.warn(f"prompt longer than {room} tokens; dropped: {' '.join(dropped)}", stacklevel=2)
            ids = [*ids[: self.length - 1], self.end]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows)


# --------------------------------------------------------------------------------------------------------- transformer
@dataclass
class CLIPTextConfig:
    """The settings of `text_encoder/config.json` that differ between supported checkpoints. Defaults: SD 1.5."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # "gelu" in SD 2.x
    layer_norm_eps: float = 1e-5

    FIXED = {"model_type": "clip_text_model", "hidden_act": {"quick_gelu", "gelu"}}
    # Training-time settings, the pooled embedding's size, and token ids, which are wrong in the official files: the
    # tokenizer's are used instead.
    IGNORED = {
        "architectures", "attention_dropout", "dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
        "initializer_factor", "initializer_range", "projection_dim", "torch_dtype", "transformers_version",
    }  # fmt: skip


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        if cfg.hidden_size % cfg.num_attention_heads:
            raise ValueError(f"{cfg.hidden_size} channels do not divide into {cfg.num_attention_heads} heads")
        self.heads = cfg.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(cfg.hidden_size, cfg.hidden_size) for _ in range(4)
        )

    def forward(self, x):  # (B, S, D)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, S, D/heads)
        # Causal: a token sees those before it. Padding is NOT masked; Stable Diffusion was trained that way.
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.quick = cfg.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        # quick_gelu is OpenAI's approximation x * sigmoid(1.702 x); SD 1.5's weights were trained with it.
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class EncoderLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x):  # (B, S, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids):  # (B, S) -> (B, S, D)
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, ids):
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPTextModel(nn.Module):
    def __init__(self, cfg=None):
        super().__init__()
        self.config = cfg or CLIPTextConfig()
        self.text_model = TextTransformer(self.config)

    def forward(self, ids):
        """Token ids (B, S) -> text states (B, S, D): the last layer's, after the final layer norm."""
        return self.text_model(ids)

    @staticmethod
    def rename(state_dict):
        """Drops the `position_ids` buffer of older files, and adds the prefix that transformers >= 5.6 leaves out."""
        return {
            key if key.startswith("text_model.") else f"text_model.{key}": tensor
            for key, tensor in state_dict.items()
            if not key.endswith("position_ids")
        }
