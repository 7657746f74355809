"""The command `latentloom`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentloom.params import ParamsError, load_params

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train your own text-to-image model: see README.md.")


@app.command()
def check(params: Annotated[Path, typer.Argument(help="A params file.")] = Path("params.yaml")) -> None:
    """Check a params file: every key and value, before any work."""
    try:
        load_params(params)
    except ParamsError as error:
        sys.exit(str(error))


@app.command()
def summary() -> None:
    """Say what the last `dvc repro` left: the sample sheet, the figures, and where to look further."""
    figures = {}
    for path in (Path("reports/train/metrics.json"), Path("reports/evaluate/metrics.json")):
        if not path.exists():
            sys.exit(f"{path} does not exist yet: run `make repro`")
        figures |= json.loads(path.read_text(encoding="utf-8"))
    print("\nSamples   reports/evaluate/samples.png")
    print(
        "Figures   "
        + ", ".join(
            f"{name} {figures[name]:.4g}" for name in ("caption_recall_at_1", "val_mae", "train_mae") if name in figures
        )
    )
    print("Model     models/unet")
    print("Data      reports/data_docs/index.html")
    print("MLflow    make ui, then open http://127.0.0.1:5000")


if __name__ == "__main__":
    app()
