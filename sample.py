"""The command line: prompts in, pictures out.

    python sample.py "a cat"                             # one step of the embedded model, on a CPU, offline
    python sample.py "a cat" --steps 25                  # the many steps that it replaces
    python sample.py "a cat on a blue background" -n 9 --seed 7
    python sample.py "an astronaut on a horse" --model sd15 --device cuda
    python sample.py --prompts captions_val2017.json --out coco --batch 16
    python sample.py "a dog" --image cat.png --strength 0.7          # editing
    python sample.py "a cat" --image cat.png --mask hole.png         # inpainting: white is drawn anew
    python sample.py --image small.png --scale 4                     # super-resolution

Paths of the pictures go to stdout, progress to stderr. A mistake ends in one line and exit code 2.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers'
PEFT_NAME = "adapter_model.safetensors"


# ------------------------------------------------------------------------------------------------------------ options
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help shows all options)\n")
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw; "" draws without a prompt')
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line, or a COCO captions file (.json)")
    add("-n", type=integer(1, 10**5), default=1, metavar="N", help="pictures per prompt (%(default)s)")
    add("--seed", type=integer(0), default=0, help="picture k is drawn from seed + k (%(default)s)")
    add("--steps", type=integer(1, 1000), help="UNet evaluations, up to 1000 (with adaptors 1, else the model's)")
    add("--guidance", type=number, help="classifier-free guidance (the model's; with one step 1, which is none)")
    add("--negative", default="", metavar="TEXT", help="what guidance is to lead away from")
    add("--model", default="emoji", help="a folder, a Hugging Face id, emoji, sd15, sd21, sd-turbo (%(default)s)")
    add("--lora", type=lora_weight, metavar="PATH[:WEIGHT]",
        help=f'adaptors, or "none" (at one step: {LORA_NAME} in the folder of the model, if there)')  # fmt: skip
    add("--size", type=width_height, metavar="W[xH]",
        help="pixels (default: the model's own; with --image, about the image's)")  # fmt: skip
    add("--out", type=Path, default=Path("outputs"), help="folder for the pictures (%(default)s)")
    add("--batch", type=integer(1), default=4, help="pictures drawn at a time (%(default)s)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    add("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
        help="auto: float16 on cuda, else float32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile: slow start, then faster; for many pictures")
    add("--show", action=argparse.BooleanOptionalAction,
        help="draw small pictures in the terminal (default: where it has colours)")  # fmt: skip
    add = parser.add_argument_group(
        "beginning with a picture", "The result has its size, whatever size is drawn."
    ).add_argument
    add("--image", type=Path, metavar="FILE", help="to be edited towards the prompt")
    add("--mask", type=Path, metavar="FILE", help="inpainting: only what is white here is drawn")
    add("--scale", type=integer(2, 64), metavar="N", help="super-resolution: N times as wide and high")
    add("--strength", type=number, help="share of the way to pure noise, above 0, up to 1 "
        "(editing 0.7, inpainting 0.9, super-resolution 0.3)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.scale and args.prompt is None and args.prompts is None:
        args.prompt = ""
    if (args.prompt is None) == (args.prompts is None):
        parser.error("give one prompt or --prompts FILE")
    for name in ("mask", "scale", "strength"):
        if getattr(args, name) is not None and not args.image:
            parser.error(f"--{name} needs --image, the picture that it is about")
    if args.scale and (args.mask or args.size):
        parser.error("--scale goes with neither --mask nor --size")
    if args.strength is not None and not 0 < args.strength <= 1:
        parser.error("--strength is above 0 and at most 1")
    return args


def integer(least, most=2**63 - 1):
    def parse(text):
        if not re.fullmatch(r"-?\d{1,30}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def number(text):
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1000:  # false for nan
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000")


def width_height(text):
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match or not 0 < int(match[1]) * int(match[2] or match[1]) <= 2**26:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def lora_weight(text):
    """ "file:0.8" -> (file, 0.8); "file" -> (file, 1.0); "none" -> None. A folder stands for its file of adaptors."""
    if text == "none":
        return None, 0.0
    path, weight = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not os.path.exists(text):  # Path.exists() raises for names the file system cannot hold
        with contextlib.suppress(ValueError):
            path, weight = head, float(tail)
    path = Path(path)
    if os.path.isdir(path):
        path /= PEFT_NAME if (path / PEFT_NAME).exists() else LORA_NAME
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"no file {str(path)!r}")
    if not -100 <= weight <= 100:  # false for nan
        raise argparse.ArgumentTypeError(f"{tail!r} is not a weight from -100 to 100")
    return path, weight


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below: a mistake is answered at once, not after torch's two seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from tqdm import tqdm  # noqa: E402

import hipa  # noqa: E402
from hipa import UserError  # noqa: E402
from lora import load_lora, merge, write_file  # noqa: E402
from unet import UNetConfig  # noqa: E402
from vae import VAEConfig, grid, to_pil, to_tensor  # noqa: E402


# --------------------------------------------------------------------------------------------------- what is asked for
def own_lora(checkpoint, steps):
    """The adaptors in a checkpoint's folder and their weight. Used only when `steps` is 1 or not given."""
    path = checkpoint / LORA_NAME
    return (path, 1.0) if path.is_file() and steps in (None, 1) else (None, 0.0)


def choose_device(name):
    """ "auto" -> the fastest device there is. Raises UserError if the device asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in available if available[d]) if name == "auto" else name
    if not available[device]:
        raise UserError(f"--device {device}: not available here; try --device cpu")
    return device


def apply_lora(model, path, weight=1.0):
    """Merges the adaptors in a file into the model's UNet, so that they cost nothing. Raises UserError."""
    try:
        merge(model.unet, load_lora(path, model.unet), weight)
    except ValueError as error:
        raise UserError(error) from None


def read_prompts(path):
    """One prompt a line, or a COCO captions file: the first caption of each image, as FID-5k is measured."""
    try:
        text = "" if path.is_char_device() else path.read_text("utf-8-sig")  # /dev/zero has no end
        if path.suffix == ".json":
            captions = {}
            for annotation in json.loads(text)["annotations"]:
                captions.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
            prompts = list(captions.values())
        else:
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is neither text with one prompt a line nor a COCO captions file") from None
    if not prompts:
        raise UserError(f"{path} has no prompts in it")
    return prompts


def picture_size(folder, size=None, like=None):
    """(width, height) in pixels for a checkpoint's folder: `size`, if the VAE can draw it. Default: the model's own.

    With an input of the size `like`: the input's size if its area is within 2x of the model's, else the model's area at
    the input's aspect ratio.
    """
    cell = hipa.read_config(VAEConfig, folder / "vae" / "config.json").downscale
    side = hipa.read_config(UNetConfig, folder / "unet" / "config.json").sample_size * cell
    if like and not size:
        factor = side / math.sqrt(math.prod(like))
        factor = 1 if 0.5 <= factor**2 <= 2 else factor
        size = [max(cell, round(factor * length / cell) * cell) for length in like]
    width, height = size or (side, side)
    if width % cell or height % cell:
        raise UserError(f"size {width}x{height}: this model draws widths and heights that are multiples of {cell}")
    return width, height


# ------------------------------------------------------------------------------------------------------------ pictures
def read_picture(path):
    """A picture file of any kind as RGB: turned as its EXIF says, of 16 bits the upper 8. Raises UserError."""
    return on(load_picture(path), "white")


def read_mask(path, size):
    """A picture file of any kind and size as a mask of `size`: white, 255, from middle grey on, else 0."""
    mask = on(load_picture(path), "black").convert("L")
    return mask.resize(size, Image.Resampling.BOX).point(lambda value: 255 * (value > 127))


def on(picture, colour):
    """A PIL picture as RGB; where it is transparent, the colour is seen."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("RGB")
    return picture.convert("RGB")


def load_picture(path):
    # Not all that Pillow can: Ghostscript would run an EPS, whatever its name.
    formats = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(path, Path) and path.is_fifo():
                raise OSError("not a file")  # opened, it might never answer
            with Image.open(path, formats=formats) as file:
                picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: reduce it first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no picture, or of a kind that Pillow cannot read") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # the last is AVIF's
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if picture.mode[0] in "IF":  # "I;16", "I": 16 bits; "F": 0 to 1
        values = np.asarray(picture, dtype="float32") * (255 if picture.mode == "F" else 1 / 257)
        picture = Image.fromarray(values.round().clip(0, 255).astype("uint8"))
    return picture


def draw(model, prompts, seeds, size, image=None, mask=None, scale=None, at_once=4, **options):
    """A batch of pictures (PIL): of prompts alone, or with an `image` edited, inpainted (`mask`) or enlarged (`scale`).

    `size` is that of the drawing; with an image the result has the image's, times `scale`; `at_once` tiles of it
    are drawn together. Options: as of hipa.sample, and with an image the strength.
    """

    def batch(picture):
        return to_tensor(picture).expand(len(prompts), -1, -1, -1)

    def resize(picture, size):
        return picture.resize(size, Image.Resampling.LANCZOS)

    if not image:
        return to_pil(hipa.sample(model, prompts, seeds, size=size, **options))
    if scale:
        return to_pil(hipa.upscale(model, batch(image), scale, prompts, seeds, at_once=at_once, **options))
    source = batch(resize(image, size))
    if not mask:
        return [resize(picture, image.size) for picture in to_pil(hipa.edit(model, source, prompts, seeds, **options))]
    hole = (batch(mask.resize(size, Image.Resampling.BOX)) > -1).float()  # whatever has white in it
    drawn = to_pil(hipa.inpaint(model, source, hole, prompts, seeds, **options))
    return [Image.composite(resize(picture, image.size), image, mask) for picture in drawn]


# -------------------------------------------------------------------------------------------------------------- output
def slug(text, most=60):
    """A prompt as a safe piece of a file name: letters and digits of any script, at most `most` bytes."""
    words = "-".join(re.findall(r"\w+", text.lower()))
    coding = sys.getfilesystemencoding()
    return words.encode(coding, "ignore")[:most].decode(coding, "ignore").strip("-_") or "picture"


def clean(text):
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def next_numbers(folder):
    """Endless numbers for new pictures, from above the largest that a file in the folder begins with."""
    taken = [int(match[0]) for path in folder.iterdir() if (match := re.match(r"\d+", path.name))]
    return itertools.count(max(taken, default=0) + 1)


def save(picture, folder, numbers, name, parameters):
    """Writes a PNG under the next free number, never over a file that exists. Returns its path."""
    info, file = PngInfo(), io.BytesIO()
    info.add_text("parameters", parameters)
    picture.save(file, "PNG", pnginfo=info)
    with hipa.locked(folder):
        for number in numbers:
            path = folder / f"{number:04d}-{name}.png"
            if not path.exists():
                write_file(path, file.getvalue())
                return path


def show(picture):
    """Prints a picture with half blocks: each character is two pixels, foreground above background."""
    width, height = picture.size
    pixels = picture.load()
    for y in range(0, height - 1, 2):
        row = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pixels[x, y], *pixels[x, y + 1]) for x in range(width))
        print("".join(row) + "\x1b[0m")


def parameters(args, prompt, seed, steps, guidance, size, lora):
    """What a picture was made from, in the words image viewers know from other Stable Diffusion programs."""
    lines = [prompt, f"Negative prompt: {args.negative}"] if args.negative else [prompt]
    made = {"Steps": steps, "Sampler": "DPM++ 2M trailing", "CFG scale": f"{guidance:g}", "Seed": seed}
    made |= {"Size": f"{size[0]}x{size[1]}", "Model": args.model}
    if lora[0]:
        made["Lora"] = f"{'/'.join(lora[0].parts[-2:])}:{lora[1]:g}"
    if args.image:
        made |= {"Image": args.image.name, "Denoising strength": f"{args.strength:g}"}
        made |= {"Mask": args.mask.name} if args.mask else {"Scale": args.scale} if args.scale else {}
    values = {key: json.dumps(text) if re.search('[,"\n]', text := str(value)) else text for key, value in made.items()}
    lines = [" ".join(line.split()) for line in lines]  # a line break would begin another entry
    return clean("\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in values.items())]))


def main(args):
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    device = choose_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    hipa.writable(args.out)
    image = read_picture(args.image) if args.image else None
    mask = read_mask(args.mask, image.size) if args.mask else None
    if args.scale and args.scale**2 * image.width * image.height > Image.MAX_IMAGE_PIXELS:
        most = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"--scale {args.scale} makes {most} of {args.image}: take a smaller one")
    checkpoint = hipa.find_checkpoint(args.model, half=dtype != torch.float32)
    size = picture_size(checkpoint, args.size, like=image and image.size)
    lora = args.lora or own_lora(checkpoint, args.steps)
    steps = args.steps or (1 if lora[0] else hipa.STEPS.get(args.model, 25))
    if lora[0]:
        hipa.read_weights(lora[0])  # refuses what is no safetensors file before the model loads
    model = hipa.load(args.model, device, dtype)
    guidance = model.guidance_at(steps) if args.guidance is None else args.guidance
    if lora[0]:
        apply_lora(model, *lora)
    if args.compile:
        for network in (model.text_encoder, model.unet, model.vae.decoder):
            network.compile()

    # Each picture's prompt and seed, in order; a batch is a slice of this list.
    jobs = [(clean(prompt), args.seed + k) for k, prompt in enumerate(p for p in prompts for _ in range(args.n))]
    total = math.ceil(len(jobs) / args.batch) * steps
    options = {"steps": steps, "guidance": guidance, "negative": clean(args.negative)}
    wide = size[0]
    if image:
        job = "super-resolution" if args.scale else "inpainting" if mask else "editing"
        args.strength = args.strength or hipa.STRENGTH[job]
        options |= {"image": image, "mask": mask, "scale": args.scale, "strength": args.strength, "at_once": args.batch}
        wide = image.width * (args.scale or 1)
        if args.scale:
            total *= math.prod(len(hipa.tiles(model, args.scale * length)) for length in image.size)
    colours = sys.stdout and sys.stdout.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")
    shown = colours and wide <= 128 if args.show is None else args.show
    numbers, of_prompt = next_numbers(args.out), []  # the current prompt's pictures, for its grid
    with tqdm(total=total, unit="step", leave=False, disable=total == 1) as bar:
        done, most = 0, args.batch
        while batch := jobs[done : done + most]:
            words, seeds = zip(*batch)
            try:
                pictures = draw(model, words, seeds, size, progress=bar.update, **options)
            except Exception as error:
                if not hipa.out_of_memory(error) or len(batch) == 1 or most < args.batch:
                    raise
                most = len(batch) // 2
                bar.write(f"not enough memory for --batch {args.batch}: going on with {most}", file=sys.stderr)
                continue
            done += len(batch)
            for picture, (prompt, seed) in zip(pictures, batch):
                of_prompt.append(picture)
                made = [(picture, f"{seed}-{slug(prompt)}", seed)]
                if len(of_prompt) == args.n:
                    if args.n > 1:
                        made.append((grid(of_prompt), f"grid-{slug(prompt)}", seed - args.n + 1))
                    of_prompt = []
                with bar.external_write_mode():
                    if shown:
                        show(picture.reduce(-(-wide // 128)) if wide > 128 else picture)
                    for drawn, name, first in made:
                        text = parameters(args, prompt, first, steps, guidance, size, lora)
                        print(save(drawn, args.out, numbers, name, text), flush=True)


def run(main, *args):
    """Runs a command line's main(): a user's mistake is one line and exit code 2, an interruption no traceback."""
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding cannot spell
    sys.stderr = sys.stderr or open(os.devnull, "w")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {hipa.printable(message)}", file=sys.stderr)
    try:
        main(*args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if hipa.out_of_memory(error):
            error = "not enough memory: try a lower --batch, --size or --teacher-batch, --accumulate or --checkpointing"
        elif not isinstance(error, (UserError, OSError)):
            raise
        if isinstance(error, OSError):
            sys.stdout = None  # it may be what failed: the reader of our output went away, or its disk is full
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        print(f"error: {hipa.printable(where + (getattr(error, 'strerror', None) or str(error)))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main, ARGS)
