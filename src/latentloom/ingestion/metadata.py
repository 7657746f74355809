"""Rows of ``metadata.csv``, ``metadata.jsonl`` and ``metadata.parquet``, as the Hugging Face image folder has them.

Columns: ``file_name``, and one or more of ``text``, ``caption`` and ``captions`` (a text, or a list of texts); other
columns are left alone. A row that cannot be read is a problem of that row; a file that lacks the columns is an error.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.ingestion.captions import flat_captions
from latentloom.ingestion.sources import IngestError

FILE_NAME = "file_name"
CAPTIONS = ("text", "caption", "captions")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
COLUMNS_WANTED = f"it needs {FILE_NAME} and one of {', '.join(CAPTIONS)}"


@dataclass(frozen=True)
class MetadataRow:
    """One row: ``file_name`` as written, its raw captions; or, where ``problem`` is set, why it cannot be read."""

    line: int
    file_name: str = ""
    captions: tuple[object, ...] = ()
    problem: str | None = None


def read_metadata_rows(path: Path) -> Iterator[MetadataRow]:
    """The rows of one metadata file, in order; bytes that are not UTF-8 come as surrogate escapes.

    Raises:
        IngestError: when the file cannot be read as its name says, or lacks a column; file and columns are named.
    """
    try:
        yield from READERS[path.name](path)
    except OSError as error:
        raise IngestError(f"{path} cannot be read ({error.strerror or error}); fix or remove it") from error


def _csv_rows(path: Path) -> Iterator[MetadataRow]:
    _reject_utf_16(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            _require_columns(path, reader.fieldnames)
            for row in reader:
                if None in row:
                    problem = (
                        f"has more fields than the {len(reader.fieldnames)} columns: put captions with commas in quotes"
                    )
                    yield MetadataRow(reader.line_num, problem=problem)
                else:
                    yield _row(reader.line_num, row)
        except csv.Error as error:
            raise IngestError(
                f"{path}, after line {reader.line_num}: not valid CSV ({error}); fix or remove it"
            ) from error


def _jsonl_rows(path: Path) -> Iterator[MetadataRow]:
    _reject_utf_16(path)
    columns: dict[str, None] = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield MetadataRow(number, problem="is not valid JSON")
                continue
            if not isinstance(row, dict):
                yield MetadataRow(number, problem="is not a JSON object")
                continue
            columns.update(dict.fromkeys(row))
            yield _row(number, row)
    _require_columns(path, list(columns))


def _parquet_rows(path: Path) -> Iterator[MetadataRow]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(path, names)
            wanted = [name for name in (FILE_NAME, *CAPTIONS) if name in names]
            rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _row(number, row)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise IngestError(f"{path} cannot be read as Parquet ({error}); fix or remove it") from error


READERS = {"metadata.csv": _csv_rows, "metadata.jsonl": _jsonl_rows, "metadata.parquet": _parquet_rows}


def _row(line: int, row: Mapping[str, Any]) -> MetadataRow:
    file_name = row.get(FILE_NAME)
    if not isinstance(file_name, str) or not file_name.strip():
        return MetadataRow(line, problem=f"has no {FILE_NAME}")
    return MetadataRow(line, file_name.strip(), tuple(flat_captions(row.get(column) for column in CAPTIONS)))


def _require_columns(path: Path, columns: Iterable[str]) -> None:
    columns = list(columns)
    if FILE_NAME not in columns or not set(CAPTIONS).intersection(columns):
        found = ", ".join(map(repr, columns)) or "none"
        raise IngestError(f"{path} has the columns {found}; {COLUMNS_WANTED} (CSV columns are separated by commas)")


def _reject_utf_16(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(2) in UTF_16:
            raise IngestError(f"{path} is UTF-16; save it as UTF-8")
