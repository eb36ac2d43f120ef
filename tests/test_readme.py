"""What the README says is there: files, commands, the method's lines, the lengths of files."""

import re
import shlex
from pathlib import Path

import pytest

import sample
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


def test_it_is_short():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    """Links to files; and what stands in `...` or in a command and looks like a file of the repository."""
    text = PAGES[page].read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"\b((?:emoji|docs|tests|live)/[\w./-]+\.\w+|\w+\.py)\b", text)
    missing = [link for link in links if not (PAGES[page].parent / link).exists()]
    missing += [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "emoji"))]
    assert links and not missing


@pytest.mark.parametrize("command", [c for c in COMMANDS if len(c) > 1], ids=" ".join)
def test_commands_are_understood(command, monkeypatch, tmp_path):
    """Their options are the programs' own. Files that only the reader has are made, empty; nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "emoji").mkdir(parents=True)
    (tmp_path / "runs" / "coco").mkdir()
    for folder in ("emoji", "coco"):
        (tmp_path / "runs" / folder / sample.LORA_NAME).touch()
    (tmp_path / "emoji").symlink_to(ROOT / "emoji")
    program = next((word for word in command if word.endswith(".py") or word == "live"), None)
    if program:
        assert (ROOT / program).exists()
    parsers = {"sample.py": sample.parse_args, "train.py": train.parse_args}
    if program in parsers and "--help" not in command and "--resume" not in command:
        parsers[program](command[command.index(program) + 1 :])


def test_the_method_is_the_codes():
    """The lines of the README's block are lines of hipa.py, in the same order."""
    [block] = [block for kind, block in BLOCKS if kind == "python"]
    code = [line.strip() for line in (ROOT / "hipa.py").read_text("utf-8").splitlines()]
    position = 0
    for line in filter(None, map(str.strip, block.splitlines())):
        if not line.startswith("#"):
            assert line in code[position:], line
            position += code[position:].index(line)


def test_lengths_of_files():
    """About right, so that not every change of a file changes the README."""
    told = {name: int(lines) for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M)}
    there = {path.name: path.read_text("utf-8").count("\n") for path in Path(ROOT).glob("*.py")}
    assert told == pytest.approx(there, rel=0.03)
