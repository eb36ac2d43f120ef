"""What is asked in words: the students' answers.md, and their answers beside the key, which is course/answers.md."""

import re
from pathlib import Path

HEAD = """# Your answers

In your own words, a few sentences each, below the questions; leave the lines that begin with ### as they are. Question
N.1 stands under the picture of exercise N, with what it speaks of. Your teacher reads this; it counts no points here.
"""
MOST = 2000  # characters of an answer that are shown


def entries(text):
    """{number: (the question, what stands below it)}"""
    parts = re.split(r"^### (\d+\.\d+)[ \t]*(.*)$", text, flags=re.MULTILINE)
    return {number: (question, below.strip()) for number, question, below in zip(*(parts[k::3] for k in (1, 2, 3)))}


def key():
    return entries(Path(__file__).with_name("answers.md").read_text("utf-8"))


def write(files):
    """Adds answers.md, with the questions and room below each, to the students' folder, {path: bytes}."""
    questions = [f"### {number} {question}\n\n\n" for number, (question, _) in key().items()]
    files["answers.md"] = "\n".join([HEAD, *questions]).encode()


def collect(folder):
    """For the teacher: each answer of the folder's answers.md, beside what a good one says."""
    path, lines, count = folder / "answers.md", [], 0
    text = path.read_bytes()[:200_000].decode("utf-8-sig", "replace") if path.is_file() else ""
    given = entries("\n".join(text.splitlines()))
    for number, (question, good) in key().items():
        answer = "".join(c for c in given.get(number, ("", ""))[1] if c == "\n" or c.isprintable())
        count += bool(answer)
        lines.append(f"{number} {question}\nANSWER: {answer[:MOST] or '-'}\nGOOD: {good}\n")
    return "\n".join([f"answers.md: {count} of {len(lines)} questions are answered", "", *lines])
