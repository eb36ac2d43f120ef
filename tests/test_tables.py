"""The scripts that make the tables of docs/tables.md, and the peers in one of them: lcm and progressive, table, jobs,
bench."""

import itertools
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

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
import progressive  # noqa: E402
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


# -------------------------------------------------------------------------------------------- progressive distillation
@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_ddim_equals_diffusers(steps):
    """Two pictures, against diffusers' scheduler around the same network; the last step ends at the clean picture."""
    from diffusers import DDIMScheduler

    model, prompts = hipa.load("emoji"), ["a cat", "a rocket on a blue background"]
    options = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**NOISE, **options, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    x, context = hipa.noise([3, 4], 4, 16, 16), model.encode_text(prompts)
    for t in scheduler.timesteps:
        x = scheduler.step(model.unet(x, t.expand(2), context), t, x).prev_sample
    assert_same(f"DDIM, {steps} steps", progressive.sample_ddim(model, prompts, [3, 4], steps), model.decode(x))


def test_one_step_of_the_student_ends_where_two_of_the_teacher_do():
    """Also from pure noise, and where the second step ends at the clean picture: there it is the teacher's x0."""
    schedule, x = hipa.load("emoji").schedule, normal(3, 4, 5, 7)
    start, middle, end = torch.tensor([999, 500, 62]), torch.tensor([936, 437, 30]), torch.tensor([874, 374, -1])

    def teacher(x, t):  # any function will do
        return (0.7 * x + t[:, None, None, None] / 999).sin()

    halfway = progressive.ddim(schedule, x, teacher(x, start), start, middle)
    twice = progressive.ddim(schedule, halfway, teacher(halfway, middle), middle, end)
    wanted = progressive.target(schedule, teacher, x, start, middle, end)
    assert_same("once", progressive.ddim(schedule, x, wanted, start, end), twice)
    assert_same("the clean picture", wanted[2], teacher(halfway, middle)[2])


def test_progressive_loss_is_of_v():
    """A student whose v is wrong by 0.5 everywhere costs 0.25, at any timestep; the teacher learns nothing."""
    model, x0, calls = hipa.load("emoji"), normal(3, 4, 16, 16), []
    teacher, schedule = hipa.load("emoji"), model.schedule
    predictor = hipa.predictor(teacher, ["a cat"] * 3, 2.0)

    def student(x, t, _):
        calls.append(t)
        assert set(t.tolist()) <= {999, 499}  # the student's own two
        with torch.no_grad():
            wanted = progressive.target(schedule, predictor, x, t, t - 250, t - 500)
        alpha, sigma = schedule.alpha_sigma(t)
        return (alpha * x - wanted) / sigma + 0.5

    model.unet = student
    loss = progressive.loss_of(teacher, model, 2, 0, ["a cat"] * 3, x0, 2.0)
    assert loss.item() == pytest.approx(0.25, rel=1e-3) and len(calls) == 1


@pytest.mark.slow
def test_progressive_distillation_goes_on_after_the_last_student(tmp_path, capsys):
    """A student that is there is not trained again; the others' weights all change."""
    options = "--data emoji --device cpu --pairs 8 --batch 2 --teacher-steps 1 --steps 7 --lr 3e-4 --out".split()
    progressive.main([*options, str(tmp_path)])
    files = {path.name: path.read_bytes() for path in tmp_path.glob("unet-*")}
    assert capsys.readouterr().out.strip() == str(tmp_path / "unet-1.safetensors") and len(files) == 5
    (tmp_path / "unet-1.safetensors").unlink()
    progressive.main(["--out", str(tmp_path), "--resume"])
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("unet-*")}
    first, last = (load_file(tmp_path / f"unet-{steps}.safetensors") for steps in (16, 1))
    assert all((first[key] != last[key]).any() for key in first if first[key].numel() > 1000)


# ------------------------------------------------------------------------------------------------------------- tables
@pytest.fixture
def few(monkeypatch):
    """Four classes in the place of 74, and figures that cost nothing."""
    pictures, labels = (part[:16] for part in evaluate.real_pictures(evaluate.read_glyphs())[1])

    def recognised(x, asked):  # as the nearest real picture
        nearest = labels[torch.cdist(x.flatten(1), pictures.flatten(1)).argmin(dim=1)]
        return 100 * (nearest == asked).float().mean().item()

    figures = SimpleNamespace(
        glyphs=evaluate.read_glyphs()[:4],
        prompts=["a cat", "a bee", "an owl"],
        real=(pictures, labels),
        measure=lambda x, asked: [recognised(x, asked), 1, 2],
        measure_all=lambda x: [x.mean().item(), x.std().item(), 2, 3, 4],
        difference=lambda x, y: (x - y).abs().mean().item(),
    )
    monkeypatch.setattr(jobs, "Evaluation", lambda *_: figures)
    monkeypatch.setattr(table, "Evaluation", lambda *_: figures)


def rows_of(capsys):
    """{name: cells} of what was printed, of lines with a figure."""
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    return {name: cells for name, *cells in rows if cells[-1][0].isdigit()}


@pytest.mark.slow
def test_jobs(few, capsys):
    """Two adaptors: HiPA's rows show the mean and deviation over them. The correction brings bicubic pictures nearer to
    what was reduced; of degraded ones it brings the faults back, too."""
    jobs.main(["--seeds", "1", "--lora", "emoji", "emoji:0"])
    parts = capsys.readouterr().out.strip().split("\n\n")
    tables = [
        {name: cells for name, *cells in (line[2:-2].split(" | ") for line in part.splitlines()[2:])} for part in parts
    ]
    assert len(tables) == 5 and all("±" in rows.pop("**HiPA, 1 step**")[0] for rows in tables)
    edited, inpainted, reduced, degraded, _ = tables
    assert not any("±" in cells[0] for rows in tables for cells in rows.values())
    assert [*reduced] == [*degraded] == ["the real pictures", "bicubic", "bicubic, corrected"]
    assert [*edited] == ["real pictures of those"] and [*inpainted] == ["the real pictures", "the hole as it is filled"]
    assert edited["real pictures of those"][0] == inpainted["the real pictures"][0] == "100.0 %"
    filled = inpainted["the hole as it is filled"]
    assert float(filled[4]) > 10 and float(filled[5]) > 1.2  # the other half is as it was; the rim shows
    psnr = [float(rows[name][4]) for rows in (reduced, degraded) for name in ("bicubic", "bicubic, corrected")]
    assert psnr[0] + 0.5 < psnr[1] and psnr[0] - 1 > psnr[2] > psnr[3] - 1


def test_trainings_have_equal_time_and_go_on_where_they_stopped(few, monkeypatch, capsys, tmp_path):
    """A program in the place of train.py; as "rank 4" it fails the first time."""
    (tmp_path / "train.py").write_text(
        "import pathlib, shutil, sys\n"
        "_, _, out, *options = sys.argv\n"
        "out = pathlib.Path(out)\n"
        "(out / 'settings.json').touch()\n"
        f"shutil.copy({str(ROOT / 'emoji' / lora.LORA_NAME)!r}, out)\n"
        "print(*options, file=open(out / 'options', 'a'))\n"
        "sys.exit('--rank' in options and options[options.index('--seed') + 1] == '0')"
    )
    monkeypatch.setattr(table, "HERE", tmp_path / "emoji")
    monkeypatch.setattr(table, "draw", lambda model, *_, **__: torch.rand(4, 3, 64, 64))
    argv = ["--out", str(tmp_path / "out"), "--share", "0.1", "--rows", "hipa", "rank-4"]
    with pytest.raises(hipa.UserError, match="rank-4-0-111 did not end well"):
        table.main(argv)
    table.main([*argv, "--jobs", "1"])
    folders = {folder.parent.name: folder.parent for folder in (tmp_path / "out").glob("*/finished")}
    trainings = [f"{row}-{seed}-{updates}" for row, updates in (("hipa", 110), ("rank-4", 111)) for seed in range(3)]
    assert sorted(folders) == [*trainings, *(f"targets-{seed}-1" for seed in range(3))]
    options = {name: (folder / "options").read_text().splitlines() for name, folder in folders.items()}
    assert all("--seed 2 --steps 110 --targets" in line for line in options["hipa-2-110"])
    assert all("--device cpu" in line for line in options["hipa-2-110"])
    assert options["rank-4-0-111"][0].endswith("--rank 4") and options["rank-4-0-111"][1:] == ["--resume"]
    assert len((folders["rank-4-0-111"] / "processor_seconds").read_text().split()) == 2
    rows = rows_of(capsys)
    assert all(
        "±" in rows[name][0] for name in ("25 steps", "**HiPA**, 1 step, 110 updates", "rank 4, 1 step, 111 updates")
    )
    table.main(argv)  # everything is there
    assert rows_of(capsys).keys() == rows.keys()
    assert sum(len((folder / "options").read_text().splitlines()) for folder in folders.values()) == 9 + 1


def test_a_star_where_welch_says_so(few, monkeypatch, capsys, tmp_path):
    """Three trainings each; the second row's first column is far from HiPA's, beyond their deviation, the fifth is not.
    A mask's row is chosen on noise that no row is measured with."""
    levels = {"hipa": 0.2, "regression-of-latents": 0.7}
    monkeypatch.setattr(table, "train", lambda folder, *_: None)
    monkeypatch.setattr(table, "apply_lora", lambda model, path: setattr(model, "level", path.parent.name))
    for name, updates in (("hipa", 110), ("regression-of-latents", 149)):
        for seed in range(3):
            (folder := tmp_path / f"{name}-{seed}-{updates}").mkdir()
            (folder / "finished").touch(), (folder / "processor_seconds").write_text("60\n60\n")
    asked = []

    def draw(model, prompts, seed, steps, sample):
        asked.append(seed)
        level = levels.get(getattr(model, "level", "").rsplit("-", 2)[0], 0.5)
        return level + 0.01 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) + 0.01 * seed

    monkeypatch.setattr(table, "draw", draw)
    table.main(["--out", str(tmp_path), "--share", "0.1", "--rows", "hipa", "regression-of-latents"])
    rows = rows_of(capsys)
    regression, mask = (
        rows["regression of latents, 1 step, 149 updates"],
        next(r for n, r in rows.items() if "mask" in n),
    )
    assert regression[0] == "0.71 ± 0.01 *" and not regression[4].endswith("*") and regression[-1].startswith("2.0")
    assert mask[0].endswith("*") and float(mask[1][:4]) > float(regression[1][:4])  # sharper
    p = rows["p of this difference to HiPA"]  # empty where the two are equal
    assert [cell != "" and float(cell) < 0.05 for cell in p[:6]] == [cell.endswith("*") for cell in mask[:6]]
    assert set(asked) == {0, 1, 2, 3} and asked.count(3) == 1


@pytest.mark.slow
def test_a_table_of_a_copy(few, monkeypatch, capsys, tmp_path):
    """Real trainings of a copy of the model, by all three programs; every row's options exist."""
    for options, *_ in table.ROWS.values():
        train.parse_args([*table.ALIKE, *options.split()])
    shutil.copytree(ROOT / "emoji", tmp_path / "copy", ignore=shutil.ignore_patterns("*.py", "pytorch_lora*", "build"))
    monkeypatch.setattr(table, "ALIKE", [*table.ALIKE, *"--pairs 8 --teacher-steps 1 --batch 2".split()])
    monkeypatch.setattr(table, "TRAININGS", 1)
    monkeypatch.chdir(tmp_path)
    rows = ["hipa", "lcm-lora", "progressive-distillation"]
    table.main(["--model", str(tmp_path / "copy"), "--share", "0.002", "--rows", *rows])
    names = ["other real pictures", "25 steps", "plain 1 step", "**HiPA**, 1 step, 2 updates"]
    names += [f"LCM-LoRA, {n}, 1 updates" for n in ("1 step", "2 steps", "4 steps")]
    names += [f"progressive distillation, {n}, 2 updates" for n in ("1 step", "2 steps", "4 steps", "8 steps")]
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
