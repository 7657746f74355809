"""The files of a cache, and how a shard of it is read; `latentloom.encoding.cache` writes them.

    index.parquet        one row per image or caption: the shard and the row where its tensors are
    NNNNN.safetensors    a shard: tensors {name: (rows, ...)}; where rows have different lengths, as captions have
                         tokens, the rows of NAME are one after the other, and NAME_ends (rows,) says where each ends
    stats.json           what made the cache; a folder without it is not finished

Readers of safetensors that know nothing of this package read the shards as they are.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from latentloom.errors import UserError
from latentloom.tensor_files import read_tensors

INDEX = "index.parquet"
PAIRS = "pairs.parquet"  # of captions: which image has which
REJECTS = "rejects.parquet"  # of images: those whose latent is not finite
RECONSTRUCTIONS = "reconstructions.parquet"  # of images: a sample, decoded from their latents
STATS = "stats.json"
SHARDS = "*.safetensors"
FLIPPED = "flipped"  # the folder of the mirrored images' latents

ENDS = "_ends"
TOKENS = "tokens"  # of captions: the states of their tokens

Tensors = dict[str, torch.Tensor]


class DamagedShardError(UserError):
    """A shard is missing, cut off, or holds other bytes than were written; the message names it."""


def ragged_names(tensors: Tensors) -> list[str]:
    """The tensors whose rows have different lengths."""
    return [name for name in tensors if name + ENDS in tensors]


def ragged(rows: Sequence[torch.Tensor], name: str) -> Tensors:
    """Rows (items, ...) of different lengths, as a shard holds them."""
    ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
    return {name: torch.cat(list(rows)), name + ENDS: ends}


def load_shard(path: Path) -> Tensors:
    """A shard's tensors, mapped into memory; raises as `read_shard` does."""
    return read_shard(path)[0]


def read_shard(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A shard's tensors, mapped into memory, and the metadata of its header.

    Raises:
        DamagedShardError: when the file is missing or damaged.
    """
    try:
        return read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise DamagedShardError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error
