"""The students' answers.md: what is asked, and what comes back for the teacher."""

import ast
import re
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "course"))

import answers  # noqa: E402
from cutting import exercises  # noqa: E402


def test_each_exercise_is_asked_about_and_the_pictures_ask_the_same():
    asked = answers.key()
    for exercise in exercises(ROOT / "course"):
        tree = next(n for n in ast.parse(exercise.path.read_text("utf-8")).body if getattr(n, "name", "") == "show")
        said = "".join(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        mine = [question for number, (question, _) in asked.items() if number.startswith(f"{exercise.number}.")]
        assert mine and " ".join(mine[0].split()) in " ".join(said.split()), exercise.number
    assert all(good and len(question) < 200 for question, good in asked.values())


def test_answers_come_back_beside_the_key(tmp_path):
    answers.write(files := {})
    text = files["answers.md"].decode()
    assert not any(good.splitlines()[0] in text for _, good in answers.key().values())
    assert answers.collect(tmp_path).startswith(f"answers.md: 0 of {len(answers.key())} questions")
    (tmp_path / "answers.md").write_bytes(files["answers.md"])
    assert " 0 of " in answers.collect(tmp_path).splitlines()[0]
    text = re.sub(r"(### 5\.2 .*\n)", "\\1\n\ufeffI turn \x1b[31mit\r\n\nback.\n", text)
    (tmp_path / "answers.md").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff\n### 99.1 mine?\n\nno")
    shown = answers.collect(tmp_path)
    assert " 2 of " in shown.splitlines()[0] and "ANSWER: I turn [31mit\n\nback.\nGOOD: alpha x" in shown
    assert "\x1b" not in shown and "mine?" not in shown
