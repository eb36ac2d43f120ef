"""Folders that peft itself saves load at the strength of peft's own forward; what is not plain LoRA is refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hipa
from lora import load_lora, merge
from sample import PEFT_NAME, lora_weight

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


@pytest.fixture(scope="module")
def unet(sd15_like):
    return hipa.load(sd15_like).unet


def output(unet):
    torch.manual_seed(1)
    x, t, text = torch.randn(2, 4, 8, 12), torch.tensor([999, 3]), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        return unet(x, t, text)


def peft_folder(unet, folder, **settings):
    """Adaptors with random factors, saved by peft -> what the network gives with them."""
    torch.manual_seed(0)
    net = get_peft_model(copy.deepcopy(unet), LoraConfig(target_modules=LAYERS, init_lora_weights=False, **settings))
    net.save_pretrained(folder)
    return output(net.base_model.model)


@pytest.mark.parametrize("settings", [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 2, "conv1": 1}},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 8}, "alpha_pattern": {"to_v": 3}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {"down_blocks.0.*to_q": 1}},
], ids=lambda settings: "-".join(settings))  # fmt: skip
def test_peft_folders_have_pefts_strength(unet, tmp_path, settings):
    theirs = peft_folder(unet, tmp_path, **settings)
    path, weight = lora_weight(str(tmp_path))
    assert path.name == PEFT_NAME and weight == 1
    ours = copy.deepcopy(unet)
    merge(ours, load_lora(path, ours))
    assert (theirs - output(unet)).abs().max() > 1e-2  # so that a wrong strength would be seen
    torch.testing.assert_close(output(ours), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_without_settings_the_strength_is_unknown(unet, tmp_path):
    peft_folder(unet, tmp_path, r=4, lora_alpha=16)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load_lora(tmp_path / PEFT_NAME, unet)


def test_other_kinds_of_adaptors_are_refused(unet, tmp_path):
    peft_folder(unet, tmp_path, r=4)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in {"use_dora": True, "peft_type": "LOHA", "bias": "all", "fan_in_fan_out": True}.items():
        path.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ValueError, match=key):
            load_lora(tmp_path / PEFT_NAME, unet)


def test_a_pattern_that_would_never_end_is_refused(unet, tmp_path):
    peft_folder(unet, tmp_path, r=4)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"(([a-z_0-9.])*)*X": 1}'))
    with pytest.raises(ValueError, match="for ever"):
        load_lora(tmp_path / PEFT_NAME, unet)


def test_lycoris_default_prefix(unet, tmp_path):
    theirs = peft_folder(unet, tmp_path, r=4, lora_alpha=16)
    renamed = {}
    for key, tensor in load_file(tmp_path / PEFT_NAME).items():
        path, factor = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        name = f"lycoris_{path.replace('.', '_')}"
        renamed[f"{name}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(16.0)
    save_file(renamed, tmp_path / "lycoris.safetensors")
    ours = copy.deepcopy(unet)
    merge(ours, load_lora(tmp_path / "lycoris.safetensors", ours))
    torch.testing.assert_close(output(ours), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
