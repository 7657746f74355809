"""DVC's outs by their hash: computing it, finding whether its bytes are here or in the remote, bringing them back.

DVC names a file by its MD5, and a folder by the MD5 of the list of its files' MD5s, with ``.dir`` behind it. Its cache
keeps each under ``files/md5/XX/YYYY...``, and a remote has the same layout.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from latentloom.errors import UserError


class Place(StrEnum):
    """Where something's bytes are."""

    HERE = "here"
    REMOTE = "in the remote"
    LOST = "lost"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Location:
    """Where an out is, and in words what was found there, or why it is not known."""

    place: Place
    message: str


def out_hash(path: Path) -> str:
    """The hash that DVC gives a file, 32 hexadecimal digits, or a folder: 32 digits and ``.dir``."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, _md5).hexdigest()
    files = sorted(own.relative_to(path).as_posix() for own in path.rglob("*") if own.is_file())
    listing = [{"md5": out_hash(path / own), "relpath": own} for own in files]
    return _md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def locked_outs(lock: bytes | str | None) -> dict[str, str]:
    """The outs that a dvc.lock names: path -> DVC's hash; nothing where there is no lock."""
    stages = (yaml.safe_load(lock) or {}).get("stages", {}) if lock else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def locate(root: Path, hashes: Iterable[str]) -> dict[str, Location]:
    """Where all bytes of each out are; of a folder, all its files must be there.

    Nothing is raised: what a remote that does not answer holds is not known.
    """
    wanted = list(dict.fromkeys(hashes))
    cache = cache_folder(root)
    if cache is None:
        return dict.fromkeys(wanted, Location(Place.UNKNOWN, "DVC is not installed, or this is no project of it"))
    here = {own for own in wanted if _is_complete(own, *_reader(cache))}
    found = dict.fromkeys(here, Location(Place.HERE, "DVC's cache"))
    missing = [own for own in wanted if own not in here]
    return found | (_locate_in_remote(root, missing) if missing else {})


def bring(root: Path, out: str, path: Path) -> None:
    """Write DVC's file or folder of the hash ``out`` to ``path``, from the cache, else from the remote.

    Raises:
        UserError: saying what DVC said, when neither has all of it, or the remote does not answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="dvc-pull-") as folder:
        (Path(folder) / "out.dvc").write_text(yaml.safe_dump({"outs": [{"md5": out, "hash": "md5", "path": "out"}]}))
        result = _dvc(root, "pull", "-q", "--force", str(Path(folder) / "out.dvc"))
        pulled = Path(folder) / "out"
        if result.returncode or not pulled.exists():
            raise UserError(f"DVC does not have {out}: {_last_line(result.stderr)}")
        if path.is_dir():
            shutil.rmtree(path)
        # A copy: DVC may have linked its cache's own files, which are read-only.
        (shutil.copytree if pulled.is_dir() else shutil.copyfile)(pulled, path)


def cache_folder(root: Path) -> Path | None:
    """The folder of DVC's cache; None where DVC is not installed, or ``root`` is no project of it."""
    result = _dvc(root, "cache", "dir")
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def _reader(cache: Path) -> tuple[Callable[[str], bytes | None], Callable[[Collection[str]], bool]]:
    def path(name: str) -> Path:
        return cache / "files" / "md5" / name[:2] / name[2:]

    def read(name: str) -> bytes | None:
        return path(name).read_bytes() if path(name).is_file() else None

    return read, lambda names: all(path(name).is_file() for name in names)


def _is_complete(out: str, read: Callable[[str], bytes | None], has_all: Callable[[Collection[str]], bool]) -> bool:
    if not out.endswith(".dir"):
        return has_all([out])
    listing = read(out)
    return listing is not None and has_all([entry["md5"] for entry in json.loads(listing)])


def _locate_in_remote(root: Path, outs: list[str]) -> dict[str, Location]:
    """The one place that asks DVC's own classes: its commands miss that a folder in the remote has lost a file."""
    try:
        from dvc.config import NoRemoteError
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            try:
                remote = repo.cloud.get_remote_odb()
            except NoRemoteError:
                return dict.fromkeys(outs, Location(Place.LOST, "not in DVC's cache, and there is no remote"))
            if away := _address_if_away(remote):
                return dict.fromkeys(outs, Location(Place.UNKNOWN, f"not in DVC's cache; no answer from {away}"))

            def read(name: str) -> bytes | None:
                place = remote.oid_to_path(name)
                return remote.fs.cat_file(place) if remote.fs.exists(place) else None

            held = {own for own in outs if _is_complete(own, read, lambda names: _holds_all(remote, names))}
    except Exception as error:  # each kind of remote has its own
        message = f"not in DVC's cache; the remote does not answer: {_last_line(str(error))}"
        return dict.fromkeys(outs, Location(Place.UNKNOWN, message))
    lost = Location(Place.LOST, "neither in DVC's cache nor in its remote")
    return {own: Location(Place.REMOTE, "DVC's remote") if own in held else lost for own in outs}


def _holds_all(remote: Any, names: Collection[str]) -> bool:
    return set(remote.oids_exist(list(names))) == set(names)


def _address_if_away(remote: Any) -> str | None:
    """The address of a remote that is away, of those kinds that then say that no file is there."""
    if remote.fs.protocol == "local":
        folder = Path(remote.path).parents[1]  # around files/md5
        return None if folder.exists() else str(folder)
    if "http" in remote.fs.protocol:
        try:
            urllib.request.urlopen(remote.path, timeout=10).close()
        except urllib.error.HTTPError:  # an answer
            return None
        except OSError:
            return remote.path.rpartition("@")[2]  # without a password
    return None


def _dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, capture_output=True, text=True)


def _last_line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[-1] if lines else "no message"


def _md5(data: bytes = b""):
    return hashlib.md5(data, usedforsecurity=False)


if __name__ == "__main__":  # of the commands that `latentloom lineage` prints: HASH=PATH, each in the current project
    for argument in sys.argv[1:]:
        own_hash, _, own_path = argument.partition("=")
        bring(Path.cwd(), own_hash, Path(own_path))
