"""Rows of ``metadata.csv``, ``metadata.jsonl`` and ``metadata.parquet``, as the Hugging Face image folder has them.

Columns: ``file_name``, and one or more of ``text``, ``caption`` and ``captions`` (a text, or a list of texts); other
columns are left alone. A row that cannot be read is a problem of that row; a file that lacks the columns is an error.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.ingestion.captions import flat_captions
from latentloom.ingestion.rejects import error_message
from latentloom.ingestion.sources import IngestError

FILE_NAME = "file_name"
CAPTIONS = ("text", "caption", "captions")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
COLUMNS_WANTED = f"it needs {FILE_NAME} and one of {', '.join(CAPTIONS)}"

Rows = Iterator[tuple[int, dict[str, Any] | str]]  # number and content of each row, or why it cannot be read


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
    columns: dict[str, None] = {}
    line = 0
    try:
        with open(path, "rb") as file:
            if file.read(2) in UTF_16:
                raise IngestError(f"{path} is UTF-16; save it as UTF-8")
        for line, row in READERS[path.name](path):
            if not isinstance(row, str):
                columns.update(dict.fromkeys(row))
            yield _metadata_row(line, row)
    except (OSError, csv.Error, pa.ArrowException, UnicodeDecodeError) as error:
        place = f" after line {line}" if line else ""
        raise IngestError(f"{path} cannot be read{place} ({error_message(error)}); fix or remove it") from error
    if FILE_NAME not in columns or not columns.keys() & CAPTIONS:
        found = f"has the columns {', '.join(map(repr, columns))}" if columns else "has no rows"
        raise IngestError(f"{path} {found}; {COLUMNS_WANTED} (CSV columns are separated by commas)")


def _metadata_row(line: int, row: dict[str, Any] | str) -> MetadataRow:
    if isinstance(row, str):
        return MetadataRow(line, problem=row)
    file_name = row.get(FILE_NAME)
    if not isinstance(file_name, str) or not file_name.strip():
        return MetadataRow(line, problem=f"has no {FILE_NAME}")
    return MetadataRow(line, file_name.strip(), tuple(flat_captions(row.get(column) for column in CAPTIONS)))


def _csv_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for row in reader:
            if None in row:
                columns = len(reader.fieldnames)
                yield reader.line_num, f"has more fields than the {columns} columns: put captions with commas in quotes"
            else:
                yield reader.line_num, row


def _jsonl_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    yield number, "is not valid JSON"
                else:
                    yield number, row if isinstance(row, dict) else "is not a JSON object"


def _parquet_rows(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in (FILE_NAME, *CAPTIONS)]
        rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


READERS = {"metadata.csv": _csv_rows, "metadata.jsonl": _jsonl_rows, "metadata.parquet": _parquet_rows}
