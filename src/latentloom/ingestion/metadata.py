"""Rows of ``metadata.csv``, ``metadata.jsonl`` and ``metadata.parquet``, as the Hugging Face image folder has them.

Columns: ``file_name``, and one or more of ``text``, ``caption`` and ``captions`` (a text, or a list of texts); other
columns are left alone. A row that cannot be read is a problem of that row; a file that lacks the columns is an error.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.ingestion.rejects import error_message
from latentloom.ingestion.sources import IngestError

FILE_NAME = "file_name"
CAPTIONS = ("text", "caption", "captions")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
COLUMNS_WANTED = f"it needs {FILE_NAME} and one of {', '.join(CAPTIONS)}"

Rows = Iterator[tuple[int, dict[str, Any] | str]]  # number and content of each row, or why it cannot be used


def read_metadata_rows(path: Path) -> Rows:
    """The rows of one metadata file, in order, each with a file name; bytes that are not UTF-8 are surrogate escapes.

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
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
                file_name = row.get(FILE_NAME)
                if not isinstance(file_name, str) or not file_name.strip():
                    row = f"has no {FILE_NAME}"
            yield line, row
    except (OSError, csv.Error, pa.ArrowException) as error:
        place = f" after line {line}" if line else ""
        raise IngestError(f"{path} cannot be read{place} ({error_message(error)}); fix or remove it") from error
    if FILE_NAME not in columns or not columns.keys() & CAPTIONS:
        found = f"has the columns {', '.join(map(repr, columns))}" if columns else "has no rows"
        raise IngestError(f"{path} {found}; {COLUMNS_WANTED} (CSV columns are separated by commas)")


def _csv_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Strict: of a quote that is never closed, the following rows would be part.
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        _require_distinct(path, reader.fieldnames)
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
                    row = "is not valid JSON"
                yield number, row if isinstance(row, dict | str) else "is not a JSON object"


def _parquet_rows(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in (FILE_NAME, *CAPTIONS)]
        _require_distinct(path, wanted)
        rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_struct_array())
        for number, row in enumerate(rows, start=1):
            try:
                yield number, row.as_py()
            except UnicodeDecodeError:
                yield number, "is not UTF-8"


def _require_distinct(path: Path, columns: Sequence[str]) -> None:
    for name in (FILE_NAME, *CAPTIONS):
        if columns.count(name) > 1:
            raise IngestError(f"{path} has two columns {name!r}; rename one, or remove it")


READERS = {"metadata.csv": _csv_rows, "metadata.jsonl": _jsonl_rows, "metadata.parquet": _parquet_rows}
