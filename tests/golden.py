"""Makes golden.json, the answers of packages that the tests compare with, so that the tests do not need them.

    pip install open_clip_torch torchvision DISTS-pytorch lpips     # in an environment of its own
    python tests/golden.py

losses      in float64: torchvision's VGG16 (names and shapes; a sample of each stage's output), the authors' DISTS and
            LPIPS (distances; a sample of their gradients; a hash of the weights that the authors learned)
tokenizer   transformers' ids by CLIP's whole vocabulary, which open_clip has; and the part of it that the prompts need
"""

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

import torch

folder = Path(importlib.util.find_spec("torchvision").origin).parent
try:
    torch.ops.load_library(*folder.glob("_C*.so"))
except OSError:  # a wheel built for CUDA, beside a torch for the CPU: it wants operators that nothing here uses
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import DISTS_pytorch  # noqa: E402
import lpips  # noqa: E402
import torchvision  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402

import conftest  # noqa: E402, F401  (puts the project's root where imports look)
import test_losses  # noqa: E402
import test_tokenizer  # noqa: E402
from clip import WORD, byte_characters, normalize  # noqa: E402
from test_losses import sha256  # noqa: E402


def losses():
    with torch.device("meta"):
        vgg16 = torchvision.models.vgg16()
    torchvision.models.vgg16 = lambda **_: vgg16  # both packages ask for a trained one, and use its `features`
    shapes = {name: list(t.shape) for name, t in vgg16.state_dict().items() if name.startswith("features.")}
    weights = test_losses.random_weights(shapes)
    vgg16.load_state_dict(weights, strict=False, assign=True)

    norm, stages = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms(), []
    x = torchvision.transforms.functional.normalize(test_losses.pair(17, 27)[0].double(), norm.mean, norm.std)
    for i, layer in enumerate(vgg16.features.double()[:30]):
        x = layer(x)
        if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            stages.append(test_losses.some(x))

    learned = torch.load(Path(DISTS_pytorch.__file__).parent / "weights.pt", weights_only=True)
    hashes, distances = {f"dists.{name}": sha256(tensor) for name, tensor in learned.items()}, []
    for kind, height, width, faint, dark in test_losses.CASES:
        vgg16.load_state_dict(test_losses.with_faint_features(weights, faint), strict=False, assign=True)
        x, y = (picture.double().requires_grad_() for picture in test_losses.pair(height, width, dark))
        if kind == "DISTS":
            network = DISTS_pytorch.DISTS(load_weights=False)
            network.alpha.data, network.beta.data = learned["alpha"], learned["beta"]
            values = network.double()(x, y, require_grad=True)
        else:
            network = lpips.LPIPS(net="vgg", version="0.1", verbose=False)
            hashes |= {f"lpips.{i}": sha256(lin.model[1].weight.data) for i, lin in enumerate(network.lins)}
            values = network.double()(2 * x - 1, 2 * y - 1)  # it takes pictures in [-1, 1]
        (gradient,) = torch.autograd.grad(values.sum(), x)
        distances.append({"values": values.flatten(), "gradient": test_losses.some(gradient)})
    return {"shapes": shapes, "stages": stages, "distances": distances, "learned": hashes}


def tokenizer():
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]  # as OpenAI reads it
    merges, prompts, ids = {merge: 512 + k for k, merge in enumerate(lines)}, test_tokenizer.golden_prompts(), {}
    for family, pad in test_tokenizer.PADS.items():
        with tempfile.TemporaryDirectory() as folder:
            test_tokenizer.write_official(Path(folder), merges, pad)
            oracle = CLIPTokenizer.from_pretrained(folder, pad_token=pad)
            ids[family] = [test_tokenizer.theirs(oracle, prompt, padding=False) for prompt in prompts]
    words = {word for prompt in prompts for word in WORD.findall(normalize(prompt.replace("!", " ! ") + prompt))}
    words = {"".join(map(byte_characters().get, word.encode())) + "</w>" for word in words}
    needed = {m: i for m, i in merges.items() if any(m.replace(" ", "") in word for word in words)}
    return {"ids": ids, "merges": needed}


if __name__ == "__main__":
    golden = {"losses": losses(), "tokenizer": tokenizer()}
    text = json.dumps(golden, default=lambda tensor: [float(f"{x:.9g}") for x in tensor.tolist()])
    Path(__file__).with_suffix(".json").write_text(text + "\n")
