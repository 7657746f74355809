"""The curves of a training, as CSV files that DVC plots: `train.csv` and `validation.csv`, one row a logged step."""

import csv
from collections.abc import Mapping
from pathlib import Path

from latentloom.files import atomic_path


class Curves:
    """Rows by file name, written whole and atomically each time: a killed training leaves the curves so far.

    They hold what the seed decides and nothing of the machine (no times): the same run gives the same files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, list[dict[str, float]]] = {}

    def add(self, name: str, values: Mapping[str, float]) -> None:
        """Add a row to ``NAME.csv``, whose columns are those of its first row."""
        self.rows.setdefault(name, []).append({key: round(value, 6) for key, value in values.items()})
        self._write(name)

    def restore(self, rows: dict[str, list[dict[str, float]]]) -> None:
        """Go on from ``rows``, which an earlier `rows` held."""
        self.rows = rows
        for name in rows:
            self._write(name)

    def _write(self, name: str) -> None:
        with (
            atomic_path(self.folder / f"{name}.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(self.rows[name][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows[name])
