"""The feature cache: prepared images -> features of a vision encoder, computed once per image and encoder.

    data/images/*.parquet -> .state/features/*.safetensors   `features` (N, dim), fp32

It holds what evaluations on this machine have computed before, and nothing else, so it may be deleted at any time.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from latentloom.encoding.cache import Done, Plan, Task, row_keys
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import Tensors
from latentloom.encoding.vision_encoder import VisionEncoder
from latentloom.ids import from_hex, positions
from latentloom.ingestion.shards import NumberedImages, metadata_batches
from latentloom.layout import state_folder, state_limit

BATCH_SIZE = 64
STORED = "float32"
ROW_BYTES = 4096  # about


def features_of(encoder: VisionEncoder, images: Path, ids: Sequence[str]) -> np.ndarray:
    """The features (N, dim), fp32, of the prepared images named ``ids``, in that order; known ones are not computed.

    Raises:
        UserError: when a file of ``images`` is damaged, or the encoder cannot be loaded.
    """
    wanted = from_hex(ids)
    prepared = np.concatenate([from_hex(batch["id"]) for batch in metadata_batches(images, ["id"])])
    numbers = np.flatnonzero(positions(prepared, wanted) >= 0)  # in the order in which they are read
    stored = prepared[numbers]
    numbered, store = NumberedImages(images), RowStore(state_folder("features"), state_limit())

    def features(task: Task) -> Done:
        shards = task.write(_encode(encoder, numbered.read(task.made_of[task.link()])))
        return Done(task.computed, torch.cat([shard.tensors["features"].clone() for shard in shards]))

    # The shards themselves are kept by the store; their copies are needed only until they have been read.
    with TemporaryDirectory() as out:
        plan = Plan(store, Path(out), stored, row_keys(stored, encoder.name, STORED), ROW_BYTES, numbers)
        parts = list(plan.run(features, title="features of images", unit="image"))
    store.trim()
    return torch.cat(parts)[positions(wanted, stored)].numpy()


def _encode(encoder: VisionEncoder, read: Iterator[np.ndarray]) -> Iterator[Tensors]:
    """The features of images."""
    while batch := list(islice(read, BATCH_SIZE)):
        yield {"features": torch.from_numpy(encoder.encode(batch))}
