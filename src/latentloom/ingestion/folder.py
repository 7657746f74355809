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
from pathlib import Path

from latentloom.ingestion.captions import caption_lines
from latentloom.ingestion.images import EXTENSIONS
from latentloom.ingestion.metadata import COLUMNS_WANTED, READERS, MetadataRow, read_metadata_rows
from latentloom.ingestion.rejects import Reason, Reject, RejectedSample, printable
from latentloom.ingestion.source_files import resolve_source_path, visible_files
from latentloom.ingestion.sources import IngestError, Sample


class FolderSource:
    """The captioned images under ``path``, in the order of their relative names.

    Raises:
        IngestError: when the folder is missing or holds no image, or a metadata file cannot be used.
    """

    attribution = None
    licence = None

    def __init__(self, path: Path | str) -> None:
        self.root = resolve_source_path(path)
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise IngestError(f"ingest: the path {self.root} {what}; give the folder that holds your images")
        names = sorted(visible_files(self.root))
        metadata = [name for name in names if posixpath.basename(name) in READERS]
        images = [name for name in names if posixpath.splitext(name)[1].lower() in EXTENSIONS]
        self._images = set(images)
        self._composed = {unicodedata.normalize("NFC", key): key for key in images}
        self._captions: dict[str, list[object]] = {}
        self._rejects: dict[str, Reject] = {}
        for key in metadata:
            for row in read_metadata_rows(self.root / key):
                self._take(key, row)
        self._keys = sorted(self._images.union(self._captions))
        if not self.total:
            raise IngestError(
                f"ingest: the path {self.root} holds no images; looked for the extensions "
                f"{' '.join(sorted(EXTENSIONS))} in it and its sub-folders, and for metadata files "
                f"({', '.join(READERS)}; {COLUMNS_WANTED})"
            )

    @property
    def total(self) -> int:
        return len(self._keys) + len(self._rejects)

    def samples(self) -> Iterator[Sample | Reject]:
        yield from self._rejects.values()
        for key in self._keys:
            try:
                yield self._sample(key)
            except RejectedSample as rejected:
                yield Reject(key, rejected.reason, rejected.detail)

    def _take(self, metadata_key: str, row: MetadataRow) -> None:
        if row.problem:
            place = f"{metadata_key}:{row.line}"
            self._rejects[place] = Reject(place, Reason.BAD_ROW, f"row {row.line} of {metadata_key} {row.problem}")
            return
        key = self._key(posixpath.dirname(metadata_key), row.file_name)
        if key is None:
            detail = f"row {row.line} of {metadata_key}: file_name must be relative, and stay inside the source folder"
            self._rejects.setdefault(row.file_name, Reject(row.file_name, Reason.OUTSIDE_FOLDER, detail))
        else:
            self._captions.setdefault(key, []).extend(row.captions)

    def _key(self, parent: str, file_name: str) -> str | None:
        """The key of the file that a metadata row names, or None when it lies out of the folder.

        Backslashes are folder marks, and accents may be composed or not, where that finds a file and the name as it
        is written does not.
        """
        key = posixpath.normpath(posixpath.join(parent, file_name))
        if key not in self._images and not _is_file(self.root / key):
            key = posixpath.normpath(posixpath.join(parent, file_name.replace("\\", "/")))
            key = self._composed.get(unicodedata.normalize("NFC", key), key)
        return None if key == ".." or key.startswith(("../", "/")) else key

    def _sample(self, key: str) -> Sample:
        path = self.root / key
        if not _is_file(path):
            detail = (
                "metadata names it, but there is no such file" if key in self._captions else "there is no such file"
            )
            raise RejectedSample(Reason.MISSING_FILE, detail)
        return Sample(printable(key), self._captions_of(key), path.read_bytes)

    def _captions_of(self, key: str) -> Sequence[object]:
        if key in self._captions:
            return self._captions[key]
        sidecar = (self.root / key).with_suffix(".txt")
        if not sidecar.is_file():
            return []
        try:
            return caption_lines(sidecar.read_bytes())
        except OSError as error:
            raise RejectedSample(Reason.UNREADABLE, f"{sidecar.name}: {error.strerror}") from error


def _is_file(path: Path) -> bool:
    """Whether a file lies there; a name that no file can have (too long, not text) is that of no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
