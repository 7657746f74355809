"""DVC's outs by their hash: computing it, finding whether its bytes are here or in the remote, bringing them back.

DVC names a file by its MD5, and a folder by the MD5 of the list of its files' MD5s, with ``.dir`` behind it.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from latentloom.errors import UserError

CONNECTIONS = 16  # to a remote, at a time


class Place(StrEnum):
    """Where something's bytes are."""

    HERE = "here"
    REMOTE = "in the remote"
    LOST = "lost"
    UNKNOWN = "not known"


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
    stages = (YAML(typ="safe").load(lock) or {}).get("stages", {}) if lock else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def locate(root: Path, outs: Iterable[str]) -> dict[str, tuple[Place, str]]:
    """Where all bytes of each out are, by its hash, and in words what was found there, or why it is not known.

    The one place that asks DVC's own classes: its commands miss that a folder in the remote has lost a file.
    """
    found: dict[str, tuple[Place, str]] = {}
    wanted = set(outs)
    try:
        from dvc.config import NoRemoteError
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            found |= {out: (Place.HERE, "DVC's cache") for out in wanted if _holds(repo.cache.local, out)}
            missing = wanted - found.keys()
            try:
                remote = repo.cloud.get_remote_odb() if missing else None
            except NoRemoteError:
                return found | dict.fromkeys(missing, (Place.LOST, "not in DVC's cache, and there is no remote"))
            found |= {out: (Place.REMOTE, "DVC's remote") for out in missing if _holds(remote, out)}
            missing -= found.keys()
            # Some kinds of remote say of each file that it is not there when they are away.
            if missing and not remote.fs.exists(address := remote.path.removesuffix("files/md5")):
                raise ConnectionError(f"nothing is at {address.rpartition('@')[2]}")  # without a password
            return found | dict.fromkeys(missing, (Place.LOST, "neither in DVC's cache nor in its remote"))
    except Exception as error:  # DVC is not installed, this is no project of it, or the remote has errors of its own
        message = f"DVC does not find it: {_last_line(str(error))}"
        return dict.fromkeys(wanted, (Place.UNKNOWN, message)) | found


def bring(root: Path, wanted: Mapping[str, Path]) -> None:
    """Write outs, by their hashes, to paths, from the cache or the remote, in one pull; what is there is replaced.

    Raises:
        UserError: saying what DVC said, when neither has all of it, or the remote does not answer; then nothing has
            been written.
    """
    with tempfile.TemporaryDirectory(dir=root, prefix="dvc-pull-") as folder:
        described = {out: Path(folder) / f"out{number}" for number, out in enumerate(wanted)}
        for out, pulled in described.items():
            entry = {"md5": out, "hash": "md5", "path": pulled.name}
            Path(f"{pulled}.dvc").write_text(json.dumps({"outs": [entry]}))  # JSON is YAML
        targets = [f"{pulled}.dvc" for pulled in described.values()]
        pull = [sys.executable, "-m", "dvc", "pull", "-q", "--force", *targets]
        result = subprocess.run(pull, cwd=root, capture_output=True, text=True)
        lost = [out for out, pulled in described.items() if not pulled.exists()]
        if result.returncode or lost:
            raise UserError(f"DVC does not have {', '.join(lost or wanted)}: {_last_line(result.stderr)}")
        for out, path in wanted.items():
            pulled = described[out]
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.rmtree(path)
            # A copy: DVC may have linked its cache's own files, which are read-only.
            (shutil.copytree if pulled.is_dir() else shutil.copyfile)(pulled, path)


def _holds(store: Any, out: str) -> bool:
    """Whether DVC's cache or remote holds all of an out: of a folder, the list of its files and each of them."""
    if not store.exists(out):
        return False
    if not out.endswith(".dir"):
        return True
    files = {entry["md5"] for entry in json.loads(store.fs.cat_file(store.oid_to_path(out)))}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return all(pool.map(store.exists, files))


def _last_line(message: str) -> str:
    return next(iter(message.strip().splitlines()[-1:]), "no message")


def _md5(data: bytes = b""):
    return hashlib.md5(data, usedforsecurity=False)


if __name__ == "__main__":  # of the commands that `latentloom lineage` prints: HASH=PATH, each in the current project
    given = [argument.partition("=") for argument in sys.argv[1:]]
    bring(Path.cwd(), {own_hash: Path(own_path) for own_hash, _, own_path in given})
