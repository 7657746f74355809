"""What was refused, and why: one row each of ``data/rejects.parquet``.

The reasons are a fixed vocabulary that reports count by; the detail is a sentence for the person who mends the data.
Neither holds a time, an address or an absolute path, so the same data gives the same file.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
ROWS_AT_ONCE = 1024


class Reason(StrEnum):
    """Why an image, a caption or a metadata row was refused."""

    MISSING_FILE = "missing_file"  # metadata names a file that is not there
    OUTSIDE_FOLDER = "outside_folder"  # metadata names a file out of the source folder
    UNSAFE_PATH = "unsafe_path"  # a tar member that is a link, or whose path is absolute or leads upwards
    DUPLICATE_KEY = "duplicate_key"  # a key of a tar that comes again
    BAD_ROW = "bad_row"  # metadata that cannot be read: a row of a file, or the JSON of one image
    UNREADABLE = "unreadable"  # the disk or the decoder gave up
    EMPTY_FILE = "empty_file"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not_an_image"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_EXTREME_ASPECT = "too_extreme_aspect"
    TOO_SMALL = "too_small"
    UNSUPPORTED_PIXELS = "unsupported_pixels"  # numbers whose black and white nobody can know
    NO_CAPTION = "no_caption"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    CAPTION_NOT_TEXT = "caption_not_text"
    DUPLICATE = "duplicate"  # the prepared pixels equal those of an image that was kept


@dataclass(frozen=True)
class Reject:
    key: str
    reason: Reason
    detail: str


class Unusable(Exception):
    """Raised where one image or caption turns out to be of no use; becomes a ``Reject`` of its sample."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def printable(text: str) -> str:
    """``text`` as valid Unicode: bytes of a file name that are not UTF-8 show as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class RejectWriter:
    """Writes rejects as they come; the file appears, whole, when the ``with`` block ends without an error."""

    def __init__(self, path: Path, source: str) -> None:
        self.reasons: Counter[Reason] = Counter()
        self._path, self._source = path, source
        self._waiting: list[dict[str, str]] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._file = stack.enter_context(pq.ParquetWriter(temporary, SCHEMA, compression="zstd"))
            stack.push(self._flush_unless_failed)
            self._open = stack.pop_all()
        return self

    def add(self, reject: Reject) -> None:
        self.reasons[reject.reason] += 1
        values = (self._source, printable(reject.key), reject.reason.value, printable(reject.detail))
        self._waiting.append(dict(zip(SCHEMA.names, values, strict=True)))
        if len(self._waiting) == ROWS_AT_ONCE:
            self._flush()

    def __exit__(self, *error: object) -> bool | None:
        return self._open.__exit__(*error)

    def _flush_unless_failed(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(pa.Table.from_pylist(self._waiting, SCHEMA))
            self._waiting.clear()


def read_rejects(path: Path | str) -> "pd.DataFrame":
    """The rejects as a table with the columns source, key, reason and detail."""
    return pq.read_table(path).to_pandas()
