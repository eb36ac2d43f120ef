"""The official config.json files of SD 1.5 and 2.1-base give networks with every name and shape of the official ones.

The files in official_configs/ are the published ones. Networks are built without memory (on the "meta" device), so the
full sizes cost nothing here; test_full_size.py compares what they compute.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import hipa
from conftest import SCHEDULE
from parity import OURS

OFFICIAL = Path(__file__).parent / "official_configs"
THEIRS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
SIZES = {  # parameters, tensors
    ("sd15", "unet"): (859_520_964, 686),
    ("sd15", "vae"): (83_653_863, 248),
    ("sd15", "text_encoder"): (123_060_480, 196),
    ("sd21base", "unet"): (865_910_724, 686),
    ("sd21base", "vae"): (83_653_863, 248),
    ("sd21base", "text_encoder"): (340_387_840, 372),
}


def read_ours(part, path):
    """Our config of that part, from a file."""
    return hipa.read_config(OURS[THEIRS[part].__name__][1] if part in THEIRS else hipa.Schedule, path)


def build_theirs(part, folder):
    """diffusers' or transformers' network from `folder`/config.json, on the meta device."""
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
        return THEIRS[part].from_config(THEIRS[part].load_config(folder))


@pytest.mark.parametrize("model, part", SIZES)
def test_names_and_shapes(model, part):
    """Official weights load: the names, shapes and counts are those of the reference and of the published files."""
    theirs = build_theirs(part, OFFICIAL / model / part)
    network = OURS[type(theirs).__name__][0]
    with torch.device("meta"):
        ours = network(read_ours(part, OFFICIAL / model / part / "config.json"))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    expected = getattr(network, "rename", dict)(theirs.state_dict())
    assert shapes == {name: tensor.shape for name, tensor in expected.items()}
    assert (sum(shape.numel() for shape in shapes.values()), len(shapes)) == SIZES[model, part]


def test_settings_that_differ():
    """The configs' defaults are SD 1.5's. What SD 2.1 has of its own is read. Both have the same schedule."""
    for part, required in {"unet": {"cross_attention_dim": 768}, "vae": {}, "text_encoder": {}}.items():
        config = read_ours(part, OFFICIAL / "sd15" / part / "config.json")
        assert config == type(config)(**required)
    unet, text = (read_ours(part, OFFICIAL / "sd21base" / part / "config.json") for part in ("unet", "text_encoder"))
    assert [unet.heads(level) for level in range(4)] == [5, 10, 20, 20]
    assert (unet.use_linear_projection, unet.cross_attention_dim) == (True, 1024)
    assert (text.num_hidden_layers, text.hidden_act) == (23, "gelu")
    for model in ("sd15", "sd21base"):
        schedule = read_ours("scheduler", OFFICIAL / model / "scheduler/scheduler_config.json")
        assert schedule == hipa.Schedule(**SCHEDULE, prediction_type="epsilon")


REFUSED = {
    "unet": [
        ("addition_embed_type", "text_time"), ("addition_time_embed_dim", 256), ("num_class_embeds", 1000),
        ("projection_class_embeddings_input_dim", 2816), ("transformer_layers_per_block", [1, 2, 10]),
        ("class_embed_type", "timestep"), ("class_embeddings_concat", True), ("encoder_hid_dim", 4096),
        ("encoder_hid_dim_type", "text_proj"), ("time_cond_proj_dim", 256), ("act_fn", "gelu"),
        ("attention_type", "gated"), ("center_input_sample", True), ("conv_in_kernel", 1), ("conv_out_kernel", 1),
        ("cross_attention_norm", "layer_norm"), ("down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D"]), ("downsample_padding", 0), ("dropout", 0.1),
        ("dual_cross_attention", True), ("flip_sin_to_cos", False), ("freq_shift", 1),
        ("mid_block_only_cross_attention", True), ("mid_block_scale_factor", 2), ("norm_eps", 1e-6),
        ("mid_block_type", "UNetMidBlock2D"), ("mid_block_type", None), ("num_attention_heads", 8),
        ("only_cross_attention", True), ("only_cross_attention", [True, False, False, False]),
        ("resnet_out_scale_factor", 2.0), ("resnet_skip_time_act", True), ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_act_fn", "silu"), ("time_embedding_dim", 64), ("time_embedding_type", "fourier"),
        ("timestep_post_act", "silu"), ("a_setting_of_the_future", 3),
    ],
    "vae": [
        ("act_fn", "gelu"), ("down_block_types", ["AttnDownEncoderBlock2D"]), ("mid_block_add_attention", False),
        ("up_block_types", ["AttnUpDecoderBlock2D"]), ("use_quant_conv", False), ("use_post_quant_conv", False),
        ("shift_factor", 0.1159), ("latents_mean", [0.1, 0.2, 0.3, 0.4]), ("latents_std", [0.1, 0.2, 0.3, 0.4]),
        ("a_setting_of_the_future", 3),
    ],
    "text_encoder": [("hidden_act", "relu"), ("model_type", "t5")],
    "scheduler": [
        ("prediction_type", "sample"), ("prediction_type", "flow_prediction"), ("beta_schedule", "linear"),
        ("beta_schedule", "squaredcos_cap_v2"), ("rescale_betas_zero_snr", True), ("trained_betas", [0.1, 0.2]),
    ],
}  # fmt: skip


def read_changed(part, settings, folder):
    """The official config of SD 2.1-base with other settings; with the setting ... it is left out."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    settings = json.loads((OFFICIAL / "sd21base" / part / name).read_text()) | settings
    (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return read_ours(part, folder / name)


@pytest.mark.parametrize("part", REFUSED)
def test_unsupported_settings_are_refused(part, tmp_path):
    """What the code would compute differently ends in a message that names the setting, and in no picture."""
    for key, value in REFUSED[part]:
        with pytest.raises(hipa.UserError, match=f"{key} = .* not supported"):
            read_changed(part, {key: value}, tmp_path)


@pytest.mark.parametrize("part, key", [("unet", "cross_attention_dim"), ("scheduler", "beta_start")])
def test_settings_without_a_default_are_required(part, key, tmp_path):
    """diffusers' own default is not Stable Diffusion's: a guess would be wrong in silence."""
    with pytest.raises(hipa.UserError, match=key):
        read_changed(part, {key: ...}, tmp_path)


def test_harmless_settings_are_accepted(tmp_path):
    """Settings that change nothing here, and "none" for what is not supported, as diffusers writes them all."""
    unet = {"upcast_attention": True, "sample_size": 96, "class_embed_type": None, "resnet_skip_time_act": False}
    vae = {"force_upcast": False, "sample_size": 32, "scaling_factor": 0.13, "latents_mean": None}
    scheduler = {"clip_sample": True, "timestep_spacing": "leading", "_class_name": "DDIMScheduler"}
    assert read_changed("unet", unet, tmp_path).sample_size == 96
    assert read_changed("vae", vae, tmp_path).scaling_factor == 0.13
    assert read_changed("scheduler", scheduler, tmp_path) == hipa.Schedule(**SCHEDULE)
