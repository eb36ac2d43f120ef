"""`emoji/make.py` in a short form: from the font to a model that draws, killed and continued, and trained further."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import ROOT

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FONT.exists(), reason="needs the font: apt-get install fonts-noto-color-emoji"),
]
UNET = Path("emoji/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code, and of `emoji/` only what people wrote: no weights."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "emoji").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("emoji/*.py"), ROOT / "emoji" / "prompts.txt"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def make(folder, *options):
    command = [sys.executable, "emoji/make.py", "--device", "cpu", "--pictures", "64", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def to_the_end(process):
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error.decode()[-2000:]


def progress(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["progress"])


def draws(folder):
    command = [sys.executable, "sample.py", "a cat", "--steps", "2"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def test_from_the_font_to_a_picture(copy):
    """Killed as soon as a state is kept; the same command continues from it and ends with a model that draws."""
    short = ["--minutes", "0.1", "0.02", "0.05", "0.05"]
    process, state = make(copy, *short), copy / "emoji" / "build" / "vae.state"
    while not state.exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = state.read_bytes()
    to_the_end(make(copy, *short))
    assert state.read_bytes() != kept
    rows = (copy / "emoji" / "build" / "vae.csv").read_text().splitlines()
    assert rows[0].startswith("minutes,samples,step,loss,psnr,edges") and len(rows) > 1
    assert draws(copy)


def test_training_further(copy):
    """Each part; without its build folder it continues from the weights, whose header says what they have had."""
    to_the_end(make(copy, "--improve", "decoder", "0.05"))
    to_the_end(make(copy, "--improve", "unet", "0.05"))
    first = progress(copy / UNET)
    assert 0.05 <= first["minutes"] < 0.2 and first["samples"] == 32 * first["step"] > 0
    shutil.rmtree(copy / "emoji" / "build")
    to_the_end(make(copy, "--improve", "unet", "0.1"))
    second = progress(copy / UNET)
    assert second["minutes"] >= 0.1 and second["step"] > first["step"]
    assert draws(copy)


def test_a_copy_that_predicts_noise(copy):
    to_the_end(make(copy, "--improve", "epsilon", "0.05"))
    folder = copy / "emoji" / "build" / "epsilon"
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    assert progress(folder / "unet" / UNET.name)["step"] > 0


@pytest.mark.parametrize("what", [("unett", "5"), ("unet", "soon"), ("unet", "-1"), ("decoder", "nan")], ids="-".join)
def test_a_typo_is_told_at_once(what):
    done = subprocess.run(
        [sys.executable, "emoji/make.py", "--improve", *what], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--improve takes one of unet, decoder, epsilon" in done.stderr.splitlines()[-1]
