"""Speed and memory beside diffusers, in one run on one machine: every row is a ratio, below 1 is better for us.

    python emoji/bench.py                # all rows: about nine minutes on 2 cores, and 6 GB of disk for a while
    python emoji/bench.py command small  # only these

Not a test: nothing fails here. Ours and theirs take turns, and the medians are compared.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hipa  # noqa: E402
import train  # noqa: E402
from clip import CLIPTextConfig, CLIPTextModel  # noqa: E402
from lora import add_lora  # noqa: E402
from losses import DISTS, VGG, HiPALoss  # noqa: E402
from sample import LORA_NAME, apply_lora  # noqa: E402
from unet import UNet2DConditionModel, UNetConfig  # noqa: E402
from vae import AutoencoderKL, VAEConfig  # noqa: E402

CONFIGS = ROOT / "tests" / "official_configs"


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
    """The whole command, start-up included, with the shortest diffusers script that does the same."""
    with tempfile.TemporaryDirectory() as out:
        for steps, options in ((1, ", guidance_scale=1"), (25, "")):
            script = (
                "from diffusers import StableDiffusionPipeline as P\n"
                "pipe = P.from_pretrained('emoji')\n"
                f"if {steps} == 1: pipe.load_lora_weights('emoji')\n"
                f"pipe('a cat', num_inference_steps={steps}{options}).images[0].save('{out}/cat.png')"
            )
            ours = command(sys.executable, "sample.py", "a cat", "--steps", str(steps), "--out", out)
            theirs = command(sys.executable, "-c", script)
            compare(f'`python sample.py "a cat" --steps {steps}`', ours, theirs, 5)
    ours = command(sys.executable, "-c", "import hipa; hipa.load('emoji')")
    theirs = command(
        sys.executable, "-c", "from diffusers import StableDiffusionPipeline as P; P.from_pretrained('emoji')"
    )
    compare("of that, imports and loading", ours, theirs, 5)


def bench_pictures():
    """Prompt to picture in one step, adaptors merged on both sides; and how the time grows with batch and size."""
    from diffusers import StableDiffusionPipeline

    model = hipa.load("emoji")
    apply_lora(model, ROOT / "emoji" / LORA_NAME)
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "emoji")
    pipeline.load_lora_weights(ROOT / "emoji")
    pipeline.fuse_lora()
    pipeline.set_progress_bar_config(disable=True)

    def sides(batch, side):
        prompts, generators = ["a cat"] * batch, [torch.Generator().manual_seed(k) for k in range(batch)]
        how = {"num_inference_steps": 1, "guidance_scale": 1, "height": side, "width": side, "output_type": "pt"}
        ours = timed(lambda: hipa.sample(model, prompts, range(batch), 1, size=(side, side)))
        return ours, timed(lambda: pipeline(prompts, generator=generators, **how))

    def growth(name, amounts, arguments):
        """Fits the exponent in seconds ~ amount ** exponent. No ratio: what costs much to begin with grows less."""
        seconds = []
        for amount in amounts:
            ours, theirs = sides(*arguments(amount))
            ours(), theirs()
            seconds.append([median(times) for times in zip(*((ours(), theirs()) for _ in range(5)))])
        a, b = np.polyfit(np.log(amounts), np.log(seconds), 1)[0]
        print(f"| exponent of time over {name} | {a:.2f} | {b:.2f} | |", flush=True)

    for batch in (1, 4, 16):
        ours, theirs = sides(batch, 64)
        compare(f"{batch} one-step pictures at a time, emoji", ours, theirs, 15)
    growth("batch (1 to 16, 64×64)", [1, 2, 4, 8, 16], lambda batch: (batch, 64))
    growth("pixels (64×64 to 256×256)", [side**2 for side in (64, 96, 128, 192, 256)], lambda n: (1, round(n**0.5)))


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


PEAK = """
import json, re, sys, time
def peak():  # in bytes; Linux. Not getrusage's ru_maxrss, which a process inherits from the one that starts it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""


def results_of(script, *args):
    """What a script prints last, as JSON. A process of its own, so that time and peak memory are its own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script, *map(str, args)],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


LOAD = """
import torch
kind, folder = sys.argv[1:]
if kind == "ours":
    sys.path.insert(0, ".")
    import hipa
else:
    from diffusers import StableDiffusionPipeline
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
        return lambda: results_of(LOAD, kind, folder)[which]

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


TRAIN = """
from statistics import median
import torch
kind, batch = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, ".")
import hipa
from losses import HiPALoss
from lora import add_lora
from train import HERE, load_distance
torch.manual_seed(0)
model, loss = hipa.load("emoji"), HiPALoss(load_distance("dists", HERE / "emoji"))
noise, target = torch.randn(2, batch, 4, 16, 16)
prompts, timesteps, seconds = ["a cat"] * batch, torch.full((batch,), 999), []
if kind == "ours":
    parameters = add_lora(model.unet, 16, "all")
    def terms_of_a_step():
        return hipa.adaptation_loss(model, loss, hipa.student(model, prompts, noise, timesteps), target)
else:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer
    load = dict(torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained("emoji/tokenizer")
    text = CLIPTextModel.from_pretrained("emoji/text_encoder", **load).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained("emoji/unet", **load).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained("emoji/vae", **load).requires_grad_(False)
    schedule = model.schedule
    del model
    layers = [n for n, m in unet.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    def decode(latent):
        return vae.decode(latent / vae.config.scaling_factor).sample
    def terms_of_a_step():
        ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        prediction = unet(noise, timesteps, text(ids).last_hidden_state).sample
        with torch.no_grad():
            picture = decode(target)
        return loss(decode(schedule.predict_x0(noise, timesteps, prediction)), picture)
optimizer = torch.optim.AdamW(parameters, 1e-4)
for _ in range(5):
    start = time.perf_counter()
    terms = terms_of_a_step()
    sum(terms.values()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(json.dumps([median(seconds[1:]), peak() / 2**30, sum(p.numel() for p in parameters), float(sum(terms.values()))]))
"""


def bench_train():
    """One update of the adaptors of every layer, rank 16: by `hipa.student` and `hipa.adaptation_loss`, and by
    diffusers' networks with peft and the same loss.

    A process each, so that the peak of memory is its own; it includes the interpreter and the libraries.
    """
    batch, results = 8, {}

    def training(kind, which):
        def run():
            results[kind] = results_of(TRAIN, kind, batch)
            return results[kind][which]

        return run

    compare(f"training step, emoji, batch {batch}", training("ours", 0), training("theirs", 0), 3)
    compare("peak memory of that", training("ours", 1), training("theirs", 1), 1, "GiB")
    assert results["ours"][2] == results["theirs"][2], results  # the same number of trained parameters


def bench_live(strokes=200):
    """The live page in headless Chromium: milliseconds from a key stroke to its picture on the screen. No ratio."""
    from test_live import chromium, until

    server = subprocess.Popen(
        [sys.executable, "live", "--port", "0", "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium(Path(folder))
        try:
            browser.get(server.stdout.readline())
            prompt, trip = (browser.find_element("id", name) for name in ("prompt", "trip"))
            until(lambda: "ms" in trip.text)
            trips = []
            for k in range(strokes):
                if k % 40 == 0:
                    browser.execute_script("arguments[0].value = ''", prompt)
                browser.execute_script("arguments[0].textContent = ''", trip)
                prompt.send_keys("a panda on a blue background, a red apple"[k % 40])
                until(lambda: "ms" in trip.text)
                trips.append(int(re.search(r"\d+", trip.text)[0]))
        finally:
            browser.quit()
            server.terminate()
    half, most = np.percentile(trips, [50, 95])
    print(f"\nlive page, {strokes} key strokes to their pictures: median {half:.0f} ms, 95th percentile {most:.0f} ms")


def bench_gpu():
    """Absolute figures of 2.1-base's size on a GPU: random weights, 512x512, bfloat16."""
    if not torch.cuda.is_available():
        print("no GPU here: its rows are left out")
        return
    torch.set_float32_matmul_precision("high")
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 * 20 / gpu_seconds(lambda: [a @ b for _ in range(20)], 3)
    print(f"{torch.cuda.get_device_name()}; a matrix product of 8192: {rate / 1e12:.0f} TFLOP/s in bfloat16\n")
    gpu_pictures(random_model(CONFIGS / "sd21base", "cuda"), rate)
    gpu_training(random_model(CONFIGS / "sd21base", "cuda"), HiPALoss(DISTS(VGG())).cuda(), rate)


def random_model(folder, device):
    """A model with random weights, float32, of the sizes in a checkpoint's config files. All prompts are one to it."""
    parts = {
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
        "unet": (UNet2DConditionModel, UNetConfig),
        "vae": (AutoencoderKL, VAEConfig),
    }
    with torch.device(device):
        nets = {
            part: kind(hipa.read_config(config, folder / part / "config.json")).requires_grad_(False).eval()
            for part, (kind, config) in parts.items()
        }
    places = nets["text_encoder"].config.max_position_embeddings
    return hipa.StableDiffusion(
        lambda prompts: torch.ones(len(prompts), places, dtype=int), schedule=hipa.Schedule(), **nets
    )


def to_bfloat16(model):
    """As the loader does: the UNet's last layers stay in float32."""
    for net in (model.text_encoder, model.vae, model.unet):
        net.bfloat16()
    model.unet.conv_norm_out.float(), model.unet.conv_out.float()


def gpu_pictures(model, rate, batches=(1, 8)):
    """One-step pictures by part: as they are, then compiled. `rate`: FLOP/s to compare with.

    Prints also how long compiling took, and how far bfloat16 is from float32.
    """
    side = model.unet.config.sample_size

    def parts(batch):
        prompts, timesteps = ["a cat"] * batch, torch.full((batch,), 999, device=model.device)
        latent = hipa.noise(range(batch), 4, side, side).to(model.device)
        with torch.no_grad():
            states = model.encode_text(prompts)
        return {
            "text": lambda: model.encode_text(prompts),
            "UNet": lambda: model.unet(latent.to(model.dtype), timesteps, states),
            "decoder": lambda: model.decode(latent),
            "all": lambda: hipa.sample(model, prompts, range(batch), steps=1),
        }

    exact = parts(1)["all"]()
    to_bfloat16(model)
    error = (parts(1)["all"]() - exact).abs()
    print(f"a one-step picture in bfloat16 is {error.mean():.4f} from float32's in the mean, {error.max():.3f} at most "
          f"(its values spread by {exact.std():.2f})\n")  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        parts(1)["all"]()
    names = [f"{name}, ms" for name in parts(1)]
    print(f"| one-step pictures | {' | '.join(names)} | pictures/s | share of the rate |\n|---|" + "---|" * 6)
    for compiled in (False, True):
        if compiled:
            start = time.perf_counter()
            for network in (model.text_encoder, model.unet, model.vae.decoder):
                network.compile()
            parts(1)["all"]()
            compiling = time.perf_counter() - start
        for batch in batches:
            seconds = {name: gpu_seconds(part, 10) / batch for name, part in parts(batch).items()}
            share = counter.get_total_flops() / seconds["all"] / rate
            name = f"batch {batch}, {'compiled' if compiled else 'eager'}"
            times = " | ".join(f"{1000 * s:.1f}" for s in seconds.values())
            print(f"| {name} | {times} | {1 / seconds['all']:.1f} | {share:.2f} |", flush=True)
    print(f"\ncompiling, for the first picture: {compiling:.0f} s\n")


def gpu_training(model, loss, rate, batches=(1, 4, 8)):
    """One update of the adaptors of the attention layers, as train.py makes it: compiled, checkpointed."""
    side, cuda = model.unet.config.sample_size, model.device.type == "cuda"
    to_bfloat16(model)
    parameters = add_lora(model.unet, 16)
    optimizer = torch.optim.AdamW(parameters, 1e-4)

    def step(batch):
        noise, target = torch.randn(2, batch, 4, side, side, device=model.device)
        prompts, timesteps = ["a cat"] * batch, torch.full((batch,), 999, device=model.device)

        def run():
            with torch.enable_grad():
                predicted = hipa.student(model, prompts, noise, timesteps)
                sum(hipa.adaptation_loss(model, loss, predicted, target).values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    with FlopCounterMode(display=False) as counter:
        step(1)()
    train.checkpoint_activations(model, loss.distance)
    for network in (model.text_encoder, model.unet, model.vae.decoder, loss):
        network.compile(dynamic=False)
    print(f"{sum(p.numel() for p in parameters):,} trained parameters\n")
    print("| training, batch | samples/s | peak GiB | share of the rate | hours for 100,000 pairs |")
    print("|---|---|---|---|---|")
    for batch in batches:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = gpu_seconds(step(batch), 5) / batch
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        share, hours = counter.get_total_flops() / seconds / rate, seconds * 100_000 / 3600
        print(f"| {batch} | {1 / seconds:.2f} | {peak:.1f} | {share:.2f} | {hours:.1f} |", flush=True)


def gpu_seconds(function, rounds):
    """Median seconds of a call, after three unmeasured ones."""
    synchronize, times = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, []
    for _ in range(3 + rounds):
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            function()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times[3:])


ROWS = ["command", "pictures", "small", "train", "large", "load", "live", "gpu"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="|".join(ROWS))
    rows = parser.parse_args().rows or ROWS
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
    print("| | hipa | diffusers | ratio |\n|---|---|---|---|")
    if "command" in rows:
        bench_command()
    if "pictures" in rows:
        bench_pictures()
    if "small" in rows:
        bench_forward("emoji", ROOT / "emoji", 1, 16, 40)
        bench_forward("emoji", ROOT / "emoji", 16, 16, 10)
    if "train" in rows:
        bench_train()
    if "large" in rows or "load" in rows:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "large"
            write_large_checkpoint(folder)
            if "load" in rows:
                bench_load(folder)
            if "large" in rows:
                bench_forward("2.1-base", folder, 1, 32, 3)
    if "live" in rows:
        bench_live()
    if "gpu" in rows:
        bench_gpu()


if __name__ == "__main__":
    main()
