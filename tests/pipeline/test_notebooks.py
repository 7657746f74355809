"""The notebooks run from top to bottom on a finished project, and are committed with what they show of the shipped."""

from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from PIL import Image
from projects import ROOT, Project
from run_notebooks import shown_of

pytestmark = pytest.mark.pipeline

NOTEBOOKS = ROOT / "notebooks"
PICTURES = {"01_walkthrough": 22, "02_dataset": 12, "03_experiments": 3}
LIMIT = 1_500_000  # bytes


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures(notebook: nbformat.NotebookNode) -> list[bytes]:
    shown = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [b64decode(png) for png in shown if png]


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

    assert all(cell.execution_count for cell in code_cells(notebook))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert len(figures(notebook)) >= PICTURES[name]
    assert finished.run("git", "status", "--porcelain").stdout == before


@pytest.mark.parametrize("name", PICTURES)
def test_committed_notebook_shows_one_whole_run_in_small_figures(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert len(figures(notebook)) >= PICTURES[name]
    assert all(Image.open(BytesIO(png)).mode == "P" for png in figures(notebook))
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LIMIT


@pytest.mark.parametrize("name", PICTURES)
def test_committed_notebook_shows_what_its_code_gives_of_the_committed_data_and_model(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata.shown_of == shown_of(notebook, ROOT / "dvc.lock"), "run `make notebooks`"


@pytest.mark.parametrize("name", PICTURES)
def test_notebook_says_what_to_run_where_the_outputs_are_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(FileNotFoundError, match="run `make repro` first"):
        exec(code_cells(read(name))[0].source, {})
