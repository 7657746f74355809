"""Files at addresses such as ``s3://bucket/folder``: listed, and read with bounded retries, by fsspec's libraries.

Credentials come from the environment, as each store's own library finds them; they never stand in an address, so they
are in no params, logs or fingerprints. A listing tells the version of each file (an ETag or a checksum), so nothing is
read to learn whether it has changed.
"""

import io
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from latentloom.ingestion.rejects import error_message
from latentloom.ingestion.sources import IngestError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PAUSES = (0.5, 1.0, 2.0)  # seconds between the tries of a request; most libraries try some times of their own
BUFFER_BYTES = 2**22  # of one request, where a file is read in parts
WILDCARD = re.compile(r"[*?\[]")
VERSIONS = ("ETag", "etag", "e_tag", "md5Hash", "blob_id", "content_md5")  # as the libraries call them
EXTRAS = {"s3": "s3", "s3a": "s3"}  # of this package, for the libraries that it names

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a listing has it; ``version`` changes with its content, and is None where the store gives none."""

    address: str
    size: int
    version: str | None

    @property
    def origin(self) -> str | None:
        """What says which bytes these are; other than a hash, a version says so of one address alone."""
        return self.version and f"{self.address} {self.size} {self.version}"


class Address(str):
    """The address of a listed file, which knows what says which bytes these are (`RemoteFile.origin`)."""

    origin: str | None

    @classmethod
    def of(cls, file: RemoteFile) -> "Address":
        address = cls(file.address)
        address.origin = file.origin
        return address


def is_remote(path: Path | str) -> bool:
    """Whether a source's path is an address."""
    return "://" in str(path)


def list_files(address: str) -> dict[str, RemoteFile]:
    """The files at an address, by their names relative to it: one file, all that a folder holds, or a pattern's.

    Raises:
        IngestError: when it cannot be listed, or what reads such addresses is not installed.
    """
    scheme, _, rest = address.partition("://")
    if "@" in rest.partition("/")[0]:
        raise IngestError(
            f"ingest: an address of {scheme}:// holds a user or a password; leave them to the environment"
        )
    try:
        files, root = _tried(lambda: _listed(address))
    except (OSError, ImportError, ValueError) as error:
        raise IngestError(f"ingest: {address} cannot be listed: {_explained(address, error)}") from error
    return {path[len(root) :].lstrip("/") or posixpath.basename(path): file for path, file in sorted(files.items())}


def read(address: str, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, or the part of it that ends before ``end``.

    Raises:
        OSError: when it cannot be read, in several tries.
    """

    def content() -> bytes:
        system, path = _opened(address)
        return system.cat_file(path, start=start, end=end)

    return _tried(content)


def open_file(path: Path | str) -> BinaryIO:
    """A file to read, wherever it lies; a remote one in parts, each of which is tried several times.

    Raises:
        OSError: when it cannot be opened.
    """
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(_Parts(str(path)), BUFFER_BYTES)


def size_of(path: Path | str) -> int:
    """The bytes of a file, wherever it lies."""
    if not is_remote(path):
        return Path(path).stat().st_size

    def size() -> int:
        system, own = _opened(str(path))
        return system.size(own)

    return _tried(size)


class _Parts(io.RawIOBase):
    """A remote file, read by requests for parts of it."""

    def __init__(self, address: str) -> None:
        self._address, self._size, self._at = address, size_of(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        end = min(self._at + len(buffer), self._size)
        data = read(self._address, self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _opened(address: str) -> tuple["AbstractFileSystem", str]:
    """What reads an address, and the address as that calls it."""
    from fsspec.core import url_to_fs

    return url_to_fs(address)


def _listed(address: str) -> tuple[dict[str, RemoteFile], str]:
    """The files by their paths, and the path of what they lie in."""
    system, path = _opened(address)
    system.invalidate_cache()
    found: Mapping[str, Any] = {}
    root = path.rstrip("/")
    if WILDCARD.search(root) and not system.exists(root):
        found = {own: info for own, info in system.glob(root, detail=True).items() if info["type"] == "file"}
        root = posixpath.dirname(root[: WILDCARD.search(root).start()] + "x")
    if not found:
        root = path.rstrip("/")
        found = system.find(root, detail=True)
    return {
        own: RemoteFile(system.unstrip_protocol(own), info["size"], _version(info)) for own, info in found.items()
    }, root


def _version(info: Mapping[str, Any]) -> str | None:
    lfs = info.get("lfs") or {}
    return next((str(own).strip('"') for own in (lfs.get("sha256"), *map(info.get, VERSIONS)) if own), None)


def _tried(request: Callable[[], Result]) -> Result:
    """The result of a request, which is tried again where that may help."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, MemoryError):
            raise  # another try gives the same
        except Exception as error:  # each library has its own for what a network does
            if pause is None:
                message = f"{type(error).__name__}: {error_message(error)}, {len(PAUSES) + 1} tries"
                raise OSError(message) from error
            time.sleep(pause)
    raise AssertionError


def _explained(address: str, error: Exception) -> str:
    scheme = address.partition("://")[0]
    if isinstance(error, ImportError):
        extra = EXTRAS.get(scheme)
        return f'pip install "latentloom[{extra}]"' if extra else str(error)
    if isinstance(error, FileNotFoundError):
        return "nothing is there; look at ingest.path, and whether this machine's credentials let it see that"
    if isinstance(error, ValueError):
        return error_message(error)
    return f"{error_message(error)}. Credentials are taken from the environment, as {scheme}'s own tools take them"
