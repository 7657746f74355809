"""Execute the walkthrough on the finished project, and store what it shows beside the code, small enough for git.

    make walkthrough

Run it when the model, the data or the notebook has changed, then read the notebook: each sentence is about the figure
next to it. Figures are stored with few colours, a quarter of their size.
"""

import base64
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks/01_walkthrough.ipynb"
COLOURS = 128


def compressed(png: bytes) -> bytes:
    """The same picture as a PNG with a palette."""
    with Image.open(BytesIO(png)) as image:
        palette = image.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    file = BytesIO()
    palette.save(file, "PNG", optimize=True)
    return file.getvalue()


def execute(path: Path) -> None:
    """Run all cells, in place; the file is written only if none of them fails."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    notebook.metadata = metadata  # execution adds what only this machine's kernel is called
    shrink(notebook)
    nbformat.write(notebook, path)


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Compress the figures, in place, and drop what an output says beside them."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = base64.b64encode(compressed(base64.b64decode(data["image/png"]))).decode()
        if "metadata" in output:
            output.metadata.clear()


if __name__ == "__main__":
    execute(NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e6:.2f} MB")
