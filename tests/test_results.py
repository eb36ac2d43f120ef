"""emoji/results.py: a table's command prints, and the page has it between its marks."""

import sys

import pytest

import hipa
from conftest import ROOT

sys.path.insert(0, str(ROOT / "emoji"))

import results  # noqa: E402

HEAD = f"| pictures {7 * '| a '}| b |\n{9 * '|---'}|\n"
NAMES = "25 steps", "**HiPA**, 1 step, 9 updates", "rank 4, 1 step, 9 updates"
ROWS = [f"| {name} {7 * '| 1 '}| 2 |" for name in NAMES]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two pages and one table, whose command counts how often it was run."""
    script = tmp_path / "command.py"
    script.write_text(f"open({str(tmp_path / 'runs')!r}, 'a').write('.'); print({HEAD + chr(10).join(ROWS)!r})")
    there = [tmp_path / "results.md", tmp_path / "README.md"]
    for page in there:
        page.write_text("before\n\n<!-- table -->\nold\n<!-- / -->\n\nafter\n")
    monkeypatch.setattr(results, "PAGES", there)
    monkeypatch.setattr(results, "TABLES", {"table": ([str(script)], 7)})
    monkeypatch.setattr(results, "commit", lambda: "1234567")
    return there


def call(tmp_path, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["results.py", "--out", str(tmp_path / "kept"), *argv])
    results.main()


def test_tables_are_put_in_their_place_once(pages, tmp_path, monkeypatch, capsys):
    call(tmp_path, monkeypatch)
    assert "table: about 7 minutes" in capsys.readouterr().err
    long, short = (page.read_text() for page in pages)
    assert long.startswith("before\n\n<!-- table -->\n`python ") and long.endswith("\n<!-- / -->\n\nafter\n")
    assert "at 1234567:" in long and HEAD + "\n".join(ROWS) in long and "old" not in long
    for line in ("| pictures | a | a | a | a | a | a |", "| 25 steps | 1 | 1 | 1 | 1 | 1 | 1 |", "| **HiPA**, 1 step"):
        assert f"\n{line}" in short
    assert not any(text in short for text in ("| b", "| 2 |", "rank 4", "command"))
    call(tmp_path, monkeypatch)  # is there
    assert [page.read_text() for page in pages] == [long, short] and (tmp_path / "runs").read_text() == "."
    call(tmp_path, monkeypatch, "table")  # wanted anew
    assert (tmp_path / "runs").read_text() == ".."


def test_a_command_that_fails_changes_nothing(pages, tmp_path, monkeypatch):
    (tmp_path / "command.py").write_text("raise SystemExit(3)")
    with pytest.raises(hipa.UserError, match="ended with code 3"):
        call(tmp_path, monkeypatch)
    assert all("old" in page.read_text() for page in pages)


def test_the_pages_have_their_places():
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert all(f"<!-- {name} -->\n" in text for name in results.TABLES)
    assert "<!-- table -->\n" in (ROOT / "README.md").read_text("utf-8")
