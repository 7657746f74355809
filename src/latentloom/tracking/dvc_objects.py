"""DVC's objects by their hash: whether their bytes are on this machine, in the remote or lost; and bringing them."""

import hashlib
import json
import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.files import atomic_path

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB


class Place(StrEnum):
    """Where an object's bytes are."""

    HERE = "here"  # in DVC's cache on this machine
    REMOTE = "in the remote"
    LOST = "lost"


def directory_oid(folder: Path) -> str:
    """The hash that DVC gives a folder: 32 hexadecimal digits and ``.dir``."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": _md5(folder / name), "relpath": name} for name in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def place_of(root: Path, oid: str) -> Place:
    """Where all bytes of a file or folder are, by its hash: an incomplete folder is not there."""
    with _repo(root) as repo:
        if _holds(repo.cache.local, oid):
            return Place.HERE
        remote = _remote(repo)
        return Place.REMOTE if remote is not None and _holds(remote, oid) else Place.LOST


def bring(root: Path, oid: str, folder: Path) -> None:
    """Write the files of DVC's folder ``oid`` into ``folder``, from the cache, else from the remote.

    Raises:
        FileNotFoundError: when neither has all of them.
        OSError: when the remote cannot be reached, or a file cannot be written.
    """
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with _repo(root) as repo:
        if not _holds(repo.cache.local, oid):
            if (remote := _remote(repo)) is None or not _holds(remote, oid):
                raise FileNotFoundError(f"{oid} is neither in DVC's cache nor in its remote")
            repo.cloud.pull([HashInfo("md5", oid)])
        cache = repo.cache.local
        for name, _, content in Tree.load(cache, HashInfo("md5", oid)):
            with atomic_path(folder.joinpath(*name)) as temporary:
                shutil.copyfile(cache.oid_to_path(content.value), temporary)


def _holds(objects: "HashFileDB", oid: str) -> bool:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not objects.exists(oid):
        return False
    files = (
        [content.value for _, _, content in Tree.load(objects, HashInfo("md5", oid))] if oid.endswith(".dir") else []
    )
    return set(objects.oids_exist(files)) == set(files)


def _repo(root: Path) -> "Repo":
    from dvc.repo import Repo

    return Repo(str(root))


def _remote(repo: "Repo") -> "HashFileDB | None":
    from dvc.exceptions import DvcException

    try:
        return repo.cloud.get_remote_odb()
    except DvcException:  # there is none
        return None


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
