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

from latentloom.encoding.cache import Plan, RowStore, row_key
from latentloom.encoding.shard_files import Tensors
from latentloom.encoding.vision_encoder import VisionEncoder
from latentloom.ingestion.shards import iterate_images, read_metadata
from latentloom.layout import state_folder, state_limit

BATCH_SIZE = 64
STORED = "float32"


def features_of(encoder: VisionEncoder, images: Path, ids: Sequence[str]) -> np.ndarray:
    """The features (N, dim), fp32, of the prepared images named ``ids``, in that order; known ones are not computed.

    Raises:
        UserError: when a file of ``images`` is damaged, or the encoder cannot be loaded.
    """
    wanted = set(ids)
    stored = [image for image in read_metadata(images)["id"] if image in wanted]  # the order in which they are read
    keys = [row_key(image, encoder.name, STORED) for image in stored]
    store = RowStore(state_folder("features"), state_limit())
    # The shards themselves are kept by the store; their copies are needed only until they have been read.
    with TemporaryDirectory() as out:
        plan = Plan(store, Path(out), stored, keys)
        batches = _encode(encoder, images, {stored[position] for position in plan.missing})
        shards = [shard.tensors["features"].clone() for shard in plan.write(batches, "features of images", "image")]
    store.trim()
    rows = {image: row for row, image in enumerate(stored)}
    return torch.cat(shards)[[rows[image] for image in ids]].numpy()


def _encode(encoder: VisionEncoder, images: Path, wanted: set[str]) -> Iterator[Tensors]:
    """The features of the images of ``wanted``, in the order they are stored."""
    read = iterate_images(images, wanted=wanted) if wanted else iter(())
    while batch := [pixels for _, pixels in islice(read, BATCH_SIZE)]:
        yield {"features": torch.from_numpy(encoder.encode(batch))}
