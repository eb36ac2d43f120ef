"""Low-rank adaptors: a network changes by B A and by nothing else; diffusers, peft and this project read each other's
files; what does not fit is refused before anything changes.

Adaptors "as if trained" have random factors large enough that a forgotten scale or a swapped pair shows in the output.
"""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import nn

import hipa
import sample
from conftest import ROOT, quiet_pipeline, run_sample
from lora import ATTENTION, LORA_NAME, add_lora, delta, factors, load_lora, lora_bytes, lora_off, merge
from parity import assert_same, normal, unet_inputs
from unet import UNet2DConditionModel, UNetConfig

LAYERS = pytest.mark.parametrize("targets", [ATTENTION, "all"], ids=["attention", "all layers"])
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # a layer of the small networks, of width 24
PEFT_NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(checkpoint):
    """The small checkpoint's UNet, which tests leave as it is."""
    return hipa.load(checkpoint).unet


@pytest.fixture(scope="module")
def sd15(sd15_like):
    """The same of the small SD 1.5 only, where the kind of network is no matter."""
    return hipa.load(sd15_like).unet


@pytest.fixture(scope="module")
def adapted(sd15):
    """`sd15` with adaptors in all layers, which tests leave as they are."""
    return trained(sd15)


@pytest.fixture(scope="module")
def theirs(sd15_like):
    """diffusers' UNet with the weights of `sd15`. `unload_lora` takes adaptors out again."""
    return diffusers.UNet2DConditionModel.from_pretrained(sd15_like / "unet")


def trained(net, targets="all", rank=4):
    """A copy of `net` with adaptors as if trained. B A is about 0.4 times the base weights."""
    net = copy.deepcopy(net)
    torch.manual_seed(0)  # for A
    add_lora(net, rank, targets)
    for seed, (_, B) in enumerate(factors(net).values()):
        B.data = 0.2 * normal(*B.shape, seed=seed)
    return net


def merged(net, loras):
    net = copy.deepcopy(net)
    merge(net, loras)
    return net


def read(path, unet):
    """Adaptors from a file for a UNet, as `merge` takes them"""
    loras = load_lora(path, nn.ModuleDict({"unet": unet}))
    return {path.removeprefix("unet."): pair for path, pair in loras.items()}


@torch.no_grad()
def output(net):
    """What our UNet or diffusers' predicts: a batch of two, latents of 13 x 18."""
    prediction = net(*unet_inputs(net.config))
    return getattr(prediction, "sample", prediction)


def far(a, b):
    """More than a hundredth of the largest value apart: a thousand times what the comparisons allow."""
    return (a - b).abs().max() > 0.01 * b.abs().max()


# ------------------------------------------------------------------------------------------------------- in the network
def test_which_layers():
    """ "all" is each Linear and Conv2d; by default it is the four of each attention, and no other layer.

    At rank 16 these have 3,319,808 parameters in SD 2.1: there are 16 transformers, of width c and text width 1024,
    with eight adapted layers each. Of these eight, six are c -> c, and attn2's to_k and to_v are 1024 -> c.
    """
    config = hipa.read_config(UNetConfig, ROOT / "tests" / "official_configs" / "sd21base" / "unet" / "config.json")
    with torch.device("meta"):
        attention, everything = UNet2DConditionModel(config), UNet2DConditionModel(config)
    layers = [path for path, m in everything.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    add_lora(everything, 1, "all")
    assert list(factors(everything)) == layers
    parameters = add_lora(attention, 16)
    assert list(factors(attention)) == [p for p in layers if re.search(r"attn[12]\.to_(q|k|v|out\.0)$", p)]
    by_hand = sum(n * 16 * (6 * (c + c) + 2 * (1024 + c)) for c, n in {320: 5, 640: 5, 1280: 6}.items())
    assert sum(p.numel() for p in parameters) == by_hand == 3_319_808


@LAYERS
def test_untrained_adaptors_change_nothing(base, targets):
    """B is zero: the output is bitwise the base's. A is not, or neither would ever learn."""
    net = copy.deepcopy(base)
    add_lora(net, 4, targets)
    assert torch.equal(output(net), output(base))
    assert all(A.abs().max() > 0 and not B.any() for A, B in factors(net).values())
    with pytest.raises(AssertionError):  # adaptors of adaptors
        add_lora(net, 4, targets)


def test_lora_off_is_the_base(sd15, adapted):
    """Bitwise, with trained adaptors. It nests, and they are on again after the outer context, however it ends."""
    net, frozen, on = adapted, output(sd15), output(adapted)
    assert far(on, frozen)
    with pytest.raises(KeyError), lora_off(net):
        with lora_off(net):
            assert torch.equal(output(net), frozen)
        assert torch.equal(output(net), frozen)
        raise KeyError
    assert torch.equal(output(net), on)


def test_only_the_factors_learn(sd15):
    """After a backward pass A and B have gradients, and the frozen base has none. It has the checkpoint's names."""
    net = trained(sd15.requires_grad_(True))
    missing, unexpected = net.load_state_dict(sd15.requires_grad_(False).state_dict(), strict=False)
    assert not unexpected and all("lora_" in name for name in missing)
    net(*unet_inputs(net.config)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


SMALL = {  # a layer and the shape of its input
    "linear": (nn.Linear(5, 3), (2, 6, 5)),
    "3x3": (nn.Conv2d(5, 7, 3, padding=1), (2, 5, 8, 9)),
    "stride 2": (nn.Conv2d(5, 7, 3, stride=2), (2, 5, 8, 9)),
    "1x1": (nn.Conv2d(5, 7, 1, bias=False), (2, 5, 8, 9)),
    "all uneven": (nn.Conv2d(5, 7, (3, 5), stride=(2, 1), padding=(0, 2)), (2, 5, 8, 9)),
}


@pytest.mark.parametrize("layer, shape", SMALL.values(), ids=SMALL)
def test_each_kind_of_layer_is_pefts(layer, shape):
    """From the bytes of our file. And merged into the weights it is the same layer."""
    net, x = nn.Sequential(layer).requires_grad_(False), normal(*shape)
    ours = trained(net, rank=2)
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    names = {"lora_unet_": "base_model.model.", "lora_down": "lora_A", "lora_up": "lora_B"}
    tensors = {re.sub("|".join(names), lambda m: names[m[0]], key): t for key, t in load(lora_bytes(ours)).items()}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    assert far(ours(x), net(x))
    assert_same("peft", ours(x), theirs(x), relative=True)
    assert_same("merged", merged(net, factors(ours))(x), ours(x), relative=True)


@pytest.mark.parametrize("layer, shape", [SMALL["linear"], SMALL["3x3"]], ids=["linear", "3x3"])
def test_factors_stay_float32(layer, shape):
    """Beside a half-precision base too; the output is of the base's kind, and the gradients of the factors'."""
    net = trained(nn.Sequential(layer).to(torch.bfloat16))
    y = net(normal(*shape).bfloat16())
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for pair in factors(net).values() for p in pair)


# --------------------------------------------------------------------------------------------------------------- merged
def test_merged_is_the_same_network(base):
    """W + B A in place of two paths."""
    net = trained(base)
    on = output(net)
    assert far(on, output(base))
    assert_same("merged", output(merged(base, factors(net))), on, relative=True)


def test_merging_rounds_once_and_leaves_the_old_tensors_alone(sd15, adapted):
    """Each float16 weight is the nearest to the exact sum: not further off than half the distance to the next.

    The old tensors may be the checkpoint's file, memory-mapped: merged ones are new tensors.
    """
    loras, half = factors(adapted), copy.deepcopy(sd15).half()
    before, copies = dict(half.state_dict()), copy.deepcopy(half.state_dict())
    merge(half, loras)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    for path, (A, B) in loras.items():
        result = half.get_submodule(path).weight
        exact = before[f"{path}.weight"].double() + delta(A, B).double()
        unit = np.spacing(np.abs(result.numpy()))  # from this float16 to the next larger
        assert result.dtype == torch.float16
        assert (np.abs(result.double().numpy() - exact.detach().numpy()) <= 0.501 * unit.astype(float)).all(), path


# ------------------------------------------------------------------------------------------------------ files: ours
@pytest.mark.parametrize("place", [".", LORA_NAME])
def test_diffusers_reads_ours(base, checkpoint, tmp_path, place):
    """The folder and the file. Every layer is adapted."""
    ours, pipeline = trained(base), quiet_pipeline(diffusers.StableDiffusionPipeline, checkpoint)
    (tmp_path / LORA_NAME).write_bytes(lora_bytes(ours))
    pipeline.load_lora_weights(tmp_path / place)
    assert_same("diffusers with our adaptors", output(ours), output(pipeline.unet), relative=True)


def test_a_pipeline_reads_ours(sd15_like, sd15, tmp_path):
    """A picture in one step, and its adapter weight is our `weight`."""
    (tmp_path / LORA_NAME).write_bytes(lora_bytes(trained(sd15, ATTENTION)))
    pipeline = quiet_pipeline(diffusers.StableDiffusionPipeline, sd15_like)
    pipeline.load_lora_weights(tmp_path, adapter_name="hipa")
    pipeline.set_adapters("hipa", 0.3)
    model = hipa.load(sd15_like)
    sample.apply_lora(model, tmp_path / LORA_NAME, 0.3)
    x = hipa.noise([0], 4, 8, 8)
    theirs = pipeline("a cat", latents=x, num_inference_steps=1, guidance_scale=1, output_type="pt").images * 2 - 1
    assert_same("picture", hipa.sample(model, ["a cat"], [0], 1).clamp(-1, 1), theirs, relative=True)


@LAYERS
def test_ours_reads_ours(sd15, targets, tmp_path):
    """The factors bit by bit, in float32, also from a half-precision network; what the caller says is in the header.
    Saved again, it is the same file. So it is under the names of before November 2026."""
    net = trained(copy.deepcopy(sd15).half(), targets)
    (tmp_path / LORA_NAME).write_bytes(lora_bytes(net, {"hipa": '{"step": 100}'}))
    with safe_open(tmp_path / LORA_NAME, "pt") as file:
        assert file.metadata() == {"hipa": '{"step": 100}'}
    assert {lora_bytes(net, {"hipa": '{"step": 100}'}) for _ in range(5)} == {(tmp_path / LORA_NAME).read_bytes()}
    loras, expected = read(tmp_path / LORA_NAME, sd15), factors(net)
    before = {f"unet.{path}.lora_{factor}.weight": t for path, pair in loras.items() for factor, t in zip("AB", pair)}
    save_file(before, tmp_path / "before")
    assert str(read(tmp_path / "before", sd15)) == str(loras)
    assert loras.keys() == expected.keys()
    for path, pair in expected.items():
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(loras[path], pair, strict=True))


# --------------------------------------------------------------------------------------------------- files: of others
ALL = [*ATTENTION, "conv_in", "conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out", "linear_1", "net.2"]
THEIRS = [  # who writes the file, and how it was trained
    ("diffusers", {"lora_alpha": 8, "target_modules": ALL}),
    ("diffusers", {"lora_alpha": 3, "use_rslora": True}),
    ("diffusers", {"lora_alpha": 8, "rank_pattern": {"to_k": 2}}),
    ("diffusers 2023", {"lora_alpha": 4, "target_modules": ["to_q", "conv1"]}),
    ("unet.save_lora_adapter", {"lora_alpha": 8}),
    ("peft", {"lora_alpha": 8, "target_modules": ["to_q", "conv1"]}),
    ("peft", {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_k": 2}}),
]


def save_as(style, theirs, folder):
    """Writes the adaptors of diffusers' UNet -> the file."""
    tensors, config = peft.get_peft_model_state_dict(theirs), theirs.peft_config["default"]
    if style == "peft":  # its settings are in a file beside
        save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, folder / PEFT_NAME)
        config.save_pretrained(folder)
        return folder / PEFT_NAME
    if style == "unet.save_lora_adapter":  # no "unet." before the names, neither the tensors' nor the settings'
        theirs.save_lora_adapter(folder)
    else:
        if style == "diffusers 2023":  # attention's factors were lora.down and lora.up
            tensors = convert_state_dict_to_diffusers(tensors)
        write = diffusers.StableDiffusionPipeline.save_lora_weights
        write(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=config.to_dict())
    return folder / LORA_NAME


@pytest.mark.parametrize("style, settings", THEIRS, ids=str)
def test_ours_reads_theirs(sd15, theirs, style, settings, tmp_path):
    """At the strength that the alphas, ranks and scaling say."""
    settings = {"r": 4, "target_modules": list(ATTENTION), **settings}
    theirs.add_adapter(peft.LoraConfig(init_lora_weights=False, **settings))
    loras, expected = read(save_as(style, theirs, tmp_path), sd15), output(theirs)
    theirs.unload_lora()
    assert far(expected, output(sd15))
    assert_same("merged", output(merged(sd15, loras)), expected, relative=True)


def kohya(loras, alphas):
    """As kohya writes adaptors: "_" for ".", and the scale alpha / rank apart. The alphas are taken in turn."""
    tensors = {}
    for k, (path, (A, B)) in enumerate(loras.items()):
        name, alpha = "lora_unet_" + path.replace(".", "_"), alphas[k % len(alphas)]
        tensors[f"{name}.lora_down.weight"] = A.detach().clone()
        tensors[f"{name}.lora_up.weight"] = B.detach() * (A.shape[0] / alpha)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


@pytest.mark.parametrize("linear", [False, True], ids=["as they are", "1x1 convolution or Linear"])
def test_kohya(base, tmp_path, linear):
    """Each layer has its alpha. float16, as adaptors are often stored, is float32 here before the alpha is applied.

    In SD 2.x, proj_in and proj_out are Linear; in files by older versions, their factors are 1x1 convolutions; or for
    SD 1.x the other way round. The numbers are the same.
    """
    expected = factors(trained(base))
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        tensors = {k: t.to(dtype) for k, t in kohya(expected, [1, 2, 8]).items()}
        for key in [key for key in tensors if linear and "_proj_" in key and "alpha" not in key]:
            tensors[key] = tensors[key].flatten(1) if tensors[key].ndim == 4 else tensors[key][..., None, None]
        save_file(tensors, tmp_path / LORA_NAME)
        loras = {
            path: (A, B.reshape(expected[path][1].shape)) for path, (A, B) in read(tmp_path / LORA_NAME, base).items()
        }
        assert loras.keys() == expected.keys()
        for path in expected:
            for ours, theirs in zip(loras[path], expected[path]):
                assert ours.dtype == torch.float32 and (ours - theirs).abs().max() <= limit * theirs.abs().max()


def of_both_networks(pipeline, style, rank, seed):
    """Random adaptors of a pipeline's UNet and text encoder, {key: tensor}, as kohya or diffusers write them"""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    parts = (("unet", "lora_unet_", pipeline.unet), ("text_encoder", "lora_te_", pipeline.text_encoder))
    for name, short, net in parts:
        for path, layer in net.named_modules():
            if not path.endswith((*ATTENTION, "proj_in", "fc1", "fc2", "q_proj", "out_proj")):
                continue
            (out, *shape), spatial = layer.weight.shape, [1] * (layer.weight.ndim - 2)
            A = torch.randn(rank, *shape, generator=generator) * layer.weight[0].numel() ** -0.5
            B = 0.2 * torch.randn(out, rank, *spatial, generator=generator)
            if style == "kohya":
                path = path if name == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                path = short + path.replace(".", "_")
                tensors |= {f"{path}.lora_down.weight": A, f"{path}.lora_up.weight": B, f"{path}.alpha": torch.ones(())}
            elif style == "diffusers":
                tensors |= {f"{name}.{path}.lora_A.weight": A, f"{name}.{path}.lora_B.weight": B}
            elif re.search("attn[12]", path):  # in early 2023, of attention only
                path = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", path)
                tensors |= {f"{name}.{path}.down.weight": A, f"{name}.{path}.up.weight": B}
    return tensors


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("styles", [("kohya", "diffusers"), ("early 2023", "kohya")], ids=str)
def test_two_files_for_both_networks(checkpoint, tmp_path, styles):
    """With weights, they are diffusers' with `set_adapters`: text states and a picture."""
    pipeline = quiet_pipeline(diffusers.StableDiffusionPipeline, checkpoint)
    model, plain, weights = hipa.load(checkpoint), hipa.load(checkpoint), (0.8, -0.5)
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for k, (file, style) in enumerate(zip(files, styles)):
        save_file(of_both_networks(pipeline, style, 2 + k, k), file)
    for k, (file, weight) in enumerate(zip(files, weights)):
        pipeline.load_lora_weights(file, adapter_name=str(k))
        sample.apply_lora(model, file, weight)
    pipeline.set_adapters(["0", "1"], list(weights))
    ids = model.tokenizer(["a cat and a dog"])
    with torch.no_grad():
        assert far(model.text_encoder(ids), plain.text_encoder(ids))
        assert_same("text states", model.text_encoder(ids), pipeline.text_encoder(ids)[0], relative=True)
    x = hipa.noise([0], 4, 8, 8)
    theirs = pipeline("a cat", latents=x, num_inference_steps=3, guidance_scale=4, output_type="pt").images * 2 - 1
    ours = hipa.sample(model, ["a cat"], [0], 3, guidance=4).clamp(-1, 1)
    assert_same("picture", ours, theirs, relative=True)
    assert far(ours, hipa.sample(plain, ["a cat"], [0], 3, guidance=4))


# ------------------------------------------------------------------------------------------------------------- refusals
A4, B4 = torch.ones(4, 24), torch.ones(24, 4)  # factors that fit QUERY
FITTING = {f"unet.{QUERY}.lora_A.weight": A4, f"unet.{QUERY}.lora_B.weight": B4}


def header(**settings):
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}


REFUSED = {  # tensors and header, or the first bytes of a file; and what the message must say
    "another network": ({f"unet.down_blocks.9.x.lora_{f}.weight": A4 for f in "AB"}, {}, "down_blocks.9.x.lora_A"),
    "another text encoder": ({"text_encoder.text_model.x.lora_A.weight": A4}, {}, "text_encoder.text_model.x"),
    "SDXL's text encoder": ({"lora_te2_text_model_x.lora_down.weight": A4}, {}, "lora_te2_text_model_x"),
    "LyCORIS": ({f"lora_unet_{QUERY.replace('.', '_')}.hada_w1_a": A4}, {}, "hada_w1_a is no factor of plain LoRA"),
    "a factor twice": ({f"lora_unet_{QUERY.replace('.', '_')}.lora_up.weight": B4}, {}, "twice"),
    "A without B": ({"conv_in.lora_A.weight": A4}, {}, "not both factors"),
    "B without A": ({"conv_in.lora_B.weight": B4}, {}, "not both factors"),
    "DoRA": ({f"unet.{QUERY}.lora_magnitude_vector": A4}, {}, "lora_magnitude_vector"),
    "DoRA by its settings": ({}, header(use_dora=True), "use_dora"),
    "DoRA of the text encoder": ({}, {"lora_adapter_metadata": '{"text_encoder.use_dora": true}'}, "use_dora"),
    "alphas by pattern": ({}, header(alpha_pattern={"to_k": 2}), "alpha_pattern"),
    "an alpha that is no number": ({}, header(lora_alpha="x"), LORA_NAME),
    "settings that are damaged": ({}, {"lora_adapter_metadata": "{"}, LORA_NAME),
    "peft without its settings": ({f"base_model.model.{QUERY}.lora_A.weight": A4}, {}, "adapter_config.json"),
    "a bias": ({f"unet.{QUERY}.lora_B.bias": A4}, {}, "lora_B.bias"),
    "a network, not adaptors": ({"conv_in.weight": A4}, {}, "conv_in.weight"),
    "rank 0": ({name: torch.ones(0, 0) for name in FITTING}, {}, LORA_NAME),
    "scalars": ({name: torch.tensor(1.0) for name in FITTING}, {}, LORA_NAME),
    "two alphas for a layer": ({f"unet.{QUERY}.alpha": torch.ones(2)}, {}, LORA_NAME),
    "another width": ({f"unet.{QUERY}.lora_A.weight": torch.ones(4, 25)}, {}, QUERY),
    "two ranks": ({f"unet.{QUERY}.lora_B.weight": torch.ones(24, 5)}, {}, QUERY),
    "no layer with weights": ({f"unet.mid_block.lora_{f}.weight": A4 for f in "AB"}, {}, LORA_NAME),
    "linear for a convolution": ({f"conv_in.lora_{f}.weight": t for f, t in (("A", A4), ("B", B4))}, {}, "conv_in"),
    "nothing": (save({}), {}, "no adaptors"),
    "an empty file": (b"", {}, "cut or damaged"),
    "half a header": (b"\xff\x00\x00\x00\x00\x00\x00\x00{", {}, "cut or damaged"),
    "a pickle": (b"PK\x03\x04", {}, "pickle"),
    "a web page": (b"<!doctype html>", {}, "web page"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1", {}, "git lfs pull"),
}


@pytest.mark.parametrize("content, metadata, message", REFUSED.values(), ids=REFUSED)
def test_refused_adaptors_change_nothing(sd15, content, metadata, message, tmp_path):
    """Half applied, they would be silently wrong: a layer that fits, and is the first, is not merged either.

    The message is one line that names the file and the fault.
    """
    path, before = tmp_path / LORA_NAME, copy.deepcopy(sd15.state_dict())
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({name: tensor.clone() for name, tensor in (FITTING | content).items()}, path, metadata)
    with pytest.raises(hipa.UserError, match=f"(?=.*{tmp_path.name})(?=.*{re.escape(message)})"):
        sample.apply_lora(SimpleNamespace(unet=sd15, text_encoder=nn.Module()), path)
    assert all(torch.equal(before[name], tensor) for name, tensor in sd15.state_dict().items())


# ----------------------------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def adaptors(adapted, tmp_path_factory):
    """A file with adaptors for the small SD 1.5, as train.py writes it."""
    path = tmp_path_factory.mktemp("adaptors") / LORA_NAME
    path.write_bytes(lora_bytes(adapted, {"hipa": "{}"}))
    return path


@pytest.fixture
def cli(sd15_like, tmp_path, capsys):
    """Samples "a cat" with the small SD 1.5 and options -> `code`, `err` (lines), `picture`, its `text`."""

    def call(*options):
        code, out, err = run_sample(["a cat", "--model", sd15_like, "--out", tmp_path / "out", *options], capsys)
        picture = Image.open(out[0]) if out else None
        return SimpleNamespace(code=code, err=err, picture=picture, text=picture and picture.text["parameters"])

    return call


def test_adaptors_make_it_one_step(cli, adaptors, sd15_like, adapted):
    """The picture is the adapted network's, and says which adaptors they are and their weight, but not whose disk."""
    result, half = cli("--lora", adaptors), cli("--lora", f"{adaptors.parent}:0.5")
    assert "Steps: 1," in result.text and "CFG scale: 1," in result.text
    name = "/".join(adaptors.parts[-2:])
    assert f", Lora: {name}:1" in result.text and f", Lora: {name}:0.5" in half.text
    model = hipa.load(sd15_like)
    merge(model.unet, factors(adapted), 0.5)
    expected = sample.to_tensor(sample.to_pil(hipa.sample(model, ["a cat"], [0], 1))[0])
    off = [(sample.to_tensor(found.picture) - expected).abs().max() * 127.5 for found in (half, result)]
    assert off[0] < 1.5 < off[1]  # rounding may differ


def test_others_keep_the_models_steps_and_guidance(cli, adaptors, adapted, tmp_path):
    """One step is right for adaptors that were made for it, which their header says; beside them, for others too."""
    style = tmp_path / "style.safetensors"
    style.write_bytes(lora_bytes(adapted))
    result, both = cli("--lora", style), cli("--lora", f"{style}:0.3", "--lora", f"{adaptors}:0.5")
    assert "Steps: 25," in result.text and "CFG scale: 7.5," in result.text
    assert "Steps: 1," in both.text and "CFG scale: 1," in both.text
    names = ["/".join(path.parts[-2:]) for path in (style, adaptors)]
    assert f"Lora: {names[0]}:0.3 + {names[1]}:0.5" in both.text
    assert (
        np.abs(np.asarray(both.picture) - np.asarray(cli("--lora", f"{adaptors}:0.8").picture).astype(int)).max() <= 1
    )


def test_which_adaptors(sd15_like, adaptors, tmp_path, monkeypatch):
    """Those in the model's folder serve one step, which they make the default; at more the model is as it was.

    What exists is a file's name; else what follows the last colon is the weight, if it is a number.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:0.5"):
        (tmp_path / name).write_text("")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / PEFT_NAME).write_text("")
    own, model = adaptors.parent, Path(sd15_like)
    found = {  # --lora, folder of the model, --steps: path and weight
        (None, own, None): (adaptors, 1), (None, own, 1): (adaptors, 1), (None, own, 4): None, (None, model, 1): None,
        ("none", own, 1): None, ("a", own, 4): (Path("a"), 1), ("a:-2", own, 1): (Path("a"), -2),
        ("b:0.5", own, 1): (Path("b:0.5"), 1), ("b:0.5:3", own, 1): (Path("b:0.5"), 3),
        ("c:.5", model, 1): (Path("c") / PEFT_NAME, 0.5), (str(own), model, 1): (adaptors, 1),
    }  # fmt: skip
    assert {question: sample.find_lora(*question) for question in found} == found
    for text in ("missing.safetensors", "missing.safetensors:0.5", "a:x", "a:nan", "a:inf", "", "x" * 5000):
        with pytest.raises(hipa.UserError, match="no such file"):
            sample.find_lora(text, model, 1)


def test_bad_adaptors_make_no_picture(cli, adaptors, tmp_path):
    """Cut ones, and ones that are not finite: one line and exit code 2."""
    (tmp_path / LORA_NAME).write_bytes(adaptors.read_bytes()[:-1000])
    result = cli("--lora", tmp_path)
    assert (result.code, len(result.err), result.picture) == (2, 1, None) and "cut or damaged" in result.err[0]
    save_file({name: tensor * torch.nan for name, tensor in FITTING.items()}, tmp_path / LORA_NAME)
    result = cli("--lora", tmp_path, "--steps", "1")
    assert (result.code, len(result.err), result.picture) == (2, 1, None) and "not finite" in result.err[0]
