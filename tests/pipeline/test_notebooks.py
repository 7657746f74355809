"""The notebooks run from top to bottom on a finished project, and are committed without what they showed."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from projects import Project

pytestmark = pytest.mark.pipeline

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PICTURES = {"01_walkthrough": 14, "02_dataset": 12, "03_experiments": 3}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(PICTURES)


@pytest.fixture(scope="module")
def kernel(finished: Project) -> Iterator[KernelManager]:
    """A kernel for all notebooks, which spend most of their time on the same imports."""
    kernel, client = start_new_kernel(
        kernel_name="python3", env=finished.environment, cwd=str(finished.folder / "notebooks")
    )
    client.stop_channels()
    yield kernel
    kernel.shutdown_kernel(now=True)


@pytest.mark.parametrize("name", PICTURES)
def test_notebook_runs_and_draws_its_pictures(name: str, finished: Project, kernel: KernelManager) -> None:
    notebook = read(name)
    before = finished.run("git", "status", "--porcelain").stdout
    forget = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {finished.folder / 'notebooks'}")
    NotebookClient(nbformat.v4.new_notebook(cells=[forget]), timeout=60, km=kernel).execute(cleanup_kc=False)
    NotebookClient(notebook, timeout=300, km=kernel).execute(cleanup_kc=False)

    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[name]
    assert finished.run("git", "status", "--porcelain").stdout == before


@pytest.mark.parametrize("name", PICTURES)
def test_committed_notebook_carries_no_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert cell.metadata == {}


@pytest.mark.parametrize("name", PICTURES)
def test_notebook_says_what_to_run_where_the_outputs_are_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(FileNotFoundError, match="run `make repro` first"):
        exec(code_cells(read(name))[0].source, {})
