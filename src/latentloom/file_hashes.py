"""The SHA-256 of files, remembered by their size and times, so that what has not changed is not read again."""

import os
import sqlite3
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from latentloom.files import sha256_file

SETTLED_NS = 2 * 10**9  # what changed so short a time before it was read may change again and keep its times
READ_AT_ONCE, WRITTEN_AT_ONCE = 256, 10_000  # hashes
END = b"\xff"  # after all paths
TIMEOUT = 60  # seconds to wait for another process
TABLE = "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, stamp BLOB, hash BLOB) WITHOUT ROWID"


class FileHashes:
    """Call it with a file for its SHA-256, in any thread; `save` keeps what it has learnt.

    A file is read again when its size, its inode or one of its times has changed: that of its last change, too, which
    no program can set.

    Args:
        path: the SQLite file of the hashes, for any number of processes; it may be deleted at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._learnt: dict[bytes, tuple[bytes, bytes]] = {}  # what is not in the file yet
        self._read: dict[bytes, tuple[bytes, bytes]] = {}  # what is, from one path to another: files mostly come sorted
        self._first = self._last = b""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        self._execute(TABLE)

    def __call__(self, file: Path) -> str:
        stamp, changed = _stamp(file)
        if known := self._find(file, stamp):
            return known
        digest = sha256_file(file)
        if time.time_ns() - changed > SETTLED_NS:
            with self._lock:
                self._learnt[_name(file)] = stamp, bytes.fromhex(digest)
                if len(self._learnt) == WRITTEN_AT_ONCE:
                    self._write()
        return digest

    def known(self, file: Path | str) -> str | None:
        """The SHA-256 of a file where that can be told without reading it."""
        try:
            return self._find(file, _stamp(file)[0])
        except OSError:
            return None

    def _find(self, file: Path | str, stamp: bytes) -> str | None:
        name = _name(file)
        with self._lock:
            if not self._first <= name <= self._last:
                self._read_from(name)
            before, digest = self._learnt.get(name) or self._read.get(name) or (None, b"")
        return digest.hex() if before == stamp else None

    def save(self) -> None:
        """Write the hashes of the files that are still there, if there is anything new."""
        with self._lock:
            if self._learnt or self._base.total_changes:
                self._write()
                self._execute("DELETE FROM hashes WHERE NOT is_file(path)")

    def _read_from(self, name: bytes) -> None:
        query = "SELECT path, stamp, hash FROM hashes WHERE path >= ? ORDER BY path LIMIT ?"
        rows = self._execute(query, [(name, READ_AT_ONCE)])
        self._read = {path: (stamp, digest) for path, stamp, digest in rows}
        self._first, self._last = name, rows[-1][0] if len(rows) == READ_AT_ONCE else END

    def _write(self) -> None:
        self._execute("REPLACE INTO hashes VALUES (?, ?, ?)", ((name, *own) for name, own in self._learnt.items()))
        self._learnt.clear()
        self._last = b""  # what has been read is no longer all there is

    def _execute(self, statement: str, rows: Iterable[tuple] = ((),)) -> list[tuple]:
        """What it gives for the rows, in one transaction; nothing where the file cannot be used."""
        try:
            with self._base:
                return [found for row in rows for found in self._base.execute(statement, row)]
        except sqlite3.OperationalError:  # another process is not done with it, or it lies where files have no locks
            return []
        except sqlite3.DatabaseError:  # damaged
            self._base.close()
            self._path.unlink(missing_ok=True)
            self._open()
            return self._base.execute(TABLE).fetchall()

    def _open(self) -> None:
        self._base = sqlite3.connect(self._path, TIMEOUT, check_same_thread=False)
        self._base.create_function("is_file", 1, os.path.isfile)


def _name(file: Path | str) -> bytes:
    return os.fsencode(os.path.abspath(file))  # noqa: PTH100 - of paths as texts, which Path would take apart


def _stamp(file: Path | str) -> tuple[bytes, int]:
    """What a file that has changed does not keep, and when it changed last, in nanoseconds."""
    status = os.stat(file)  # noqa: PTH116
    times = status.st_mtime_ns, status.st_ctime_ns
    return struct.pack("<QQqq", status.st_size, status.st_ino, *times), times[-1]
