"""Shards that `dvc pull` brought, for the row store: rows that another machine encoded.

DVC deletes a stage's outs before the stage runs. So in a clone whose caches were pulled, finished shards are left in
DVC's own cache alone, and one added image would have all the others encoded again.
"""

from pathlib import Path

from latentloom.encoding.row_store import RowStore
from latentloom.encoding.tensor_shards import DamagedShardError, read_keys


def adopt_pulled(store: RowStore, out: str) -> None:
    """Let ``store`` know the shards of ``out``, such as ``data/latents``, as the project's ``dvc.lock`` names them.

    What is not there (no DVC, no such out yet, objects that were never pulled) is passed over: it only saves work.
    """
    for path in _cached_files(out):
        if path.is_file():
            try:
                keys = read_keys(path)
            except DamagedShardError:  # no shard, or one of an older format
                continue
            if not store.has_shard(keys):
                store.add(path, keys)


def _cached_files(out: str) -> list[Path]:
    """Where DVC's cache has, or would have, the safetensors files of an out."""
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
    except ImportError:  # training machines may lack DVC
        return []
    try:
        with Repo() as repo:
            (output,) = repo.find_outs_by_path(out)
            files = output.get_obj() or ()
            return [
                Path(output.cache.oid_to_path(content.value))
                for name, _, content in files
                if name[-1].endswith(".safetensors")
            ]
    except DvcException:
        return []
