"""An accelerator without one: everything that a model does, on a second device, with pictures on the CPU or on it too.

The device is torch's "meta": its tensors have shapes but no values. `Accelerator` makes it as strict as a real one.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hipa
from lora import add_lora, load_lora, merge, save_lora
from losses import DISTS, VGG, HiPALoss, VGGConfig

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


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (1, 2.0), (3, 2.0)])
def test_sample(model, steps, guidance):
    pictures = hipa.sample(model, PROMPTS, SEEDS, steps, guidance, size=(28, 20), negative="a bird")
    assert pictures.is_meta and pictures.shape == SIZE


@DEVICES
@pytest.mark.parametrize("job", ["edit", "inpaint", "upscale"])
def test_jobs(model, job, device):
    """The result is where the given pictures are. Enlarged, 56 x 40 pixels are drawn in four tiles."""
    pictures, mask = torch.zeros(SIZE, device=device), torch.ones(2, 1, 20, 28, device=device)
    between = {"edit": [], "inpaint": [mask], "upscale": [2]}[job]
    drawn = getattr(hipa, job)(model, pictures, *between, PROMPTS, SEEDS, steps=2)
    assert drawn.device.type == device and drawn.shape == (SIZE if job != "upscale" else (2, 3, 40, 56))


@DEVICES
def test_encode_and_decode(model, device):
    latent = model.encode(torch.zeros(SIZE, device=device))
    assert latent.is_meta and model.decode(latent).is_meta and model.decode(latent).shape == SIZE
    assert model.encode_text(PROMPTS).is_meta


@pytest.mark.parametrize("first", [None, 600, torch.tensor([1, 999]), torch.tensor([1, 999], device="meta")], ids=str)
def test_solver_and_teacher(model, first):
    """Each picture's first timestep may be on either device."""
    x = torch.zeros(2, 4, 8, 8, device="meta")
    x0 = hipa.dpm_solver(lambda x, t: model.schedule.predict_x0(x, t, 0.5 * x), x, model.schedule, 2, first)
    target = hipa.teacher(model, PROMPTS, x, 2, 2.0, first)
    assert x0.is_meta and target.is_meta and x0.shape == target.shape == x.shape


def test_training(model):
    """The gradients are where the adaptors are."""
    parameters = add_lora(model.unet, 2)
    loss = HiPALoss(DISTS(VGG(VGGConfig(channels=(4, 8), convs=(1, 1)))), energy=1).to("meta")
    x, timesteps = torch.zeros(2, 4, 8, 8, device="meta"), torch.tensor([999, 5], device="meta")
    terms = hipa.adaptation_loss(model, loss, hipa.student(model, PROMPTS, x, timesteps), x)
    sum(terms.values()).backward()
    assert len(terms) == 4 and all(p.grad.is_meta and p.grad.shape == p.shape for p in parameters)


def test_adaptors_from_a_file(model, sd15_like, tmp_path):
    """They are on the CPU, and merge into weights that are not."""
    here = hipa.load(sd15_like).unet
    add_lora(here, 2, "all")
    save_lora(tmp_path / "a.safetensors", here)
    merge(model.unet, load_lora(tmp_path / "a.safetensors", model.unet), 0.5)
    assert all(weight.is_meta for weight in model.unet.parameters())
    assert hipa.sample(model, PROMPTS, SEEDS, 1).is_meta
