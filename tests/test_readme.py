"""What the README says is there: files, commands, the lengths of files."""

import re
import shlex

import pytest

import sample
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    """Links to files; and what looks like a file of the repository in `...` or in a command."""
    text = PAGES[page].read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"\b((?:emoji|docs|tests|live)/[\w./-]+\.\w+|\w+\.py)\b", text)
    missing = [link for link in links if not (PAGES[page].parent / link).exists()]
    missing += [
        name
        for name in named
        if not any((ROOT / folder / name).exists() for folder in (".", "emoji", "tools", "tests"))
    ]
    assert links and not missing


@pytest.mark.parametrize("page, least", [("inputs.md", 40), ("results.md", 11)])
def test_what_is_claimed_has_a_test(page, least):
    """Each row of docs/inputs.md, and each claim of docs/results.md, that names tests names some that are there."""
    named = re.findall(r"`(test_\w+\.py)(?: -k \"?([\w ]+)\"?)?`", PAGES[page].read_text("utf-8"))
    assert len(named) > least
    for file, words in named:
        names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text("utf-8"), re.M)
        assert all(any(word in name for name in names) for word in words.split(" or ")), (file, words)


@pytest.mark.parametrize("program", ["sample.py", "train.py"])
def test_commands_are_understood(program):
    """Their options are the programs' own. (--resume reads what only the reader has.)"""
    parse_args = {"sample.py": sample.parse_args, "train.py": train.parse_args}[program]
    commands = [shlex.split(line.partition(program)[2], comments=True) for line in COMMANDS if f" {program} " in line]
    assert len(commands) > 3
    for words in commands:
        if "--resume" not in words and "--help" not in words:
            parse_args(words)


def test_lengths_of_files():
    """About right, so that not every change of a file changes the README."""
    told = {name: int(lines) for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M)}
    assert told == pytest.approx(
        {path.name: path.read_text("utf-8").count("\n") for path in ROOT.glob("*.py")}, rel=0.03
    )


def test_figures_are_in_a_table():
    """Each figure with a decimal point in docs/results.md, the README's results and limits, and what paper.md calls
    measured, stands in docs/tables.md; there, each section has a command."""
    tables, paper, results = (PAGES[page].read_text("utf-8") for page in ("tables.md", "paper.md", "results.md"))
    claims = re.findall(r"^## (?:Results|Limits)\n(.*?)^## ", README, re.M | re.S) + [re.sub("`.*?`", "", results)]
    claims += [line.split(" | ")[2] for line in paper.splitlines() if line.startswith("| ") and line.count(" | ") > 2]
    figures = re.findall(r"(?<![\w./])\d+\.\d+(?: %| ×)?(?![\w/]|\.\d)", " ".join(claims))
    missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables)]
    assert len(figures) > 100 and not missing
    assert all("`python " in part for part in tables.split("\n## ")[1:])
    assert len(results.split()) <= 1500
