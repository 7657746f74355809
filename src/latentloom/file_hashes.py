"""The SHA-256 of files, remembered by their size and times, so that what has not changed is not read again."""

import os
import time
from pathlib import Path

from latentloom.errors import UserError
from latentloom.files import read_json, sha256_file, write_json

SETTLED_NS = 2 * 10**9  # what changed so short a time before it was read may change again and keep its times


class FileHashes:
    """Call it with a file for its SHA-256, in any thread; `save` keeps what it has learnt.

    A file is read again when its size, its inode or one of its times has changed: that of its last change, too, which
    no program can set.

    Args:
        path: where the hashes are kept; it may be deleted at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list] = dict(read_json(path))
        except (UserError, TypeError, ValueError):  # missing, or damaged
            self._known = {}
        self._learnt = False

    def __call__(self, file: Path) -> str:
        stamp = _stamp(file)
        if known := self._find(file, stamp):
            return known
        digest = sha256_file(file)
        if time.time_ns() - stamp[-1] > SETTLED_NS:
            self._known[_name(file)] = [*stamp, digest]
            self._learnt = True
        return digest

    def known(self, file: Path | str) -> str | None:
        """The SHA-256 of a file where that can be told without reading it."""
        try:
            return self._find(file, _stamp(file))
        except OSError:
            return None

    def _find(self, file: Path | str, stamp: list[int]) -> str | None:
        *before, digest = self._known.get(_name(file), [None])
        return digest if before == stamp else None

    def save(self) -> None:
        """Write the hashes of the files that are still there, if there is anything new."""
        if self._learnt:
            write_json(self._path, {name: known for name, known in self._known.items() if Path(name).is_file()})


def _name(file: Path | str) -> str:
    return os.path.abspath(file)  # noqa: PTH100 - of paths as texts, which Path would take apart


def _stamp(file: Path | str) -> list[int]:
    """What a file that has changed does not keep, its last change's time at the end."""
    status = os.stat(file)  # noqa: PTH116
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
