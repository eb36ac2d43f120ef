"""Speed and memory beside diffusers, in one run on one machine: every row is a ratio, below 1 is better for hipa.

    python tools/bench.py command pictures small train large load     # ten minutes on 2 cores, 5 GB of disk for a while
    python tools/bench.py gpu                                         # on a GPU, at 2.1-base's size; training too
    python tools/bench.py live                                        # a key stroke in the live page; needs Chromium

Not a test: nothing fails here. The two sides take turns, and the medians are compared.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "emoji"
sys.path.insert(0, str(ROOT))

import hipa  # noqa: E402
from lora import LORA_NAME, add_lora  # noqa: E402
from losses import DISTS, VGG, HiPALoss  # noqa: E402
from sample import Parser, apply_lora, run  # noqa: E402
from train import descend, load_distance  # noqa: E402


def seconds(function):
    """[how long a call takes]"""
    start = time.perf_counter()
    with torch.no_grad():
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return [time.perf_counter() - start]


def alone(function):
    """What the function returns in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def compare(rows, ours, theirs, rounds, measure=seconds):
    """Measures both in turn and prints the medians and the ratio of each figure. rows: {name: unit}"""
    measure(ours), measure(theirs)  # the first call can be slower
    pairs = [(measure(ours), measure(theirs)) for _ in range(rounds)]
    for k, (name, unit) in enumerate(rows.items()):
        a, b = (median(pair[side][k] for pair in pairs) for side in (0, 1))
        print(f"| {name} | {a:.3g}{unit} | {b:.3g}{unit} | {a / b:.2f} |", flush=True)


def peak():
    """The most memory that this process ever had, in bytes; Linux. (getrusage's includes what its parent had.)"""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def load_pipeline(folder, **options):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bench_command():
    """The whole command, start-up included, with the shortest diffusers script that does the same."""
    command = partial(subprocess.run, check=True, capture_output=True, cwd=ROOT)
    load = "from diffusers import StableDiffusionPipeline as P; pipe = P.from_pretrained('emoji'); "
    lora = load + "pipe.load_lora_weights('emoji'); "
    with tempfile.TemporaryDirectory() as out:
        for steps, script, options in (("1", lora, "guidance_scale=1"), ("25", load, "")):
            script += f"pipe('a cat', num_inference_steps={steps}, {options}).images[0].save('{out}/cat.png')"
            ours = partial(command, [sys.executable, "sample.py", "a cat", "--steps", steps, "--out", out])
            theirs = partial(command, [sys.executable, "-c", script])
            compare({f'`python sample.py "a cat" --steps {steps}`': " s"}, ours, theirs, 5)
    ours, theirs = ([sys.executable, "-c", script] for script in ("import hipa; hipa.load('emoji')", load))
    compare({"of that, imports and loading": " s"}, partial(command, ours), partial(command, theirs), 5)


def bench_pictures(folder, batches, rounds, device="cpu", dtype=torch.float32):
    """Prompt to picture in one step; on both sides the folder's adaptors are merged, if it has any."""
    model, pipeline = hipa.load(folder, device, dtype), load_pipeline(folder, dtype=dtype).to(device)
    if (folder / LORA_NAME).exists():
        apply_lora(model, folder / LORA_NAME)
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()
    for batch in batches:
        prompts, generators = ["a cat"] * batch, [torch.Generator().manual_seed(k) for k in range(batch)]
        options = {"num_inference_steps": 1, "guidance_scale": 1, "generator": generators, "output_type": "pt"}
        ours, theirs = partial(hipa.sample, model, prompts, range(batch), 1), partial(pipeline, prompts, **options)
        compare({f"{batch} one-step pictures at a time, {folder.name}": " s"}, ours, theirs, rounds)


def bench_networks(folder, batch, side, rounds, device="cpu", dtype=torch.float32):
    """One evaluation of each network at `side` x `side` latents."""
    model, pipeline = hipa.load(folder, device, dtype), load_pipeline(folder, dtype=dtype).to(device)
    latent = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
    picture = torch.randn(batch, 3, *2 * [side * model.vae.config.downscale], device=device, dtype=dtype)
    with torch.no_grad():
        inputs = latent, torch.full((batch,), 999, device=device), model.encode_text(["a cat"] * batch)
    at = f"{folder.name}, batch {batch}, {picture.shape[2]}×{picture.shape[3]}"
    compare({f"UNet, {at}": " s"}, partial(model.unet, *inputs), partial(pipeline.unet, *inputs), rounds)
    compare(
        {f"VAE decode, {at}": " s"}, partial(model.vae.decode, latent), partial(pipeline.vae.decode, latent), rounds
    )
    compare(
        {f"VAE encode, {at}": " s"}, partial(model.vae.moments, picture), partial(pipeline.vae.encode, picture), rounds
    )


def load(kind, folder):
    """The figures of LOADING: seconds until all weights are in memory, and peak memory over the weights' size."""
    from diffusers import StableDiffusionPipeline  # before the clock starts

    before, start = peak(), time.perf_counter()
    model = hipa.load(folder) if kind == "ours" else StableDiffusionPipeline.from_pretrained(folder)
    parameters = [p for net in (model.unet, model.vae, model.text_encoder) for p in net.parameters()]
    sum(p.detach().sum() for p in parameters)  # touches every weight: a mapped page that was not read is not loaded
    duration = time.perf_counter() - start
    return duration, (peak() - before) / sum(p.numel() * p.element_size() for p in parameters)


@cache
def large():
    """A folder with cheap random weights, float32, in the sizes of SD 2.1-base's official configs; 5 GB."""
    large.place = tempfile.TemporaryDirectory()  # kept until the program ends
    folder, noise = Path(large.place.name) / "2.1-base", torch.randn(2**27)
    shutil.copytree(ROOT / "tests" / "official_configs" / "sd21base", folder)
    for name in ("model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        shutil.copy(EMOJI / name, folder / name)
    for name, network, config in (
        ("text_encoder/model", hipa.CLIPTextModel, hipa.CLIPTextConfig),
        ("unet/diffusion_pytorch_model", hipa.UNet2DConditionModel, hipa.UNetConfig),
        ("vae/diffusion_pytorch_model", hipa.AutoencoderKL, hipa.VAEConfig),
    ):
        with torch.device("meta"):
            shapes = network(hipa.read_config(config, (folder / name).with_name("config.json"))).state_dict()
        tensors = {k: noise[: t.numel()].view_as(t) * t[0].numel() ** -0.5 for k, t in shapes.items()}
        save_file(tensors, f"{folder / name}.safetensors", {"format": "pt"})
    return folder


def update(model, loss, parameters, batch, side):
    """A function for one update of the adaptors. model: a `StableDiffusion`, or what stands in its place."""
    noise, target = torch.randn(2, batch, 4, side, side, device=model.device)
    optimizer, timesteps = torch.optim.AdamW(parameters, 1e-4), torch.full((batch,), 999, device=model.device)

    @torch.enable_grad()
    def step():
        predicted = hipa.student(model, ["a cat"] * batch, noise, timesteps)
        sum(hipa.adaptation_loss(model, loss, predicted, target).values()).backward()
        descend(optimizer, 1e-4)

    return step


def train(kind, batch):
    """The figures of TRAINING: an update of adaptors of every layer, rank 16. "theirs": by diffusers and peft."""
    model, loss = hipa.load(EMOJI), HiPALoss(load_distance("dists", EMOJI))
    if kind == "ours":
        parameters = add_lora(model.unet, 16, "all")
    else:
        from peft import LoraConfig

        pipe = load_pipeline(EMOJI)
        pipe.unet.requires_grad_(False), pipe.vae.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
        layers = [name for name, m in pipe.unet.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
        pipe.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers))
        parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
        tokens = pipe.tokenizer(["a cat"] * batch, padding="max_length", return_tensors="pt").input_ids
        model.unet, model.vae = lambda *inputs: pipe.unet(*inputs).sample, None
        model.encode_text = lambda prompts: pipe.text_encoder(tokens)[0]
        model.decode = lambda latent: pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    step = update(model, loss, parameters, batch, 16)
    return median([seconds(step)[0] for _ in range(12)][3:]), peak() / 2**30, sum(p.numel() for p in parameters)


def bench_gpu(folder, device="cuda"):
    """One-step pictures and the networks in bfloat16; one update of the attention layers' adaptors, as train.py's."""
    print(f"| **{torch.cuda.get_device_name() if device == 'cuda' else device}, bfloat16** | | | |", flush=True)
    bench_pictures(folder, (1, 8), 10, device, torch.bfloat16)
    bench_networks(folder, 1, 64, 10, device, torch.bfloat16)
    model, loss = hipa.load(folder, device, torch.bfloat16), HiPALoss(DISTS(VGG())).to(device)
    parameters = add_lora(model.unet)
    for batch in (1, 2, 4, 8):  # until memory is full: then this ends in a message
        step = update(model, loss, parameters, batch, model.unet.config.sample_size)
        time = median([seconds(step)[0] for _ in range(8)][3:])
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak()
        print(f"| training step, batch {batch}: time, peak memory | {time:.3g} s, {memory / 2**30:.3g} GiB | | |")


def bench_live(text="a panda on a blue background, a red apple on a table, "):
    """In headless Chromium: milliseconds from a key stroke to its picture on the screen."""
    from live.figure import chromium, until

    start = [sys.executable, "live", "--port", "0", "--device", "cpu"]
    server, trips = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True), []
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        browser.get(server.stdout.readline())
        prompt, trip = (browser.find_element("id", name) for name in ("prompt", "trip"))
        for key in 4 * text:
            until(lambda: "ms" in trip.text)
            browser.execute_script("arguments[0].textContent = ''", trip)
            prompt.send_keys(key)
            until(lambda: "ms" in trip.text)
            trips.append(int(re.search(r"\d+", trip.text)[0]))
    server.terminate()
    *_, most = quantiles(trips, n=20)
    print(f"\n{len(trips)} key strokes to pictures: median {median(trips):.0f} ms, 95th percentile {most:.0f} ms")


TRAINING = {"training step, emoji, batch 8": " s", "peak memory of that": " GiB", "trained parameters of that": ""}
LOADING = {"load, 2.1-base": " s", "peak memory of that, weights = 1": ""}
ROWS = {
    "command": bench_command,
    "pictures": lambda: bench_pictures(EMOJI, (1, 4, 16), 15),
    "small": lambda: [bench_networks(EMOJI, 1, 16, 40), bench_networks(EMOJI, 16, 16, 10)],
    "train": lambda: compare(TRAINING, partial(train, "ours", 8), partial(train, "theirs", 8), 3, alone),
    "large": lambda: bench_networks(large(), 1, 32, 3),
    "load": lambda: compare(LOADING, partial(load, "ours", large()), partial(load, "theirs", large()), 3, alone),
    "gpu": lambda: bench_gpu(large()),
    "live": bench_live,
}


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    rows = parser.parse_args(argv).rows
    if "gpu" in rows and not torch.cuda.is_available():
        parser.error("gpu: there is none here")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
    print("| | hipa | diffusers | ratio |\n|---|---|---|---|", flush=True)
    for name in rows:
        ROWS[name]()


if __name__ == "__main__":
    run(main)
