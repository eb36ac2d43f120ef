"""An accelerator without one: everything that a model does, on a second device, with pictures on the CPU or on it too.

The device is torch's "meta": its tensors have shapes but no values. `Accelerator` makes it as strict as a real one.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hipa
import sample
import train
from conftest import ROOT
from lora import LORA_NAME, add_lora
from test_compile import small_distance, small_model

sys.path.insert(0, str(ROOT / "emoji"))

import evaluate  # noqa: E402
import lcm  # noqa: E402
import progressive  # noqa: E402

PROMPTS, SEEDS, SIZE = ["a cat", "a dog"], [0, 1], (2, 3, 20, 28)
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


class Accelerator(TorchDispatchMode):
    """Refuses operations of tensors of both devices, but for numbers. Every value that the CPU asks for is 1, or True.

    Without it, the meta device itself lets some mixtures pass, `x[:2] += y` for one, and refuses all copies to the CPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if function is torch.ops.aten._to_copy.default:
            if args[0].is_meta and str(kwargs.get("device") or "meta") == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif function is not torch.ops.aten.copy_.default:
            devices = sorted({tensor.device.type for tensor in tensors if tensor.ndim})
            assert len(devices) < 2, f"{function}: expected all tensors on one device, not {' and '.join(devices)}"
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def accelerator():
    with Accelerator():
        yield


@pytest.fixture
def model(sd15_like):
    return hipa.load(sd15_like, "meta")


def test_the_accelerator_is_strict():
    """Mixtures are refused, also those that the meta device lets pass; numbers of the CPU are welcome everywhere."""
    here, there = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
    linear = torch.nn.Linear(3, 3, device="meta")
    for mix in (lambda: here + there, lambda: there[:1].add_(here[:1]), lambda: linear(here), lambda: here[there > 0]):
        with pytest.raises(AssertionError, match="one device, not cpu and meta"):
            mix()
    assert (there * torch.tensor(2.0)).is_meta and there.to("cpu").tolist() == here.add(1).tolist()


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (3, 2.0)])
def test_sample(model, steps, guidance):
    pictures = hipa.sample(model, PROMPTS, SEEDS, steps, guidance, size=(28, 20), negative="a bird")
    assert pictures.is_meta and pictures.shape == SIZE


@DEVICES
@pytest.mark.parametrize("job", ["edit", "inpaint", "upscale"])
def test_jobs(model, job, device):
    """The result is where the given pictures are. Enlarged, 40 x 28 pixels are made in two tiles."""
    pictures, mask = torch.zeros(SIZE, device=device), torch.ones(2, 1, 20, 28, device=device)
    if job == "upscale":
        pictures = pictures[..., :14, :20]
    between = {"edit": [], "inpaint": [mask], "upscale": [2]}[job]
    result = getattr(hipa, job)(model, pictures, *between, PROMPTS, SEEDS, steps=1)
    assert result.device.type == device and result.shape == (SIZE if job != "upscale" else (2, 3, 28, 40))


def test_training(sd15_like, tmp_path, monkeypatch):
    """All of train.py: targets, an update with later starts, what is saved. Then sampling with the file of adaptors."""

    def load(*args):
        model = small_model(hipa_load(*args), levels=2)
        model.unet.to("meta"), model.vae.to("meta")
        return model

    hipa_load = hipa.load
    monkeypatch.setattr(hipa, "load", load)
    monkeypatch.setattr(train, "choose_device", lambda name: "meta")
    monkeypatch.setattr(train, "load_distance", lambda *_: small_distance())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = "--rank 2 --pairs 6 --teacher-steps 2 --steps 1 --batch 6 --accumulate 2 --head-start 0 --later 1"
    paths = ["--data", tmp_path / "prompts.txt", "--model", sd15_like, "--out", tmp_path / "run"]
    train.main([*map(str, paths), *options.split()])

    model = load(sd15_like, "meta")
    sample.apply_lora(model, tmp_path / "run" / LORA_NAME, 0.5)
    assert all(weight.is_meta for weight in model.unet.parameters())
    assert hipa.sample(model, PROMPTS, SEEDS, 1).is_meta


@pytest.mark.parametrize("sample", [lcm.sample_consistency, progressive.sample_ddim])
def test_samplers_of_the_peers(sample):
    assert sample(hipa.load("emoji", "meta"), PROMPTS, SEEDS, 2).is_meta


def test_losses_of_the_peers():
    """Of LCM and of progressive distillation, in emoji/."""
    teacher, model, x0 = (
        hipa.load("emoji", "meta"),
        hipa.load("emoji", "meta"),
        torch.zeros(2, 4, 16, 16, device="meta"),
    )
    assert progressive.loss_of(teacher, model, 2, 0, PROMPTS, x0, 2.0).is_meta
    add_lora(model.unet, 2)
    batch = SimpleNamespace(prompts=PROMPTS, x0=x0)
    assert lcm.loss_of(SimpleNamespace(seed=0, guidance=2.0), model, None, 0, batch)["consistency"].is_meta


@pytest.mark.slow
def test_peers_are_trained_and_measured(tmp_path, monkeypatch):
    """Each student is read back onto the device for the next; pictures are measured on the CPU."""
    monkeypatch.setattr(progressive, "choose_device", lambda name: "meta")
    monkeypatch.setattr(progressive, "SHARES", {2: 1, 1: 1})
    options = "--data emoji --pairs 8 --teacher-steps 1 --batch 2 --steps 2 --out"
    progressive.main([*options.split(), str(tmp_path)])
    model = hipa.load("emoji", "meta")
    drawn, copies = evaluate.draw(model, PROMPTS, 0, 1), evaluate.Evaluation(model, per_class=1).copies
    assert drawn.device.type == copies.device.type == "cpu"
