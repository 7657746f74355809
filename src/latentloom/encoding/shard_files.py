"""The files of a cache, and how a shard of it is read; `latentloom.encoding.cache` writes them.

    index.parquet        one row per image or caption: the shard and the row where its tensors are
    NNNNN.safetensors    a shard: tensors {name: (rows, ...)}
    stats.json           what made the cache; a folder without it is not finished

Readers of safetensors that know nothing of this package read the shards as they are.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from latentloom.errors import UserError

INDEX = "index.parquet"
PAIRS = "pairs.parquet"  # of captions: which image has which
REJECTS = "rejects.parquet"  # of images: those whose latent is not finite
STATS = "stats.json"
SHARDS = "*.safetensors"
FLIPPED = "flipped"  # the folder of the mirrored images' latents

Tensors = dict[str, torch.Tensor]


class DamagedShardError(UserError):
    """A shard is missing, cut off, or holds other bytes than were written; the message names it."""


def load_shard(path: Path) -> Tensors:
    """A shard's tensors, mapped into memory; raises as `read_shard` does."""
    return read_shard(path)[0]


def read_shard(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A shard's tensors, mapped into memory, and the metadata of its header.

    Raises:
        DamagedShardError: when the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedShardError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error
