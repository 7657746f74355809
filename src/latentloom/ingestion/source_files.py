"""The files that a source's ``path`` names.

A path is one file, a folder searched in depth, or a pattern; what exists under the very name is never taken for a
pattern. Files are known by their names relative to that folder, or to the part of the pattern before its first
wildcard, and come sorted by them. Hidden files, and folders that a system keeps for itself, are skipped. Linked folders
are followed, each once.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from latentloom.files import user_path
from latentloom.ingestion import remote
from latentloom.ingestion.caption_files import TABLES, TEXT_SUFFIXES
from latentloom.ingestion.image_formats import looks_like_image
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.remote import WILDCARD
from latentloom.ingestion.sources import IngestError, Origin, Sample, rejected_sample
from latentloom.layout import project_root

SYSTEM_FOLDERS = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}


def source_files(path: Path | str, suffixes: tuple[str, ...]) -> tuple[dict[str, Path | str], list[str]]:
    """Name -> file, of the files that end in ``suffixes``; one that ``path`` itself names may end in anything. And the
    names of the other files there. A file at an address is an address, too.

    Raises:
        IngestError: when nothing is there, or no such file.
    """
    if remote.is_remote(path):
        return _chosen(
            {name: remote.Address.of(file) for name, file in remote_files(str(path)).items()}, path, suffixes
        )
    path = resolve_source_path(path)
    if path.is_file():
        return {path.name: path}, []
    root, names = listed_files(path, suffixes[0])
    return _chosen({name: root / name for name in names}, path, suffixes)


def listed_files(path: Path, suffix: str = "") -> tuple[Path, list[str]]:
    """A folder, and the sorted names relative to it of the files that a path names.

    Raises:
        IngestError: when nothing is there.
    """
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        return path, sorted(visible_files(path))
    if not WILDCARD.search(str(path)):
        raise IngestError(
            f"ingest: the path {path} does not exist; give a {suffix} file, a folder of them, or a pattern such as "
            f"FOLDER/*{suffix}"
        )
    root = glob_root(path)
    matches = root.glob(str(path.relative_to(root)))
    names = {match.relative_to(root).as_posix() for match in matches if not match.is_dir()}
    return root, sorted(name for name in names if not is_hidden(name))


def remote_files(address: str) -> dict[str, remote.RemoteFile]:
    """The files at an address but the hidden ones, by their names, sorted.

    Raises:
        IngestError: when the address cannot be listed.
    """
    return {name: file for name, file in remote.list_files(address).items() if not is_hidden(name)}


def _chosen(
    there: dict[str, Path | str], path: Path | str, suffixes: tuple[str, ...]
) -> tuple[dict[str, Path | str], list[str]]:
    files = {name: file for name, file in there.items() if name.lower().endswith(suffixes)}
    if not files and remote.is_remote(path) and len(there) == 1 and str(path).endswith(next(iter(there))):
        files = there  # the file that the address names
    if not files:
        kind = " or ".join(filter(None, suffixes))
        raise IngestError(f"ingest: the path {path} holds no file{kind and f' that ends in {kind}'}")
    return files, [name for name in there if name not in files]


def origin_of(file: Path | str, part: str) -> Origin | None:
    """The origin of an image that is a part of a file; None where a listing has not told the file's version."""
    if not remote.is_remote(file):
        return Origin(str(file), part)
    return file.origin and Origin(None, f"{file.origin} {part}")


def loose_samples(others: Iterable[str], read: str) -> list[Sample]:
    """A reject for each image, caption file and table among the ``others`` of a source, beside what is ``read``."""
    detail = (
        f"lies beside {read}, not in one, and this source reads nothing else; pack it, move it, or add its folder to "
        "ingest.source as a source of its own (source: folder)"
    )
    return [
        rejected_sample(name, Reason.MISSING_FILE, detail)
        for name in others
        if looks_like_image(name) or name.lower().endswith((*TEXT_SUFFIXES, *TABLES))
    ]


def resolve_source_path(path: Path | str) -> Path:
    """A source's path; a relative one lies in the current folder, or else in the project's root.

    An experiment that DVC runs in a temporary copy of the project has only what git tracks, and seldom the images.
    """
    path = user_path(path)
    if path.is_absolute():
        return path
    here, root = glob_root(path), project_root()
    there = glob_root(root / path).relative_to(root)
    return path if here.exists() and len(here.parts) >= len(there.parts) else root / path


def glob_root(path: Path) -> Path:
    """The part of a pattern before its first wildcard; any other path as it is.

    A name that is there is no wildcard, whatever its characters: ``photos [2024]/*.tar`` has its root in that folder.
    """
    root = Path()
    for part in path.parts:
        if WILDCARD.search(part) and not os.path.lexists(root / part):
            return root
        root /= part
    return root


def visible_files(root: Path) -> Iterator[str]:
    """The relative names of all files under ``root`` but the hidden ones.

    A linked folder is entered after all that are not linked, unless it has been entered already or leads up to where
    the link lies. So a file comes once, under its own name where it has one.

    Raises:
        IngestError: when a folder cannot be read, for its images would be missing without a word.
    """

    def unreadable(error: OSError) -> None:
        raise IngestError(
            f"the folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it"
        ) from error

    entered, waiting = set(), deque([Path(root)])
    while waiting:
        for folder, folders, files in os.walk(waiting.popleft(), onerror=unreadable):
            here = os.path.realpath(folder)
            if here in entered:
                folders.clear()
                continue
            entered.add(here)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links = [Path(folder, name) for name in folders if os.path.islink(Path(folder, name))]  # noqa: PTH114
            waiting += [link for link in links if not Path(here).is_relative_to(link.resolve())]
            parent = Path(folder, "_").relative_to(root).as_posix()[:-1]  # with its slash, or nothing
            yield from (parent + name for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name begins with a dot, as ``._photo.jpg`` does, or is a folder of a system."""
    parts = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)
