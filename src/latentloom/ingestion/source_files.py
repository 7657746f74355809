"""The files that a source's ``path`` names: one file, all in a folder at any depth, or those that a pattern matches.

Files are known by their names relative to that folder, or to the part of the pattern before its first wildcard, and
come sorted by them. Hidden files and folders are skipped, and linked folders are not entered.
"""

import itertools
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from latentloom.ingestion.sources import IngestError
from latentloom.layout import project_root

WILDCARD = re.compile(r"[*?\[]")


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
    path = Path(path).expanduser()
    return path if path.is_absolute() or glob_root(path).exists() else project_root() / path


def glob_root(path: Path) -> Path:
    """The part of a pattern before its first wildcard; any other path as it is."""
    return Path(*itertools.takewhile(lambda part: not WILDCARD.search(part), path.parts))


def visible_files(root: Path) -> Iterator[str]:
    """The relative names of all files under ``root`` but the hidden ones.

    Raises:
        IngestError: when a folder cannot be read, for its images would be missing without a word.
    """
    for folder, folders, files in os.walk(root, onerror=_unreadable_folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        parent = Path(folder).relative_to(root).as_posix()
        yield from (posixpath.normpath(posixpath.join(parent, name)) for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether the last part of a name begins with a dot, as that of ``._photo.jpg`` does, which is not a photo."""
    return posixpath.basename(name).startswith(".")


def error_message(error: Exception) -> str:
    """The message of an error, on one line and without the file's path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0]


def _unreadable_folder(error: OSError) -> None:
    raise IngestError(
        f"the folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it"
    ) from error
