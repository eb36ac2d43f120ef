"""The scripts that make the tables of docs/results.md, and the peer in one of them: lcm, table, jobs, bench."""

import itertools
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import hipa
import lora
import train
from conftest import ROOT
from parity import assert_same, normal

sys.path[:0] = [str(ROOT / "emoji"), str(ROOT / "tools")]

import bench  # noqa: E402
import evaluate  # noqa: E402
import jobs  # noqa: E402
import lcm  # noqa: E402
import table  # noqa: E402

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_consistency_sampling_equals_diffusers(steps):
    """Two pictures with noise of their own, against diffusers' scheduler around the same network, one at a time."""
    from diffusers import LCMScheduler

    model, prompts, expected = hipa.load("emoji"), ["a cat", "a rocket on a blue background"], []
    for prompt, seed in zip(prompts, [3, 4]):
        scheduler = LCMScheduler(**NOISE, prediction_type=model.schedule.prediction_type)
        scheduler.set_timesteps(steps)
        generator, context = torch.Generator().manual_seed(seed), model.encode_text([prompt])
        x = torch.randn(1, 4, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            prediction = model.unet(x, t.expand(1), context)
            x, denoised = scheduler.step(prediction, t, x, generator=generator, return_dict=False)
        expected.append(model.decode(denoised))
    pictures = lcm.sample_consistency(model, prompts, [3, 4], steps)
    assert_same(f"consistency sampling, {steps} steps", pictures, torch.cat(expected))


def test_consistency_loss_equals_diffusers():
    """Its steps of DDIM and the boundary are those of diffusers' schedulers, one picture at a time. The adaptors are
    not at zero; one picture starts at the last timestep, 19, whose step ends at 0. Only the adaptors learn."""
    from diffusers import DDIMScheduler, LCMScheduler

    model, student = hipa.load("emoji"), hipa.load("emoji")
    parameters = lora.add_lora(student.unet, 4, "all")
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(2))
    for step in itertools.count():
        generator = train.seeded("consistency", 0, step)
        starts = 20 * torch.randint(1, 51, (3,), generator=generator) - 1
        if 19 in starts:
            break
    x0, noises = normal(3, 4, 16, 16, seed=1), torch.randn(3, 4, 16, 16, generator=generator)
    scheduler = LCMScheduler(**NOISE)
    ddim = DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    states, losses = model.encode_text(["", "a cat"]).detach(), []

    def f(x, t):
        alpha, sigma = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return c_skip * x + c_out * (alpha * x - sigma * student.unet(x, t.expand(1), states[1:]))

    for t, noise, clean in zip(starts, noises, x0):
        with torch.no_grad():
            x = scheduler.add_noise(clean[None], noise[None], t[None])
            without, with_text = model.unet(torch.cat([x, x]), t.expand(2), states).chunk(2)
            later = ddim.step(without + 2.0 * (with_text - without), t, x).prev_sample
        difference = f(x, t) - f(later, (t - 20).clamp(min=0)).detach()
        losses.append(((difference**2 + 0.001**2) ** 0.5 - 0.001).mean())
    args, batch = SimpleNamespace(seed=0, guidance=2.0), train.Batch(["a cat"] * 3, None, None, x0)
    gradients, losses = [], [torch.stack(losses).mean(), lcm.loss_of(args, student, None, step, batch)["consistency"]]
    for loss in losses:
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        assert all(".lora_" in name for name, p in student.unet.named_parameters() if p.grad is not None)
        student.unet.zero_grad()
    assert_same("loss, times 100", 100 * losses[1], 100 * losses[0], relative=True)
    # Relative to the largest. Sums over the batch are in another order here: two threads were seen to make it 1.2e-5.
    assert (gradients[1] - gradients[0]).abs().max() < 3e-5 * gradients[0].abs().max()


def test_the_boundary_equals_diffusers():
    """Its constants are seen only near timestep 0."""
    from diffusers import LCMScheduler

    timesteps = torch.tensor([0, 1, 19, 499, 999])
    theirs = LCMScheduler(**NOISE).get_scalings_for_boundary_condition_discrete(timesteps)
    assert_same("boundary", torch.stack(lcm.boundary(timesteps)), torch.stack(theirs))


# ------------------------------------------------------------------------------------------------------------- tables
@pytest.fixture
def few(monkeypatch):
    """Four classes in the place of 74, and figures that cost nothing."""
    figures = SimpleNamespace(
        glyphs=evaluate.read_glyphs()[:4],
        measure=lambda x, _: [x.mean().item(), 1, 2, 3, 4],
        difference=lambda x, y: (x - y).abs().mean().item(),
    )
    real = evaluate.real_pictures(evaluate.read_glyphs())[1][0][: 4 * evaluate.OTHER_VIEWS]
    monkeypatch.setattr(jobs, "real_pictures", lambda _: (None, (real, None)))
    monkeypatch.setattr(jobs, "Evaluation", lambda *_, **__: figures)
    monkeypatch.setattr(table, "Evaluation", lambda *_: figures)
    monkeypatch.setattr(table, "PER_CLASS", 1)
    monkeypatch.setattr(table, "SEEDS", 2)


def rows_of(capsys):
    """{name: cells} of what was printed, of lines with a figure."""
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    return {name: cells for name, *cells in rows if cells[-1][0].isdigit()}


@pytest.mark.slow
def test_jobs(few, capsys):
    """Two adaptors: HiPA's rows show the mean and half the spread over them; the others have one repetition."""
    jobs.main(["--seeds", "1", "--lora", "emoji", "emoji:0"])
    rows = rows_of(capsys)
    assert {"bicubic", "bicubic, corrected", "the hole as it is filled first"} == {n for n in rows if "HiPA" not in n}
    assert len(rows) == 10 and all(("HiPA" in name) == ("±" in cells[0]) for name, cells in rows.items())
    assert float(rows["bicubic"][0]) < float(rows["bicubic, corrected"][0])  # PSNR


def test_trainings_have_equal_time_and_go_on_where_they_stopped(few, monkeypatch, capsys, tmp_path):
    """A program in the place of train.py; as "rank 4" it fails the first time."""
    (tmp_path / "train.py").write_text(
        "import pathlib, shutil, sys\n"
        "_, _, out, *options = sys.argv\n"
        "out = pathlib.Path(out)\n"
        "(out / 'settings.json').touch()\n"
        f"shutil.copy({str(ROOT / 'emoji' / lora.LORA_NAME)!r}, out)\n"
        "print(*options, file=open(out / 'options', 'a'))\n"
        "sys.exit('--rank' in options)"
    )
    monkeypatch.setattr(table, "HERE", tmp_path / "emoji")
    monkeypatch.setattr(table, "draw", lambda *_, **__: (torch.zeros(4, 3, 64, 64), None))
    argv = ["--out", str(tmp_path / "out"), "--share", "0.1", "--rows", "hipa", "rank-4"]
    with pytest.raises(hipa.UserError, match="rank-4-0-111 did not end well"):
        table.main(argv)
    table.main(argv)
    folders = {folder.parent.name: folder.parent for folder in (tmp_path / "out").glob("*/finished")}
    assert sorted(folders) == ["hipa-0-110", "hipa-1-110", "hipa-2-110", "rank-4-0-111", "targets-0-1"]
    options = {name: (folder / "options").read_text().splitlines() for name, folder in folders.items()}
    assert all("--seed 2 --steps 110 --targets" in line for line in options["hipa-2-110"])
    assert options["rank-4-0-111"][0].endswith("--rank 4") and options["rank-4-0-111"][1:] == ["--resume"]
    assert len((folders["rank-4-0-111"] / "processor_seconds").read_text().split()) == 2
    rows = rows_of(capsys)
    assert rows["**HiPA**, 1 step, 110 updates"][-2] == "1,271,808" and "±" in rows["rank 4, 1 step, 111 updates"][0]
    table.main(argv)  # everything is there
    assert rows_of(capsys) == rows
    assert sum(len((folder / "options").read_text().splitlines()) for folder in folders.values()) == 6


@pytest.mark.slow
def test_a_table_of_a_copy(few, monkeypatch, capsys, tmp_path):
    """Real trainings of a copy of the model, by train.py and lcm.py; every variant's options exist."""
    for options, *_ in table.ROWS.values():
        train.parse_args([*table.ALIKE, *options.split()])
    shutil.copytree(ROOT / "emoji", tmp_path / "copy", ignore=shutil.ignore_patterns("*.py", "pytorch_lora*", "build"))
    monkeypatch.setattr(table, "ALIKE", [*table.ALIKE, *"--pairs 8 --teacher-steps 1 --batch 2".split()])
    monkeypatch.setattr(table, "TRAININGS", 1)
    monkeypatch.chdir(tmp_path)
    table.main(["--model", str(tmp_path / "copy"), "--share", "0.002", "--rows", "hipa", "lcm-lora"])
    names = ["25 steps", "plain 1 step", "**HiPA**, 1 step, 2 updates"]
    names += [f"LCM-LoRA, {n}, 1 updates" for n in ("1 step", "2 steps", "4 steps")]
    assert list(rows_of(capsys)) == names and (tmp_path / "runs" / "table-copy" / "lcm-lora-0-1").is_dir()


@pytest.mark.slow
def test_bench(monkeypatch, capsys):
    """Networks beside diffusers, and an update, which trains as many parameters there."""
    compare = bench.compare
    monkeypatch.setattr(bench, "compare", lambda rows, ours, theirs, _: compare(rows, ours, theirs, 1))
    monkeypatch.setitem(bench.ROWS, "small", lambda: bench.bench_networks(bench.EMOJI, 2, 8, 1))
    bench.main(["small"])
    assert list(rows_of(capsys)) == [f"{name}, emoji, batch 2, 32×32" for name in ("UNet", "VAE decode", "VAE encode")]
    ours, theirs = bench.train("ours", 1), bench.train("theirs", 1)
    assert ours[2] == theirs[2] > 10**6 and ours[0] > 0
