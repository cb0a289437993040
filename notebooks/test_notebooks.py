"""Every notebook runs from its first cell to its last.

python -m pytest notebooks/test_notebooks.py
"""

from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SETTINGS = {"BNP_NOTEBOOK_STEPS": "40", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def run(notebook, folder):
    """Run all cells in a fresh kernel; a cell that fails raises `CellExecutionError`."""
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_opens_in_colab_and_shows_its_figures(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    opens = "](https://colab.research.google.com/github/OWNER/bnp_optax/blob/main/notebooks/"
    assert f"{opens}{name})" in notebook.cells[0].source
    # Only where the package cannot be imported.
    tried, _, installs = notebook.cells[1].source.partition("except ImportError:\n    ")
    assert "bnp_optax" in tried
    assert installs.startswith("%pip install -q 'bnp-optax[bench")
    assert "] @ git+https://github.com/OWNER/bnp_optax'" in installs
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, monkeypatch, tmp_path):
    for variable, value in SETTINGS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("BNP_DATA_DIR", raising=False)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code), "committed without its outputs"
    run(notebook, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_failing_cell_fails(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        run(notebook, tmp_path)
