"""The source ``folder``: a user's own images, in any depth of sub-folders, with captions beside them.

Captions come from metadata files (``metadata.csv``, ``.jsonl``, ``.parquet``) in the root or any sub-folder, whose
``file_name`` is relative to the folder they lie in; several rows of one image are several captions. An image that no
metadata row names takes them from its caption files (``caption_files.py``). Or they are the names of the images, or of
their folders. A file that may hold captions, and could not be used, is a reject of its own.

Names and captions are held in memory; images are read one at a time, and nothing is ever written here.
"""

import os.path
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from latentloom.ingestion.caption_files import (
    CAPTION_SUFFIXES,
    TABLES,
    CaptionFiles,
    ImageNames,
    RawCaptions,
    as_seen,
    caption_suffix,
    is_text_file,
    pair,
)
from latentloom.ingestion.captions import columns_of_captions, flat_captions, notice_of_several
from latentloom.ingestion.image_formats import HEAD, format_of, looks_like_image
from latentloom.ingestion.metadata import FILE_NAME, READERS, columns_wanted, read_metadata_rows
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.ingestion.remote import is_remote, read
from latentloom.ingestion.source_files import remote_files, resolve_source_path, visible_files
from latentloom.ingestion.sources import IngestError, Origin, Sample, Source, reject, rejected_sample


class FolderSource(Source):
    """The captioned images under ``path``, in the order of their names relative to it, which are their keys.

    Args:
        path: the folder.
        captions, caption_columns: as `CaptionFiles` has them; the columns are those of metadata, too, which is read
            where caption files are.

    Raises:
        IngestError: when the folder is missing or holds no image, or a metadata file cannot be used.
    """

    def __init__(
        self, path: Path | str, captions: str = "lines", caption_columns: Mapping[str, int] | None = None
    ) -> None:
        if is_remote(path):
            self.root, self._remote = str(path).rstrip("/"), remote_files(str(path))
            names = list(self._remote)
        else:
            self.root, self._remote = resolve_source_path(path), None
            if not self.root.is_dir():
                what = "is not a folder" if self.root.exists() else "does not exist"
                raise IngestError(f"ingest: the path {self.root} {what}; give the folder that holds your images")
            names = sorted(visible_files(self.root))
        images = list(filter(self._is_image, names))
        self._images = set(images)
        self._captions: dict[str, list[object]] = {}  # from metadata
        self._files_of: dict[str, list[str]] = {}  # caption files
        self._unused: list[Sample] = []
        self._others: dict[str, str] = {}  # files beside images whose suffix is not known, by name as seen, without it
        self._notices: list[str] = []
        self._columns, self._reader = caption_columns, CaptionFiles(captions, caption_columns)
        self._names = ImageNames(images)
        self._read_captions(names)
        self._keys = sorted(self._images.union(self._captions))
        self.total = len(self._unused) + len(self._keys)
        if not self._keys:
            raise IngestError(
                f"ingest: the path {self.root} holds no images; looked for them in it and its sub-folders, and for "
                f"metadata files ({', '.join(READERS)}; {columns_wanted(caption_columns)})"
            )

    def samples(self) -> Iterator[Sample]:
        yield from self._unused
        for key in self._keys:
            yield Sample(key, self._image(key), self._captions_of(key), self._origin(key))

    def _origin(self, key: str) -> Origin | None:
        if key not in self._images:
            return None
        if self._remote is None:
            return Origin(f"{self.root}/{key}")
        told = self._remote[key].origin
        return told and Origin(None, told)

    def _is_there(self, key: str) -> bool:
        return _is_file(self.root / key) if self._remote is None else key in self._remote

    def _is_image(self, name: str) -> bool:
        """By its name, or where that says nothing by its content. A link to nowhere may be to a folder of images."""
        if looks_like_image(name):
            return True
        if _may_hold_captions(name):
            return False
        try:
            if self._remote is not None:
                return format_of(read(self._remote[name].address, 0, HEAD)) is not None
            path = self.root / name
            if not _is_file(path):
                return path.is_symlink() and not path.exists()
            with open(path, "rb") as file:
                return format_of(file.read(HEAD)) is not None
        except OSError:
            return False

    def notices(self) -> list[str]:
        return [*self._notices, *super().notices()]

    def _read_captions(self, names: Sequence[str]) -> None:
        """Read metadata, and find the caption files of the other images."""
        metadata = list(filter(_is_metadata, names))
        caption_files = list(filter(caption_suffix, names))
        if self._reader.from_names:
            self._notice(metadata + caption_files, "not read, since captions are the names of images or folders")
            return
        for name in metadata:
            self._read_metadata(name)
        of_image, alone = pair(self._names, caption_files)
        captioned = [image for image in of_image if self._captions.get(image)]
        unread = [file for image in captioned for file in of_image.pop(image)]
        self._files_of = of_image
        self._notice(unread, "not read, since metadata gives captions to the images beside them")
        second = [file for files in self._files_of.values() for file in [*filter(is_text_file, files)][1:]]
        self._notice(second, "not the only text file of its image; the captions of all are taken")
        for name, why in sorted(alone.items()):
            self._unused.append(rejected_sample(name, Reason.MISSING_FILE, f"may hold a caption, but {why}"))
        for name in names:
            if name in self._images or caption_suffix(name) or _is_metadata(name):
                continue
            self._others[as_seen(posixpath.splitext(name)[0])] = name
            if _may_hold_captions(name):
                detail = f"may hold captions, but only {', '.join(READERS)} are read; rename it, or remove it"
                self._unused.append(rejected_sample(name, Reason.BAD_ROW, detail))

    def _notice(self, names: Sequence[str], what: str) -> None:
        if names:
            self._notices.append(f"{len(names)} files, such as {names[0]}: {what}")

    def _read_metadata(self, name: str) -> None:
        used: dict[str, None] = {}
        for line, row in read_metadata_rows(f"{self.root}/{name}", self._columns):
            if isinstance(row, str):
                detail = f"row {line} of {name} {row}"
                self._unused.append(rejected_sample(f"{name}:{line}", Reason.BAD_ROW, detail))
            else:
                captions = self._captions.setdefault(self._key(posixpath.dirname(name), row[FILE_NAME].strip()), [])
                columns = columns_of_captions(row, self._columns)
                captions += flat_captions(row, columns)
                used.update(dict.fromkeys(columns))
        if len(used) > 1 and not self._columns:
            self._notices.append(notice_of_several(name, used))

    def _key(self, parent: str, file_name: str) -> str:
        """The key of the file that a metadata row names: as it is written, or else as people see names.

        To those, a backslash is a folder mark, accents may be composed or not, letters be in either case, and the
        suffix be missing. Where several images have the name in this way, none is meant.
        """
        key = posixpath.normpath(posixpath.join(parent, file_name))
        if key in self._images or self._is_there(key):
            return key
        key = posixpath.normpath(posixpath.join(parent, file_name.replace("\\", "/")))
        called = self._names.called(key)
        return next(iter(called)) if len(called) == 1 else key

    def _image(self, key: str) -> Callable[[], bytes]:
        named = "metadata names it, but " if key in self._captions else ""
        if key == ".." or key.startswith(("../", "/")):
            detail = f"{named}file_name must be relative, and stay inside the source folder"
            return partial(reject, Reason.OUTSIDE_FOLDER, detail)
        called = {}
        if key not in self._images:
            called = self._names.called(key) or self._names.called(posixpath.splitext(key)[0])
        hint = f"; did you mean {' or '.join(called)}?" if called else ""
        if self._remote is not None and key not in self._remote:
            return partial(reject, Reason.MISSING_FILE, f"{named}there is no such file{hint}")
        return partial(_image, f"{self.root}/{key}", named, hint)

    def _captions_of(self, key: str) -> Callable[[], Iterable[object]]:
        if captions := self._captions.get(key):
            return partial(list, captions)
        stem, files = posixpath.splitext(key)[0], self._files_of.get(key)
        if not files and (other := self._others.get(as_seen(stem))):
            detail = f"no metadata row or caption file; {other} beside it does not end in {', '.join(CAPTION_SUFFIXES)}"
            return partial(reject, Reason.NO_CAPTION, detail)
        return partial(_captions, self._reader, stem, [f"{self.root}/{name}" for name in files or ()])


def _image(path: str, named: str, hint: str) -> bytes:
    """The content of an image; where there is none, ``named`` says who names it, and ``hint`` what may be meant."""
    if is_remote(path) or _is_file(path):
        return _content(path)
    is_link = os.path.islink(path)  # noqa: PTH114
    what = "it is a link to what is not there" if is_link else f"there is no such file{hint}"
    raise RejectedSample(Reason.MISSING_FILE, f"{named}{what}")


def _captions(reader: CaptionFiles, stem: str, files: Sequence[str]) -> RawCaptions:
    return reader.read(stem, ((caption_suffix(path), _content(path)) for path in files))


def _is_metadata(name: str) -> bool:
    return posixpath.basename(name).lower() in READERS


def _may_hold_captions(name: str) -> bool:
    return caption_suffix(name) is not None or name.lower().endswith((*TABLES, ".parquet"))


def _content(path: str) -> bytes:
    try:
        return read(path) if is_remote(path) else Path(path).read_bytes()
    except OSError as error:
        detail = f"{posixpath.basename(path)}: {error.strerror or error}"
        raise RejectedSample(Reason.UNREADABLE, detail) from error


def _is_file(path: Path | str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path's own raises for a name that no file can have, as a too long one
