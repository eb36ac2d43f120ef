"""Stage one of training. Each pair is a prompt, a noisy latent at a timestep, and what the teacher makes of that; all
of it depends on the pair's number alone. Targets that exist are not drawn again, nor mixed up with others."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

import hipa
import train

# isort: split
from training import (  # noqa: I001
    FIRST, GUIDANCE, PAIRS, PROMPTS, TEACHER_STEPS, close, contents, done, refused, resume, same_tensors, stamps,
)  # fmt: skip

pytest_plugins = "training"


def targets_of(folder, prompts=PROMPTS, pairs=PAIRS, later=0.5):
    return train.Targets(folder, prompts, pairs, later, hipa.Schedule())


# ---------------------------------------------------------------------------------------------------- the plan of pairs
def test_the_share_of_pairs_that_begin_later():
    """About a third if a third is asked for; half of these blurred; from all over the timesteps. The first of a shard
    and the held-out pairs begin with noise."""
    targets = targets_of(None, pairs=6400, later=0.3)
    plans = [targets.plan(k) for k in range(6400 + train.HELD_OUT)]
    later = [plan for plan in plans if plan[0] is not None]
    assert len(later) / 6400 == pytest.approx(0.3, abs=0.02)
    assert sum(blurred for _, blurred, _ in later) / len(later) == pytest.approx(0.5, abs=0.04)
    assert 199 <= min(t for *_, t in later) < 205 and 993 < max(t for *_, t in later) < 999
    assert {t // 100 for *_, t in later} >= set(range(2, 10))
    begin_with_noise = [*range(0, 6400, train.SHARD), *range(6400, 6400 + train.HELD_OUT)]
    assert {plans[k] for k in begin_with_noise} == {(None, False, 999)}
    assert all(plan[1:] == (False, 999) for plan in plans if plan[0] is None)


@pytest.mark.parametrize("later", [0.3, 1])
def test_a_later_pair_begins_with_the_picture_of_an_earlier_one(later):
    """Of the same shard, and that one begins with noise. A blurred picture keeps its prompt; the others get another."""
    targets, seen = targets_of(None, prompts=list(range(1000)), pairs=16, later=later), Counter()
    plan = targets.plan
    targets.plan = lambda k: seen.update([k]) or plan(k)
    for k in range(16):
        source, blurred, _ = targets.plan(k)
        if source is not None:
            assert source < k and source // train.SHARD == k // train.SHARD and plan(source)[0] is None
        assert targets.prompt(k) == (source if blurred else k)
    assert sum(seen.values()) < 16**3  # with all of them later, a search that searches anew for each would not end


def test_no_share_none_later():
    assert {targets_of(None, later=0).plan(k) for k in range(64)} == {(None, False, 999)}


# ----------------------------------------------------------------------------------------------- the teacher's pictures
def test_targets_are_what_sampling_draws(checkpoint, monkeypatch, tmp_path):
    """Of a model that predicts noise, and of one that predicts v: decoded, they are the pictures of `hipa.sample`."""
    model, prompts = hipa.load(checkpoint), ["a cat", "a dog", "a red cat"]
    monkeypatch.setattr(train, "HELD_OUT", 0)
    targets = train.Targets(tmp_path, prompts, 4, 0, model.schedule)
    targets.make(model, 4, GUIDANCE, batch=3)
    x, timesteps, x0, words = targets.batch([1, 2, 3])
    assert words == ["a dog", "a red cat", "a cat"] and timesteps.tolist() == [999] * 3
    assert torch.equal(x, hipa.noise([FIRST + 1, FIRST + 2, FIRST + 3], 4, 8, 8)) and x0.dtype == torch.float32
    expected = hipa.sample(model, words, [FIRST + 1, FIRST + 2, FIRST + 3], 4, GUIDANCE)
    with torch.no_grad():
        assert (model.decode(x0) - expected).abs().max() < 1e-2


@pytest.fixture(scope="module")
def emoji():
    return hipa.load("emoji")


@pytest.fixture(scope="module")
def later_starts(emoji, tmp_path_factory):
    """Targets of the embedded model, whose pictures differ; half of them begin later."""
    prompts = ["a cat", "a red apple", "a rocket on a blue background"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "HELD_OUT", 0)
        targets = train.Targets(tmp_path_factory.mktemp("targets"), prompts, PAIRS, 0.5, emoji.schedule)
    targets.make(emoji, 3, GUIDANCE, batch=16)
    return targets


LATER = [k for k in range(PAIRS) if targets_of(None).plan(k)[0] is not None]
assert {targets_of(None).plan(k)[1] for k in LATER} == {False, True}  # both kinds are tested below


@torch.no_grad()
@pytest.mark.parametrize("k", LATER)
def test_a_later_start(emoji, later_starts, k):
    """x is the source's picture, or what super-resolution by 4 would make it begin with, and the noise of the pair's
    own seed; x0 is what sampling makes of x alone. The timestep that is kept fits both better than its neighbours."""
    source, blurred, planned = later_starts.plan(k)
    _, _, x0, _ = later_starts.batch([source])
    x, timesteps, picture, prompts = later_starts.batch([k])
    t = timesteps.item()
    assert t == planned < 999 and prompts == [later_starts.prompts[(source if blurred else k) % 3]]
    begin = emoji.decode(x0)
    if blurred:
        begin = hipa.resize(hipa.resize(begin, (16, 16)), (64, 64))
    noise, latent = hipa.noise([FIRST + k], 4, 16, 16), emoji.encode(begin)
    near = [t - 1, t, t + 1]
    errors = [(x - emoji.schedule.add_noise(latent, each, noise)).square().mean() ** 0.5 for each in near]
    assert min(errors) == errors[1] < 2e-3
    drawn = hipa.generate(emoji, prompts * 3, x.expand(3, -1, -1, -1), torch.tensor(near), 3, GUIDANCE)
    errors = (emoji.decode(picture) - drawn).square().mean(dim=(1, 2, 3)).sqrt().tolist()
    assert min(errors) == errors[1] < 5e-3


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_pair_does_not_depend_on_what_is_drawn_beside_it(finished, small, tmp_path, batch):
    """--teacher-batch changes nothing but the last bits."""
    model, folder = hipa.load(small), finished.out / "targets"
    drawn = targets_of(tmp_path, finished.prompts).draw(model, range(16), TEACHER_STEPS, GUIDANCE, batch)
    there = load_file(folder / "000000.safetensors")
    assert drawn.keys() == there.keys() and torch.equal(drawn["t"], there["t"])
    for name in ("x0", "x"):
        close(drawn[name], there[name])


def test_training_reads_pairs_in_any_order(finished):
    """Each alone is what it is among the others."""
    targets = targets_of(finished.out / "targets", finished.prompts)
    order = [7, 0, *LATER, 15]
    *tensors, prompts = targets.batch(order)
    for row, k in enumerate(order):
        *alone, (prompt,) = targets.batch([k])
        assert all(torch.equal(tensor[row], one[0]) for tensor, one in zip(tensors, alone)) and prompts[row] == prompt


def test_a_teacher_that_draws_nan(begin, small, tmp_path):
    """It is refused, and no shard is written."""
    damaged = shutil.copytree(small, tmp_path / "model")
    path = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"conv_out.bias": torch.full((4,), float("nan"))}, path)
    refused(*begin(targets=tmp_path / "targets", model=damaged), words=["not finite"])
    assert stamps(tmp_path / "targets") == {}


# ----------------------------------------------------------------------------------------------- targets that are there
def test_only_missing_shards_are_made(begin, small_shards, tmp_path):
    """One of two deleted: it is made again, the same bits; the other is left alone."""
    folder = tmp_path / "run" / "targets"
    done(*begin(targets=folder, steps=1))
    before, copy = stamps(folder), shutil.copytree(folder, tmp_path / "copy")
    assert list(before) == ["000000.safetensors", "000001.safetensors"]
    (folder / "000000.safetensors").unlink()
    resume(tmp_path / "run")
    assert stamps(folder)["000001.safetensors"] == before["000001.safetensors"]
    for name in before:
        same_tensors(folder / name, copy / name)


@pytest.mark.parametrize("pairs, made", [(8, {"000001", "000002"}), (12, {"000001", "000002"})])
def test_more_pairs_keep_the_shards_that_fit(small, small_shards, tmp_path, pairs, made):
    """From 8 or 12 pairs to 16: the first shard stays. The second had held-out pairs in it, which begin with noise; now
    they are trained on, and may begin later. All are as if 16 had been asked for at first."""
    model, folder, fresh = hipa.load(small), tmp_path / "targets", tmp_path / "fresh"

    def make(folder, pairs):
        targets = targets_of(folder, pairs=pairs, later=0.9)
        folder.mkdir(exist_ok=True)
        targets.make(model, 1, 1.0, batch=16)
        return targets

    make(folder, pairs)
    before = stamps(folder)
    again, expected = make(folder, 16), make(fresh, 16)
    assert {name[:6] for name, stamp in stamps(folder).items() if stamp != before.get(name)} == made
    for ours, theirs in zip(again.batch(range(24)), expected.batch(range(24))):
        assert ours == theirs if isinstance(ours, list) else torch.equal(ours, theirs)


def test_runs_share_targets(begin, finished, tmp_path):
    """With other settings of stage two. Nothing is drawn again, and none are kept in the run's own folder."""
    before = stamps(finished.out / "targets")
    done(*begin(steps=1, rank=1, distance="lpips", seed=9, teacher_batch=2))
    assert stamps(finished.out / "targets") == before and not (tmp_path / "run" / "targets").exists()


@pytest.fixture
def other(small, tmp_path):
    """What to change of a run, by the name of what its targets then differ in."""
    prompts = tmp_path / "other.txt"
    prompts.write_text("a horse\n")
    folder = shutil.copytree(small, tmp_path / "other_model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 1.01 for key, tensor in load_file(path).items()}, path)
    return {
        "guidance": {"guidance": 2}, "steps": {"teacher_steps": 5}, "later": {"later": 0.4},
        "prompts": {"data": prompts}, "unet": {"model": folder},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["guidance", "steps", "later", "prompts", "unet"])
def test_targets_of_other_settings_are_refused(begin, finished, other, name):
    """The message names what differs, and the targets stay as they are. Once that is mended, the same --out serves."""
    before = contents(finished.out / "targets")
    refused(
        *begin(**other[name]), words=["targets", "--targets", f"another {name.replace('steps', '--teacher-steps')}"]
    )
    assert contents(finished.out / "targets") == before
    if name == "guidance":
        done(*begin(steps=1))


def test_targets_of_an_older_format_are_refused(begin, finished, tmp_path):
    """Those held two starts for each pair."""
    folder = shutil.copytree(finished.out / "targets", tmp_path / "old")
    settings = json.loads((folder / "settings.json").read_text())
    del settings["format"]
    (folder / "settings.json").write_text(json.dumps(settings))
    refused(*begin(targets=folder), words=["another format", "--targets"])
