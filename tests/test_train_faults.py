"""What goes wrong in training: options that do not fit, downloads that fail, signals, losses that are not numbers. Each
ends in one line on stderr, and what was saved before is kept."""

import hashlib
import json
import math
import re
import shutil
import signal
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import hipa
import train
from losses import DISTS, VGG
from training import FLAGS, PAIRS, PROMPTS, STATE, STEPS, contents, done, log, refused, resume, run, saved_step, stamps

pytest_plugins = "training"


# -------------------------------------------------------------------------------------------------------------- options
BAD = {
    "no --data": (["--out", "new"], ["--data"]),
    "no such file": (["--data", "missing.txt"], ["missing.txt"]),
    "an empty file": (["--data", "empty.txt"], ["no prompts"]),
    "a folder": (["--data", "."], ["directory"]),
    "JSON of another kind": (["--data", "other.json"], ["neither text"]),
    "an unknown model": (["--data", "p.txt", "--model", "no-such-model"], ["no-such-model"]),
    "a batch that does not divide": (["--data", "p.txt", "--batch", "4", "--accumulate", "3"], ["--batch 4"]),
    "no loss": ([*"--data p.txt --spatial 0 --fourier 0 --sobel 0 --energy 0 --latent 0".split()], ["weight 0"]),
    "no CUDA": (["--data", "p.txt", "--device", "cuda"], ["--device cuda"]),
    "COCO without a GPU": (["--data", "coco"], ["GPU", "EFLOP", "--device cpu", "--data emoji"]),
    "a file in place of the folder": (["--data", "p.txt", "--out", "taken"], ["cannot write", "taken"]),
    "a folder nobody can write": (["--data", "p.txt", "--out", "/proc/x"], ["cannot write", "/proc/x"]),
    "a learning rate of nan": (["--data", "p.txt", "--lr", "nan"], ["--lr"]),
    "a learning rate of 1e30": (["--data", "p.txt", "--lr", "1e30"], ["--lr"]),
    "more than all begin later": (["--data", "p.txt", "--later", "1.5"], ["--later"]),
    "a head start beyond the end": (["--data", "p.txt", "--head-start", "2"], ["--head-start"]),
    "rank 0": (["--data", "p.txt", "--rank", "0"], ["--rank"]),
    "no pairs": (["--data", "p.txt", "--pairs", "0"], ["--pairs"]),
    "no teacher steps": (["--data", "p.txt", "--teacher-steps", "0"], ["--teacher-steps"]),
    "a teacher's batch of none": (["--data", "p.txt", "--teacher-batch", "0"], ["--teacher-batch"]),
    "a seed too large": (["--data", "p.txt", "--seed", str(2**63 - 1)], ["--seed"]),
    "a distance there is not": (["--data", "p.txt", "--distance", "mse"], ["--distance"]),
    "an unknown option": (["--data", "p.txt", "--stepz", "3"], ["--stepz"]),
    "an existing run": (["--data", "p.txt", "--out", "old"], ["old", "--resume", "--out"]),
    "--resume without --out": (["--resume"], ["--out"]),
    "--resume without a run": (["--resume", "--out", "new"], ["new", "no folder of a run"]),
    "--resume of something else": (["--resume", "--out", "odd"], ["odd", "no folder of a run"]),
    "--resume with another --lr": (["--resume", "--out", "old", "--lr", "0.5"], ["--lr", str(FLAGS["lr"])]),
    "--resume with another --steps": (["--resume", "--out", "old", "--steps", "99"], ["--steps", str(STEPS)]),
    "--resume with --paper": (["--resume", "--out", "old", "--paper"], ["--paper"]),
    "--resume in other parts": (["--resume", "--out", "old", "--accumulate", "3"], ["--batch"]),
}


@pytest.mark.parametrize("argv, words", BAD.values(), ids=BAD)
def test_a_mistake(finished, small, monkeypatch, tmp_path, argv, words):
    """One line that says what is wrong, before the model is loaded; no file is written or changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hipa, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(hipa, "fetch", lambda *_, **__: pytest.fail("something was downloaded"))
    for name, text in {"p.txt": "a cat\n", "empty.txt": " \n", "other.json": "[]", "taken": "precious"}.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(finished.out, tmp_path / "old")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "settings.json").write_text("{}")
    before = contents(tmp_path)
    refused(*([] if "--model" in argv or "--resume" in argv else ["--model", small]), *argv, words=words)
    assert contents(tmp_path) == before


def test_coco_without_a_gpu_if_one_insists(monkeypatch):
    """--device cpu starts it all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = train.parse_args(["--data", "coco", "--device", "cpu"])
    assert (args.model, args.pairs) == ("sd21", 100_000)


# ------------------------------------------------------------------------------------------------------------ downloads
# The "server" is a file on this disk; what the network can do wrong is tested in test_download.py.
def captions():
    """A captions file as COCO has it: several of each image."""
    lines = [(9, "a cat"), (4, "a\n dog "), (9, "another cat"), (4, "x"), (5, "a horse")]
    return json.dumps({"annotations": [{"image_id": image, "caption": text} for image, text in lines]})


@pytest.fixture
def home(monkeypatch, tmp_path):
    """torch's cache, where downloads are kept."""
    monkeypatch.setattr(hipa.time, "sleep", lambda _: None)  # between tries
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def coco(home, monkeypatch, tmp_path):
    """COCO's archive of annotations, where train.py looks for it."""
    path = tmp_path / "annotations.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("annotations/instances_train2017.json", "{}")
        file.writestr("annotations/captions_train2017.json", captions())
    monkeypatch.setattr(train, "COCO", path.as_uri())
    monkeypatch.setattr(train, "COCO_SHA256", hipa.sha256(path))
    return path


def test_coco(begin, coco, home, tmp_path):
    """The annotations are downloaded once, and only the captions kept; of each image the first one counts."""
    argv = begin(data="coco", targets=None, pairs=4, teacher_steps=1, steps=1)
    done(*argv)
    assert [path.name for path in contents(home)] == ["captions_train2017.json"]
    assert sorted(train.find_prompts("coco")) == ["a cat", "a dog", "a horse"]
    coco.unlink()
    resume(tmp_path / "run")


def damage(path):
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("fault, words", [(damage, ["sha256"]), (lambda path: path.unlink(), ["cannot download"])])
def test_coco_that_cannot_be_had(begin, coco, home, fault, words):
    """Another file, or none: one line, and nothing stays that a later run would have to get past."""
    fault(coco)
    refused(*begin(data="coco"), words=[train.COCO, *words])
    assert contents(home) == {}


def test_no_place_for_coco(begin, coco, home):
    """A file stands where the cache should be."""
    home.write_text("")
    refused(*begin(data="coco"), words=["cannot"])


@pytest.fixture
def vgg16(home, monkeypatch, tmp_path):
    """The official VGG16's file, but with other weights: a pickle of tensors, with a classifier that is not used."""
    torch.manual_seed(0)
    path, weights = tmp_path / "vgg16-397923af.pth", VGG().state_dict()
    torch.save({**weights, "classifier.0.bias": torch.zeros(3)}, path)
    monkeypatch.setattr(train, "VGG16", path.as_uri())
    monkeypatch.setattr(train, "VGG16_SHA256", hipa.sha256(path))
    return SimpleNamespace(path=path, weights=weights, kept=home / "hub" / "checkpoints" / path.name)


def test_vgg16(vgg16, tmp_path):
    """For a checkpoint without a feature net of its own it is downloaded, once, and its own weights of DISTS go with
    it. A file in its place that is another one is refused, not used."""
    vgg = train.load_distance("lpips", tmp_path).vgg
    assert all(torch.equal(tensor, vgg16.weights[name]) for name, tensor in vgg.state_dict().items())
    vgg16.path.unlink()
    distance = train.load_distance("dists", tmp_path)
    learned = load_file(train.HERE / "losses.safetensors")["dists.alpha"]
    assert isinstance(distance, DISTS) and torch.allclose(
        distance.alpha / distance.alpha.sum(), learned / learned.sum()
    )
    damage(vgg16.kept)
    with pytest.raises(hipa.UserError, match="not the official file.*delete"):
        train.load_distance("dists", tmp_path)


def test_vgg16_that_is_another_file(vgg16, tmp_path):
    """It is not kept."""
    damage(vgg16.path)
    with pytest.raises(hipa.UserError, match="sha256"):
        train.load_distance("dists", tmp_path)
    assert list(vgg16.kept.parent.iterdir()) == []


def test_official_addresses():
    """The pinned checksum of VGG16 begins as its name says, and both are sha256."""
    assert train.VGG16_SHA256[:8] in train.VGG16 and train.VGG16.startswith("https://")
    assert {len(digest) for digest in (train.VGG16_SHA256, train.COCO_SHA256)} == {2 * hashlib.sha256().digest_size}


@pytest.mark.parametrize("name", ["p.txt", "p.json"])
def test_a_file_of_prompts(tmp_path, name):
    """One a line, or COCO's captions; shuffled, but always in the same way."""
    (tmp_path / name).write_text("a cat\n\n a dog \na horse\n" if name == "p.txt" else captions())
    first, second = (train.find_prompts(str(tmp_path / name)) for _ in range(2))
    assert sorted(first) == ["a cat", "a dog", "a horse"] and first == second


# -------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_stage_one(begin, small_shards, monkeypatch, tmp_path, signum):
    """The second shard is lost, the first stays."""
    draw, folder = train.Targets.draw, tmp_path / "run" / "targets"

    def draw_and_signal(self, model, indices, *rest):
        if indices[0] == 8:
            signal.raise_signal(signum)
        return draw(self, model, indices, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.Targets, "draw", draw_and_signal)
        result = run(*begin(targets=folder, teacher_steps=1, steps=2))
    assert result.code == 128 + signum and result.out == []
    assert len([line for line in result.err if line.endswith("; --resume continues")]) == 1
    before = stamps(folder)
    assert list(before) == ["000000.safetensors"] and not list(tmp_path.rglob("*.part"))
    resume(tmp_path / "run")
    after = stamps(folder)
    assert after.pop("000001.safetensors") and after == before


@pytest.fixture
def signals(monkeypatch):
    """Makes every update begin with signals."""
    update = train.Run.update

    def send(*signums):
        monkeypatch.setattr(train.Run, "update", lambda run: [*map(signal.raise_signal, signums)] and update(run))

    return send


def test_a_message_stands_on_a_line_of_its_own(begin, signals):
    """Not behind the progress bar."""
    signals(signal.SIGTERM)
    result = run(*begin())
    assert result.code == 143
    assert [line for line in result.err if re.match(r"\S+: saved at step 1; --resume continues", line)]


def test_a_second_ctrl_c_ends_at_once(begin, signals, tmp_path):
    """Without waiting for the step, and without a traceback."""
    signals(signal.SIGINT, signal.SIGINT)
    assert run(*begin()).code == 130 and saved_step(tmp_path / "run") == 0


# --------------------------------------------------------------------------------------------------------- not a number
def poison(training, step):
    """The loss of one step becomes nan."""
    loss_of = training.loss_of

    def poisoned(*batch):
        return {name: term * (math.nan if training.step == step else 1) for name, term in loss_of(*batch).items()}

    training.loss_of = poisoned


def test_a_loss_that_is_not_a_number(begin, finished, monkeypatch, tmp_path):
    """The run ends with the step and its prompts; what was saved before stays, and can be gone on with."""
    go, out = train.Run.train, tmp_path / "run"
    targets = train.Targets(None, finished.prompts, PAIRS, FLAGS["later"], hipa.Schedule())
    words = [targets.prompt(k) for k in train.pairs_of_step(3, SimpleNamespace(pairs=PAIRS, batch=4, seed=5))]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train", lambda training: poison(training, 3) or go(training))
        result = refused(*begin(), words=["step 3", "--lr", "; ".join(words)])
    assert "nan" in result.err[-1] and set(words) <= set(PROMPTS)
    assert saved_step(out) == 2 and log(out)["step"] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in load_file(out / STATE).values())
    resume(out)
    assert saved_step(out) == STEPS


def test_a_gradient_that_is_not_a_number(student):
    """Of a finite loss, as of a square root at 0: the adaptors stay as they were."""
    training = student()
    training.update()
    before = [parameter.clone() for parameter in training.parameters]
    training.parameters[0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(hipa.UserError, match="step 1.*prompts"):
        training.update()
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters))
