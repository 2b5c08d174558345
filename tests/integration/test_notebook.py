"""The notebook of the documentation runs from its first cell to its last."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "examples" / "after_training.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    shown = printed(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    (tmp_path / "here").mkdir()
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path / "here")}}).execute()
    text = printed(notebook)
    right, images = map(int, re.search(r"(\d+) of (\d+) right; by chance 1", text).groups())
    assert images == 32 and right >= 4
    assert "torch.Size([32, 64]) torch.Size([32, 64])" in text
    shape = re.compile(r"[\d.]+")
    assert len(shape.sub("", text).splitlines()) == len(shape.sub("", shown).splitlines())
    assert "image/png" in notebook.cells[-2].outputs[-1].data


def test_the_stored_outputs_are_small_and_of_no_machine(notebook):
    """Results are stored so that the notebook can be read without running it."""
    assert PATH.stat().st_size < 50_000
    stored = PATH.read_text()
    assert not re.search(r"/(?:home|root|tmp|usr)/|site-packages|Traceback", stored)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert all(output.get("name") != "stderr" for output in cell.outputs)
    assert "right; by chance" in printed(notebook)
