"""The source ``folder``: a user's own images, in any depth of sub-folders, with captions beside them.

Captions come from metadata files (``metadata.csv``, ``.jsonl``, ``.parquet``) in the root or any sub-folder, whose
``file_name`` is relative to the folder they lie in; several rows of one image are several captions. An image that no
metadata row names takes them from ``NAME.txt``, one caption on each line that is not empty.

Hidden files and folders are skipped (``._photo.jpg`` is not a photo), linked folders are not entered, and nothing
is ever written here. Names and captions are held in memory; images are read one at a time.
"""

import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from latentloom.ingestion.captions import caption_lines
from latentloom.ingestion.images import EXTENSIONS
from latentloom.ingestion.metadata import COLUMNS_WANTED, READERS, MetadataRow, read_metadata_rows
from latentloom.ingestion.rejects import Reason, RejectedSample, printable
from latentloom.ingestion.source_files import resolve_source_path, visible_files
from latentloom.ingestion.sources import IngestError, Sample, Source, rejected_sample


class FolderSource(Source):
    """The captioned images under ``path``, in the order of their relative names.

    Raises:
        IngestError: when the folder is missing or holds no image, or a metadata file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        self.root = resolve_source_path(path)
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise IngestError(f"ingest: the path {self.root} {what}; give the folder that holds your images")
        names = sorted(visible_files(self.root))
        self._images = {name for name in names if posixpath.splitext(name)[1].lower() in EXTENSIONS}
        self._composed = {unicodedata.normalize("NFC", key): key for key in self._images}
        self._captions: dict[str, list[object]] = {}
        self._rejects: dict[str, Sample] = {}
        for name in names:
            if posixpath.basename(name) in READERS:
                for row in read_metadata_rows(self.root / name):
                    self._take(name, row)
        self._keys = sorted(self._images.union(self._captions))
        self.total = len(self._keys) + len(self._rejects)
        if not self.total:
            raise IngestError(
                f"ingest: the path {self.root} holds no images; looked for the extensions "
                f"{' '.join(sorted(EXTENSIONS))} in it and its sub-folders, and for metadata files "
                f"({', '.join(READERS)}; {COLUMNS_WANTED})"
            )

    def samples(self) -> Iterator[Sample]:
        yield from self._rejects.values()
        for key in self._keys:
            yield Sample(printable(key), partial(self._read, key), partial(self._captions_of, key))

    def _take(self, metadata: str, row: MetadataRow) -> None:
        if row.problem:
            place, detail = f"{metadata}:{row.line}", f"row {row.line} of {metadata} {row.problem}"
            self._rejects[place] = rejected_sample(place, Reason.BAD_ROW, detail)
            return
        key = self._key(posixpath.dirname(metadata), row.file_name)
        if key == ".." or key.startswith(("../", "/")):
            detail = f"row {row.line} of {metadata}: file_name must be relative, and stay inside the source folder"
            rejected = rejected_sample(printable(row.file_name), Reason.OUTSIDE_FOLDER, detail)
            self._rejects.setdefault(row.file_name, rejected)
        else:
            self._captions.setdefault(key, []).extend(row.captions)

    def _key(self, parent: str, file_name: str) -> str:
        """The key of the file that a metadata row names.

        Backslashes are folder marks, and accents may be composed or not, where that finds a file and the name as it
        is written does not.
        """
        key = posixpath.normpath(posixpath.join(parent, file_name))
        if key in self._images or _is_file(self.root / key):
            return key
        key = posixpath.normpath(posixpath.join(parent, file_name.replace("\\", "/")))
        return self._composed.get(unicodedata.normalize("NFC", key), key)

    def _read(self, key: str) -> bytes:
        path = self.root / key
        if not _is_file(path):
            named = "metadata names it, but " if key in self._captions else ""
            raise RejectedSample(Reason.MISSING_FILE, f"{named}there is no such file")
        return _content(path)

    def _captions_of(self, key: str) -> Sequence[object]:
        if key in self._captions:
            return self._captions[key]
        sidecar = (self.root / key).with_suffix(".txt")
        return caption_lines(_content(sidecar)) if sidecar.is_file() else []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RejectedSample(Reason.UNREADABLE, f"{path.name}: {error.strerror or error}") from error


def _is_file(path: Path) -> bool:
    """Whether a file lies there; a name that no file can have (too long, not text) is that of no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
