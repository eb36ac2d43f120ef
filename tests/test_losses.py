"""The distances give what their authors' packages give; the high-frequency views have closed forms.

golden.json has the packages' answers: see golden.py. They share one VGG16 of random weights with ours, so nothing is
downloaded. The weights keep the size of the activations from layer to layer, so that all stages count.
"""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train
from conftest import ROOT
from losses import DISTS, LPIPS, VGG, HiPALoss, VGGConfig, high_pass, sobel
from parity import assert_same
from sample import to_tensor

CASES = [  # distance, height and width (odd at every stage, or even at the first ones), size of features, of values
    ("DISTS", 17, 27, 1, 1), ("DISTS", 16, 24, 1, 1), ("DISTS", 17, 24, 3e-3, 1), ("DISTS", 17, 24, 1, 1e-2),
    ("LPIPS", 17, 27, 1, 1), ("LPIPS", 16, 24, 1, 1), ("LPIPS", 17, 24, 1e-10, 1),
]  # fmt: skip


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pair(height, width, dark=1):
    """Two pictures, and for each another that resembles it, the second less: (2, 3, H, W) twice."""
    x, other = pictures(2, 3, height, width), pictures(2, 3, height, width, seed=1)
    share = torch.tensor([0.3, 0.9])[:, None, None, None]
    return dark**1.5 * x, dark * (x + share * (other - x))


def random_weights(shapes):
    """{name: shape} of VGG16 -> {name: tensor}, at random. Uniform: these are the same bits on every machine."""
    weights = {name: 2 * pictures(*shape, seed=seed) - 1 for seed, (name, shape) in enumerate(shapes.items())}
    return {n: w * (0.1 if w.ndim == 1 else (6 / w[0].numel()) ** 0.5) for n, w in weights.items()}  # He et al. 2015


def with_faint_features(weights, faint):
    """Weights for features that are `faint` times as large: the first layer's are, and later biases are gone."""
    without = {name: 0 * tensor if tensor.ndim == 1 else tensor for name, tensor in weights.items()}
    return weights if faint == 1 else without | {"features.0.weight": faint * weights["features.0.weight"]}


def some(x):
    """A sample of a large tensor's values"""
    return x.flatten()[:: 1 + x.numel() // 400]


def sha256(x):
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------- the authors' packages
@pytest.fixture(scope="module")
def golden():
    return json.loads((ROOT / "tests" / "golden.json").read_text())["losses"]


@pytest.fixture(scope="module")
def weights(golden):
    return random_weights(golden["shapes"])


@pytest.fixture(scope="module")
def distances(weights, tmp_path_factory):
    """{kind: distance}, as training makes them where a checkpoint has no feature net: VGG16 and the learned weights.

    The VGG is float64 here: a ReLU whose input is about 0 opens or not by rounding, which moves the gradient.
    """
    with pytest.MonkeyPatch.context() as patch:
        downloaded = weights | {"classifier.0.weight": torch.zeros(1)}
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: downloaded)
        made = {kind: train.load_distance(kind.lower(), tmp_path_factory.mktemp(kind)) for kind in ("DISTS", "LPIPS")}
    for distance in made.values():
        distance.vgg.double()
    return made


def test_vgg_gives_the_five_stages(golden, weights):
    """torchvision's names and shapes, and each stage's last ReLU of a picture normalised as torchvision does it."""
    with torch.device("meta"):
        vgg = VGG()
    vgg.load_state_dict(weights, strict=True, assign=True)
    for stage, expected in zip(vgg(pair(17, 27)[0]), golden["stages"], strict=True):
        assert_same("VGG", some(stage), torch.tensor(expected), relative=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distance_is_the_authors(golden, weights, distances, case):
    """And so is its gradient. In faint features and dark pictures, the constants that prevent a division by 0 count."""
    kind, height, width, faint, dark = case
    distance, expected = distances[kind], golden["distances"][CASES.index(case)]
    distance.vgg.load_state_dict(with_faint_features(weights, faint))
    x, y = (picture.double() for picture in pair(height, width, dark))
    values = distance(x.requires_grad_(), y)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert_same(f"{case}", values, torch.tensor(expected["values"]))
    expected = torch.tensor(expected["gradient"])
    scale = expected.abs().max()
    assert_same(f"{case}, gradient", some(gradient).float() / scale, expected / scale)


def test_learned_weights_are_the_authors(golden):
    """`losses.safetensors` holds what the packages hold, and nothing else."""
    official = load_file(ROOT / "losses.safetensors")
    assert {name: sha256(tensor) for name, tensor in official.items()} == golden["learned"]


def test_without_learned_weights():
    """DISTS: every stage counts alike, means five times as much as covariances. LPIPS: every channel counts alike."""
    vgg, widths = VGG(VGGConfig(channels=(5, 7), convs=(1, 2))), [3, 5, 7]
    for weights, share in ((DISTS(vgg).alpha, 5 / 6), (DISTS(vgg).beta, 1 / 6)):
        assert [part.sum().item() for part in weights.split(widths)] == pytest.approx([share / 3] * 3)
        assert all((part == part[0]).all() for part in weights.split(widths))
    assert [weights.tolist() for weights in LPIPS(vgg).weights] == [[1] * 5, [1] * 7]


def test_vgg_of_another_shape():
    """Stages, widths, layers, mean and std are the config's; each stage but the first begins with a pooling."""
    torch.manual_seed(0)
    small = VGG(VGGConfig(channels=(5, 7), convs=(1, 2), mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)))
    conv0, _, _, conv3, _, conv5, _ = small.features
    x = pictures(2, 3, 9, 13)
    first = conv0((x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 1, 2])[:, None, None]).relu()
    last = conv5(conv3(F.max_pool2d(first, 2)).relu()).relu()
    for name, ours, expected in zip(("first", "last"), small(x), (first, last), strict=True):
        assert_same(f"VGG of two stages, the {name}", ours, expected)


@pytest.fixture(params=[DISTS, LPIPS])
def small(request):
    """A distance on a small VGG"""
    torch.manual_seed(0)
    return request.param(VGG(VGGConfig(channels=(6, 8, 10), convs=(1, 2, 1))))


def test_distance_of_equal_pictures_is_0(small):
    """Also of flat ones, whose features do not vary; others are apart, and as far in both directions."""
    x, y = pair(17, 24)
    flat = torch.full_like(x, 0.5)
    for same in (x, flat):
        assert small(same, same).abs().max() < 1e-6
    assert (small(x, flat) > 1e-3).all() and torch.allclose(small(x, y), small(y, x))
    assert 1e-3 < small(x, y)[0] < small(x, y)[1]  # the second y resembles its x less


@pytest.mark.parametrize("kind, distance", [("dists", DISTS), ("lpips", LPIPS)])
def test_embedded_feature_net(kind, distance):
    """Training on the embedded model uses its weights; the more a picture is blurred, the further off it is."""
    loaded = train.load_distance(kind, ROOT / "emoji")
    weights, stored = loaded.vgg.state_dict(), load_file(ROOT / "emoji" / "features" / "model.safetensors")
    assert isinstance(loaded, distance) and weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)
    sheet = Image.open(ROOT / "emoji" / "renders.png")  # real pictures, of 64x64 pixels
    tiles = torch.stack([to_tensor(sheet.crop((0, y, 64, y + 64))) for y in range(0, 1024, 256)]) / 2 + 0.5
    blurred = [F.avg_pool2d(tiles, k, stride=1, padding=k // 2, count_include_pad=False) for k in (1, 3, 7, 15)]
    found = torch.stack([loaded(tiles, x) for x in blurred])
    assert found[0].abs().max() < 1e-6 and (found.diff(dim=0) > 0.005).all()


# ----------------------------------------------------------------------------------------------------------- high pass
def wave(height, width, down, right):
    """(1, 1, H, W): a cosine of so many periods over the height and over the width"""
    row, column = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.cos(2 * math.pi * (down * row / height + right * column / width) + 0.7).float()[None, None]


def assert_near(x, expected):
    assert x.shape == expected.shape and (x - expected).abs().max() < 1e-6


@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (15, 11), (10, 21)])
def test_high_pass_of_every_wave_there_is(height, width):
    """It vanishes or passes unchanged, as its frequency says: alike in both axes, and by the radius on diagonals."""
    waves = [(d, r) for d in range(-(height // 2) + 1, height // 2 + 1) for r in range(width // 2 + 1)]
    frequency = torch.tensor([math.hypot(2 * d / height, 2 * r / width) for d, r in waves])  # 1: two pixels a period
    before = torch.cat([wave(height, width, *w) for w in waves])
    for radius in (0.1, 0.25, 0.5, 0.9, 1.2):
        passed = frequency > radius
        assert_near(high_pass(before, radius), before * passed[:, None, None, None])


@pytest.mark.parametrize("down, right, radius", [(0, 8, 0.25), (-6, 0, 0.25), (24, 0, 1), (9, 16, 0.625)])
def test_high_pass_at_the_cut(down, right, radius):
    """What lies exactly on it is removed. 9 of 24 and 16 of 32 periods: 3/8 and 4/8 of Nyquist, 5/8 together."""
    x = wave(48, 64, down, right)
    assert_near(high_pass(x, radius), 0 * x)
    assert_near(high_pass(x, radius - 1e-3), x)


@pytest.mark.parametrize("height, width", [(16, 16), (15, 22), (22, 15), (9, 7), (1, 8)])
def test_high_pass_of_pictures(height, width):
    """NumPy's transform in float64 is the same. Radius 0 removes the mean only; one beyond the corner, everything."""
    x = pictures(2, 3, height, width)
    frequency = np.hypot(np.fft.fftfreq(height, 0.5)[:, None], np.fft.fftfreq(width, 0.5))
    expected = np.fft.ifft2(np.fft.fft2(x.double().numpy()) * (frequency > 0.3)).real
    assert_near(high_pass(x, 0.3), torch.from_numpy(expected).float())
    assert_near(high_pass(x, 0), x - x.mean(dim=(2, 3), keepdim=True))
    assert_near(high_pass(x, 2), 0 * x)


# --------------------------------------------------------------------------------------------------------------- sobel
def test_sobel_of_a_step():
    """From 0 to 1 it is 1 in the two columns beside the edge, up to the border, and 1e-4 (of the root) elsewhere."""
    step = (torch.arange(12) >= 6).float().expand(1, 1, 12, 12)
    expected = torch.full((1, 1, 12, 12), 1e-4)
    expected[..., 5:7] = 1
    assert_near(sobel(step), expected)
    assert_near(sobel(1 - step.mT / 4), (expected.mT / 4).clamp(min=1e-4))


def test_sobel_of_pictures():
    """Written out in float64: differences of the neighbours two pixels apart, averaged as 1, 2, 1 along the edge."""
    x = pictures(2, 3, 9, 14)
    p = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    right, down = p[..., 2:] - p[..., :-2], p[..., 2:, :] - p[..., :-2, :]
    right = (right[..., :-2, :] + 2 * right[..., 1:-1, :] + right[..., 2:, :]) / 4
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    assert_near(sobel(x), torch.from_numpy(np.sqrt(right**2 + down**2 + 1e-8)).float())


# ---------------------------------------------------------------------------------------------------------------- loss
class Difference(nn.Module):
    """A distance that notes what it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, y):
        self.asked.append((x, y))
        return (x - y).abs().mean(dim=(1, 2, 3))


def sampled():
    return [2 * x - 1 for x in pair(24, 33)]  # in [-1, 1], as the rest of the code has pictures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_compares_pictures_and_their_views(dtype):
    """In [0, 1]; grey is added to what the high pass leaves. All in float32, whatever the picture comes in."""
    distance, given = Difference(), [x.to(dtype) for x in sampled()]
    terms = HiPALoss(distance, radius=0.4)(*given)
    assert list(terms) == ["spatial", "fourier", "sobel"]
    for (x, y), term in zip(distance.asked, terms.values(), strict=True):
        assert term.shape == () and term.item() == pytest.approx((x - y).abs().mean().item())
    for picture, asked in zip(given, zip(*distance.asked)):
        x = (picture.float() + 1) / 2
        for ours, expected in zip(asked, (x, high_pass(x, 0.4) + 0.5, sobel(x)), strict=True):
            assert ours.dtype == torch.float32
            assert_near(ours, expected)


@pytest.mark.parametrize("kept", [(), ("spatial",), ("fourier",), ("sobel", "energy"), ("fourier", "sobel")])
def test_loss_weighs_its_terms(kept):
    """Those of weight 0 are left out, and the distance is not asked about them."""
    distance, one = Difference(), HiPALoss(Difference(), energy=1)(*sampled())
    weights = {"spatial": 2, "fourier": 0.5, "sobel": 3, "energy": 0.2}
    terms = HiPALoss(distance, **{name: weights[name] * (name in kept) for name in weights})(*sampled())
    assert {name: (terms[name] / one[name]).item() for name in terms} == pytest.approx({n: weights[n] for n in kept})
    assert len(distance.asked) == len(set(kept) - {"energy"})


def test_energy_term_has_a_closed_form():
    """Waves above the cut, k times the target's height: (2 log k)^2. Those below it, and brightness, do not count."""
    fine, coarse = wave(24, 33, 6, 5), wave(24, 33, 2, 2)
    loss = HiPALoss(Difference(), spatial=0, fourier=0, sobel=0, energy=1, radius=0.25)
    for k in (0.5, 1, 1.5):
        term = loss(0.4 * k * fine + 0.3 * coarse + 0.2, 0.4 * fine)["energy"]
        assert term.item() == pytest.approx((2 * math.log(k)) ** 2, rel=1e-3, abs=1e-6)


def test_loss_is_the_mean_over_the_batch(small):
    """And 0 for equal pictures."""
    loss, (picture, target) = HiPALoss(small, energy=1), sampled()
    both, first, second = loss(picture, target), loss(picture[:1], target[:1]), loss(picture[1:], target[1:])
    for name in both:
        assert both[name].item() == pytest.approx((first[name] + second[name]).item() / 2, rel=1e-4)
    assert [term.item() for term in loss(picture, picture).values()] == pytest.approx([0] * 4, abs=1e-6)


def test_gradients_flow_into_the_picture_only(small):
    """Each term has one, all finite, for a picture of one colour too; the VGG is frozen, although it could learn."""
    assert any(p.requires_grad for p in small.parameters())
    loss, (picture, target) = HiPALoss(small, energy=1), sampled()
    assert not any(p.requires_grad for p in loss.parameters())
    for x in (picture, torch.full_like(picture, -1)):
        for name, term in loss(x.requires_grad_(), target).items():
            (gradient,) = torch.autograd.grad(term, x, retain_graph=True)
            assert gradient.isfinite().all() and (x is not picture or gradient.abs().max() > 1e-6), name
