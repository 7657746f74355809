"""Execute the notebooks on the finished project, and store what they show beside the code, small enough for git.

    make notebooks

Run it when the model, the data or a notebook has changed (a test notices), then read them: each sentence is about the
figure next to it. Figures are stored with few colours, a quarter of their size.
"""

import base64
import hashlib
import sys
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
COLOURS = 128


def shown_of(notebook: nbformat.NotebookNode, lock: Path) -> dict[str, str]:
    """What the outputs depend on: a hash of the code, and DVC's of the data and the model."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    return {
        "code": hashlib.sha256(code.encode()).hexdigest(),
        **{path: outs[path] for path in ("data/latents", "data/text", "models/unet")},
    }


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
    # Without what execution adds, which only this machine's kernel is called.
    notebook.metadata = metadata | {"shown_of": shown_of(notebook, ROOT / "dvc.lock")}
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
    for notebook in map(Path, sys.argv[1:] or sorted(ROOT.glob("notebooks/*.ipynb"))):
        execute(notebook)
        print(f"{notebook.name}: {notebook.stat().st_size / 1e6:.2f} MB")
