"""Writing files atomically: a reader sees the old file or the new one, never a part of it.

Every file is written under a temporary name in its own folder, flushed to the disk, and renamed onto its final name;
then the folder is flushed, so that the new name outlives a power cut. A process killed at any moment leaves the old
file, or the new one, and at worst a stray ``.NAME.PID.tmp``.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentloom.errors import UserError, WriteError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ID_COLUMNS = {"id", "image_id", "twin_id", "caption_id"}  # of all tables
ID_DIGITS = 64
PART_ROWS = 2**18  # of a table that is read in parts


@contextmanager
def atomic_path(path: Path | str, room: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` when the block ends without an error.

    Args:
        path: the final name.
        room: how many bytes the file will take, for the message of a full disk.

    Raises:
        WriteError: what the disk said, with the final name, the room needed and the room left, when the file cannot be
            written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except WriteError:  # of another file, which it names
        raise
    except OSError as error:
        message = f"could not write {path}: {error.strerror or error}"
        if error.errno in NO_ROOM:
            needs = "" if room is None else f"it needs {math.ceil(room / 2**20 * 10) / 10:.1f} MiB, "
            free = shutil.disk_usage(path.parent).free / 2**20
            message += f"; {needs}{free:.0f} MiB are free there. Make room and run the stage again."
        raise WriteError(error.errno, message) from error
    finally:
        with suppress(OSError):  # there is none where its folder is a file, or its name too long
            temporary.unlink()


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system lets one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system of a network may flush no folders
            raise
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link where the disk can, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with atomic_path(target, room=source.stat().st_size) as temporary:
            shutil.copyfile(source, temporary)


def user_path(path: Path | str) -> Path:
    """A path as a person writes it: `~` is their home; a `~name` that is nobody's is left as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` atomically; raises as `atomic_path`."""
    with atomic_path(path, room=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with Unix newlines, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically; the same data gives the same bytes.

    Raises:
        ValueError: when a number is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: naming the file and the command that makes it, when it is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `dvc repro`, which makes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run `dvc repro`") from error


def read_table(path: Path | str, columns: list[str]) -> "pd.DataFrame":
    """Read columns of a Parquet file.

    Raises:
        UserError: naming the file and the command that makes it, when it is missing, damaged, or lacks a column.
    """
    import pandas as pd

    with _usable(path):
        return pd.read_parquet(path, columns=columns)


def table_rows(path: Path | str) -> int:
    """The number of rows of a Parquet file; raises as `read_table` does."""
    import pyarrow.parquet as pq

    with _usable(path):
        return pq.read_metadata(path).num_rows


def iterate_table(path: Path | str, columns: list[str]) -> "Iterator[pa.Table]":
    """Read columns of a Parquet file in parts of at most ``PART_ROWS``, at least one.

    Raises:
        UserError: as `read_table`, and when an id has not 64 characters, naming its column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _usable(path), pq.ParquetFile(path) as file:
        if missing := set(columns) - set(file.schema_arrow.names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        if not file.metadata.num_rows:
            yield file.schema_arrow.empty_table().select(columns)
        for group in range(file.num_row_groups):  # each by a reader of its own, which keeps all that it has read
            for batch in file.iter_batches(PART_ROWS, row_groups=[group], columns=columns):
                check_ids(batch)
                yield pa.Table.from_batches([batch])
                pa.default_memory_pool().release_unused()  # else Arrow keeps more than what is read takes


def check_ids(batch: "pa.RecordBatch") -> None:
    """Check the columns of ids among those of a batch.

    Raises:
        ValueError: naming the column, when one of its ids has not 64 characters.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in ID_COLUMNS.intersection(batch.schema.names):
        lengths = pc.binary_length(batch[name].cast(pa.string()))
        if not pc.all(pc.equal(lengths, ID_DIGITS), skip_nulls=False).as_py():
            raise ValueError(f"{name}: ids have {ID_DIGITS} hexadecimal digits")


@contextmanager
def _usable(path: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `dvc repro`, which makes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it and run `dvc repro`") from error


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuses_maps(path: Path | str) -> bool:
    """Whether a file is on a disk that maps no files into memory, as some of a network do; the user is told once."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            return False
    except ValueError:
        return False  # an empty file has nothing to map
    except OSError:
        folder = Path(path).parent
        warnings.warn(f"{folder} is on a disk that refuses memory maps: its files are read whole", stacklevel=1)
        return True
