"""torch.compile takes each network whole, computes the same, and makes a fixed number of graphs of the UNet.

The backend "eager" runs what was captured without a C++ compiler. test_compile_real.py trains with the real one.
"""

import torch
from torch._dynamo.testing import CompileCounter

import hipa
from lora import add_lora, factors, lora_off
from losses import DISTS, VGG, HiPALoss, VGGConfig
from parity import assert_same, normal
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL, VAEConfig

PROMPTS = ["a cat", "a dog"]


def small_model(model, levels):
    """The model with as few layers as show everything: compiling takes seconds for each."""
    torch.manual_seed(0)
    del model.text_encoder.text_model["encoder"]["layers"][1:]
    blocks = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    sizes = {"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 4}
    model.unet = UNet2DConditionModel(UNetConfig(48, **blocks, **sizes, attention_head_dim=2, sample_size=8))
    model.vae = AutoencoderKL(VAEConfig(**sizes))
    return model


def small_distance():
    torch.manual_seed(0)
    return DISTS(VGG(VGGConfig(channels=(4, 8), convs=(1, 1))))


def test_whole_graphs_and_a_fixed_number_of_them(sd15_like):
    """A break in a graph is an error (`fullgraph`). The UNet has one graph each for the student, for pictures without
    adaptors, as the teacher's, and for pictures with them.

    A resumed run begins with the student. That its adaptors are then switched off and on compiles nothing new.
    """
    torch._dynamo.reset()
    model, loss = small_model(hipa.load(sd15_like), levels=2), HiPALoss(small_distance(), energy=1)
    adaptors = add_lora(model.unet, 2)
    for seed, (_, B) in enumerate(factors(model.unet).values()):
        B.data = 0.2 * normal(*B.shape, seed=seed)
    x, x0 = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)

    def student():
        terms = hipa.adaptation_loss(model, loss, hipa.student(model, PROMPTS, x, torch.tensor([999, 500])), x0)
        gradients = torch.autograd.grad(1000 * sum(terms.values()), adaptors)
        return torch.stack(list(terms.values())).detach(), torch.cat([g.flatten() for g in gradients])

    def frozen():
        with lora_off(model.unet):
            return one_step()

    def one_step():
        return [hipa.sample(model, PROMPTS, [0, 1], 1)]

    parts = (student, frozen, one_step)
    expected = [part() for part in parts]
    counter = CompileCounter()
    model.unet.compile(backend=counter, dynamic=False, fullgraph=True)
    for network in (model.text_encoder, model.vae.decoder, loss):
        network.compile(backend="eager", dynamic=False, fullgraph=True)
    graphs = []
    for part, tensors in zip(parts * 2, expected * 2):
        for ours, theirs in zip(part(), tensors):
            assert_same(part.__name__, ours, theirs, relative=True)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 3, 3, 3], "graphs after each part, the first time and the second"
