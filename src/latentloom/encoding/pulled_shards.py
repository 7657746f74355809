"""Shards that `dvc pull` brought: rows that another machine encoded.

DVC deletes a stage's outs before the stage runs. So in a clone whose caches were pulled, finished shards are left in
DVC's own cache alone, and one added image would have all the others encoded again.

Read here is what DVC documents: ``dvc.lock`` names an out's hash, the cache keeps what has the hash ``abcdef...`` at
``files/md5/ab/cdef...``, and a folder's is a JSON list of its files. A test compares this with DVC itself.
"""

import configparser
import json
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from latentloom.layout import DVC_LOCK, project_root


def pulled_shards(out: Path) -> list[Path]:
    """The shards in DVC's cache that belong to ``out``, as the ``dvc.lock`` of this folder names it.

    Empty where something is missing (DVC, the lock, the out, its files in the cache): they only save work.
    """
    try:
        stages = YAML(typ="safe").load(DVC_LOCK.read_text(encoding="utf-8"))["stages"]
        (digest,) = [own["md5"] for stage in stages.values() for own in stage["outs"] if own["path"] == out.as_posix()]
        cache = _cache()
        files = json.loads((cache / digest[:2] / digest[2:]).read_text(encoding="utf-8"))
        hashes = [file["md5"] for file in files if file["relpath"].endswith(".safetensors")]
        paths = [cache / own[:2] / own[2:] for own in hashes]
    except (OSError, YAMLError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if path.is_file()]


def _cache() -> Path:
    """What the project's DVC cache holds by its MD5, wherever the configuration puts it."""
    folder = project_root() / ".dvc"
    config = configparser.ConfigParser(interpolation=None)
    config.read([folder / "config", folder / "config.local"])  # the latter goes first in DVC, so it comes last here
    return folder / config.get("cache", "dir", fallback="cache") / "files" / "md5"
