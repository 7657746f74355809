"""Rows of ``metadata.csv``, ``metadata.jsonl`` and ``metadata.parquet``, as the Hugging Face image folder has them.

Columns: ``file_name``, and those that hold captions (``captions.columns_of_captions``), each a text or a list of texts;
others are left alone. A row that cannot be read is a problem of that row; a file that lacks the columns is an error.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.ingestion.captions import CAPTION_COLUMNS, HOW_TO_NAME_COLUMN, columns_of_captions
from latentloom.ingestion.image_formats import looks_like_image
from latentloom.ingestion.rejects import error_message
from latentloom.ingestion.remote import open_file
from latentloom.ingestion.sources import IngestError

FILE_NAME = "file_name"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
NULLS = ("nan", "null", "none")  # what other programs write into a CSV file for nothing, in any case

Rows = Iterator[tuple[int, dict[str, Any] | str]]  # number and content of each row, or why it cannot be used


def columns_wanted(caption_columns: Mapping[str, int] | None) -> str:
    """What a metadata file must have, for a message."""
    of_captions = f"one of {', '.join(CAPTION_COLUMNS)}" if caption_columns is None else ", ".join(caption_columns)
    return f"it needs {FILE_NAME} and {of_captions}"


def read_metadata_rows(path: Path | str, wanted: Mapping[str, int] | None = None) -> Rows:
    """The rows of one metadata file, in order, each with a file name; bytes that are not UTF-8 are surrogate escapes.

    Args:
        path: the file.
        wanted: the columns of captions, which must be there; None for all of the usual names, of which one must be.

    Raises:
        IngestError: when the file cannot be read as its name says, or lacks a column; file and columns are named.
    """
    line = 0
    try:
        with open_file(path) as file:
            if file.read(2) in UTF_16:
                raise IngestError(f"{path} is UTF-16; save it as UTF-8")
        for line, row in READERS[posixpath.basename(str(path)).lower()](path, wanted):
            if isinstance(row, dict):
                file_name = row.get(FILE_NAME)
                if not isinstance(file_name, str) or not file_name.strip():
                    row = f"has no {FILE_NAME}"
            yield line, row
    except (OSError, csv.Error, pa.ArrowException) as error:
        place = f" after line {line}" if line else ""
        raise IngestError(f"{path} cannot be read{place} ({error_message(error)}); fix or remove it") from error


def _csv_rows(path: Path | str, wanted: Mapping[str, int] | None) -> Rows:
    with _text(path, newline="") as file:
        # Strict: of a quote that is never closed, the following rows would be part.
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        of_captions = _columns_of_captions(path, reader.fieldnames, wanted)
        for row in reader:
            if None in row:
                columns = len(reader.fieldnames)
                yield reader.line_num, f"has more fields than the {columns} columns: put captions with commas in quotes"
            elif any(map(_holds_row, filter(None, row.values()))):
                detail = "holds the rows before it: a quote in the first of them is not closed, or is a typographic one"
                yield reader.line_num, detail
            else:
                nulls = {column for column in of_captions if (row[column] or "").strip().lower() in NULLS}
                yield reader.line_num, row | dict.fromkeys(nulls)


def _text(path: Path | str, newline: str) -> TextIO:
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _holds_row(cell: str) -> bool:
    """Whether one of the lines of a cell names an image, as a row that a quote has swallowed does."""
    cells = (own for line in cell.split("\n") for own in line.split(",")) if "\n" in cell else ()
    return any(looks_like_image(own.strip(' "\r')) for own in cells)


def _jsonl_rows(path: Path | str, wanted: Mapping[str, int] | None) -> Rows:
    columns: dict[str, None] = {}
    with _text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield number, "is not valid JSON"
                continue
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
            yield number, row if isinstance(row, dict) else "is not a JSON object"
    _columns_of_captions(path, list(columns), wanted)


def _parquet_rows(path: Path | str, wanted: Mapping[str, int] | None) -> Rows:
    with open_file(path) as source, pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        columns = [FILE_NAME, *_columns_of_captions(path, names, wanted)]
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_struct_array())
        for number, row in enumerate(rows, start=1):
            try:
                yield number, row.as_py()
            except UnicodeDecodeError:
                yield number, "is not UTF-8"


def _columns_of_captions(path: Path | str, names: Sequence[str], wanted: Mapping[str, int] | None) -> dict[str, int]:
    """Those of a table's columns, which must have the wanted ones, and each of them once."""
    columns = columns_of_captions(names, wanted)
    if FILE_NAME not in names or len(columns) < len(wanted or [""]):
        found = f"has the columns {', '.join(map(repr, names))}" if names else "has no rows"
        raise IngestError(
            f"{path} {found}; {columns_wanted(wanted)} (CSV columns are separated by commas; captions of another name: "
            f"{HOW_TO_NAME_COLUMN})"
        )
    for name in (FILE_NAME, *columns):
        if names.count(name) > 1:
            raise IngestError(f"{path} has two columns {name!r}; rename one, or remove it")
    return columns


READERS = {"metadata.csv": _csv_rows, "metadata.jsonl": _jsonl_rows, "metadata.parquet": _parquet_rows}
