"""Small checkpoints with random weights, written by diffusers and transformers in the official layout.

Their shapes are chosen to catch mistakes: odd head counts, three levels, widths that differ between levels.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest starts a process for each core; so do some tests
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
}  # fmt: skip


def write_tokenizer(folder, pad):
    """A byte-level BPE tokenizer with a handful of merges and 77 places."""
    from clip import byte_characters

    folder.mkdir(parents=True)
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "n"), ("an", "d</w>"), ("r", "e")]
    characters = list(byte_characters().values())
    tokens = characters + [c + "</w>" for c in characters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special, "pad_token": pad}))
    return len(tokens)


def write_checkpoint(folder, like="sd15", prediction_type="epsilon"):
    """A whole StableDiffusionPipeline folder, `like` "sd15" or "sd21" in every setting in which the two differ."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sd21 = like == "sd21"
    vocab_size = write_tokenizer(folder / "tokenizer", "!" if sd21 else "<|endoftext|>")
    width = 48
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=3,
            hidden_act="gelu" if sd21 else "quick_gelu",
            bos_token_id=0,
            eos_token_id=2,
        )  # fmt: skip
    ).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(
        block_out_channels=(24, 48, 72), layers_per_block=2 if sd21 else 1, norm_num_groups=8, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 3, 6) if sd21 else 3, use_linear_projection=sd21, cross_attention_dim=width,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DPMSolverMultistepScheduler(
        **SCHEDULE, prediction_type=prediction_type, timestep_spacing="trailing", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    write_index(folder)
    return folder


def write_index(folder):
    """`model_index.json`: what diffusers makes of the parts."""
    index = {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))


def run_sample(argv, capsys, main=None):
    """A command line, sample.py's or another `main`, in this process -> exit code, lines of stdout, lines of stderr"""
    import sample

    code = 0
    with warnings.catch_warnings():  # each is shown once, as in a process of its own
        warnings.simplefilter("default")
        try:
            sample.run(lambda: (main or sample.main)([str(arg) for arg in argv]))
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), [line for line in re.split(r"[\r\n]+", err) if line.strip()]


@pytest.fixture(scope="session", params=["sd15", "sd21"])
def checkpoint(request, tmp_path_factory):
    """Each kind in turn; SD 2.1's also predicts v, as its 768-pixel sibling does."""
    prediction_type = {"sd15": "epsilon", "sd21": "v_prediction"}[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param, prediction_type)


@pytest.fixture(scope="module")
def model(checkpoint):
    import hipa

    return hipa.load(checkpoint)


def quiet_pipeline(kind, checkpoint):
    """diffusers' pipeline of a class, without its progress bars"""
    pipeline = kind.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def sd15_like(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "sd15")
