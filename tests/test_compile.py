"""torch.compile takes each network whole, computes the same, and makes a fixed number of graphs of it.

The backends "eager" and "aot_eager" run what was captured without a C++ compiler; "aot_eager" also captures backward.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hipa
from lora import add_lora, factors, lora_off
from losses import DISTS, VGG, HiPALoss, VGGConfig
from parity import assert_same, normal, unet_inputs
from unet import UNet2DConditionModel, UNetConfig

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture
def model(sd15_like):
    return hipa.load(sd15_like)


@pytest.fixture
def adapted(model):
    """The model with a smaller UNet, of one level, and adaptors as if trained."""
    levels = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    levels |= {"up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1, "norm_num_groups": 4}
    config = UNetConfig(**levels, attention_head_dim=2, cross_attention_dim=48, sample_size=8)
    torch.manual_seed(0)
    model.unet = UNet2DConditionModel(config)
    add_lora(model.unet, 2)
    for seed, (_, B) in enumerate(factors(model.unet).values()):
        B.data = 0.2 * normal(*B.shape, seed=seed)
    return model


@pytest.fixture
def loss():
    torch.manual_seed(0)
    return HiPALoss(DISTS(VGG(VGGConfig(channels=(4, 8), convs=(1, 1)))), energy=1)


def whole(function, backend):
    """Compiled; a break in the graph is an error."""
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.parametrize("network", ["unet", "decoder", "text encoder"])
def test_no_graph_break(model, network):
    function, *inputs = {
        "unet": (model.unet, *unet_inputs(model.unet.config, 8, 8)),
        "decoder": (model.vae.decode, normal(2, 4, 8, 8)),
        "text encoder": (model.text_encoder, model.tokenizer(PROMPTS)),
    }[network]
    with torch.no_grad():
        assert_same(network, whole(function, "eager")(*inputs), function(*inputs), relative=True)


def test_no_graph_break_in_training(adapted, loss):
    """The UNet and the loss, forward and backward: the same terms, the same gradients of the adaptors."""
    inputs, target = unet_inputs(adapted.unet.config, 8, 8), normal(2, 3, 32, 32, seed=2).tanh()
    adaptors = [factor for pair in factors(adapted.unet).values() for factor in pair]

    def gradients(unet, loss):
        terms = loss(adapted.vae.decode(unet(*inputs)), target)
        return torch.stack(list(terms.values())), torch.autograd.grad(sum(terms.values()), adaptors)

    terms, expected = gradients(adapted.unet, loss)
    ours, found = gradients(whole(adapted.unet, "aot_eager"), whole(loss, "aot_eager"))
    assert_same("terms", ours, terms, relative=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * expected[0].abs().max().item(), rtol=1e-4)


def test_a_fixed_number_of_graphs(adapted, loss):
    """One each for the student, the teacher, and the pictures that are drawn on the way, without and with adaptors.

    A resumed run begins with the student. That its adaptors are then switched off and on compiles nothing new.
    """
    counter, x = CompileCounter(), hipa.noise([0, 1], 4, 8, 8)
    adapted.unet.compile(backend=counter, dynamic=False)

    def student():
        predicted = hipa.student(adapted, PROMPTS, x, torch.tensor([999, 500]))
        sum(hipa.adaptation_loss(adapted, loss, predicted, x).values()).backward()

    def teacher():
        hipa.teacher(adapted, PROMPTS, x, 2, 2.0)

    def frozen():
        with lora_off(adapted.unet):
            hipa.sample(adapted, PROMPTS, [0, 1], 1)

    def one_step():
        hipa.sample(adapted, PROMPTS, [0, 1], 1)

    graphs = []
    for part in (student, teacher, frozen, one_step) * 2:
        part()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 4, 4, 4, 4, 4], "graphs after each part, the first time and the second"
