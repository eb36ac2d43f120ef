"""The coursework: what `cut` makes, what students are told, what the grader survives; slow: that checks are right."""

import ast
import contextlib
import functools
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image

from conftest import ROOT

COURSE = ROOT / "course"
sys.path.insert(0, str(COURSE))

import checks  # noqa: E402
import child  # noqa: E402
import running  # noqa: E402
from cutting import FILES, Answer, Problem, answers, fingerprint, parsed, source_of, split  # noqa: E402
from handing import cut_autograder, cut_folder, students_files  # noqa: E402
from proof import prove  # noqa: E402
from running import Project, UserError, check, student_files  # noqa: E402

command_line = checks.load_file("command_line", COURSE / "__main__.py")
MOST, COUNT = (f([e.POINTS for e in running.exercises(COURSE)]) for f in (sum, len))
BPE, ADD = "clip.Tokenizer._bpe", "hipa.Schedule.add_noise"


@pytest.fixture(scope="module")
def project():
    return Project()


@pytest.fixture(scope="module")
def emptied(project):
    """{module: text} of a students' folder in which nothing is done."""
    files = students_files(project)
    return {module: files[path].decode() for module, path in FILES.items()}


@pytest.fixture(scope="module")
def reference():
    """On one thread, as the children run: waiting threads use processor time, which the checks limit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield checks.Course(ROOT)
    torch.set_num_threads(threads)


@pytest.fixture
def here(reference, monkeypatch):
    """Checks run in this process instead of one for each exercise, and without time limits."""
    of_number = functools.cache(reference.exercise)

    def ask(project, exercise, paths, texts, seed, only=None, seconds=0):
        events, request = [], {"paths": paths, "texts": texts, "seed": seed, "only": only}
        with running.PARSING:
            child.judge(reference, of_number(exercise.number), request, lambda **e: events.append(e | {"printed": ""}))
        return events, None

    monkeypatch.setattr(running, "ask", ask)
    monkeypatch.setattr(checks, "TimeLimit", lambda seconds: contextlib.nullcontext())


def judge(project, number, texts, paths=None):
    return check(project, project.exercises[number - 1], paths or {module: f"<{module}>" for module in texts}, texts)


def filled(emptied, target, body):
    """The emptied texts with one body written, as a student writes it."""
    module, name = split(target)
    stub = source_of(target, emptied)
    return {**emptied, module: emptied[module].replace(stub, stub[: stub.index("raise NotImpl")] + body + "\n")}


def course(folder, *arguments):
    """`python course ...` -> exit code, stdout, stderr"""
    command = [sys.executable, "course", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


# -------------------------------------------------------------------------------------------------------------- cutting
def test_cut_empties_the_targets_and_nothing_else(project, emptied):
    """With the functions put back the files are the project's own, byte for byte; their docstrings were never gone."""
    for exercise in project.exercises:
        for target in exercise.TARGETS:
            stub, whole = source_of(target, emptied), source_of(target, project.texts)
            assert f"exercise {exercise.number}: python course check {exercise.number}" in stub
            assert ast.get_docstring(parsed(stub)) == ast.get_docstring(parsed(whole))
            module, name = split(target)
            holder = emptied[module].index(f"class {name.split('.')[0]}") if "." in name else 0
            place = emptied[module].index(stub, holder)
            emptied = {**emptied, module: emptied[module][:place] + whole + emptied[module][place + len(stub) :]}
    assert emptied == project.texts
    assert not any("course" in text for text in project.texts.values())  # the product knows nothing of the course


def test_no_solution_lies_open_in_the_students_folder(project):
    """No long line of a solution stands in the hand-out or in the checks."""
    files = {p: data for p, data in students_files(project).items() if p == "README.md" or p.startswith("course/")}
    text = "\n".join(data.decode("utf-8", "ignore") for data in files.values())
    assert "course/sealed" in files and not any("mistakes" in path for path in files)
    for target in (target for exercise in project.exercises for target in exercise.TARGETS):
        node = parsed(source_of(target, project.texts))
        for line in ast.unparse(node.body[1:] if ast.get_docstring(node) else node.body).splitlines():
            assert len(line.strip()) < 45 or line.strip() not in text, (target, line)


def test_nothing_is_overwritten_and_zips_are_complete(project, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        cut_folder(project, tmp_path)
    for make, name in ((cut_folder, "a.zip"), (cut_autograder, "auto.zip")):
        make(project, tmp_path / name)
        with pytest.raises(UserError, match="exists"):
            make(project, tmp_path / name)
    student, teacher = (zipfile.ZipFile(tmp_path / name) for name in ("a.zip", "auto.zip"))
    assert {name.removeprefix("a/") for name in student.namelist()} == students_files(project).keys()
    files = {"setup.sh", "run_autograder", "requirements.txt", "course/__main__.py", "course/mistakes/01_words.py"}
    assert files <= set(teacher.namelist()) and teacher.getinfo("run_autograder").external_attr >> 16 & 0o111
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "a.zip", "auto.zip"}


# --------------------------------------------------------------------------------------------- what the student is told
def test_the_board_and_the_texts_need_no_torch_and_a_check_says_so(project, tmp_path, monkeypatch):
    cut_folder(project, folder := tmp_path / "mine")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, out, err = course(folder)
    assert code == 0 and err == "" and f"\n0 of {MOST} points. Next: python course check 1" in out
    code, out, _ = course(folder, "check", "5", "--picture")
    lines = [int(line.split()[-1]) for line in out.splitlines() if " in hipa.py, line " in line]
    assert code == 1 and "There is no picture yet" in out and "alpha_t^2" in out and lines == sorted(lines) != []
    (folder / "lora.py").write_text(project.texts["lora"], "utf-8")
    code, _, err = course(folder, "check", "9")
    assert code == 2 and err.startswith("error:") and err.count("\n") == 1 and "pip install" in err

    mark = fingerprint(project.exercises[8], student_files(folder)[1], project.texts)
    (folder / "outputs").mkdir(exist_ok=True)
    memory = {"9": {"mark": mark, "points": 8, "state": "remembered"}}
    (kept := folder / "outputs" / "course.json").write_text(json.dumps(memory))
    assert "remembered" in course(folder)[1]  # what it remembers it does not check again
    monkeypatch.setattr(command_line, "KEPT", kept)
    assert command_line.read_kept()["9"] == memory["9"]
    kept.write_text("[1, 2]")
    assert command_line.read_kept() == {}
    for argv in (["check"], ["check", "x"], ["cut", "a"], ["grade", "a"], ["prove"]):  # not in a students' folder
        with pytest.raises(UserError, match="--help"):
            command_line.parse_args(argv, is_cut=True)


def test_a_wrong_answer_is_told_its_value_its_place_and_its_mistake(project, emptied, here):
    body = "alpha, sigma = self.alpha_sigma(timestep)\n        return x0 + noise * sigma"
    result = judge(project, 5, filled(emptied, ADD, body))
    assert result.state == {**dict.fromkeys(result.state, "empty"), ADD: "wrong"} and result.points == 0
    report = command_line.report(result)
    assert "variance grows to 2" in report and "right is" in report and "at [" in report
    assert command_line.state_of(result) == "1 of 3 functions wrong"


def test_helpers_imports_and_methods_of_the_students_own_are_used(project, emptied, here):
    texts, whole = filled(emptied, BPE, "return self.mine(word)"), source_of(BPE, project.texts)
    method = whole.replace("_bpe", "mine").replace('[*word[:-1], word[-1] + "</w>"]', "letters(word)")
    helper = '\n\nMARK = "</w>"\n\n\ndef letters(word):\n    return [*itertools.chain(word[:-1], [word[-1] + MARK])]\n'
    text = texts["clip"].replace("    def tokenize(self", f"{method}\n    def tokenize(self") + helper
    result = judge(project, 1, {**texts, "clip": text.replace("import json\n", "import itertools\nimport json\n")})
    assert result.points == 7


STYLES = {
    "typing": ("from typing import Optional", "", "(self, x0: Optional[int], timestep, noise)", "alpha"),
    "future": ("from __future__ import annotations", "", "(self, x0: unheard_of, timestep, noise)", "alpha"),
    "decorator": ("try:\n    from functools import wraps\nexcept ImportError:\n    wraps = None\n"
                  "ONE: float = 1.0\n\n\ndef same(f):\n    return wraps(f)(lambda *how: f(*how))\n", "@same\n    ",
                  "(self, x0, timestep, noise, k=ONE)", "k * alpha"),
    "a helper beside a syntax error": ("import math, = 3\nONE = 1.0\n\n\ndef own(x):\n    return ONE * x\n",
                                       "def mine(self, x):\n        return own(x)\n\n    ",
                                       "(self, x0, timestep, noise)", "self.mine(alpha)"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_file_may_be_written_in_any_style(project, emptied, here, tmp_path, style):
    """What the student has added is run where it stands in the student's file, which has a byte order mark."""
    top, before, arguments, alpha = STYLES[style]
    body = f"alpha, sigma = self.alpha_sigma(timestep)\n        return {alpha} * x0 + sigma * noise"
    text = filled(emptied, ADD, body)["hipa"].replace("import json\n", f"{top}\nimport json\n", 1)
    text = text.replace("def add_noise(self, x0, timestep, noise)", f"{before}def add_noise{arguments}")
    (tmp_path / "hipa.py").write_text(text, "utf-8-sig")
    result = judge(project, 5, student_files(tmp_path)[1])
    assert result.state[ADD] == "right" and result.points == 3, command_line.report(result)


BAD = {
    "no gradient flows": (3, "unet.ResnetBlock.forward", "F.silu(time_emb)", "F.silu(time_emb).detach()"),
    "only a part of the gradient": (7, "hipa.dpm_solver", "previous = x0, lam", "previous = x0.detach(), lam"),
    "to model.text": (6, "hipa.predictor", "timesteps, context)", "timesteps, context.detach())"),
    "is NaN or infinite": (8, "losses.sobel", "(gradient.square().sum(2) + 1e-8).sqrt()",
                           "gradient.square().sum(2).sqrt().clamp(min=1e-4)"),
    "is torch.float64": (3, "unet.sinusoidal_embedding", "dim=1)", "dim=1).double()"),
    "is on the CPU": (8, "losses.sobel", "x.new_tensor(", "torch.tensor("),
    "changes x itself": (8, "losses.high_pass", "x.float()", "x.mul_(1.5).float() / 1.5"),
    "the default dtype": (3, "unet.sinusoidal_embedding", "half = ", "torch.set_default_dtype(torch.float64); half = "),
    "the state of the random numbers": (3, "unet.sinusoidal_embedding", "half = ", "torch.manual_seed(1); half = "),
}  # fmt: skip


@pytest.mark.parametrize("says", BAD)
def test_bad_conduct_is_told_and_costs_no_other_function(project, here, says):
    number, target, old, new = BAD[says]
    module, source = split(target)[0], source_of(target, project.texts)
    assert source.count(old) == 1, source
    text = project.texts[module].replace(source, source.replace(old, new))
    result = judge(project, number, {**project.texts, module: text})
    assert any(says in (how or "") for *_, how in result.checks), result.checks
    assert {t for t, state in result.state.items() if state == "wrong"} == {target}
    assert torch.get_default_dtype() == torch.float32


CLAMPED = """alpha, sigma = self.alpha_sigma(timestep)
        x = alpha * x - sigma * prediction if "v_" in self.prediction_type else (x - sigma * prediction) / alpha
        return x.clamp(-1, 1)"""
FIRST_RADIUS = """if not KEPT:
        down, across = torch.fft.fftfreq(x.shape[-2])[:, None], torch.fft.rfftfreq(x.shape[-1])
        KEPT.append(torch.hypot(down, across) * 2 > radius)
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * KEPT[0], s=x.shape[-2:])


KEPT = []"""
HINTS = {
    "do not use `noise`": (5, ADD, "return self.alpha_sigma(timestep)[0] * x0"),
    "cut off at -1 and 1": (5, "hipa.Schedule.predict_x0", CLAMPED),
    "keep in KEPT": (8, "losses.high_pass", FIRST_RADIUS),
}


@pytest.mark.parametrize("says", HINTS)
def test_a_hint_says_what_is_unused_cut_off_or_kept(project, emptied, here, says):
    number, target, body = HINTS[says]
    assert says in judge(project, number, filled(emptied, target, body)).hints[target]


def test_a_typo_in_another_function_of_the_file_blocks_nothing(project, here):
    broken = project.texts["hipa"].replace("def resize(pictures, size):", "def resize(pictures size):")
    assert judge(project, 5, {**project.texts, "hipa": broken}).points == 9
    own = project.texts["hipa"].replace("return alpha * x0 + sigma * noise", "return alpha * x0 + + sigma noise")
    result = judge(project, 5, {**project.texts, "hipa": own})
    assert result.points == 6 and "line" in result.problems[ADD]


@pytest.mark.parametrize("body, says", [("return x", "NameError"), ("raise SystemExit", "sys.exit")])
def test_what_is_raised_is_shown_with_the_students_own_line(project, emptied, here, tmp_path, body, says):
    texts = filled(emptied, "hipa.predictor", body)
    (tmp_path / "hipa.py").write_text(texts["hipa"])
    result = judge(project, 6, texts, {"hipa": str(tmp_path / "hipa.py")})
    shown = next(how for *_, how in result.checks if how)
    assert says in shown and "hipa.py, line" in shown and body in shown


def test_a_function_that_is_gone_and_one_that_is_forbidden_are_named(project, emptied):
    gone = {**emptied, "clip": emptied["clip"].replace("def _bpe", "def bpe_")}
    cases = {"_bpe": (1, gone), "scaled_dot_product_attention": (2, project.texts), "missing": (1, {})}
    for name, (number, texts) in cases.items():
        (problem,) = answers(project.exercises[number - 1], texts, project.texts).values()
        assert isinstance(problem, Problem) and name in str(problem)


# ------------------------------------------------------------------------------------------------- what it must survive
def test_the_end_of_python_costs_its_own_exercise(project, emptied):
    result = judge(project, 1, filled(emptied, BPE, "import os; print('hello'); os._exit(3)"))
    assert result.points == 0 and "ended Python itself (exit code 3)" in result.problems[BPE]


def test_the_other_functions_of_an_exercise_are_run_again(project):
    """One ends Python, one fills the memory; what one prints does not steer the terminal."""
    texts = dict(project.texts)
    lines = {"high_pass": "__import__('os')._exit(3)", "sobel": "print('\\x1b[31mred'); torch.empty(2**36)"}
    for target, line in lines.items():
        head = source_of(f"losses.{target}", texts).split("\n")[0]
        texts["losses"] = texts["losses"].replace(head, f"{head}\n    {line}")
    result = judge(project, 8, texts)
    assert "exit code 3" in result.problems["losses.high_pass"] and "losses.sobel" not in result.problems
    assert [*result.state.values()] == ["wrong", "wrong", "right"] and result.points == 3.33
    report = command_line.report(result)
    assert "3.33 of 10 points" in report and "\\x1b[31mred" in report and "\x1b" not in report
    assert "memory" in report or sys.platform != "linux"


LOOP = "while True:\n            try:\n                len(word)\n            except Exception:\n                pass"
DELETE = "import os, shutil; [shutil.rmtree(f, True) for f in (os.path.dirname(__file__), os.getcwd())]"
CASES = {LOOP: "never ends", "import time; time.sleep(1000)": "stopped after 9 seconds", DELETE: "Error",
         "[print('hello') for _ in range(9999)]": "characters more"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("body", CASES)
def test_loops_waits_floods_and_vandals_cost_their_own_exercise(project, emptied, monkeypatch, body):
    """Each exercise has a process and a copy of the project of its own."""
    if "sleep" in body:
        monkeypatch.setattr(running, "WALL_SECONDS", 9)
    before, texts = sorted(COURSE.rglob("*.py")), filled(emptied, BPE, body)
    if body == LOOP:
        with pytest.raises(UserError, match="no picture: still running"):
            running.picture(project, project.exercises[0], {}, texts)
    result = judge(project, 1, texts)
    told = [*result.problems.values(), result.printed, *(how or "" for *_, how in result.checks)]
    assert result.points == 0 and any(CASES[body] in words for words in told) and len(result.printed) < 2200, told
    assert sorted(COURSE.rglob("*.py")) == before


# -------------------------------------------------------------------------------------------------------------- grading
def test_nothing_scores_0_and_everything_scores_all(project, emptied, tmp_path, here, capsys):
    """Files may lie flat. Attention is written by hand, as its exercise wants it. Other seeds have other numbers."""
    out = tmp_path / "results.json"
    with pytest.raises(UserError):  # there are no files at all
        command_line.grade(project, tmp_path, 0, out)
    assert [test["score"] for test in json.loads(out.read_text("utf-8"))["tests"]] == COUNT * [0]
    bank = checks.load_file("bank", COURSE / "mistakes" / "02_attention.py")
    tree = ast.parse(project.texts["unet"])
    checks.replace(tree, "Attention.forward", Answer(parsed(bank.RIGHT[0]["code"]["unet.Attention.forward"])))
    for texts, points in ((emptied, 0), (project.texts | {"unet": ast.unparse(tree)}, MOST)):
        for module, text in texts.items():
            (tmp_path / f"{module}.py").write_text(text, "utf-8")
        command_line.grade(project, tmp_path, 7, out)
        assert f"\n{points} of {MOST} points" in capsys.readouterr().out
    tests = json.loads(out.read_text("utf-8"))["tests"]
    assert [test["score"] for test in tests] == [test["max_score"] for test in tests]


@pytest.mark.slow
def test_the_solved_folder_draws(project, tmp_path):
    """Its `check` passes in a process, its picture is saved, and its sample.py makes what the project's makes."""
    cut_folder(project, tmp_path / "mine")
    for module, text in project.texts.items():
        (tmp_path / "mine" / FILES[module]).write_text(text, "utf-8")
    assert course(tmp_path / "mine", "check", "9")[0] == 0
    code, out, _ = course(tmp_path / "mine", "check", "9", "--picture")
    assert code == 0 and (tmp_path / "mine" / out.splitlines()[0]).is_file() and "?" in out
    command, pictures = [sys.executable, "sample.py", "a cat", "--out", str(tmp_path / "out")], []
    for folder in (ROOT, tmp_path / "mine"):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        pictures.append(Image.open(folder / done.stdout.strip()).tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, COUNT + 1))
def test_the_checks_can_be_trusted_and_end_in_a_picture_and_a_question(reference, number):
    """Known mistakes are caught and named, other right answers pass, mutants are caught."""
    exercise = reference.exercise(number)
    counts, _, _, problems = prove(reference, exercise, 0)
    assert problems == [] and counts["mistakes"] >= 5 and counts["mutants"] >= 5
    picture, words = exercise.show(reference.reference)
    assert picture.width >= 400 and picture.convert("L").getextrema()[0] < 100 and "?" in words


def test_a_proof_finds_a_check_that_is_too_weak(reference):
    """Without its strict checks exercise 3 lets mistakes and mutants pass, and the proof says so."""
    exercise = reference.exercise(3)
    exercise.checks = {name: f for name, f in exercise.checks.items() if name == "time_counts" or f.kinds}
    exercise.equivalent = {"nothing  ->  something": "no reason"}
    exercise.mistakes, exercise.right = dict(list(exercise.mistakes.items())[:2]), {}
    *_, problems = prove(reference, exercise, 0)
    for words in ("does not catch", "survives", "declared to change nothing", "only 2 mistakes"):
        assert any(words in problem for problem in problems)
