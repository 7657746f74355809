"""What was rejected, and why: one row each of ``data/rejects.parquet``.

The reasons are a fixed vocabulary that reports count by; the detail is a sentence for the person who fixes the data;
the first few of each reason show the picture. Nothing holds a time, an address or an absolute path, so the same data
gives the same file.
"""

from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.files import write_bytes

SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")] + [("preview", pa.binary())])
PREVIEWS = 24  # of each reason: enough for a contact sheet
BATCH_ROWS = 2**12
ROW_GROUP_ROWS = 2**20  # a multiple of it


class Reason(StrEnum):
    """Why an image, a caption or a metadata row was rejected."""

    MISSING_FILE = "missing_file"  # what metadata names, or the image of a caption, or lies beside what is read
    OUTSIDE_FOLDER = "outside_folder"  # metadata names a file out of the source folder
    UNSAFE_PATH = "unsafe_path"  # a tar member that is a link, or whose path is absolute or leads upwards
    DUPLICATE_KEY = "duplicate_key"  # a key of a tar that comes again
    BAD_ROW = "bad_row"  # metadata that cannot be read: a row of a file, or the JSON of one image
    UNREADABLE = "unreadable"  # the disk or the decoder gave up
    EMPTY_FILE = "empty_file"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image that is not read, or only with an extra of this package
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


@dataclass(frozen=True, slots=True)
class Reject:
    """One rejected sample; ``preview`` is a PNG of at most 64 pixels per side, where the picture can be decoded."""

    source: str
    key: str
    reason: Reason
    detail: str
    preview: bytes | None = None


class RejectedSample(Exception):
    """Raised where one image or caption turns out to be unusable; ``preprocess`` makes it a ``Reject``."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def printable(text: str) -> str:
    """``text`` as valid Unicode: bytes of a file name that are not UTF-8 show as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def error_message(error: Exception) -> str:
    """The message of an error, on one line and without the file's path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]


class RejectTable:
    """The rejects of a run, without their pictures but for the first few.

    They are kept as the Parquet file that they become, some 30 bytes each, and written at the run's end.
    """

    def __init__(self) -> None:
        self.examples: dict[Reason, Reject] = {}  # the first of each reason
        self._reasons: Counter[Reason] = Counter()
        self.with_preview = frozenset(Reason)  # those of which one is still wanted
        self._previews: Counter[Reason] = Counter()
        self._recent: list[Reject] = []
        self._batches: list[pa.RecordBatch] = []  # of the row group that is being filled
        self._file = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._file, SCHEMA, compression="zstd")

    def __len__(self) -> int:
        return self._reasons.total()

    def wants_preview(self, reason: Reason) -> bool:
        """Whether fewer than ``PREVIEWS`` of this reason have one; once it does not, it never will again."""
        return reason in self.with_preview

    def add(self, reject: Reject) -> None:
        if reject.preview and not self.wants_preview(reject.reason):
            reject = replace(reject, preview=None)
        self._previews[reject.reason] += reject.preview is not None
        if self._previews[reject.reason] == PREVIEWS:
            self.with_preview -= {reject.reason}
        self._reasons[reject.reason] += 1
        self.examples.setdefault(reject.reason, reject)
        self._recent.append(reject)
        if len(self._recent) == BATCH_ROWS:
            self._collect()
            if len(self) % ROW_GROUP_ROWS == 0:
                self._write_group()

    def reasons(self) -> Counter[Reason]:
        return self._reasons.copy()

    def write(self, path: Path) -> None:
        """Write the table; nothing can be added any more."""
        self._collect()
        if self._batches or not len(self):
            self._write_group()
        self._writer.close()
        write_bytes(path, self._file.getvalue())

    def _collect(self) -> None:
        columns = [[getattr(reject, name) for reject in self._recent] for name in SCHEMA.names]
        if self._recent:
            self._batches.append(pa.record_batch([*map(pa.array, columns, SCHEMA.types)], schema=SCHEMA))
        self._recent = []

    def _write_group(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, SCHEMA).combine_chunks())
        self._batches = []
