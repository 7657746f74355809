"""The source ``parquet``: tables with a column of encoded images and a column of captions.

``table_columns`` says which columns these are. A table may have a row for each caption: rows of equal pictures are one
image.

A page of a column (of 1,024 rows or fewer, as the common writers cut them) is in memory at a time, whatever the size
of a row group. A damaged row group, or file, is one reject; the others are used.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.ingestion.captions import columns_of_captions, flat_captions, notice_of_several
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message
from latentloom.ingestion.remote import is_remote, open_file
from latentloom.ingestion.source_files import loose_samples, origin_of, source_files
from latentloom.ingestion.sources import Origin, Sample, Source, reject, rejected_sample
from latentloom.ingestion.table_columns import image_of, table_columns

SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 16
BATCH_BYTES = 2**28  # of images as large as the average of their row group; Arrow's limit for a column is 2**31
BUFFER_BYTES = 2**20  # read ahead in a column; without a buffer, a row group's whole column is read at once
DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)


class ParquetSource(Source):
    """The rows of the Parquet files that ``path`` names, file by file in the order of their names.

    Args:
        path: a file, a folder, or a pattern.
        image_column: of encoded bytes; None for the first of ``table_columns.IMAGE_COLUMNS`` that holds some.
        caption_columns: and how often a caption of each counts; None for all of the usual names.
        is_known: whether the image of an origin need not be read; of a row group of such, only captions are.

    Raises:
        IngestError: when there is no Parquet file, or one lacks a column; file, columns and param are named.
    """

    joins_captions = True

    def __init__(
        self,
        path: Path | str,
        image_column: str | None = None,
        caption_columns: Mapping[str, int] | None = None,
        is_known: Callable[[Origin], bool] = lambda _: False,
    ) -> None:
        self._is_known = is_known
        self._files, others = source_files(path, SUFFIXES)
        self._loose = loose_samples(others, "the tables")
        self._image_column, self._caption_columns = image_column, caption_columns
        self._several: dict[tuple[str, ...], str] = {}  # columns of captions -> a file that has them
        self.total = len(self._loose)
        for path in self._files.values():
            try:
                with _open(path) as file:
                    self._columns(path, file.schema_arrow)
                    self.total += file.metadata.num_rows
            except DAMAGED:
                self.total += 1  # the file is a reject

    def samples(self) -> Iterator[Sample]:
        yield from self._loose
        for name, path in self._files.items():
            try:
                file = _open(path)
            except DAMAGED as error:
                detail = f"cannot be read as Parquet ({error_message(error)}); fix or remove it"
                yield rejected_sample(name, Reason.UNREADABLE, detail)
                continue
            with file:
                yield from self._samples(file, name, path, self._columns(path, file.schema_arrow))

    def notices(self) -> list[str]:
        return [notice_of_several(name, columns) for columns, name in self._several.items()]

    def _samples(self, file: pq.ParquetFile, name: str, path: Path | str, columns: list[str]) -> Iterator[Sample]:
        stop, of_captions = 0, columns_of_captions(columns[1:], self._caption_columns)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            start = row = stop
            stop += group.num_rows
            origins = (origin_of(path, str(own)) for own in range(start, stop))
            is_known = all(origin and self._is_known(origin) for origin in origins)
            rows = min(BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            try:
                for batch in file.iter_batches(rows, row_groups=[number], columns=columns[is_known:]):
                    values = [batch.column(column) for column in columns[is_known:]]
                    for own in zip(*values, strict=True):
                        read = (
                            partial(_image_in_row, str(path), columns[0], number, row - start)
                            if is_known
                            else partial(image_of, own[0].as_py())
                        )
                        captions = _captions(own[1 - is_known :], of_captions)
                        yield Sample(f"{name}:{row}", read, captions, origin_of(path, str(row)))
                        row += 1
            except DAMAGED as error:
                detail = f"the rows {row} to {stop - 1} cannot be read ({error_message(error)})"
                yield rejected_sample(f"{name}:{row}", Reason.UNREADABLE, detail)

    def _columns(self, path: Path | str, schema: pa.Schema) -> list[str]:
        """The image column, then those of captions."""
        columns = table_columns(schema, self._image_column, self._caption_columns, str(path), "parquet")
        if len(columns) > 2 and not self._caption_columns:
            self._several.setdefault(tuple(columns[1:]), path.name)
        return columns


def _open(path: Path | str) -> pq.ParquetFile:
    file = open_file(path) if is_remote(path) else path
    return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def _image_in_row(path: str, column: str, group: int, row: int) -> bytes:
    try:
        with _open(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                if row < len(batch):
                    return image_of(batch.column(column)[row].as_py())
                row -= len(batch)
    except DAMAGED as error:
        raise RejectedSample(Reason.UNREADABLE, error_message(error)) from error
    raise RejectedSample(Reason.UNREADABLE, "its row is gone")


def _captions(scalars: Sequence[pa.Scalar], columns: Mapping[str, int]) -> Callable[[], Iterable[object]]:
    try:
        row = {name: own.as_py() for name, own in zip(columns, scalars, strict=True)}
    except UnicodeDecodeError:
        return partial(reject, Reason.CAPTION_NOT_UTF8, "its caption is not UTF-8; save the captions as UTF-8")
    return partial(flat_captions, row, columns)
