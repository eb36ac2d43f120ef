"""The coursework: what `cut` makes, what students are told, what the grader survives. The checks' own proof is slow."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "course"
sys.path.insert(0, str(COURSE))

import running  # noqa: E402
from checks import Course, load_file, replace  # noqa: E402
from cutting import FILES, Answer, Problem, answers, find, parsed, source_of, split  # noqa: E402
from handing import cut_folder, students_files  # noqa: E402
from proof import prove  # noqa: E402
from running import Project, UserError, check, student_files  # noqa: E402

BPE, ADD = "clip.Tokenizer._bpe", "hipa.Schedule.add_noise"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def course(folder, *arguments):
    """Runs `python course ...` in a folder -> (exit code, stdout, stderr)"""
    command = [sys.executable, "course", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def project():
    return Project()


@pytest.fixture(scope="module")
def reference():
    """On one thread, as the children run: waiting threads use processor time, which the checks limit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Course(ROOT)
    torch.set_num_threads(threads)


@pytest.fixture
def emptied(project):
    """{module: text} of a students' folder in which nothing is done."""
    files = students_files(project)
    return {module: files[path].decode() for module, path in FILES.items()}


def exercise_of(project, number):
    return next(e for e in project.exercises if e.number == number)


def written(text, name, source):
    """A module's text with a function replaced."""
    tree = ast.parse(text)
    replace(tree, name, Answer(parsed(source)))
    return ast.unparse(tree)


def solution(project, number):
    """{module: text} with one exercise solved; attention by hand, as its exercise wants it."""
    texts = dict(project.texts)
    bank = load_file("bank", COURSE / "mistakes" / "02_attention.py")
    if number == 2:
        texts["unet"] = written(texts["unet"], "Attention.forward", bank.RIGHT[0]["code"]["unet.Attention.forward"])
    return texts


def judge(project, number, texts, seed=0):
    return check(project, exercise_of(project, number), {m: f"{m}.py" for m in texts}, texts, seed)


# -------------------------------------------------------------------------------------------------------------- cutting
def test_cut_empties_the_functions_and_nothing_else(project, emptied):
    """All files compile; every function of an exercise raises; the lines that are left are the project's own."""
    for module, text in emptied.items():
        tree = ast.parse(text)
        for exercise in project.exercises:
            for target in (t for t in exercise.TARGETS if split(t)[0] == module):
                assert f"exercise {exercise.number}" in source_of(target, emptied)
                assert ast.get_docstring(function(tree, target)) == ast.get_docstring(
                    function(ast.parse(project.texts[module]), target)
                )
        added = set(text.splitlines()) - set(project.texts[module].splitlines())
        assert all("NotImplementedError" in line for line in added)


def function(tree, target):
    return find(tree, split(target)[1])[1]


def test_the_product_knows_nothing_of_the_course():
    for file in FILES.values():
        assert "course" not in (ROOT / file).read_text("utf-8")


def test_no_solution_lies_open_in_the_students_folder(project):
    """No long line of a solution stands in the hand-out or in the checks."""
    files = students_files(project)
    read = [data for path, data in files.items() if path == "README.md" or path.startswith("course/")]
    open_text = "\n".join(data.decode("utf-8", "ignore") for data in read)
    for exercise in project.exercises:
        for target in exercise.TARGETS:
            node = parsed(source_of(target, project.texts))
            for statement in node.body[1:] if ast.get_docstring(node) else node.body:
                for line in ast.unparse(statement).splitlines():
                    assert len(line.strip()) < 45 or line.strip() not in open_text, (target, line)


def test_cut_refuses_a_folder_that_is_not_empty(project, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, out, err = course(ROOT, "cut", tmp_path)
    assert (code, out) == (2, "") and err.startswith("error:") and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_zip_has_the_same_folder_and_is_never_overwritten(project, tmp_path):
    cut_folder(project, tmp_path / "a.zip")
    names = [n.split("/", 1)[1] for n in zipfile.ZipFile(tmp_path / "a.zip").namelist()]
    assert "course/sealed" in names and not any("mistakes" in n for n in names)
    with pytest.raises(UserError, match="exists"):
        cut_folder(project, tmp_path / "a.zip")


def test_the_autograder_has_what_gradescope_calls(project, tmp_path):
    from handing import cut_autograder

    cut_autograder(project, tmp_path / "auto.zip")
    archive = zipfile.ZipFile(tmp_path / "auto.zip")
    assert {"setup.sh", "run_autograder", "requirements.txt", "course/__main__.py", "hipa.py"} <= set(
        archive.namelist()
    )
    assert archive.getinfo("run_autograder").external_attr >> 16 & 0o111
    with pytest.raises(UserError, match="zip"):
        cut_autograder(project, tmp_path / "auto")


# --------------------------------------------------------------------------------------------- what the student is told
def test_the_board_of_a_new_folder_and_the_first_exercise(project, tmp_path):
    """Both answer without torch, so at once."""
    folder = tmp_path / "mine"
    cut_folder(project, folder)
    code, out, err = course(folder)
    assert code == 0 and err == "" and "0 of 108 points. Next: python course check 1" in out
    code, out, _ = course(folder, "check", "1")
    assert code == 1 and "Tokenizer._bpe in clip.py, line" in out and "</w>" in out
    for wrong in (["check"], ["check", "13"], ["check", "x"], ["cut", tmp_path / "other"], ["nonsense"]):
        code, out, err = course(folder, *wrong)
        assert code == 2 and err.startswith("error:") and err.count("\n") == 1 and "grade" not in err, wrong
    assert "grade" not in course(folder, "--help")[1] and "grade" in course(ROOT, "--help")[1]
    code, out, _ = course(folder, "check", "5", "--picture")
    assert code == 1 and "There is no picture yet" in out
    lines = [int(line.split()[-1]) for line in out.splitlines() if " in hipa.py, line " in line]
    assert len(lines) == 3 and lines == sorted(lines)


def test_the_board_remembers_and_forgives_a_damaged_memory(project, tmp_path):
    """A check's result is shown without checking again; another answer is checked again."""
    folder = tmp_path / "mine"
    cut_folder(project, folder)
    (folder / "lora.py").write_text(project.texts["lora"], "utf-8")
    assert course(folder, "check", "9")[0] == 0
    kept = folder / "outputs" / "course.json"
    marked = json.loads(kept.read_text("utf-8"))
    marked["9"]["state"] = "remembered"
    kept.write_text(json.dumps(marked), "utf-8")
    assert "remembered" in course(folder)[1]
    kept.write_text("[1, 2]", "utf-8")
    wrong = project.texts["lora"].replace(
        "return y + F.linear(F.linear(x, A), B)", "return F.linear(F.linear(x, A), B)"
    )
    (folder / "lora.py").write_text(wrong, "utf-8")
    out = course(folder)[1]
    assert "1 of 3 functions wrong" in out and "Next: python course check 9" in out  # what is begun goes before 1


def test_a_wrong_answer_is_told_its_value_its_place_and_its_mistake(project, emptied):
    texts = {**emptied, "hipa": written(emptied["hipa"], "Schedule.add_noise", """
def add_noise(self, x0, timestep, noise):
    alpha, sigma = self.alpha_sigma(timestep)
    return x0 + noise * sigma
""")}  # fmt: skip
    result = judge(project, 5, texts)
    assert result.state[ADD] == "wrong" and result.points == 0
    assert "variance grows to 2" in result.hints[ADD]
    assert any("right is" in (how or "") and "at [" in how for _, _, _, how in result.checks if how)


def test_of_two_mistakes_the_hint_is_of_the_one_that_is_shown(project):
    """An unknown mistake in the first check that fails, a known one in the second; then the other way round."""
    wrong_v = ("alpha * x - sigma * prediction", "alpha * x + sigma * prediction")
    for mistake, hint in (("x - sigma * prediction * 3 + 1", None), ("(x + sigma * prediction) / alpha", "once more")):
        text = project.texts["hipa"].replace(*wrong_v).replace("(x - sigma * prediction) / alpha", mistake)
        told = judge(project, 5, {**project.texts, "hipa": text}).hints["hipa.Schedule.predict_x0"]
        assert told is None if hint is None else hint in told


def test_helpers_imports_and_methods_of_the_students_own_are_used(project, emptied):
    text = emptied["clip"].replace(
        'raise NotImplementedError("exercise 1: python course check 1")', "return self.mine(letters(word))"
    )
    text = text.replace("    def tokenize(self", '''    def mine(self, parts):
        while found := self.ranks.keys() & itertools.pairwise(parts):
            pair = min(found, key=self.ranks.get)
            for i in itertools.count():
                if i >= len(parts) - 1:
                    break
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = ["".join(pair)]
        return parts

    def tokenize(self''')  # fmt: skip
    text = text.replace("import json\n", "import itertools\nimport json\n")
    text += '\n\nMARK = "</w>"\n\n\ndef letters(word):\n    return [*word[:-1], word[-1] + MARK]\n'
    assert judge(project, 1, {**emptied, "clip": text}).points == 7


def test_a_typo_in_another_function_of_the_file_blocks_nothing(project, emptied):
    broken = project.texts["hipa"].replace("def noise_for(model, pictures, seeds):", "def noise_for(model pictures):")
    assert judge(project, 5, {**emptied, "hipa": broken}).points == 9
    own = project.texts["hipa"].replace("return alpha * x0 + sigma * noise", "return alpha * x0 + + sigma noise")
    result = judge(project, 5, {**emptied, "hipa": own})
    assert result.points == 6 and "line" in result.problems[ADD]


def test_a_crash_is_shown_as_the_students_own_line(project, emptied, tmp_path):
    path = tmp_path / "hipa.py"
    path.write_text(emptied["hipa"].replace(
        'raise NotImplementedError("exercise 6: python course check 6")', "return promts"))  # fmt: skip
    paths = {"hipa": str(path)}
    result = check(project, exercise_of(project, 6), paths, {**emptied, "hipa": path.read_text()})
    shown = next(how for *_, how in result.checks if how)
    assert "NameError" in shown and "hipa.py, line" in shown and "return promts" in shown


def test_a_function_that_is_gone_and_one_that_is_forbidden_are_named(project, emptied):
    gone = {**emptied, "clip": emptied["clip"].replace("def _bpe", "def bpe_")}
    (problem,) = answers(exercise_of(project, 1), gone, project.texts).values()
    assert isinstance(problem, Problem) and "_bpe" in str(problem)
    (problem,) = answers(exercise_of(project, 2), project.texts, project.texts).values()
    assert isinstance(problem, Problem) and "scaled_dot_product_attention" in str(problem)


# ------------------------------------------------------------------------------------------------- what it must survive
ENDLESS = """while True:
            try:
                len(word)
            except Exception:
                pass"""


@pytest.mark.parametrize(
    "code, says",
    [
        pytest.param(ENDLESS, "never ends", id="an endless loop that catches exceptions"),
        pytest.param("import os; os._exit(3)", "ended Python itself (exit code 3)", id="the end of Python"),
    ],
)
def test_an_answer_that_does_not_return_costs_its_own_exercise(project, emptied, code, says):
    text = emptied["clip"].replace('raise NotImplementedError("exercise 1: python course check 1")', code)
    result = judge(project, 1, {**emptied, "clip": text})
    told = [result.failed or "", *(how or "" for *_, how in result.checks)]
    assert result.points == 0 and any(says in words for words in told), told


@pytest.mark.parametrize("code, says", [("raise SystemExit", "sys.exit"), ("return self._bpe(word)", "RecursionError")])
def test_an_answer_that_ends_the_program_is_a_wrong_answer(reference, code, says):
    exercise = reference.exercise(1)
    answer = {BPE: Answer(parsed(f"def _bpe(self, word):\n    {code}"))}
    results = reference.run(exercise, answer)
    assert all(how and says in how for how, _ in results.values())


def test_what_an_answer_prints_is_shown_and_cut_short(project):
    loud = "        for _ in range(50): print('hello')\n        parts = [*word[:-1]"
    text = project.texts["clip"].replace("        parts = [*word[:-1]", loud)
    result = judge(project, 1, {**project.texts, "clip": text})
    assert result.points == 7 and len(result.printed) < 2200 and "characters more" in result.printed


@pytest.mark.slow
def test_an_answer_that_deletes_all_it_can_find_costs_its_own_exercise(project, tmp_path):
    """The grader's own folder is a copy here; the answer removes the folder that its module lies in, and the
    current."""
    evil = (
        "import os, shutil\n        for folder in (os.path.dirname(__file__), os.getcwd()): shutil.rmtree(folder, True)"
    )
    text = project.texts["clip"].replace(
        "        parts = [*word[:-1]", f"        {evil}\n        raise KeyError\n        parts = [*word[:-1]"
    )
    texts = {**project.texts, "clip": text}
    before = sorted(p for p in COURSE.rglob("*") if "__pycache__" not in p.parts)
    assert judge(project, 1, texts).points == 0
    assert judge(project, 9, texts).points == 8
    assert sorted(p for p in COURSE.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.slow
def test_a_wait_that_uses_no_processor_time_ends_too(project, emptied, monkeypatch):
    monkeypatch.setattr(running, "WALL_SECONDS", 8)
    text = emptied["clip"].replace(
        'raise NotImplementedError("exercise 1: python course check 1")', "import time; time.sleep(1000)"
    )
    result = judge(project, 1, {**emptied, "clip": text})
    assert result.points == 0 and "stopped after 8 seconds" in result.failed


def test_without_torch_there_is_one_line(project, emptied, monkeypatch, tmp_path):
    """As on a machine where nothing is installed yet."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install"):
        judge(project, 1, project.texts)


# -------------------------------------------------------------------------------------------------------------- grading
def test_files_lie_flat_or_are_missing(project, tmp_path):
    (tmp_path / "evaluate.py").write_text(project.texts["evaluate"])
    paths, texts = student_files(tmp_path)
    assert paths == {"evaluate": str(tmp_path / "evaluate.py")}
    (problem,) = answers(exercise_of(project, 1), texts, project.texts).values()
    assert str(problem) == "clip.py is missing"
    with pytest.raises(UserError):
        student_files(tmp_path / "nowhere")


def test_results_are_written_also_where_nothing_can_be_graded(tmp_path):
    code, _, err = course(ROOT, "grade", tmp_path, "--out", tmp_path / "results.json")
    tests = json.loads((tmp_path / "results.json").read_text("utf-8"))["tests"]
    assert code == 2 and err.count("\n") == 1
    assert len(tests) == 12 and all(test["score"] == 0 for test in tests)


@pytest.mark.slow
def test_nothing_scores_0_and_everything_scores_all(project, tmp_path):
    """And the solved folder's sample.py draws what the project's draws, but for rounding: its functions are others."""
    import numpy as np
    from PIL import Image

    cut_folder(project, tmp_path / "mine")
    out = tmp_path / "results.json"
    assert "\n0 of 108 points" in course(ROOT, "grade", tmp_path / "mine", "--out", out)[1]
    for module, text in solution(project, 2).items():
        (tmp_path / "mine" / FILES[module]).write_text(text, "utf-8")
    assert "\n108 of 108 points" in course(ROOT, "grade", tmp_path / "mine", "--seed", 7, "--out", out)[1]
    assert [t["score"] for t in json.loads(out.read_text("utf-8"))["tests"]] == [e.POINTS for e in project.exercises]
    pictures = []
    for folder in (ROOT, tmp_path / "mine"):
        command = [sys.executable, "sample.py", "a cat", "--out", str(tmp_path / folder.name)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=True)
        pictures.append(np.asarray(Image.open(folder / done.stdout.strip()).convert("RGB")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 13))
def test_the_checks_can_be_trusted(reference, number):
    """Known mistakes are caught and named, other right answers pass, mutants are caught: at one seed here."""
    row = prove(reference, reference.exercise(number), 0)
    assert row["problems"] == [] and row["mistakes"] >= 5 and row["mutants"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 13))
def test_every_exercise_ends_in_a_picture_and_a_question(reference, number):
    exercise = reference.exercise(number)
    picture, words = exercise.show(reference.graft({}))
    assert picture.width >= 400 and picture.convert("L").getextrema()[0] < 100 and "?" in words


def test_a_proof_finds_a_check_that_is_too_weak(reference):
    """Without its strict checks exercise 3 lets mistakes and mutants pass, and the proof says so."""
    exercise = reference.exercise(3)
    exercise.checks = {name: exercise.checks[name] for name in ("shift", "untouched")}
    exercise.equivalent = {"nothing  ->  something": "no reason"}
    problems = prove(reference, exercise, 0)["problems"]
    assert any("does not catch" in problem for problem in problems)
    assert any("survives" in problem for problem in problems)
    assert any("declared to change nothing" in problem for problem in problems)
