"""The source ``folder``: a user's own images, in any depth of sub-folders, with captions beside them.

Captions come from metadata files (``metadata.csv``, ``.jsonl``, ``.parquet``) in the root or any sub-folder, whose
``file_name`` is relative to the folder they lie in; several rows of one image are several captions. An image that no
metadata row names takes them from ``NAME.txt``, one caption on each line that is not empty.

Names and captions are held in memory; images are read one at a time, and nothing is ever written here.
"""

import os.path
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from latentloom.ingestion.captions import caption_lines, flat_captions
from latentloom.ingestion.image_formats import HEAD, format_of, looks_like_image, may_be_image
from latentloom.ingestion.metadata import CAPTIONS, COLUMNS_WANTED, FILE_NAME, READERS, read_metadata_rows
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.ingestion.source_files import resolve_source_path, visible_files
from latentloom.ingestion.sources import IngestError, Sample, Source, rejected_sample


class FolderSource(Source):
    """The captioned images under ``path``, in the order of their names relative to it, which are their keys.

    Raises:
        IngestError: when the folder is missing or holds no image, or a metadata file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        self.root = resolve_source_path(path)
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise IngestError(f"ingest: the path {self.root} {what}; give the folder that holds your images")
        names = sorted(visible_files(self.root))
        self._images = set(filter(self._is_image, names))
        self._composed = {unicodedata.normalize("NFC", key): key for key in self._images}
        self._captions: dict[str, list[object]] = {}
        self._bad_rows: list[Sample] = []
        for name in names:
            if posixpath.basename(name) in READERS:
                self._read_metadata(name)
        self._keys = sorted(self._images.union(self._captions))
        self.total = len(self._bad_rows) + len(self._keys)
        if not self.total:
            raise IngestError(
                f"ingest: the path {self.root} holds no images; looked for them in it and its sub-folders, and for "
                f"metadata files ({', '.join(READERS)}; {COLUMNS_WANTED})"
            )

    def samples(self) -> Iterator[Sample]:
        yield from self._bad_rows
        for key in self._keys:
            yield Sample(key, partial(self._image, key), partial(self._captions_of, key))

    def _is_image(self, name: str) -> bool:
        """By its name, or where that says nothing by its content. A link to nowhere may be to a folder of images."""
        path = self.root / name
        if looks_like_image(name) or not may_be_image(name):
            return looks_like_image(name)
        if not _is_file(path):
            return path.is_symlink() and not path.exists()
        try:
            with open(path, "rb") as file:
                return format_of(file.read(HEAD)) is not None
        except OSError:
            return False

    def _read_metadata(self, name: str) -> None:
        for line, row in read_metadata_rows(self.root / name):
            if isinstance(row, str):
                detail = f"row {line} of {name} {row}"
                self._bad_rows.append(rejected_sample(f"{name}:{line}", Reason.BAD_ROW, detail))
            else:
                captions = self._captions.setdefault(self._key(posixpath.dirname(name), row[FILE_NAME].strip()), [])
                captions += flat_captions(map(row.get, CAPTIONS))

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

    def _image(self, key: str) -> bytes:
        if key == ".." or key.startswith(("../", "/")):
            detail = "metadata names it, but file_name must be relative, and stay inside the source folder"
            raise RejectedSample(Reason.OUTSIDE_FOLDER, detail)
        if not _is_file(self.root / key):
            named = "metadata names it, but " if key in self._captions else ""
            if os.path.islink(self.root / key):  # noqa: PTH114
                raise RejectedSample(Reason.MISSING_FILE, f"{named}it is a link to what is not there")
            raise RejectedSample(Reason.MISSING_FILE, f"{named}there is no such file")
        return _content(self.root / key)

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
    return os.path.isfile(path)  # noqa: PTH113 - Path's own raises for a name that no file can have, as a too long one
