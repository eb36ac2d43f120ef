"""The distances give what their authors' packages give; the high-frequency views have closed forms.

The packages and torchvision share one VGG16 of random weights with ours, so nothing is downloaded. Its weights keep the
size of the activations from layer to layer, so that all stages count. `pytest -rP tests/test_losses.py` shows the
errors.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from conftest import INSTALL_ORACLES, ORACLES

if not ORACLES.exists():
    pytest.skip(f"DISTS' and LPIPS' packages are missing: {INSTALL_ORACLES}", allow_module_level=True)
sys.path.insert(0, str(ORACLES))
# torchvision's wheel is built for CUDA. Beside a torch for the CPU it wants operators that nothing here uses.
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import DISTS_pytorch  # noqa: E402
import lpips  # noqa: E402
import torchvision  # noqa: E402

import losses  # noqa: E402
import train  # noqa: E402
from losses import DISTS, LPIPS, VGG, HiPALoss, VGGConfig, high_pass, l2_pool, sobel  # noqa: E402
from parity import LIMIT, assert_same, normal  # noqa: E402

ROOT = Path(losses.__file__).parent
RELUS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}  # in torchvision's `features`
SIZES = [(33, 47), (16, 40)]  # odd at every stage; even at the first ones


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pair(height, width):
    """Two pictures, and for each another that resembles it, the second less: (2, 3, H, W) twice."""
    x, other = pictures(2, 3, height, width), pictures(2, 3, height, width, seed=1)
    share = torch.tensor([0.3, 0.9])[:, None, None, None]
    return x, x + share * (other - x)


@torch.no_grad()
def random_features(faint=1):
    """The convolutional part of torchvision's vgg16, weights and biases at random.

    With `faint` the features of all stages are that much smaller: the first layer makes them so, and there are no
    biases to make them large again.
    """
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features
    features.to_empty(device="cpu")
    for i, conv in enumerate(layer for layer in features if isinstance(layer, nn.Conv2d)):
        gain = (2 / conv.weight[0].numel()) ** 0.5  # He et al. 2015
        conv.weight.copy_(normal(*conv.weight.shape, seed=i) * gain * (1 if i else faint))
        conv.bias.copy_(normal(*conv.bias.shape, seed=100 + i) * 0.1 * (faint == 1))
    return features.eval().requires_grad_(False)


def vgg_with(features):
    """Our VGG with torchvision's weights."""
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    with torch.device("meta"):
        vgg = VGG()
    vgg.load_state_dict(weights, strict=True, assign=True)
    return vgg.eval().requires_grad_(False)


def package_with(monkeypatch, features, make):
    """What `make` gives where torchvision's vgg16, trained or not, has these features."""
    monkeypatch.setattr(torchvision.models, "vgg16", lambda pretrained: SimpleNamespace(features=features))
    return make()


@pytest.fixture(scope="module")
def features():
    return random_features()


@pytest.fixture(scope="module")
def vgg(features):
    return vgg_with(features)


@pytest.fixture(scope="module")
def official():
    """The distances' own weights, learned by their authors for VGG16."""
    return load_file(ROOT / "losses.safetensors")


def assert_same_gradients(what, ours, theirs, x, y):
    """d distance / dx, as a part of the largest.

    LPIPS' package normalises in other steps than ours; that moves a few ReLUs' inputs past 0, and not the same ones on
    every machine. The package's own gradients in float32 and in float64 differ by 0.006.
    """

    def gradient(distance):
        leaf = x.clone().requires_grad_()
        distance(leaf, y).sum().backward()
        return leaf.grad

    found, expected = gradient(ours), gradient(theirs)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}, gradient: largest relative error {error:.1e}")
    assert error <= (0.02 if what.startswith("LPIPS") else LIMIT)


# ----------------------------------------------------------------------------------------------------------------- VGG
@pytest.mark.parametrize("height, width", SIZES)
def test_vgg_gives_the_five_stages(features, vgg, height, width):
    """Each stage's last ReLU, of a picture normalised as torchvision does it."""
    official = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    x = pictures(2, 3, height, width)
    stages = vgg(x)
    assert len(stages) == len(RELUS)
    theirs = torchvision.transforms.functional.normalize(x, official.mean, official.std)
    names = {index: name for name, index in RELUS.items()}
    for i, layer in enumerate(features[:30]):
        theirs = layer(theirs)
        if i in names:
            assert_same(f"VGG, {height}x{width}, {names[i]}", stages.pop(0), theirs)


def test_vgg_of_another_shape():
    """Stages, widths, layers, mean and std are those of the config; stages begin with a pooling, the first does not."""
    torch.manual_seed(0)
    small = VGG(VGGConfig(channels=(5, 7), convs=(1, 2), mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)))
    conv0, _, _, conv3, _, conv5, _ = small.features
    x = pictures(2, 3, 9, 13)
    normalised = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 1, 2])[:, None, None]
    first = conv0(normalised).relu()
    last = conv5(conv3(F.max_pool2d(first, 2)).relu()).relu()
    assert [stage.shape for stage in small(x)] == [(2, 5, 9, 13), (2, 7, 4, 6)]
    for name, ours, expected in zip(("first", "last"), small(x), (first, last)):
        assert_same(f"VGG of two stages, the {name}", ours, expected)


@pytest.mark.parametrize("size", [1, 1e-6])
@pytest.mark.parametrize("height, width", [(12, 16), (13, 18), (7, 9), (1, 1)])
def test_l2_pool(height, width, size):
    """The package's pooling, also of values so small that the constant under its root counts."""
    x = normal(2, 5, height, width)
    theirs = DISTS_pytorch.DISTS_pt.L2pooling(channels=5)
    assert l2_pool(x).shape == (2, 5, math.ceil(height / 2), math.ceil(width / 2))
    assert_same(f"L2 pooling, {height}x{width}", l2_pool(x * size) / size, theirs(x * size) / size)


# --------------------------------------------------------------------------------------------------- authors' packages
def dists_pair(monkeypatch, features, official):
    """Our DISTS and the package's, with the official alpha and beta."""
    theirs = package_with(monkeypatch, features, lambda: DISTS_pytorch.DISTS(load_weights=False))
    for name in ("alpha", "beta"):
        getattr(theirs, name).data = official[f"dists.{name}"].reshape(1, -1, 1, 1)
    ours = DISTS(vgg_with(features), official["dists.alpha"], official["dists.beta"])
    return ours, lambda x, y: theirs(x, y, require_grad=True)


def lpips_pair(monkeypatch, features, official):
    """Our LPIPS and the package's, which reads its own weights and takes pictures in [-1, 1]."""
    theirs = package_with(monkeypatch, features, lambda: lpips.LPIPS(net="vgg", version="0.1", verbose=False))
    ours = LPIPS(vgg_with(features), [official[f"lpips.{i}"] for i in range(5)])
    return ours, lambda x, y: theirs(2 * x - 1, 2 * y - 1).flatten()


PAIRS = {"DISTS": dists_pair, "LPIPS": lpips_pair}


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("kind", PAIRS)
def test_distance_is_the_authors(monkeypatch, features, official, kind, height, width):
    """And so is its gradient, which is what training follows."""
    ours, theirs = PAIRS[kind](monkeypatch, features, official)
    x, y = pair(height, width)
    assert_same(f"{kind}, {height}x{width}", ours(x, y), theirs(x, y))
    assert_same_gradients(f"{kind}, {height}x{width}", ours, theirs, x, y)


@pytest.mark.parametrize("kind, faint, dark", [("LPIPS", 1e-10, 1), ("DISTS", 3e-3, 1), ("DISTS", 1, 1e-2)])
def test_distance_is_the_authors_where_features_are_faint(monkeypatch, official, kind, faint, dark):
    """There the small constants that keep them from dividing by 0 count: 1e-10 beside a length, 1e-6 beside squares.

    The picture itself, which may be dark, is the first of the six stages that DISTS compares, and not normalised there.
    """
    ours, theirs = PAIRS[kind](monkeypatch, random_features(faint), official)
    x, y = pair(17, 24)
    x, y = dark**1.5 * x, dark * y
    assert_same(f"{kind}, faint features", ours(x, y), theirs(x, y))


@pytest.mark.parametrize("kind", PAIRS)
def test_distance_of_equal_pictures_is_0(monkeypatch, features, official, kind):
    """Also of flat ones, whose features do not vary; and no two others are closer."""
    ours, _ = PAIRS[kind](monkeypatch, features, official)
    x, y = pair(17, 24)
    flat = torch.full_like(x, 0.5)
    for same in (x, flat):
        torch.testing.assert_close(ours(same, same), torch.zeros(2), atol=1e-6, rtol=0)
    assert (ours(x, y) > 1e-3).all() and (ours(x, flat) > 1e-3).all()
    assert ours(x, y)[0] < ours(x, y)[1]  # the second y resembles its x less


@pytest.mark.parametrize("distance", [DISTS, LPIPS])
def test_every_stage_counts(features, distance):
    """Without learned weights. Were a stage's features about 0, the comparisons above would not show it."""
    network = distance(vgg_with(features))
    x, y = pair(17, 24)
    right = network(x, y)
    for name, index in RELUS.items():
        moved = vgg_with(features)
        last = moved.features[index - 1]
        last.bias = nn.Parameter(last.bias + 0.1, requires_grad=False)
        change = (distance(moved)(x, y) - right).abs().max().item()
        print(f"{distance.__name__}: 0.1 more before {name} shows as {change:.1e}")
        assert change > 10 * LIMIT


def test_without_learned_weights(vgg):
    """DISTS: every stage counts alike, and means five times correlations. LPIPS: every channel counts alike."""
    distance, widths = DISTS(vgg), [3, *VGGConfig().channels]
    for weights, share in ((distance.alpha, 5 / 6), (distance.beta, 1 / 6)):
        assert [part.sum().item() for part in weights.split(widths)] == pytest.approx([share / 6] * 6)
        assert all((part == part[0]).all() for part in weights.split(widths))
    assert [weights.tolist() for weights in LPIPS(vgg).weights] == [[1] * width for width in widths[1:]]


def test_learned_weights_are_the_authors(official):
    """`losses.safetensors` holds what the packages hold, and nothing else."""

    def read(package, path):
        return torch.load(Path(package.__file__).parent / path, weights_only=True, map_location="cpu")

    theirs = {f"dists.{name}": tensor for name, tensor in read(DISTS_pytorch, "weights.pt").items()}
    lins = read(lpips, "weights/v0.1/vgg.pth")
    theirs |= {f"lpips.{i}": lins[f"lin{i}.model.1.weight"] for i in range(5)}
    assert official.keys() == theirs.keys()
    assert all(torch.equal(official[name], theirs[name].flatten()) for name in theirs)


# ----------------------------------------------------------------------------------------------------------- high pass
def wave(height, width, down, right, phase=0.7):
    """(1, 1, H, W): a cosine of so many periods over the height and over the width"""
    row, column = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.cos(2 * math.pi * (down * row / height + right * column / width) + phase).float()[None, None]


def radius_of(height, width, down, right):
    """The frequency of that wave: 1 is Nyquist, two pixels a period, down as well as across."""
    return math.hypot(2 * down / height, 2 * right / width)


def assert_gone(x):
    assert x.abs().max() < 1e-6


def assert_unchanged(x, before):
    assert x.shape == before.shape and (x - before).abs().max() < 1e-6


@pytest.mark.parametrize("radius", [0.1, 0.25, 0.5, 0.9, 1.2])
@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (15, 11), (10, 21)])
def test_high_pass_of_every_wave_there_is(height, width, radius):
    """It vanishes or passes unchanged, as its frequency says: alike in both axes, and by the radius on diagonals."""
    waves = [(d, r) for d in range(-(height // 2) + 1, height // 2 + 1) for r in range(width // 2 + 1)]
    passed = [radius_of(height, width, *w) > radius for w in waves]
    assert any(passed) and not all(passed)
    before = torch.cat([wave(height, width, *w) for w in waves])
    after = high_pass(before, radius)
    passed = torch.tensor(passed)
    assert_gone(after[~passed])
    assert_unchanged(after[passed], before[passed])


@pytest.mark.parametrize(
    "down, right, radius",
    [(0, 8, 0.25), (6, 0, 0.25), (-6, 0, 0.25), (0, 32, 1), (24, 0, 1), (9, 16, 0.625), (-9, 16, 0.625)],
)
def test_high_pass_at_the_cut(down, right, radius):
    """What lies exactly on it is taken out; the next wave, one period more, passes. 9 of 24 and 16 of 32 periods are
    3/8 and 4/8 of Nyquist, so 5/8 together."""
    assert radius_of(48, 64, down, right) == radius
    assert_gone(high_pass(wave(48, 64, down, right), radius))
    assert_unchanged(high_pass(wave(48, 64, down, right), radius - 1e-3), wave(48, 64, down, right))
    if radius < 1:
        more = down + (1 if down > 0 else -1) if down else 0, right + 1 if right else 0
        assert_unchanged(high_pass(wave(48, 64, *more), radius), wave(48, 64, *more))


@pytest.mark.parametrize("radius", [0, 0.3, 2])
@pytest.mark.parametrize("height, width", [(16, 16), (15, 22), (22, 15), (9, 7), (1, 8)])
def test_high_pass_of_pictures(height, width, radius):
    """NumPy's full transform in float64 gives the same, picture by picture and channel by channel.

    Radius 0 takes out the mean and nothing else; one beyond the corner, sqrt(2), takes out everything.
    """
    x = pictures(2, 3, height, width)
    down, right = np.fft.fftfreq(height, 0.5)[:, None], np.fft.fftfreq(width, 0.5)
    spectrum = np.fft.fft2(x.double().numpy()) * (np.hypot(down, right) > radius)
    expected = np.fft.ifft2(spectrum)
    assert np.abs(expected.imag).max() < 1e-12
    assert_unchanged(high_pass(x, radius), torch.from_numpy(expected.real).float())
    if radius != 0.3:
        assert_unchanged(high_pass(x, radius), 0 * x if radius else x - x.mean(dim=(2, 3), keepdim=True))


# --------------------------------------------------------------------------------------------------------------- sobel
FLAT = 1e-4  # the square root of 1e-8


def step(size=12):
    """(1, 1, H, W) of 0, and of 1 from the middle column on"""
    x = torch.zeros(1, 1, size, size)
    x[..., size // 2 :] = 1
    return x


def test_sobel_of_a_step():
    """From 0 to 1 it is 1 in the two columns beside the edge, up to the border, and nothing elsewhere."""
    expected = torch.full((1, 1, 12, 12), FLAT)
    expected[..., 5:7] = 1
    for ours, theirs in [(sobel(step()), expected), (sobel(step().mT), expected.mT), (sobel(1 - step()), expected)]:
        assert_unchanged(ours, theirs)
    assert_unchanged(sobel(step() / 4), (expected / 4).clamp(min=FLAT))


def test_sobel_of_pictures():
    """Written out in float64: differences of the neighbours two pixels apart, averaged as 1, 2, 1 along the edge."""
    x = pictures(2, 3, 9, 14)
    p = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    right, down = p[..., 2:] - p[..., :-2], p[..., 2:, :] - p[..., :-2, :]
    right = (right[..., :-2, :] + 2 * right[..., 1:-1, :] + right[..., 2:, :]) / 4
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    assert_unchanged(sobel(x), torch.from_numpy(np.sqrt(right**2 + down**2 + 1e-8)).float())


@pytest.mark.parametrize("brightness", [0, 0.5, 1])
def test_sobel_of_a_flat_picture(brightness):
    """No edges, at the border neither; and a gradient, which a root at 0 would not have."""
    x = torch.full((1, 3, 8, 11), float(brightness), requires_grad=True)
    assert_unchanged(sobel(x), torch.full_like(x, FLAT))
    sobel(x).sum().backward()
    assert_gone(x.grad)


# ---------------------------------------------------------------------------------------------------------------- loss
class Difference(nn.Module):
    """A distance that notes what it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, y):
        self.asked.append((x, y))
        return (x - y).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def small():
    """DISTS and LPIPS on a small VGG"""
    torch.manual_seed(0)
    return [distance(VGG(VGGConfig(channels=(6, 8, 10), convs=(1, 2, 1)))) for distance in (DISTS, LPIPS)]


def drawn(height=24, width=33):
    """Pictures as the rest of the code draws them: a pair in [-1, 1]"""
    return [2 * x - 1 for x in pair(height, width)]


def test_loss_compares_pictures_and_their_views():
    """In [0, 1] all of them; grey is added to what the high pass leaves."""
    distance = Difference()
    picture, target = drawn()
    terms = HiPALoss(distance, radius=0.4)(picture, target)
    assert list(terms) == ["spatial", "fourier", "sobel"]
    for (x, y), term in zip(distance.asked, terms.values(), strict=True):
        assert term.shape == () and term.item() == pytest.approx((x - y).abs().mean().item())
    for seen, asked in zip((picture, target), zip(*distance.asked)):
        x = (seen + 1) / 2
        assert 0 <= x.min() < 0.01 and 0.99 < x.max() <= 1
        for ours, expected in zip(asked, (x, high_pass(x, 0.4) + 0.5, sobel(x)), strict=True):
            assert_unchanged(ours, expected)


def test_loss_weighs_its_terms():
    one = HiPALoss(Difference(), energy=1)(*drawn())
    weights = {"spatial": 2, "fourier": 0.5, "sobel": 3, "energy": 0.2}
    weighed = HiPALoss(Difference(), **weights)(*drawn())
    assert {name: (weighed[name] / one[name]).item() for name in one} == pytest.approx(weights)


def test_energy_term_has_a_closed_form():
    """Waves above the cut, k times the target's height: (2 log k)^2. Those below it, and brightness, do not count."""
    quick, slow = wave(24, 33, 6, 5), wave(24, 33, 2, 2)
    loss = HiPALoss(Difference(), spatial=0, fourier=0, sobel=0, energy=1, radius=0.25)
    for k in (0.5, 1, 1.5):
        term = loss(0.4 * k * quick + 0.3 * slow + 0.2, 0.4 * quick)["energy"]
        assert term.item() == pytest.approx((2 * math.log(k)) ** 2, rel=1e-3, abs=1e-6)
    strong, same = loss(0.8 * quick, 0.4 * quick)["energy"], loss(0.4 * quick, 0.4 * quick)["energy"]
    mixed = loss(torch.cat([0.8 * quick, 0.4 * quick]), torch.cat([0.4 * quick, 0.4 * quick]))["energy"]
    assert mixed.item() == pytest.approx((strong + same).item() / 2), "each picture for itself"


@pytest.mark.parametrize("kept", [(), ("spatial",), ("fourier",), ("sobel", "energy"), ("fourier", "sobel")])
def test_loss_leaves_out_terms_of_weight_0(monkeypatch, kept):
    """They cost nothing: neither the view is made nor the distance asked."""
    for view, names in (("high_pass", {"fourier", "energy"}), ("sobel", {"sobel"})):
        if not names & set(kept):
            monkeypatch.delattr(losses, view)
    distance = Difference()
    weights = {name: float(name in kept) for name in ("spatial", "fourier", "sobel", "energy")}
    assert tuple(HiPALoss(distance, **weights)(*drawn())) == kept
    assert len(distance.asked) == len(set(kept) - {"energy"})


def test_loss_is_the_mean_over_the_batch(small):
    for distance in small:
        loss, (picture, target) = HiPALoss(distance), drawn()
        both, first, second = loss(picture, target), loss(picture[:1], target[:1]), loss(picture[1:], target[1:])
        for name in both:
            assert both[name].item() == pytest.approx((first[name] + second[name]).item() / 2, rel=1e-4)


def test_loss_of_equal_pictures_is_0(small):
    for distance in small:
        terms = HiPALoss(distance, energy=1)(drawn()[0], drawn()[0])
        assert [term.item() for term in terms.values()] == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_gradients_flow_into_the_picture_only(small):
    """Each term has one, all finite; the VGG is frozen, although it was made to be trained."""
    for distance in small:
        assert any(p.requires_grad for p in distance.parameters())
        loss = HiPALoss(distance, energy=1)
        assert not any(p.requires_grad for p in loss.parameters())
        picture, target = drawn()
        picture.requires_grad_()
        for name, term in loss(picture, target).items():
            (gradient,) = torch.autograd.grad(term, picture, retain_graph=True)
            assert gradient.isfinite().all() and gradient.abs().max() > 1e-6, name


def test_loss_of_flat_pictures_has_a_gradient(small):
    """A picture of one colour, as a network may draw at first."""
    for distance in small:
        picture = torch.full((1, 3, 24, 33), -1.0, requires_grad=True)
        sum(HiPALoss(distance, energy=1)(picture, drawn()[1][:1]).values()).backward()
        assert picture.grad.isfinite().all()


def test_loss_takes_half_precision():
    """The views are made in float32, whatever the picture came in."""
    distance = Difference()
    picture, target = (x.bfloat16() for x in drawn())
    assert all(term.dtype == torch.float32 for term in HiPALoss(distance, energy=1)(picture, target).values())
    assert all(x.dtype == y.dtype == torch.float32 for x, y in distance.asked)


# -------------------------------------------------------------------------------------------- the embedded feature net
@pytest.fixture(scope="module")
def tiles():
    """Four drawings of emoji, (4, 3, 64, 64) in [0, 1]"""
    sys.path.insert(0, str(ROOT / "emoji"))
    import evaluate

    (reference, _), _ = evaluate.real_pictures(evaluate.read_glyphs())
    return reference[:: len(reference) // 4][:4] / 2 + 0.5


def blurred(x, times):
    """(B, 3, H, W) under the window (1, 2, 1) / 4 in both axes, so many times"""
    line = torch.tensor([0.25, 0.5, 0.25])
    window = (line[:, None] * line).expand(3, 1, 3, 3)
    for _ in range(times):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), window, groups=3)
    return x


@pytest.mark.parametrize("kind, distance", [("dists", DISTS), ("lpips", LPIPS)])
def test_embedded_feature_net(tiles, kind, distance):
    """Training on the embedded model uses its weights; the more a picture is blurred, the further off it is."""
    loaded = train.load_distance(kind, ROOT / "emoji")
    assert isinstance(loaded, distance)
    weights, stored = loaded.vgg.state_dict(), load_file(ROOT / "emoji" / "features" / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)
    with torch.no_grad():
        distances = torch.stack([loaded(tiles, blurred(tiles, times)) for times in (0, 1, 3, 9, 27)])
    print(f"{kind}, by blur: {distances.mean(1).tolist()}")
    assert (distances[0].abs() < 1e-6).all()
    assert (distances.diff(dim=0) > 0.005).all()
