"""Low-rank adaptors: a network changes by B A and by nothing else, diffusers and this project read each other's files,
and what does not fit is refused before it can draw a wrong picture.

Adaptors "as if trained" have random factors large enough that a forgotten scale or a swapped pair shows in the output.
Errors are printed (`pytest -rP`) and at most 1e-5 of the largest value.
"""

import copy
import hashlib
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hipa
import lora
import sample
from conftest import quiet_pipeline, run_sample
from lora import ATTENTION, add_lora, delta, factors, load_lora, lora_off, merge, save_lora
from parity import assert_same, normal, unet_inputs
from test_official_configs import OFFICIAL, read_ours
from test_sample import files, parameters, pixels
from test_sampler import run_pipeline
from unet import UNet2DConditionModel
from vae import to_pil

LAYERS = pytest.mark.parametrize("targets", [ATTENTION, "all"], ids=["attention", "all layers"])
ONE_KIND = pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)  # where the kind of network is no matter
A_QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # a layer's path in the small networks


@pytest.fixture
def unet(checkpoint):
    return hipa.load(checkpoint).unet


@pytest.fixture(scope="module")
def base(sd15_like):
    """The small SD 1.5's UNet, for tests that leave it as it is."""
    return hipa.load(sd15_like).unet


@pytest.fixture(scope="module")
def pipelines():
    """diffusers' pipelines by checkpoint, made once: `pipeline` takes the adaptors out again."""
    return {}


@pytest.fixture
def pipeline(pipelines, checkpoint):
    if checkpoint not in pipelines:
        pipelines[checkpoint] = quiet_pipeline(StableDiffusionPipeline, checkpoint)
    yield pipelines[checkpoint]
    pipelines[checkpoint].unload_lora_weights()


def trained(net, targets=ATTENTION, rank=4):
    """`net` with adaptors as if trained. B A is about 0.4 times the base weights."""
    torch.manual_seed(0)  # for A
    add_lora(net, rank, targets)
    for seed, (_, B) in enumerate(factors(net).values()):
        B.data = 0.2 * normal(*B.shape, seed=seed)
    return net


@torch.no_grad()
def output(net):
    """What our UNet or diffusers' predicts: a batch of two, latents of 13 x 18."""
    prediction = net(*unet_inputs(net.config))
    return getattr(prediction, "sample", prediction)


def far(a, b):
    """More than a hundredth of the largest value apart: a thousand times what the comparisons allow."""
    return (a - b).abs().max() > 0.01 * b.abs().max()


def same_weights(a, b):
    """Two networks' weights, or two state dicts, are equal bit by bit."""
    a, b = (net if isinstance(net, dict) else net.state_dict() for net in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------- in the network
def test_the_number_of_parameters_on_sd21():
    """3,319,808 at rank 16: 16 transformers, of width c and text width 1024, with eight adapted layers each.

    Of these eight, six are c -> c, and attn2's to_k and to_v are 1024 -> c.
    """
    config = read_ours("unet", OFFICIAL / "sd21base" / "unet" / "config.json")
    with torch.device("meta"), hipa.NoInitialisation():
        net = UNet2DConditionModel(config)
    parameters = add_lora(net, 16)
    transformers = {320: 5, 640: 5, 1280: 6}
    by_hand = sum(n * 16 * (6 * (c + c) + 2 * (1024 + c)) for c, n in transformers.items())
    assert sum(p.numel() for p in parameters) == by_hand == 3_319_808
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == by_hand
    assert len(factors(net)) == 8 * 16 and len(parameters) == 2 * 8 * 16


@LAYERS
def test_untrained_adaptors_change_nothing(unet, targets):
    """B is zero: the output is bitwise the base's. A is not, or neither would ever learn."""
    base = output(unet)
    add_lora(unet, 4, targets)
    assert torch.equal(output(unet), base)
    assert all(A.abs().max() > 0 and not B.any() for A, B in factors(unet).values())


def test_all_layers_are_all_layers(unet):
    """ "all" is each Linear and Conv2d; by default it is the four of each attention, and no other layer."""
    attention = factors(trained(copy.deepcopy(unet)))
    everything = factors(trained(unet, "all"))
    layers = [path for path, m in unet.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    assert list(everything) == [path for path in layers if "lora_" not in path]
    expected = [path for path in everything if re.search(r"attn[12]\.to_(q|k|v|out\.0)$", path)]
    assert list(attention) == expected and len(expected) % 8 == 0


@ONE_KIND
def test_lora_off_is_the_base(unet):
    """Bitwise, with trained adaptors. It nests, and they are on again after the outer context, however it ends."""
    base = output(unet)
    on = output(trained(unet, "all"))
    assert far(on, base)
    with lora_off(unet):
        with lora_off(unet):
            assert torch.equal(output(unet), base)
        assert torch.equal(output(unet), base)
    assert torch.equal(output(unet), on)
    with pytest.raises(KeyError), lora_off(unet):
        raise KeyError
    assert torch.equal(output(unet), on)


@ONE_KIND
@LAYERS
def test_only_the_factors_learn(unet, targets):
    """After a backward pass A and B have gradients, and the frozen base has none."""
    parameters = add_lora(unet.requires_grad_(True), 4, targets)
    for seed, parameter in enumerate(parameters):  # A has a gradient only where B is not zero
        parameter.data = 0.2 * normal(*parameter.shape, seed=seed)
    unet(*unet_inputs(unet.config)).square().mean().backward()
    learn = {id(p) for p in parameters}
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (id(parameter) in learn) == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


@ONE_KIND
@LAYERS
def test_the_base_keeps_its_names(unet, checkpoint, targets):
    """The base's keys and tensors are the checkpoint's, which loads into the adapted network too."""
    base = dict(unet.state_dict())
    adapted = trained(unet, targets).state_dict()
    assert same_weights({name: adapted[name] for name in base}, base)
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in adapted.keys() - base.keys())
    missing, unexpected = unet.load_state_dict(load_file(hipa.weights_file(checkpoint / "unet")), strict=False)
    assert not unexpected and set(missing) == adapted.keys() - base.keys()


@pytest.mark.parametrize(
    "layer, x", [(torch.nn.Linear(5, 3), (2, 5)), (torch.nn.Conv2d(5, 3, 3), (2, 5, 4, 4))], ids=str
)
def test_the_factors_stay_float32(layer, x):
    """Beside a half-precision base too; the output is of the base's kind, and the gradients of the factors'."""
    net = torch.nn.Sequential(layer).to(torch.bfloat16)
    parameters = add_lora(net, 2, "all")
    y = net(normal(*x).bfloat16())
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in parameters)


# --------------------------------------------------------------------------------------------------------------- merged
@LAYERS
def test_merged_is_the_same_network(unet, targets):
    """W + B A in place of two paths: 3x3, stride 2 and 1x1 convolutions and linear layers, at odd sizes."""
    merged = copy.deepcopy(unet)
    base, on = output(unet), output(trained(unet, targets))
    assert far(on, base)
    merge(merged, factors(unet))
    assert_same("merged", output(merged), on, relative=True)
    if targets == "all":  # the kinds of layer that this test is about
        kinds = {(m.kernel_size, m.stride) for m in merged.modules() if isinstance(m, torch.nn.Conv2d)}
        assert kinds == {((3, 3), (1, 1)), ((3, 3), (2, 2)), ((1, 1), (1, 1))}


def test_the_change_of_the_weights_is_b_times_a():
    """delta: for a linear layer the product of the matrices; a convolution by it is A's, then B's."""
    A, B = normal(3, 5), normal(7, 3, seed=1)
    assert_same("linear", delta(A, B), B @ A)
    A, B, x = normal(3, 5, 3, 3), normal(7, 3, 1, 1, seed=1), normal(2, 5, 8, 9, seed=2)
    convolve = torch.nn.functional.conv2d
    assert_same("conv", convolve(x, delta(A, B), stride=2), convolve(convolve(x, A, stride=2), B), relative=True)


@ONE_KIND
def test_the_weight_multiplies_the_change(unet):
    """Half the weight is half the change, and the negative one takes merged adaptors out again."""
    base, full, loras = copy.deepcopy(unet), copy.deepcopy(unet), factors(trained(copy.deepcopy(unet), "all"))
    merge(full, loras)
    assert not same_weights(full, base)
    for weight, share in ((0.5, 0.5), (-0.5, 0)):
        merge(unet, loras, weight)
        for ours, a, b in zip(unet.parameters(), base.parameters(), full.parameters(), strict=True):
            assert (ours - (a + share * (b - a))).abs().max() < 1e-6


@ONE_KIND
def test_merging_in_half_precision_rounds_once(unet):
    """Each float16 weight is the nearest to the exact sum: not further off than half the distance to the next."""
    loras = factors(trained(copy.deepcopy(unet), "all"))
    unet.half()
    exact = {path: unet.get_submodule(path).weight.double() + delta(A, B).double() for path, (A, B) in loras.items()}
    merge(unet, loras)
    for path, sum_ in exact.items():
        merged = unet.get_submodule(path).weight
        assert merged.dtype == torch.float16
        unit = np.spacing(np.abs(merged.numpy()))  # from this float16 to the next larger
        error = np.abs(merged.double().numpy() - sum_.detach().numpy())
        assert (error <= 0.501 * unit.astype(float)).all(), path


@ONE_KIND
def test_merging_leaves_the_checkpoint_alone(checkpoint, unet):
    """The base weights are the checkpoint's own file, memory-mapped: merged ones are new tensors."""
    path = hipa.weights_file(checkpoint / "unet")
    before, tensors = sha256(path), dict(unet.state_dict())
    loras = factors(trained(copy.deepcopy(unet), "all"))
    merge(unet, loras)
    assert not same_weights(unet, tensors)
    assert sha256(path) == before and same_weights(tensors, hipa.load(checkpoint).unet)


# ---------------------------------------------------------------------------------------- files: diffusers' and peft's
@LAYERS
def test_diffusers_reads_ours(checkpoint, pipeline, targets, tmp_path):
    """The UNet's output and a picture in one step; and ours with the file merged, as `sample.py` does."""
    model = hipa.load(checkpoint)
    adapted = trained(copy.deepcopy(model.unet), targets)
    save_lora(tmp_path / sample.LORA_NAME, adapted, {"step": "100"})
    pipeline.load_lora_weights(tmp_path)
    assert far(output(adapted), output(model.unet))
    assert_same("diffusers with our adaptors", output(adapted), output(pipeline.unet), relative=True)
    sample.apply_lora(model, tmp_path / sample.LORA_NAME)
    with torch.no_grad():
        theirs = run_pipeline(pipeline, ["a cat"], [0], 1, 1.0)
    assert_same("picture", hipa.sample(model, ["a cat"], [0], 1), theirs, relative=True)


@ONE_KIND
def test_diffusers_weights_adaptors_as_we_do(checkpoint, pipeline, unet, tmp_path):
    """Their adapter weight is our `weight`."""
    save_lora(tmp_path / sample.LORA_NAME, trained(copy.deepcopy(unet)))
    pipeline.load_lora_weights(tmp_path, adapter_name="hipa")
    pipeline.set_adapters("hipa", 0.3)
    merge(unet, load_lora(tmp_path / sample.LORA_NAME, unet), 0.3)
    assert_same("weight 0.3", output(unet), output(pipeline.unet), relative=True)


CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"]  # for SD 2, these linear
LINEAR = ["time_emb_proj", "linear_1", "linear_2", "ff.net.0.proj", "ff.net.2"]
PEFT = {  # adaptors as diffusers' training scripts make them
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": list(ATTENTION)},
    "alpha is not the rank": {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION)},
    "all layers": {"r": 4, "lora_alpha": 2, "target_modules": [*ATTENTION, *CONVOLUTIONS, *LINEAR]},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": list(ATTENTION)},
    "ranks by pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2}, "target_modules": list(ATTENTION)},
    "alphas by pattern": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"attn2.to_v": 3}, "target_modules": [*ATTENTION, *LINEAR],
        "alpha_pattern": {"to_k": 2, "attn2.to_v": 5, "ff.net.2": 1},
    },
    "patterns are regular expressions": {
        "r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "rank_pattern": {"^mid_block.*": 3},
        "alpha_pattern": {r"^mid_block\..*": 2, r"attn\d.to_[kv]": 16},
    },
    "a pattern is no mere ending": {
        "r": 4, "lora_alpha": 8, "target_modules": ["conv", "proj_in", *LINEAR], "alpha_pattern": {"proj": 1},
    },
}  # fmt: skip


def save_peft(pipeline, folder, settings, spelling=dict):
    """Gives diffusers' UNet adaptors by peft with random factors, and saves them as its training scripts do."""
    pipeline.unet.add_adapter(LoraConfig(init_lora_weights=False, **settings))
    tensors = spelling(get_peft_model_state_dict(pipeline.unet))
    settings = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=settings)
    return folder / sample.LORA_NAME


@pytest.mark.parametrize(
    "checkpoint, settings", [*(("sd15", name) for name in PEFT), ("sd21", "all layers")], indirect=["checkpoint"]
)
def test_ours_reads_diffusers(checkpoint, pipeline, unet, settings, tmp_path):
    """With alphas, ranks and scaling as the file's header says.

    Older scripts call attention's factors lora.down and lora.up, beside convolutions' lora_A and lora_B.
    """
    base = output(unet)
    older = len(PEFT[settings]) > 3  # one spelling for some of the settings and one for the others
    path = save_peft(pipeline, tmp_path, PEFT[settings], convert_state_dict_to_diffusers if older else dict)
    theirs = output(pipeline.unet)
    assert far(theirs, base)
    merge(unet, load_lora(path, unet))
    assert_same("merged", output(unet), theirs, relative=True)


@ONE_KIND
def test_ours_reads_a_unets_own_file(pipeline, unet, tmp_path):
    """`unet.save_lora_adapter` puts no "unet." before the names, neither the tensors' nor the settings'."""
    pipeline.unet.add_adapter(LoraConfig(init_lora_weights=False, **PEFT["alpha is not the rank"]))
    pipeline.unet.save_lora_adapter(tmp_path)
    merge(unet, load_lora(tmp_path / sample.LORA_NAME, unet))
    assert_same("merged", output(unet), output(pipeline.unet), relative=True)


@ONE_KIND
def test_ours_by_way_of_diffusers(pipeline, unet, tmp_path):
    """Adaptors of several ranks, saved, read by diffusers, saved by it with its settings, and read again.

    Its settings then hold patterns such as "^mid_block.attentions.0…to_q".
    """
    ranks = {path: 2 + k % 3 for k, path in enumerate(factors(trained(copy.deepcopy(unet))))}
    adapted = trained(copy.deepcopy(unet), ranks)
    save_lora(tmp_path / sample.LORA_NAME, adapted)
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    assert_same("diffusers, several ranks", output(adapted), output(pipeline.unet), relative=True)
    settings = pipeline.unet.peft_config["default"].to_dict()
    tensors = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path / "again", unet_lora_layers=tensors, unet_lora_adapter_metadata=settings)
    merge(unet, load_lora(tmp_path / "again" / sample.LORA_NAME, unet))
    assert_same("and back", output(unet), output(adapted), relative=True)


@ONE_KIND
@LAYERS
def test_ours_reads_ours(unet, targets, tmp_path):
    """The factors bit by bit, in float32, of the same layers in the same order."""
    adapted = factors(trained(copy.deepcopy(unet), targets))
    save_lora(tmp_path / "a.safetensors", trained(copy.deepcopy(unet), targets))
    loras = load_lora(tmp_path / "a.safetensors", unet)
    assert sorted(loras) == sorted(adapted)
    for path, pair in adapted.items():
        assert all(torch.equal(a, b) for a, b in zip(loras[path], pair, strict=True))


# ----------------------------------------------------------------------------------------------- files: other spellings
def same_deltas(ours, theirs):
    for path, pair in theirs.items():
        torch.testing.assert_close(delta(*ours[path]), delta(*pair), rtol=1e-6, atol=1e-7)
    return ours.keys() == theirs.keys()


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("down, up", [("lora.down", "lora.up"), ("lora_A", "lora_B")])
def test_spellings(base, prefix, down, up, tmp_path):
    """diffusers' names of 2023 and today's, with the network's name before them and without."""
    loras = {A_QUERY: (normal(4, 24), normal(24, 4)), "conv_in": (normal(2, 4, 3, 3), normal(24, 2, 1, 1))}
    tensors = {f"{prefix}{path}.{down}.weight": A for path, (A, _) in loras.items()}
    tensors |= {f"{prefix}{path}.{up}.weight": B for path, (_, B) in loras.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert same_deltas(load_lora(tmp_path / "a.safetensors", base), loras)


def kohya(loras, alphas):
    """The adaptors as kohya's scripts write them: "_" for ".", and B divided by the scale alpha / rank, which is kept
    apart. The alphas are taken in turn."""
    tensors = {}
    for k, (path, (A, B)) in enumerate(loras.items()):
        name, alpha = "lora_unet_" + path.replace(".", "_"), alphas[k % len(alphas)]
        tensors[f"{name}.lora_down.weight"] = A.detach().clone()
        tensors[f"{name}.lora_up.weight"] = B.detach() * (A.shape[0] / alpha)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


@LAYERS
def test_kohya(pipeline, unet, targets, tmp_path):
    """The changes of the weights that were saved, each layer with its alpha; and diffusers reads the file as we do,
    where all alphas are equal (with several it does not)."""
    adapted = trained(copy.deepcopy(unet), targets)
    for alphas in ([1, 2, 8], [2]):
        save_file(kohya(factors(adapted), alphas), tmp_path / sample.LORA_NAME)
        assert same_deltas(load_lora(tmp_path / sample.LORA_NAME, unet), factors(adapted))
    pipeline.load_lora_weights(tmp_path)
    assert_same("diffusers, kohya's file", output(adapted), output(pipeline.unet), relative=True)


def test_half_precision_files(base, tmp_path):
    """Adaptors are often stored as float16; they are float32 here, and the alpha is applied to that."""
    adapted = trained(copy.deepcopy(base))
    tensors = {name: tensor.half() for name, tensor in kohya(factors(adapted), [3]).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    for path, (A, B) in load_lora(tmp_path / "a.safetensors", base).items():
        name = "lora_unet_" + path.replace(".", "_")
        assert A.dtype == B.dtype == torch.float32
        assert_same("B", B, tensors[f"{name}.lora_up.weight"].float() * (3 / 4), relative=True)


# ------------------------------------------------------------------------------------------------------------- refusals
A4, B4 = torch.ones(4, 24), torch.ones(24, 4)  # factors that fit A_QUERY, of width 24
FITTING = {f"unet.{A_QUERY}.lora_A.weight": A4, f"unet.{A_QUERY}.lora_B.weight": B4}


def write(path, tensors, metadata=None):
    """A safetensors file, which may hold one tensor under several names here."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)


REFUSED = {  # what is in the file, and what the message must name
    "a layer that is not there": (FITTING | {"unet.down_blocks.9.x.lora_A.weight": A4}, "unet.down_blocks.9.x.lora_A"),
    "the text encoder": (FITTING | {"text_encoder.text_model.x.lora_A.weight": A4}, "text_encoder.text_model.x"),
    "kohya's text encoder": (FITTING | {"lora_te_text_model_x.lora_down.weight": A4}, "lora_te_text_model_x"),
    "A without B": ({f"unet.{A_QUERY}.lora_A.weight": A4}, A_QUERY),
    "B without A": ({f"unet.{A_QUERY}.lora_B.weight": B4}, A_QUERY),
    "DoRA": (FITTING | {f"unet.{A_QUERY}.lora_magnitude_vector": A4}, "lora_magnitude_vector"),
    "a bias": (FITTING | {f"unet.{A_QUERY}.lora_B.bias": A4}, "lora_B.bias"),
    "a network, not adaptors": ({"conv_in.weight": A4}, "conv_in.weight"),
    "nothing": ({}, "no tensors in it"),
    "factors of rank 0": ({name: torch.ones(0, 0) for name in FITTING}, A_QUERY),
    "factors of no dimension": ({name: torch.tensor(1.0) for name in FITTING}, A_QUERY),
    "two alphas for a layer": (FITTING | {f"unet.{A_QUERY}.alpha": torch.ones(2)}, A_QUERY),
}


@pytest.mark.parametrize("tensors, named", REFUSED.values(), ids=REFUSED)
def test_refused_files(base, tensors, named, tmp_path):
    """Half applied, adaptors would draw what their author never saw: the message names the file and the key."""
    write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        load_lora(tmp_path / "a.safetensors", base)
    assert "a.safetensors" in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_files_that_are_refused(base, tmp_path):
    """Settings that are damaged, and what is no safetensors file. The file without its fault is read."""
    path = tmp_path / "a.safetensors"
    write(path, FITTING)
    assert list(load_lora(path, base)) == [A_QUERY]
    for header in ("{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 2}}'):
        write(path, FITTING, {"lora_adapter_metadata": header})
        with pytest.raises(ValueError, match="a.safetensors"):
            load_lora(path, base)
    for content in (b"", b"a text", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.safetensors"):
            load_lora(path, base)
    with pytest.raises(ValueError, match="missing.safetensors"):
        load_lora(tmp_path / "missing.safetensors", base)


MISFITS = {
    "a layer that is not there": ("down_blocks.9", A4, B4),
    "no layer with weights": ("mid_block", A4, B4),
    "A too wide": (A_QUERY, torch.ones(4, 25), B4),
    "B too wide": (A_QUERY, A4, torch.ones(25, 4)),
    "two ranks": (A_QUERY, A4, torch.ones(24, 5)),
    "a convolution for a linear layer": (A_QUERY, torch.ones(4, 24, 3, 3), torch.ones(24, 4, 1, 1)),
    "a linear layer for a convolution": ("conv_in", torch.ones(4, 4), B4),
    "a kernel of another size": ("conv_in", torch.ones(4, 4, 5, 5), torch.ones(24, 4, 1, 1)),
    "a kernel in B": ("conv_in", torch.ones(4, 4, 3, 3), torch.ones(24, 4, 3, 3)),
}


@pytest.mark.parametrize("path, A, B", MISFITS.values(), ids=MISFITS)
def test_adaptors_for_another_network_change_nothing(base, path, A, B):
    """The first of the two fits, and is not merged either."""
    before = copy.deepcopy(base)
    fits = {"up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(4, 48), torch.ones(48, 4))}
    merge(copy.deepcopy(base), fits)
    with pytest.raises(ValueError, match=f"another network.*{path}"):
        merge(base, fits | {path: (A, B)})
    assert same_weights(base, before)


@ONE_KIND
def test_adaptors_are_added_once(unet):
    """A second time would freeze the first, or give adaptors adaptors."""
    trained(unet)
    with pytest.raises(ValueError, match="adaptors"):
        add_lora(unet, 4, "all")


@pytest.mark.parametrize("targets", [["to_x"], ["o_q"], {"down_blocks.9": 4}, {}], ids=str)
def test_a_target_that_matches_nothing(base, targets):
    """The end of a path is whole names: "o_q" is no end of "to_q"."""
    with pytest.raises(ValueError, match="no layer"):
        add_lora(base, 4, targets)


# -------------------------------------------------------------------------------------------------------------- writing
@ONE_KIND
def test_saving_is_atomic(unet, monkeypatch, tmp_path):
    """The file is there whole, and alone; a write that fails half way leaves the file that was there."""
    path = tmp_path / "a.safetensors"
    save_lora(path, trained(unet))
    assert list(files(tmp_path)) == [path]
    before = sha256(path)

    def full_disk(file):
        os.truncate(file, 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_lora(path, unet)
    assert sha256(path) == before and list(files(tmp_path)) == [path]
    monkeypatch.undo()
    save_lora(path, unet, {"step": "2"})  # what the failure left is no obstacle
    assert list(files(tmp_path)) == [path] and sha256(path) != before


@ONE_KIND
def test_what_is_in_the_file(unet, tmp_path):
    """float32 tensors by diffusers' names, and in the header what the caller wants to say."""
    save_lora(tmp_path / "a.safetensors", trained(unet.half()), {"step": "100"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "100"}
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == {f"unet.{path}.lora_{factor}.weight" for path in factors(unet) for factor in "AB"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def adaptors(base, tmp_path_factory):
    """A folder with adaptors for the small SD 1.5."""
    folder = tmp_path_factory.mktemp("adaptors")
    save_lora(folder / sample.LORA_NAME, trained(copy.deepcopy(base), "all"))
    return folder


@pytest.fixture
def cli(sd15_like, tmp_path, capsys):
    """Draws "a cat" with the small SD 1.5 and options -> `code`, `err` (lines), the `path` of the picture."""

    def call(*options, model=sd15_like):
        argv = ["a cat", "--model", model, "--out", tmp_path / "out", *options]
        code, out, err = run_sample(argv, capsys)
        return SimpleNamespace(code=code, err=err, path="\n".join(out))

    return call


def equal(a, b):
    return np.array_equal(pixels(a.path), pixels(b.path))


def test_adaptors_make_it_one_step(cli, adaptors):
    """One step with them and 25 without, unless told otherwise; the picture says which they are, and their weight."""
    file = adaptors / sample.LORA_NAME
    made_with = {o: parameters(cli("--lora", o, "--size", "8").path) for o in (file, f"{file}:0.5", "none")}
    assert "Steps: 1," in made_with[file] and "CFG scale: 1," in made_with[file]
    name = "/".join(Path(file).parts[-2:])  # no more: a picture need not tell where its maker keeps files
    assert made_with[file].endswith(f", Lora: {name}:1")
    assert "Steps: 1," in made_with[f"{file}:0.5"] and made_with[f"{file}:0.5"].endswith(f", Lora: {name}:0.5")
    assert "Steps: 25," in made_with["none"] and "Lora" not in made_with["none"]
    assert "Steps: 2," in parameters(cli("--lora", file, "--steps", "2").path)


def test_the_picture_is_the_adapted_networks(cli, adaptors, sd15_like):
    """Each weight draws another picture, a weight of 0 the base's; a folder stands for the file in it."""
    file = adaptors / sample.LORA_NAME
    drawn = {option: cli("--lora", option, "--steps", "1") for option in (file, f"{file}:0.5", f"{file}:0", "none")}
    assert all(result.code == 0 and result.err == [] for result in drawn.values())
    assert equal(drawn[f"{file}:0"], drawn["none"])
    assert not equal(drawn[file], drawn["none"]) and not equal(drawn[file], drawn[f"{file}:0.5"])
    assert equal(drawn[file], cli("--lora", adaptors)) and equal(drawn[f"{file}:0.5"], cli("--lora", f"{adaptors}:0.5"))
    model = hipa.load(sd15_like)
    trained(model.unet, "all")
    picture = to_pil(hipa.sample(model, ["a cat"], [0], 1))[0]
    assert np.abs(np.asarray(picture).astype(int) - pixels(drawn[file].path)).max() <= 1


def test_adaptors_in_the_models_folder(cli, adaptors, sd15_like, tmp_path):
    """They serve one step, which they make the default; at more the model is as it was. Damaged ones are refused."""
    model = shutil.copytree(sd15_like, tmp_path / "model")
    shutil.copy(adaptors / sample.LORA_NAME, model)
    shipped = cli(model=model)
    assert "Steps: 1," in parameters(shipped.path)
    assert parameters(shipped.path).endswith(f"Lora: {model.name}/{sample.LORA_NAME}:1")
    assert equal(shipped, cli("--steps", "1", model=model)) and equal(shipped, cli("--lora", adaptors))
    several = cli("--steps", "3", model=model)
    assert "Lora" not in parameters(several.path)
    assert equal(several, cli("--lora", "none", "--steps", "3", model=model)) and equal(several, cli("--steps", "3"))
    (model / sample.LORA_NAME).write_bytes(b"damaged")
    result = cli(model=model)
    assert result.code == 2 and len(result.err) == 1 and sample.LORA_NAME in result.err[0]


def test_a_colon_in_a_name(tmp_path, monkeypatch):
    """What exists is a file's name; else what follows the last colon is the weight, if it is a number."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:0.5"):
        (tmp_path / name).write_text("")
    assert {text: [str(part) for part in sample.lora_weight(text)] for text in ("a", "a:-2", "b:0.5", "b:0.5:3")} == {
        "a": ["a", "1.0"], "a:-2": ["a", "-2.0"], "b:0.5": ["b:0.5", "1.0"], "b:0.5:3": ["b:0.5", "3.0"],
    }  # fmt: skip


BAD = {  # the option, and what the message must say; {file} holds adaptors that fit
    "a missing file": ("missing.safetensors", "no file 'missing.safetensors'"),
    "a missing file with a weight": ("missing.safetensors:0.5", "no file 'missing.safetensors'"),
    "a folder without adaptors": ("empty", "no file 'empty"),
    "a name that no file system can hold": ("x" * 5000, "xxx"),
    "nothing": ("", "no file"),
    "no number for a weight": ("{file}:x", "no file"),
    "weight nan": ("{file}:nan", "'nan' is not a weight"),
    "weight inf": ("{file}:inf", "'inf' is not a weight"),
    "weight -101": ("{file}:-101", "'-101' is not a weight"),
    "an empty file": ("void.safetensors", "truncated or damaged"),
    "a truncated file": ("cut.safetensors", "truncated or damaged"),
    "a pickle": ("lora.bin", "pickle"),
    "a web page": ("page.safetensors", "HTML"),
    "another network": ("other.safetensors", "no adaptors for this network"),
    "another width": ("wide.safetensors", "for another network"),
    "nan": ("nan.safetensors", "not finite"),
}


@pytest.mark.parametrize("option, message", BAD.values(), ids=BAD)
def test_bad_adaptors(cli, adaptors, option, message, tmp_path, monkeypatch):
    """One line, exit code 2, and no picture."""
    monkeypatch.chdir(tmp_path)
    good = (adaptors / sample.LORA_NAME).read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "void.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(good[:-1000])
    (tmp_path / "lora.bin").write_bytes(b"PK")
    (tmp_path / "page.safetensors").write_bytes(b"<!doctype html>" + bytes(100))
    write(tmp_path / "other.safetensors", {f"unet.down_blocks.9.lora_{f}.weight": A4 for f in "AB"})
    wide = {f"unet.{A_QUERY}.lora_A.weight": torch.ones(4, 25)}
    write(tmp_path / "wide.safetensors", FITTING | wide)
    write(tmp_path / "nan.safetensors", {name: tensor * torch.nan for name, tensor in FITTING.items()})
    result = cli("--lora", option.format(file=adaptors / sample.LORA_NAME))
    assert result.code == 2 and len(result.err) == 1, result
    assert "error: " in result.err[0] and message in result.err[0]
    assert not result.path and not files(tmp_path / "out")
