"""DVC's objects by their hash: whether their bytes are on this machine, in the remote or lost; and bringing them."""

import hashlib
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.files import atomic_path
from latentloom.tracking.delivery import first_line
from latentloom.tracking.store import without_credentials

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB


class Place(StrEnum):
    """Where something's bytes are."""

    HERE = "here"
    REMOTE = "in the remote"
    LOST = "lost"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Whereabouts:
    """Where an object is: the place, and in words what was found there, or why it is not known."""

    place: Place
    told: str


def directory_oid(folder: Path) -> str:
    """The hash that DVC gives a folder: 32 hexadecimal digits and ``.dir``."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": _md5(folder / name), "relpath": name} for name in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def oid_of(path: Path) -> str:
    """The hash that DVC gives a file or a folder."""
    return directory_oid(path) if path.is_dir() else _md5(path)


def places_of(root: Path, oids: Iterable[str]) -> dict[str, Whereabouts]:
    """Where all bytes of each file or folder are, by its hash: an incomplete folder is not there.

    Nothing is raised: a remote that does not answer is asked once, and what may be in it is not known.
    """
    oids = list(oids)
    try:
        repo = _repo(root)
    except Exception as error:  # DVC is not installed, or the folder is none of its projects
        return dict.fromkeys(oids, Whereabouts(Place.UNKNOWN, f"DVC cannot tell: {first_line(error)}"))
    with repo:
        found = {oid: Whereabouts(Place.HERE, "DVC's cache") for oid in oids if _holds(repo.cache.local, oid)}
        missing = [oid for oid in oids if oid not in found]
        return found | (_in_remote(repo, missing) if missing else {})


def cache_folder(root: Path) -> Path:
    """Where the project keeps DVC's cache.

    Raises:
        Exception: DVC's own, when the folder is no project of it.
    """
    with _repo(root) as repo:
        return Path(repo.cache.local_cache_dir)


def bring(root: Path | str, oid: str, path: Path | str) -> None:
    """Write DVC's file or folder ``oid`` to ``path``, from the cache, else from the remote.

    Raises:
        FileNotFoundError: when neither has all of them.
        OSError: when the remote cannot be reached, or a file cannot be written.
    """
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with _repo(root) as repo:
        if not _holds(repo.cache.local, oid):
            try:
                remote = _remote(repo)
            except DvcException as error:
                raise OSError(f"DVC's remote cannot be used: {error}") from error
            if remote is None or not _holds(remote, oid):
                raise FileNotFoundError(f"{oid} is neither in DVC's cache nor in its remote")
            repo.cloud.pull([HashInfo("md5", oid)])
        cache = repo.cache.local
        files = {(): oid}
        if oid.endswith(".dir"):
            files = {name: content.value for name, _, content in Tree.load(cache, HashInfo("md5", oid))}
        for name, content in files.items():
            with atomic_path(Path(path).joinpath(*name)) as temporary:
                shutil.copyfile(cache.oid_to_path(content), temporary)


def _holds(objects: "HashFileDB", oid: str) -> bool:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not objects.exists(oid):
        return False
    files = (
        [content.value for _, _, content in Tree.load(objects, HashInfo("md5", oid))] if oid.endswith(".dir") else []
    )
    return set(objects.oids_exist(files)) == set(files)


def _in_remote(repo: "Repo", oids: list[str]) -> dict[str, Whereabouts]:
    try:
        if (remote := _remote(repo)) is None:
            return dict.fromkeys(oids, Whereabouts(Place.LOST, "not in DVC's cache, and there is no remote"))
        if (away := _away(remote)) is not None:
            return dict.fromkeys(oids, Whereabouts(Place.UNKNOWN, f"not in DVC's cache; the remote {away} is away"))
        held = {oid for oid in oids if _holds(remote, oid)}
    except Exception as error:  # each kind of remote has its own
        told = f"not in DVC's cache; the remote does not answer: {first_line(error)}"
        return dict.fromkeys(oids, Whereabouts(Place.UNKNOWN, told))
    there = Whereabouts(Place.REMOTE, "DVC's remote")
    lost = Whereabouts(Place.LOST, "neither in DVC's cache nor in its remote")
    return {oid: there if oid in held else lost for oid in oids}


def _away(remote: "HashFileDB") -> str | None:
    """The remote's address where it is of those kinds for which nothing is there when all of it is away."""
    protocol = remote.fs.protocol
    if protocol == "local":
        folder = Path(remote.path).parent.parent  # of files/md5
        return None if folder.exists() else str(folder)
    if "http" in protocol:
        try:
            urllib.request.urlopen(remote.path, timeout=10).close()
        except urllib.error.HTTPError:  # an answer
            return None
        except OSError:
            return without_credentials(remote.path)
    return None


def _repo(root: Path | str) -> "Repo":
    from dvc.repo import Repo

    return Repo(str(root))


def _remote(repo: "Repo") -> "HashFileDB | None":
    from dvc.config import NoRemoteError

    try:
        return repo.cloud.get_remote_odb()
    except NoRemoteError:
        return None


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
