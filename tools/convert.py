"""A Stable Diffusion checkpoint in ONE file (the layout of CompVis and Stability AI) -> a folder as hipa.load takes it.

    python tools/convert.py v1-5-pruned-emaonly.safetensors my-model --like sd15
    python sample.py "a cat" --model my-model

The tensors are the same, under older names: for each name that a network wants, this looks up the old one. The file
says neither how the networks are built nor how words become tokens. Settings, noise schedule and tokenizer are those of
`--like`, a model of the same family; its weights are not needed. Whether epsilon or v is predicted is tried out.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hipa  # noqa: E402
from hipa import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig  # noqa: E402
from sample import Parser, run  # noqa: E402

PARTS = {
    "text_encoder/model.safetensors": (CLIPTextModel, CLIPTextConfig),
    "unet/diffusion_pytorch_model.safetensors": (UNet2DConditionModel, UNetConfig),
    "vae/diffusion_pytorch_model.safetensors": (AutoencoderKL, VAEConfig),
}
SCHEDULE = "scheduler/scheduler_config.json"
EMA, UNET = "model_ema.diffusion_model", "model.diffusion_model."
# How the names of a part begin in the file. Of several ways that are there, the first is taken.
BEGINNINGS = {
    "unet": [EMA, UNET],  # some files hold two UNets. EMA is the other's average over training, and better
    "vae": ["first_stage_model."],
    "quick_gelu": ["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.",
                   "conditioner.embedders.0.transformer.text_model."],  # OpenAI's CLIP, of SD 1.x
    "gelu": ["cond_stage_model.model.", "conditioner.embedders.0.model."],  # OpenCLIP, of SD 2.x
}  # fmt: skip
FAMILIES = {"quick_gelu": "1.x: give --like sd15", "gelu": "2.x: give --like sd21"}
OTHERS = {  # names that only other files have: what such a file is
    r"lora|hada_|lokr_": "it holds adaptors: give it to sample.py as --lora, and as --model what they are for",
    r"^control": "it is a ControlNet, which is not supported",
    r"double_blocks\.|joint_blocks\.|label_emb\.|conditioner\.embedders\.1\.":
        "it is SDXL, SD 3, Flux or the like (models are Stable Diffusion 1.x or 2.x here)",
    r"(down|up|mid)_blocks?\.|^text_model\.":
        "it has diffusers' names already, and is a part of a folder: sample.py takes the whole folder with --model",
    r"^(encoder|decoder)\.(down|up|mid)\.": "it is a VAE alone",
}  # fmt: skip

# Today's name: the original one.
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2":
        "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
VAE = {"mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1":
       "mid.block_2", "_blocks.": ".", ".resnets.": ".block.", ".downsamplers.0": ".downsample", ".upsamplers.0":
       ".upsample", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm", "to_out.0":
       "proj_out", ".to_": "."}  # fmt: skip
OPENCLIP = {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.": "", "final_layer_norm":
            "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}  # fmt: skip


def unet_name(path, config):
    """A module of the UNet -> its original name. There all layers of the way down, and of that up, are in one row."""
    place = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path)
    if not place:
        return ENDS[path]
    per_level = config.layers_per_block + 1
    way, level, kind, layer, inner = place[1], int(place[2] or 0), place[3], int(place[4]), place[5]
    inner = RESNET[inner] if kind == "resnets" else inner
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.op"
    if kind == "upsamplers":  # after the last layer's resnet and, if the level has them, its transformer
        return f"output_blocks.{per_level * (level + 1) - 1}.{1 + ('Attn' in config.up_block_types[level])}.conv"
    row = "output_blocks." if way == "up" else "input_blocks."
    return f"{row}{per_level * level + layer + (way == 'down')}.{int(kind == 'attentions')}.{inner}"


def substitute(text, names):
    for new, old in names.items():
        text = text.replace(new, old)
    return text


def original(key, net):
    """A name in `net` -> the original one without its beginning, and which third of that tensor it is, or None."""
    if isinstance(net, UNet2DConditionModel):
        path, _, end = key.rpartition(".")
        return f"{unet_name(path, net.config)}.{end}", None
    if isinstance(net, AutoencoderKL):  # its levels upwards are counted from below
        last = len(net.config.block_out_channels) - 1
        key = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{last - int(level[1])}", key)
        return substitute(key, VAE), None
    key = key.removeprefix("text_model.")
    if net.config.hidden_act == "quick_gelu":
        return key, None
    qkv = re.search(r"\.([qkv])_proj\.", key)  # OpenCLIP has the three in one tensor
    return re.sub(r"\.[qkv]_proj\.", ".in_proj_", substitute(key, OPENCLIP)), qkv and "qkv".index(qkv[1])


def lookup(file, part, net):
    """{name in `net`: tensor in the file}. Raises ValueError if one is missing or of another shape."""
    there, wanted, kind = set(file.keys()), net.state_dict(), getattr(net.config, "hidden_act", part)
    old = [original(key, net) for key in wanted]
    ways = [[b + (name.replace(".", "") if b == EMA else name) for name, _ in old] for b in BEGINNINGS[kind]]
    way = min(ways, key=lambda way: len(set(way) - there))
    missing = [name for name in way if name not in there]
    if len(missing) == len(wanted):
        for act, family in FAMILIES.items():
            if part == "text_encoder" and act != kind and any(n.startswith(tuple(BEGINNINGS[act])) for n in there):
                raise ValueError(f"it is Stable Diffusion {family}")
        raise ValueError(f"there is no {part} in it: it is no whole checkpoint of Stable Diffusion")
    if missing:
        raise ValueError(f"{missing[0]} is missing: it is not whole, or of another family than --like")
    if part == "unet" and (surplus := {name for name in there if name.startswith(UNET)} - {*ways[-1]}):
        raise ValueError(f"it is of another family than --like, which has no {min(surplus)}")

    tensors = {}
    for key, name, (_, third) in zip(wanted, way, old):
        tensor, shape = file.get_tensor(name), wanted[key].shape
        if key == "conv_in.weight" and tensor.shape[1] != shape[1]:
            raise ValueError(f"its UNet has {tensor.shape[1]} input channels, for inpainting or so: not supported")
        tensor = tensor if third is None else tensor.chunk(3)[third]
        # Some projections are 1x1 convolutions in the file and Linear here: the same numbers.
        tensors[key] = tensor = tensor.flatten(1) if tensor.dim() == len(shape) + 2 else tensor
        if tensor.shape != shape:
            raise ValueError(f"it is of another family: {name} is {(*tensor.shape,)}, in --like {(*shape,)}")
    return tensors


def read(source, like):
    """A file, and a model of its family -> that model's folder, {path: {name: tensor}}. Raises UserError."""
    if not source.is_file():
        raise hipa.UserError(f"{source}: {'this is a folder' if source.is_dir() else 'there is no such file'}")
    with hipa.reading(source):
        file = safe_open(source, "pt")
        for pattern, what in OTHERS.items():
            if any(re.search(pattern, name) for name in file.keys()):
                raise ValueError(what)
        like, found = hipa.find_checkpoint(like, weights=False), {}
        for path, (cls, config_cls) in PARTS.items():
            part, _ = path.split("/")
            config = hipa.read_config(config_cls, like / part / "config.json")
            with hipa.reading(like / part / "config.json"), torch.device("meta"):
                net = cls(config)
            found[path] = lookup(file, part, net)
    return like, found


@torch.no_grad()
def similarity(model):
    """The cosine between pure noise and what the UNet predicts from it. An epsilon network gives the noise back almost
    unchanged; v is nearly -x_0 there, and has little to do with it. (The embedded model: 0.16, and as epsilon 0.9998.)
    """
    x = hipa.noise([0, 1], model.unet.config.in_channels, 32, 32)
    out = model.unet(x, torch.full((2,), 999), model.encode_text(["", ""]))
    if not out.isfinite().all():
        raise hipa.UserError("what its UNet predicts is not finite (NaN or inf): the weights are damaged")
    return torch.cosine_similarity(out.flatten(), x.flatten(), dim=0).item()


def write(folder, like, found, prediction=None):
    """A checkpoint's folder: the small files of the folder `like`, and tensors {path: {name: tensor}}."""
    for name in hipa.FILES:
        if not name.endswith(".safetensors") and (like / name).exists():
            hipa.write_file(folder / name, (like / name).read_bytes())
    for path, tensors in found.items():
        try:
            save_file(tensors, folder / path, {"format": "pt"})
        except SafetensorError as error:  # a full disk, for example
            raise hipa.UserError(f"the weights cannot be written: {error}") from error
        shutil.copymode((folder / path).with_name("config.json"), folder / path)  # save_file lets only the owner read
    cosine = similarity(hipa.load(folder))  # all fits together, or this raises
    prediction = prediction or ("epsilon" if cosine > 0.5 else "v_prediction")
    print(f"prediction type: {prediction} (pure noise and its prediction have cosine {cosine:.3f})", file=sys.stderr)
    schedule = json.loads((folder / SCHEDULE).read_text("utf-8-sig")) | {"prediction_type": prediction}
    index = json.loads((folder / "model_index.json").read_text("utf-8")).items()
    # diffusers would look for parts that are not here, such as the safety checker.
    index = {key: value for key, value in index if not isinstance(value, list) or (folder / key).exists()}
    for name, settings in ((SCHEDULE, schedule), ("model_index.json", index)):
        hipa.write_file(folder / name, json.dumps(settings, indent=2).encode())


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, help="the checkpoint, .safetensors")
    add("folder", type=Path, help="a new folder for the model")
    add("--like", required=True, metavar="MODEL", help="its family: sd15, sd21, a folder or a Hugging Face id")
    add("--prediction", choices=["epsilon", "v_prediction"], help="what the UNet predicts (found by trying)")
    args = parser.parse_args(argv)
    if os.path.lexists(args.folder):
        parser.error(f"{args.folder} is there already: give another name")
    like, found = read(args.file, args.like)
    part = args.folder.with_name(f".{args.folder.name}.{os.urandom(4).hex()}.part")  # complete before it has its name
    try:
        write(part, like, found, args.prediction)
        part.rename(args.folder)
    except hipa.UserError as error:  # the weights are as wanted; so it is about the files of `like`
        raise hipa.UserError(str(error).replace(str(part), str(like))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(args.folder)
    print(f'try it: python sample.py "a cat" --model {args.folder}', file=sys.stderr)


if __name__ == "__main__":
    run(main)
