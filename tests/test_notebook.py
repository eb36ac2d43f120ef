"""docs/hipa.ipynb: what is committed was executed and is tidy; it finds the checkout; it runs, offline, and learns.

python tests/test_notebook.py       # after a change of the notebook: executes it, and keeps the outputs in it
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "hipa.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
OFFLINE = """
import socket

def refuse(*args, **options):
    raise OSError("the notebook went online")

socket.getaddrinfo = socket.gethostbyname = refuse
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind):
    """All outputs of a kind, such as "image/png", or "stdout" for what was printed: [(cell's number, its content)]"""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            content = output.get("data", {}).get(kind) or (output.get("name") == kind and output.text)
            found += [(number, content)] if content else []
    return found


def losses(notebook):
    """What training has printed."""
    printed = "".join(text for _, text in outputs(notebook, "stdout"))
    return [float(loss) for loss in re.findall(r"^update +\d+: loss (\S+) =", printed, re.MULTILINE)]


def execute(notebook):
    """Runs all cells in docs/, with this Python, offline. The settings of whoever runs it are left out of it."""
    with tempfile.TemporaryDirectory() as folder:
        startup = Path(folder) / "profile_default" / "startup" / "offline.py"  # IPython runs it first
        startup.parent.mkdir(parents=True)
        startup.write_text(OFFLINE)
        own = {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "PIP_NO_INDEX": "1"}
        with mock.patch.dict(os.environ, own):
            os.environ.pop("MPLBACKEND", None)  # Jupyter's own
            specs = KernelSpecManager(kernel_dirs=[])  # so that "python3" is this interpreter
            client = NotebookClient(
                notebook,
                km=AsyncKernelManager(kernel_spec_manager=specs),
                resources={"metadata": {"path": str(NOTEBOOK.parent)}},
                timeout=600,
                record_timing=False,
                coalesce_streams=True,
            )
            client.execute(cleanup_kc=True)  # also stops the kernel
    return notebook


def tidy(notebook):
    """Small and the same for everyone: no versions and times, each picture once, in 52 shades of each colour."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("image/jpeg", None)  # Pillow shows each picture in both ways
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                picture = picture.point(lambda value: 5 * round(value / 5))  # not visible, and half the size
                picture.save(file := io.BytesIO(), "PNG", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return notebook


# ------------------------------------------------------------------------------------------------ what is committed
def test_short_and_explained():
    notebook = read()
    nbformat.validate(notebook)
    assert len(code_cells(notebook)) <= 10
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown", *["markdown", "code"] * len(code_cells(notebook))]  # a title, then by turns


def test_executed_and_tidy():
    notebook = read()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata == METADATA and not any(cell.metadata for cell in notebook.cells)
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}  # no error, no warning
    assert {number for number, _ in outputs(notebook, "image/png")} == set(range(3, len(cells) + 1))
    assert len(losses(notebook)) > 10 and losses(notebook)[-1] < losses(notebook)[0] / 4
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_nobodys_paths():
    """Neither in the cells nor in what they have printed is there an absolute path, or a traceback."""
    notebook = read()
    texts = [cell.source for cell in notebook.cells]
    texts += [text for kind in ("stdout", "text/plain") for _, text in outputs(notebook, kind)]
    for text in texts:
        assert "Traceback" not in text and not re.search(r"(?<![\w.)}\]/*])/\w|\b[A-Z]:\\|~/|https?:", text), text


def test_pictures_are_small():
    for number, data in outputs(read(), "image/png"):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert max(picture.size) <= 700 and picture.convert("L").getextrema() != (255, 255), number


# ----------------------------------------------------------------------------------------------------- finding the code
def find(folder, monkeypatch):
    """The first cell, run in a folder -> the root that it finds, and what it adds to sys.path"""
    source = TransformerManager().transform_cell(code_cells(read())[0].source)  # %pip -> Python
    path, names = list(sys.path), {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(path))
    exec(source, names)
    return names["root"], sys.path[: -len(path)]


@pytest.mark.parametrize("start", ["docs", "."])
def test_finds_the_checkout_around_it(start, monkeypatch):
    assert find(ROOT / start, monkeypatch) == (ROOT, [str(ROOT), str(ROOT / "emoji")])


def test_finds_a_clone_beside_it(tmp_path, monkeypatch):
    for name in ("another", "clone"):
        (tmp_path / name).mkdir()
    (tmp_path / "clone" / "hipa.py").touch()
    assert find(tmp_path, monkeypatch)[0] == (tmp_path / "clone").resolve()


def test_says_what_to_do_without_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="^no hipa.py here: .*clone.*run this cell again$"):
        find(tmp_path / "folder", monkeypatch)


# -------------------------------------------------------------------------------------------------------------- running
@pytest.mark.slow
def test_runs_offline_and_learns():
    before, files = NOTEBOOK.read_bytes(), sorted(NOTEBOOK.parent.rglob("*"))
    committed, notebook = read(), read()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    execute(notebook)  # raises if a cell does
    assert not outputs(notebook, "stderr")
    pictures = [[number for number, _ in outputs(book, "image/png")] for book in (committed, notebook)]
    assert pictures[0] == pictures[1]
    assert losses(notebook)[-1] < losses(notebook)[0] / 4
    assert NOTEBOOK.read_bytes() == before and sorted(NOTEBOOK.parent.rglob("*")) == files


if __name__ == "__main__":
    nbformat.write(tidy(execute(read())), NOTEBOOK)
