"""The source ``parquet``: tables with a column of encoded images and a column of captions.

Images are bytes, or Hugging Face's struct of ``bytes`` and ``path``; captions are a text or a list of texts. Where
params name no column, it is the first of ``IMAGE_COLUMNS`` that holds images, and the first of ``CAPTION_COLUMNS``, in
upper or lower case.

A page of a column (of 1,024 rows or fewer, as the common writers cut them) is in memory at a time, whatever the size
of a row group. A damaged row group, or file, is one reject; the others are used.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from latentloom.ingestion.captions import flat_captions
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message
from latentloom.ingestion.source_files import source_files
from latentloom.ingestion.sources import IngestError, Sample, Source, rejected_sample

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "txt", "prompt", "description")
SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 16
BUFFER_BYTES = 2**20  # read ahead in a column; without a buffer, a row group's whole column is read at once
DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)


class ParquetSource(Source):
    """The rows of the Parquet files that ``path`` names, file by file in the order of their names.

    Args:
        path: a file, a folder, or a pattern.
        image_column: of encoded bytes; None for the first of ``IMAGE_COLUMNS`` that holds some.
        caption_column: None for the first of ``CAPTION_COLUMNS``.

    Raises:
        IngestError: when there is no Parquet file, or one lacks a column; file, columns and param are named.
    """

    def __init__(self, path: Path | str, image_column: str | None = None, caption_column: str | None = None) -> None:
        self._files = source_files(path, SUFFIXES)
        self._image_column, self._caption_column = image_column, caption_column
        self.total = 0
        for path in self._files.values():
            try:
                with _open(path) as file:
                    self._columns(path, file.schema_arrow)
                    self.total += file.metadata.num_rows
            except DAMAGED:
                self.total += 1  # the file is a reject

    def samples(self) -> Iterator[Sample]:
        for name, path in self._files.items():
            try:
                file = _open(path)
            except DAMAGED as error:
                detail = f"cannot be read as Parquet ({error_message(error)}); fix or remove it"
                yield rejected_sample(name, Reason.UNREADABLE, detail)
                continue
            with file:
                yield from self._samples(file, name, self._columns(path, file.schema_arrow))

    def _samples(self, file: pq.ParquetFile, name: str, columns: list[str]) -> Iterator[Sample]:
        stop = 0
        for group in range(file.num_row_groups):
            row, stop = stop, stop + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for image, caption in zip(*(batch.column(column) for column in columns), strict=True):
                        yield Sample(f"{name}:{row}", partial(_image, image.as_py()), partial(_captions, caption))
                        row += 1
            except DAMAGED as error:
                detail = f"the rows {row} to {stop - 1} cannot be read ({error_message(error)})"
                yield rejected_sample(f"{name}:{row}", Reason.UNREADABLE, detail)

    def _columns(self, path: Path, schema: pa.Schema) -> list[str]:
        """The image column and the caption column."""
        with_bytes = [field.name for field in schema if _holds_bytes(field.type)]
        found = []
        for param, wanted, known, columns, what in (
            ("image_column", self._image_column, IMAGE_COLUMNS, with_bytes, "encoded images (bytes, or such a struct)"),
            ("caption_column", self._caption_column, CAPTION_COLUMNS, schema.names, "captions"),
        ):
            by_lower_case = {column.lower(): column for column in reversed(columns)}
            usual = [by_lower_case[name] for name in known if name in by_lower_case]
            candidates = usual if wanted is None else [column for column in columns if column == wanted]
            if not candidates:
                there = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise IngestError(
                    f"{path} has the columns {there}; none that is called {wanted or ', '.join(known)} holds {what}. "
                    f"Name it in params.yaml: ingest.source: [{{source: parquet, path: ..., {param}: ...}}]"
                )
            found.append(candidates[0])
        return found


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def _holds_bytes(arrow_type: pa.DataType) -> bool:
    if types.is_struct(arrow_type):
        inner = [field.type for field in arrow_type if field.name == "bytes"]
        return any(types.is_null(of_bytes) or _holds_bytes(of_bytes) for of_bytes in inner)
    if types.is_dictionary(arrow_type):
        return _holds_bytes(arrow_type.value_type)
    return types.is_binary(arrow_type) or types.is_large_binary(arrow_type) or types.is_binary_view(arrow_type)


def _image(value: bytes | dict[str, Any] | None) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return data
    detail = "its row holds no image"
    if value and value.get("path"):
        detail = f"its row holds the path {value['path']} without the bytes; embed them, or use the source folder"
    raise RejectedSample(Reason.MISSING_FILE, detail)


def _captions(scalar: pa.Scalar) -> list[object]:
    try:
        return flat_captions([scalar.as_py()])
    except UnicodeDecodeError:
        raise RejectedSample(Reason.CAPTION_NOT_UTF8, "its caption is not UTF-8; save the captions as UTF-8") from None
