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
import itertools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

LORA_NAME = "pytorch_lora_weights.safetensors"
STRENGTH = {"editing": 0.7, "inpainting": 0.9, "super-resolution": 0.3}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help shows all options)\n")
    parser.add_argument("prompt", nargs="?", help='what to draw; "" draws without a prompt')
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line, or a COCO captions file (.json)"
    )
    parser.add_argument("-n", type=whole(1), default=1, metavar="N", help="pictures per prompt (%(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, help="picture k is drawn from seed + k (%(default)s)")
    parser.add_argument(
        "--steps", type=whole(1, 1000), help="UNet evaluations, 1 to 1000 (1 if there are adaptors, else 25)"
    )
    parser.add_argument(
        "--guidance", type=number, help="classifier-free guidance (7.5; with one step 1, which is none)"
    )
    parser.add_argument("--negative", default="", metavar="TEXT", help="what guidance is to lead away from")
    parser.add_argument(
        "--model", default="emoji", help="a folder, a Hugging Face id, emoji, sd15, sd21, sd-turbo (%(default)s)"
    )
    parser.add_argument(
        "--lora", type=lora_weight, metavar="PATH[:WEIGHT]",
        help=f'adaptors, or "none" (at one step: {LORA_NAME} in the folder of the model, if there)',
    )  # fmt: skip
    parser.add_argument("--size", type=width_height, metavar="W[xH]",
        help="pixels (default: the model's own; with --image, about the image's)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures (%(default)s)")
    parser.add_argument("--batch", type=whole(1), default=4, help="pictures drawn at a time (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
                        help="auto: float16 on cuda, else float32")  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: slow start, then faster; for many pictures"
    )
    parser.add_argument("--show", action=argparse.BooleanOptionalAction,
                        help="draw small pictures in the terminal (default: where it has colours)")  # fmt: skip
    group = parser.add_argument_group(
        "beginning with a picture", "The result has its size, whatever size it is drawn at."
    )
    group.add_argument("--image", type=Path, metavar="FILE", help="to be edited towards the prompt")
    group.add_argument("--mask", type=Path, metavar="FILE", help="inpainting: only what is white here is drawn")
    group.add_argument("--scale", type=whole(2, 64), metavar="N", help="super-resolution: N times as wide and high")
    group.add_argument("--strength", type=number, help="share of the picture that gives way to noise, above 0, up to 1 "
                       "(" + ", ".join(f"{job} {strength:g}" for job, strength in STRENGTH.items()) + ")")  # fmt: skip
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
    if args.strength is None:
        args.strength = STRENGTH["super-resolution" if args.scale else "inpainting" if args.mask else "editing"]
    if not 0 < args.strength <= 1:
        parser.error("--strength is above 0 and at most 1")
    return args


def whole(least, most=2**63 - 1):
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
    if not match or not int(match[1]) or not int(match[2] or 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64 or 768x512")
    return int(match[1]), int(match[2] or match[1])


def lora_weight(text):
    """ "file:0.8" -> (file, 0.8); "file" -> (file, 1.0); "none" -> None. A folder stands for LORA_NAME in it."""
    if text == "none":
        return None, 0.0
    path, weight = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not os.path.exists(text):  # Path.exists() raises for names the file system cannot hold
        with contextlib.suppress(ValueError):
            path, weight = head, float(tail)
    path = Path(path) / LORA_NAME if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"no file {str(path)!r}")
    if not -100 <= weight <= 100:  # false for nan
        raise argparse.ArgumentTypeError(f"{tail!r} is not a weight from -100 to 100")
    return path, weight


def own_lora(checkpoint, steps):
    """The adaptors in a checkpoint's folder and their weight. They are made for one step, and left off at more."""
    path = checkpoint / LORA_NAME
    return (path, 1.0) if path.is_file() and steps in (None, 1) else (None, 0.0)


def choose_device(name):
    """ "auto" -> the fastest device there is. Raises UserError if the device asked for is not there."""
    import torch

    from hipa import UserError

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in available if available[d]) if name == "auto" else name
    if not available[device]:
        raise UserError(f"--device {device}: not available here; try --device cpu")
    return device


def apply_lora(model, path, weight=1.0):
    """Merges the adaptors in a file into the model's UNet, so that they cost nothing. Raises UserError."""
    from hipa import UserError
    from lora import load_lora, merge

    try:
        merge(model.unet, load_lora(path, model.unet), weight)
    except ValueError as error:
        raise UserError(error) from None


def read_prompts(path):
    """One prompt a line, or a COCO captions file: the first caption of each image, as FID-5k is measured."""
    from hipa import UserError

    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            captions = {}
            for annotation in json.loads(text)["annotations"]:
                captions.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
            prompts = list(captions.values())
        else:
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is neither text with one prompt a line nor a COCO captions file") from None
    if not prompts:
        raise UserError(f"{path} has no prompts in it")
    return prompts


def writable(folder):
    """Makes the folder and checks that files can be written, before anything slow starts."""
    from hipa import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


def slug(text, most=60):
    """A prompt as a safe piece of a file name: letters and digits of any script, at most `most` bytes."""
    words = "-".join(re.findall(r"\w+", text.lower()))
    return words.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore").strip("-_") or "picture"


def next_numbers(folder):
    """Endless numbers for new pictures, from above the largest that a file in the folder begins with."""
    taken = [int(match[0]) for path in folder.iterdir() if (match := re.match(r"\d+", path.name))]
    return itertools.count(max(taken, default=0) + 1)


def save(picture, folder, numbers, name, parameters):
    """Writes a PNG under the next free number, never over a file that exists. Returns its path."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", parameters)
    for number in numbers:
        path = folder / f"{number:04d}-{name}.png"
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            picture.save(file, "PNG", pnginfo=info)
            return path


def show(picture):
    """Prints a picture with half blocks: each character is two pixels, foreground above background."""
    width, height = picture.size
    pixels = picture.load()
    for y in range(0, height - 1, 2):
        row = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*pixels[x, y], *pixels[x, y + 1]) for x in range(width))
        print("".join(row) + "\x1b[0m")


def read_picture(path):
    """A picture file of any kind as RGB: turned as its EXIF says, of 16 bits the upper 8. Raises UserError."""
    return on(load_picture(path), "white")


def read_mask(path, size):
    """A picture file of any kind and size as a mask of `size`: white, 255, from middle grey on, else 0."""
    from PIL import Image

    mask = on(load_picture(path), "black").convert("L")
    return mask.resize(size, Image.Resampling.BOX).point(lambda value: 255 * (value > 127))


def on(picture, colour):
    """A PIL picture as RGB; where it is transparent, the colour is seen."""
    from PIL import Image

    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("RGB")
    return picture.convert("RGB")


def load_picture(path):
    import numpy as np
    from PIL import Image, ImageOps

    from hipa import UserError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: reduce it first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no picture, or of a kind that Pillow cannot read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if picture.mode[0] in "IF":  # "I;16", "I": 16 bits; "F": 0 to 1
        values = np.asarray(picture, dtype="float32") * (255 if picture.mode == "F" else 1 / 257)
        picture = Image.fromarray(values.round().clip(0, 255).astype("uint8"))
    return picture


def to_tensor(picture):
    """PIL picture -> (3, H, W) in [-1, 1]; a mask -> (1, H, W)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1) / 127.5 - 1


def to_pil(pictures):
    """Pictures (B, 3, H, W) in [-1, 1] -> PIL pictures."""
    from PIL import Image

    array = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def grid(pictures, columns=None):
    """PIL pictures of one size -> one picture, filled row by row; about square, or of so many columns."""
    from PIL import Image

    columns = columns or math.ceil(len(pictures) ** 0.5)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * width, k // columns * height))
    return sheet


def draw(model, prompts, seeds, size, image=None, mask=None, scale=None, **options):
    """A batch of pictures (PIL): of prompts alone, or with an `image` edited, inpainted (`mask`) or enlarged (`scale`).

    `size` is that of the drawing; with an image the result has the image's, times `scale`. Options: as of hipa.sample,
    and with an image the strength.
    """
    from PIL import Image

    import hipa

    batch = lambda picture: to_tensor(picture).expand(len(prompts), -1, -1, -1)  # noqa: E731
    resize = lambda picture, size: picture.resize(size, Image.Resampling.LANCZOS)  # noqa: E731
    if not image:
        return to_pil(hipa.sample(model, prompts, seeds, size=size, **options))
    if scale:
        return to_pil(hipa.upscale(model, batch(image), scale, prompts, seeds, **options))
    source = batch(resize(image, size))
    if not mask:
        return [resize(picture, image.size) for picture in to_pil(hipa.edit(model, source, prompts, seeds, **options))]
    hole = (batch(mask.resize(size, Image.Resampling.BOX)) > -1).float()  # whatever has white in it
    drawn = to_pil(hipa.inpaint(model, source, hole, prompts, seeds, **options))
    return [Image.composite(resize(picture, image.size), image, mask) for picture in drawn]


def main(argv=None):
    args = parse_args(argv)  # before the imports below: a mistake should not wait for torch
    import torch
    from PIL import Image
    from tqdm import tqdm

    import hipa

    # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which no file can hold.
    clean = lambda text: text.encode("utf-8", "replace").decode()  # noqa: E731
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    prompts = [clean(prompt) for prompt in prompts]
    negative = clean(args.negative)

    device = choose_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    writable(args.out)
    image = read_picture(args.image) if args.image else None
    mask = read_mask(args.mask, image.size) if args.mask else None
    if args.scale and args.scale**2 * image.width * image.height > Image.MAX_IMAGE_PIXELS:
        most = Image.MAX_IMAGE_PIXELS
        raise hipa.UserError(
            f"--scale {args.scale} makes more than {most:,} pixels of {args.image}: take a smaller one"
        )
    checkpoint = hipa.find_checkpoint(args.model, half=dtype != torch.float32)
    size = hipa.picture_size(checkpoint, args.size, like=image and image.size)
    lora, weight = args.lora or own_lora(checkpoint, args.steps)
    steps = args.steps or (1 if lora else 25)
    guidance = hipa.default_guidance(steps) if args.guidance is None else args.guidance
    if lora:
        hipa.read_weights(lora)  # refuses what is no safetensors file before the model loads
    model = hipa.load(checkpoint, device, dtype)
    if lora:
        apply_lora(model, lora, weight)
    if args.compile:
        model.unet.compile()
        model.vae.decoder.compile()

    def parameters(prompt, seed):
        """What a picture was made from, in the words image viewers know from other Stable Diffusion programs."""
        lines = [prompt, f"Negative prompt: {negative}"] if negative else [prompt]
        settings = f"Steps: {steps}, Sampler: DPM++ 2M trailing, CFG scale: {guidance:g}, Seed: {seed}"
        made_with = f"Model: {args.model}" + (f", Lora: {clean(str(lora))}:{weight:g}" if lora else "")
        if image:
            made_with += f", Image: {clean(args.image.name)}, Denoising strength: {args.strength:g}"
            made_with += f", Mask: {clean(args.mask.name)}" if mask else f", Scale: {args.scale}" if args.scale else ""
        return "\n".join([*lines, f"{settings}, Size: {size[0]}x{size[1]}, {made_with}"])

    # Each picture's prompt and seed, in order; a batch is a slice of this list.
    jobs = [(prompt, args.seed + k) for k, prompt in enumerate(p for p in prompts for _ in range(args.n))]
    batches = [jobs[i : i + args.batch] for i in range(0, len(jobs), args.batch)]
    numbers = next_numbers(args.out)
    colours = sys.stdout and sys.stdout.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")
    wide = max(size[0], image.width * (args.scale or 1) if image else 0)
    shown = colours and wide <= 128 if args.show is None else args.show
    of_prompt = []  # the current prompt's pictures, for its grid
    total = len(batches) * steps
    if args.scale:
        total *= math.prod(len(hipa.tiles(model, args.scale * length)) for length in image.size)
    options = {"steps": steps, "guidance": guidance, "negative": negative}
    if image:
        options |= {"image": image, "mask": mask, "scale": args.scale, "strength": args.strength}
    with tqdm(total=total, unit="step", leave=False, disable=total == 1) as bar:
        for batch in batches:
            words, seeds = zip(*batch)
            pictures = draw(model, words, seeds, size, progress=bar.update, **options)
            for picture, (prompt, seed) in zip(pictures, batch):
                of_prompt.append(picture)
                made = [(picture, f"{seed}-{slug(prompt)}", parameters(prompt, seed))]
                if len(of_prompt) == args.n:
                    if args.n > 1:
                        first = seed - args.n + 1
                        made.append((grid(of_prompt), f"grid-{slug(prompt)}", parameters(prompt, first)))
                    of_prompt = []
                with bar.external_write_mode():
                    if shown:
                        show(picture.reduce(-(-wide // 128)) if wide > 128 else picture)
                    for each in made:
                        print(save(each[0], args.out, numbers, *each[1:]), flush=True)


def run(main):
    """Runs a command line's main(): a user's mistake is one line and exit code 2, an interruption no traceback."""
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding cannot spell
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from hipa import UserError  # here, because importing torch takes longer than refusing a bad argument

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
