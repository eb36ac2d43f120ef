"""tools/convert.py: one file becomes a folder with the same tensors, which draws the same pictures; a mistake becomes
one line, and no folder. The file is written here: from diffusers' names to the original ones, by tables of this test.
"""

import itertools
import json
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hipa
from conftest import ROOT, quiet_pipeline, run_sample, write_checkpoint
from parity import OURS, assert_same, normal
from test_official_configs import OFFICIAL, SIZES
from test_sampler import run_pipeline

sys.path.insert(0, str(ROOT / "tools"))

import convert  # noqa: E402

NETS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
FILES = {part: f"{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors" for part in NETS}
CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
UNET, VAE = "model.diffusion_model.", "first_stage_model."

# ------------------------------------------------------------------------------------------------- the original layout
RESNET = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
          "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection."}  # fmt: skip
REST = {
    "unet": {"conv_in.": "input_blocks.0.0.", "time_embedding.linear_1.": "time_embed.0.", "conv_norm_out.": "out.0.",
             "time_embedding.linear_2.": "time_embed.2.", "conv_out.": "out.2.", "mid_block.attentions.0.":
             "middle_block.1.", "mid_block.resnets.0.": "middle_block.0.", "mid_block.resnets.1.": "middle_block.2."},
    "vae": {"mid_block.resnets.0.": "mid.block_1.", "mid_block.attentions.0.": "mid.attn_1.", "mid_block.resnets.1.":
            "mid.block_2.", "conv_norm_out.": "norm_out.", "conv_shortcut.": "nin_shortcut.", "group_norm.": "norm.",
            "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."},
    "text_encoder": {"embeddings.token_embedding.": "token_embedding.", "embeddings.position_embedding.weight":
                     "positional_embedding", "encoder.layers.": "transformer.resblocks.", "final_layer_norm.":
                     "ln_final.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "fc1.": "c_fc.", "fc2.": "c_proj.",
                     "self_attn.": "attn."},
}  # fmt: skip


def places(part, config):
    """{places of diffusers' blocks: the original ones}. The UNet's, down and up, are counted over all levels."""
    levels, layers, table = len(config["block_out_channels"]), config["layers_per_block"] + 1, {}
    for k, (i, j) in enumerate(itertools.product(range(levels), range(layers))):
        down, up = f"down_blocks.{i}.", f"up_blocks.{i}."
        if part == "unet":
            for m, kind in enumerate((f"resnets.{j}.", f"attentions.{j}.")):
                table |= {down + kind: f"input_blocks.{k + 1}.{m}.", up + kind: f"output_blocks.{k}.{m}."}
            after = 2 if "Cross" in config["up_block_types"][i] else 1
            table[f"{down}downsamplers.0.conv."] = f"input_blocks.{k + 1}.0.op."  # of the last k of this level
            table[f"{up}upsamplers.0.conv."] = f"output_blocks.{k}.{after}.conv."
        else:
            old = f"up.{levels - 1 - i}."
            table |= {f"{down}resnets.{j}.": f"down.{i}.block.{j}.", f"{up}resnets.{j}.": f"{old}block.{j}."}
            table |= {f"{down}downsamplers.0.": f"down.{i}.downsample.", f"{up}upsamplers.0.": f"{old}upsample."}
    return table


def original(part, tensors, config):
    """diffusers' {name: tensor} of a part -> the original's, under whole names"""
    tensors, result = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}, {}
    if config.get("hidden_act") == "quick_gelu":  # OpenAI's CLIP: only a prefix
        return {CLIP + key: tensor for key, tensor in tensors.items()}
    table = REST[part] if part == "text_encoder" else places(part, config) | REST[part]
    for key, tensor in tensors.items():
        for new, old in (table | (RESNET if part == "unet" and "resnets" in key else {})).items():
            key = key.replace(new, old)
        if ".mid.attn_1." in key and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        result[{"unet": UNET, "vae": VAE, "text_encoder": OPENCLIP}[part] + key] = tensor
    for key in [key for key in result if ".q_proj." in key]:
        names = [key.replace("q_proj", f"{x}_proj") for x in "qkv"]
        result[key.replace("q_proj.", "in_proj_")] = torch.cat([result.pop(name) for name in names])
    return result


def one_file(folder, path, change=dict):
    """Writes the folder's checkpoint, after `change`, as one file. There are also tensors in it that nobody needs."""
    tensors = {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}
    for part, name in FILES.items():
        config = json.loads((folder / part / "config.json").read_text())
        tensors |= original(part, load_file(folder / part / name), config)
    if f"{OPENCLIP}ln_final.bias" in tensors:
        tensors[f"{OPENCLIP}transformer.resblocks.3.ln_1.bias"] = torch.zeros(48)  # of a last layer that is not used
    else:
        tensors[f"{CLIP}embeddings.position_ids"] = torch.arange(77)[None]
    save_file({key: tensor.contiguous() for key, tensor in change(tensors).items()}, path)
    return path


# --------------------------------------------------------------------------------------------------------- conversions
@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """The small checkpoint with noise in every tensor: as initialised, all norms are equal, and many biases are 0."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("noisy") / checkpoint.name)
    for seed, path in enumerate(sorted(folder.rglob("*.safetensors"))):
        save_file({k: t + 0.05 * normal(*t.shape, seed=seed) for k, t in load_file(path).items()}, path)
    return folder


@pytest.fixture
def like(folder, tmp_path_factory, monkeypatch):
    """Settings in the cache, without weights, which cannot be downloaded. The index names a part that is not there."""
    cache = tmp_path_factory.mktemp("hub")
    like = cache / "models--org--name" / "snapshots" / "1"
    shutil.copytree(folder, like, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((like / "model_index.json").read_text()) | {"_guidance": 3}
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (like / "model_index.json").write_text(json.dumps(index))
    hipa.write_file(like.parent.parent / "refs" / "main", b"1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    return "org/name"


def converted(capsys, path, like, *options):
    """-> the folder that the file became, its tensors {part: {name: tensor}}"""
    made = path.parent / "new" / f"made{len(options)}"
    code, out, err = run_sample([path, made, "--like", like, *options], capsys, convert.main)
    assert (code, out) == (0, [str(made)]) and "prediction type" in err[0] and str(made) in err[1], err
    return made, weights(made)


def weights(folder):
    nets = {part: OURS[name][0] for part, name in NETS.items()}
    return {part: getattr(nets[part], "rename", dict)(load_file(folder / part / FILES[part])) for part in NETS}


def assert_equal(found, expected):
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        assert not [key for key, tensor in tensors.items() if not torch.equal(found[part][key], tensor)]


def test_the_same_tensors_and_pictures(folder, like, tmp_path, capsys):
    """To the bit those of the folder that the file was made of; within 1e-5 what diffusers draws from the file."""
    path, prediction = one_file(folder, tmp_path / "one.safetensors"), hipa.load(folder).schedule.prediction_type
    made, tensors = converted(capsys, path, like, "--prediction", prediction)
    assert_equal(tensors, weights(folder))
    request = ["a cat", "a dog"], [3, 4], 3, 5.0
    ours = hipa.sample(hipa.load(made), *request)
    assert torch.equal(ours, hipa.sample(hipa.load(folder), *request)) and hipa.load(made).guidance == 3
    direct = StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    direct.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for pipeline in (direct, quiet_pipeline(StableDiffusionPipeline, made)):
            assert_same(f"from one file, {folder.name}", ours, run_pipeline(pipeline, *request), relative=True)
    assert len({os.stat(file).st_mode for file in made.rglob("*.*")}) == 1  # all can be read by whoever can read one


@pytest.mark.parametrize("old, new", [
    (CLIP, "cond_stage_model.transformer."), (CLIP, "conditioner.embedders.0.transformer.text_model."),
    (OPENCLIP, "conditioner.embedders.0.model."),
])  # fmt: skip
def test_other_names_and_mixed_precision(folder, like, tmp_path, capsys, old, new):
    """Names of the text encoder that occur. Each tensor keeps its precision."""
    dtypes = {0: torch.float32, 1: torch.float32, 2: torch.float16, 4: torch.bfloat16}  # by dimensions
    change = lambda file: {k.replace(old, new): t.to(dtypes[t.dim()]) for k, t in file.items()}  # noqa: E731
    _, found = converted(capsys, one_file(folder, tmp_path / "one.safetensors", change), like)
    assert {t.dtype for tensors in found.values() for t in tensors.values()} == {*dtypes.values()}
    before = weights(folder)
    assert_equal(found, {part: {k: before[part][k].to(t.dtype) for k, t in found[part].items()} for part in found})


@pytest.mark.parametrize("whole", [True, False])
def test_the_average_is_taken(folder, like, tmp_path, capsys, whole):
    """Of two UNets in a file, the one that is the average over training (EMA), if all of it is there."""

    def change(file):
        average = {"model_ema." + k[6:].replace(".", ""): -t for k, t in file.items() if k.startswith(UNET)}
        return file | dict(list(average.items())[not whole :])

    _, found = converted(capsys, one_file(folder, tmp_path / "one.safetensors", change), like)
    expected = weights(folder)["unet"]
    assert_equal(found, {"unet": {key: -tensor for key, tensor in expected.items()} if whole else expected})


@pytest.mark.parametrize("gain, bias, predicted", [(1, 0, "epsilon"), (-1, 0, "v_prediction"), (0, 1, "v_prediction")])
def test_what_is_predicted(sd15_like, tmp_path, capsys, gain, bias, predicted):
    """A UNet that gives back its input, up to scale, predicts epsilon; one that gives the opposite or a constant v."""
    folder = shutil.copytree(sd15_like, tmp_path / "like")
    path = folder / "unet" / FILES["unet"]
    tensors = {key: torch.full_like(t, "norm" in key and "weight" in key) for key, t in load_file(path).items()}
    for c in range(4):  # silu(a) - silu(-a) = a; a group of the norm has three channels: x, -x and 0
        tensors["conv_in.weight"][3 * c : 3 * c + 2, c, 1, 1] = torch.tensor([1.0, -1.0])
        tensors["conv_out.weight"][c, 3 * c : 3 * c + 2, 1, 1] = torch.tensor([1.0, -1.0]) * gain
    tensors["up_blocks.2.resnets.1.conv_shortcut.weight"][:, 24:, 0, 0] = torch.eye(24)  # the skip from conv_in
    tensors["conv_out.bias"][:] = bias
    save_file(tensors, path)
    made, _ = converted(capsys, one_file(folder, tmp_path / "one.safetensors"), folder)
    assert hipa.load(made).schedule.prediction_type == predicted


def test_the_embedded_model(tmp_path, capsys):
    """It is trained, and predicts v."""
    made, found = converted(capsys, one_file(ROOT / "emoji", tmp_path / "one.safetensors"), "emoji")
    assert_equal(found, weights(ROOT / "emoji"))
    assert hipa.load(made).schedule == hipa.load("emoji").schedule


@pytest.mark.parametrize("model, part", SIZES)
def test_every_official_name(model, part):
    """The official settings: each of the published number of tensors is taken from where diffusers takes it."""
    path, (network, config_cls) = OFFICIAL / model / part / "config.json", OURS[NETS[part]]
    with torch.device("meta"):
        net = network(hipa.read_config(config_cls, path))
    numbers, config = enumerate(net.state_dict().items()), json.loads(path.read_text())
    numbered = {key: torch.tensor(k).short().expand(t.shape) for k, (key, t) in numbers}  # they take no memory
    old = original(part, numbered, config)
    ours = convert.lookup(SimpleNamespace(keys=old.keys, get_tensor=old.__getitem__), part, net)
    if part != "text_encoder":
        theirs = getattr(single_file_utils, f"convert_ldm_{part}_checkpoint")(old, config)
    elif model == "sd15":
        theirs = single_file_utils.convert_ldm_clip_checkpoint(old)
    else:
        theirs = single_file_utils.convert_open_clip_checkpoint(SimpleNamespace(config=net.config), old)
    assert ours.keys() == theirs.keys() == numbered.keys() and len(ours) == SIZES[model, part][1]
    for key, same in ((key, [found[key] for found in (ours, theirs, numbered)]) for key in ours):
        assert len({(t.shape, t[(end,) * t.dim()].item()) for t in same for end in (0, -1)}) == 1, key


# ------------------------------------------------------------------------------------------------------------ mistakes
MISTAKES = {  # what is done to the file: names that go, tensors that come, or a function; and words of the error
    "no file": (os.remove, "no such file"), "a folder": (lambda path: os.remove(path) or path.mkdir(), "a folder"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({})), "pickle"),
    "a .ckpt": (lambda path: path.write_bytes(b"PK\x03\x04"), "pickle"),
    "a git-LFS pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com"), "git lfs pull"),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "cut or damaged"),
    "SDXL": ({"conditioner.embedders.1.model.ln_final.bias": [9]}, "SDXL"),
    "SD 3": ({f"{UNET}joint_blocks.0.context_block.attn.proj.bias": [9]}, "SD 3"),
    "Flux": ({"double_blocks.0.img_attn.proj.bias": [9]}, "Flux"),
    "kohya's LoRA": ({"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": []}, "--lora"),
    "peft's LoRA": ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": [9, 9]}, "--lora"),
    "a ControlNet": ({"control_model.zero_convs.0.0.bias": [9]}, "ControlNet"),
    "a VAE": ({"encoder.down.0.block.0.conv1.bias": [9]}, "VAE alone"),
    "diffusers' UNet": ({"down_blocks.0.resnets.0.conv1.bias": [9]}, "diffusers"),
    "an inpainting UNet": ({f"{UNET}input_blocks.0.0.weight": [24, 9, 3, 3]}, "9 input channels"),
    "no VAE": (VAE, "no vae"), "no UNet": (UNET, "no unet"), "no CLIP": (CLIP, "no text_encoder"),
    "a hole": (f"{UNET}out.2.bias", f"{UNET}out.2.bias is missing"),
    "another shape": ({f"{UNET}out.2.bias": [5]}, f"{UNET}out.2.bias is (5,), in --like (4,)"),
    "a layer more": ({f"{UNET}fuser.0.bias": [9]}, f"{UNET}fuser.0.bias"),
    "not finite": ({f"{UNET}out.2.bias": None}, "not finite"),
}  # fmt: skip


def refused(capsys, *argv, code=2):
    """The command ends in one line, or for Ctrl-C in none. It is returned."""
    result, out, err = run_sample(argv, capsys, convert.main)
    assert (result, out, len(err)) == (code, [], code == 2), err
    return "".join(err)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake(sd15_like, tmp_path, capsys, what):
    """It is said in one line, and no folder is left."""
    (change, words), path = MISTAKES[what], tmp_path / "one.safetensors"
    gone, new = (change if isinstance(change, kind) else kind() for kind in (str, dict))
    new = {name: torch.full([4], torch.nan) if shape is None else torch.zeros(shape) for name, shape in new.items()}
    one_file(sd15_like, path, lambda file: {k: t for k, t in file.items() if not gone or not k.startswith(gone)} | new)
    if callable(change):
        change(path)
    error = refused(capsys, path, tmp_path / "made", "--like", sd15_like)
    assert words in error and (str(path) in error or what == "not finite")
    assert not set(os.listdir(tmp_path)) - {path.name}


def test_another_family(sd15_like, tmp_path, capsys):
    """The line says which."""
    sd21_like, path = write_checkpoint(tmp_path / "sd21", "sd21"), tmp_path / "one.safetensors"
    capsys.readouterr()  # diffusers' bars
    for folder, like, version in ((sd15_like, sd21_like, "1.x"), (sd21_like, sd15_like, "2.x")):
        error = refused(capsys, one_file(folder, path), tmp_path / "made", "--like", like)
        assert f"{version}: give --like {folder.name}" in error
    assert sorted(os.listdir(tmp_path)) == [path.name, "sd21"]


def test_a_mistake_in_like(sd15_like, tmp_path, capsys):
    """No model, or a tokenizer with too many words: the line names what was given."""
    path, like = one_file(sd15_like, tmp_path / "one.safetensors"), shutil.copytree(sd15_like, tmp_path / "like")
    words = json.loads((like / "tokenizer" / "vocab.json").read_text()) | {"more": 10**6}
    (like / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    for given in (tmp_path, "nowhere", like):
        assert str(given) in refused(capsys, path, tmp_path / "made", "--like", given)
    assert sorted(os.listdir(tmp_path)) == ["like", path.name]


def test_nothing_is_overwritten(tmp_path, capsys):
    """This is said before anything else is looked at."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    for place in (tmp_path, tmp_path / "kept", tmp_path / "link"):
        assert f"{place} is there already" in refused(capsys, "no file", place, "--like", "nobody/nothing")
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("error, code", [(SafetensorError("No space left"), 2), (KeyboardInterrupt(), 130)])
def test_what_is_begun_is_removed(sd15_like, tmp_path, capsys, monkeypatch, error, code):
    def fail(tensors, path, _):
        path.write_bytes(b"half of it")
        raise error

    path = one_file(sd15_like, tmp_path / "one.safetensors")
    monkeypatch.setattr(convert, "save_file", fail)
    assert str(error) in refused(capsys, path, tmp_path / "made", "--like", sd15_like, code=code)
    assert os.listdir(tmp_path) == [path.name]
