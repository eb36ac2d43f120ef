"""Speed and memory beside diffusers, in one run on one machine: every row is a ratio, below 1 is better for us.

    python tests/bench.py                # all rows: about ten minutes on 2 cores, and 6 GB of disk for a while
    python tests/bench.py command small  # only these

Not a test: nothing fails here. Ours and theirs take turns, and the medians are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hipa  # noqa: E402

CONFIGS = Path(__file__).resolve().parent / "official_configs"


def compare(name, ours, theirs, rounds, unit="s"):
    """Calls each `rounds` times in turn (after one unmeasured call of each) and prints the ratio of the medians."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    print(f"| {name} | {a:.3g} {unit} | {b:.3g} {unit} | {a / b:.2f} |", flush=True)


def timed(function):
    def run():
        start = time.perf_counter()
        with torch.no_grad():
            function()
        return time.perf_counter() - start

    return run


def command(*args, **kwargs):
    """A command as something to time, from process start to end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return timed(lambda: subprocess.run(args, check=True, capture_output=True, cwd=ROOT, env=environment, **kwargs))


# ---------------------------------------------------------------------------------------------------------------- rows
def bench_command():
    """The whole command, start-up included, 25 steps, with the shortest diffusers script that does the same."""
    with tempfile.TemporaryDirectory() as out:
        script = (
            "from diffusers import StableDiffusionPipeline as P\n"
            f"P.from_pretrained('emoji')('a cat', num_inference_steps=25).images[0].save('{out}/cat.png')"
        )
        ours = command(sys.executable, "sample.py", "a cat", "--steps", "25", "--out", out)
        compare('`python sample.py "a cat"`, 25 steps', ours, command(sys.executable, "-c", script), 5)


def networks(folder):
    """(our checkpoint, their UNet, their VAE) of one folder, in float32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    load = dict(torch_dtype=torch.float32, low_cpu_mem_usage=True)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **load)
    return hipa.load(folder), unet, AutoencoderKL.from_pretrained(folder / "vae", **load)


def bench_forward(name, folder, batch, side, rounds):
    """One UNet and one VAE evaluation at `side` x `side` latents."""
    model, unet, vae = networks(folder)
    config = model.unet.config
    latent, timestep = torch.randn(batch, 4, side, side), torch.full((batch,), 999)
    states = torch.randn(batch, 77, config.cross_attention_dim)
    picture = torch.randn(batch, 3, side * model.vae.config.downscale, side * model.vae.config.downscale)
    at = f"{name}, batch {batch}, {picture.shape[-1]}×{picture.shape[-1]}"
    compare(
        f"UNet, {at}",
        timed(lambda: model.unet(latent, timestep, states)),
        timed(lambda: unet(latent, timestep, states)),
        rounds,
    )
    compare(f"VAE decode, {at}", timed(lambda: model.vae.decode(latent)), timed(lambda: vae.decode(latent)), rounds)
    compare(f"VAE encode, {at}", timed(lambda: model.vae.moments(picture)), timed(lambda: vae.encode(picture)), rounds)


LOAD = """
import json, re, sys, time
import torch
kind, folder = sys.argv[1:]
if kind == "ours":
    sys.path.insert(0, ".")
    import hipa
else:
    from diffusers import StableDiffusionPipeline
def peak():  # in bytes; Linux. Not getrusage's ru_maxrss, which a process inherits from the one that starts it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
start = time.perf_counter()
if kind == "ours":
    model = hipa.load(folder)
else:
    model = StableDiffusionPipeline.from_pretrained(folder)
parameters = [p for net in (model.unet, model.vae, model.text_encoder) for p in net.parameters()]
total = sum(p.detach().sum() for p in parameters)  # touches every weight: a mapped page not yet read is no page loaded
seconds = time.perf_counter() - start
used = peak() - before
print(json.dumps([seconds, used / sum(p.numel() * p.element_size() for p in parameters)]))
"""


def bench_load(folder):
    """A checkpoint of 2.1-base's size: seconds until all weights are in memory; peak memory over the weights' size."""

    def loading(kind, which):
        def run():
            done = subprocess.run(
                [sys.executable, "-c", LOAD, kind, str(folder)],
                check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            return json.loads(done.stdout.splitlines()[-1])[which]

        return run

    compare("load, 2.1-base size", loading("ours", 0), loading("theirs", 0), 3)
    compare("peak memory of that, weights = 1", loading("ours", 1), loading("theirs", 1), 1, "")


def write_large_checkpoint(folder):
    """SD 2.1-base's official configs with cheap random weights, float32, in diffusers' layout; 5 GB."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from conftest import write_index, write_tokenizer

    official = CONFIGS / "sd21base"
    with torch.device("meta"):
        nets = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(official / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(official / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_json_file(official / "text_encoder" / "config.json")),
        }
    noise = torch.randn(2**27)
    for name, net in nets.items():
        net.to_empty(device="cpu")
        for parameter in net.parameters():
            parameter.data.copy_(noise[: parameter.numel()].view_as(parameter)).mul_(parameter[0].numel() ** -0.5)
        net.save_pretrained(folder / name, max_shard_size="100GB")
    write_tokenizer(folder / "tokenizer", "!")
    DPMSolverMultistepScheduler(beta_schedule="scaled_linear", steps_offset=1).save_pretrained(folder / "scheduler")
    write_index(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="command|small|large|load")
    rows = parser.parse_args().rows or ["command", "small", "large", "load"]
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
    print("| | hipa | diffusers | ratio |\n|---|---|---|---|")
    if "command" in rows:
        bench_command()
    if "small" in rows:
        bench_forward("emoji", ROOT / "emoji", 1, 16, 40)
        bench_forward("emoji", ROOT / "emoji", 16, 16, 10)
    if "large" in rows or "load" in rows:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "large"
            write_large_checkpoint(folder)
            if "load" in rows:
                bench_load(folder)
            if "large" in rows:
                bench_forward("2.1-base", folder, 1, 32, 3)


if __name__ == "__main__":
    main()
