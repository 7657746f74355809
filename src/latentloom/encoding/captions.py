"""The text cache: distinct captions -> embeddings.

data/images/*.parquet -> data/text/NNNNN.safetensors   `embedding` (M, dim), fp16, one row a distinct caption
                         data/text/index.parquet       one row a caption: its text, its place, statistics
                         data/text/pairs.parquet       whose caption it is; position 0 is the primary one
                         data/text/stats.json          what made it
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from latentloom.encoding.latents import EncodeCounts
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.rows import FORMAT_VERSION, load_rows, row_key, write_shards
from latentloom.encoding.tensor_shards import Tensors
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.files import atomic_path, read_json, write_json
from latentloom.ingestion.shards import read_metadata

DTYPES = "float32->float16"
CAPTIONS_AT_ONCE = 256
STATS = "stats.json"


def caption_id(text: str) -> str:
    """The id of a caption: the SHA-256 of its text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def encode_captions(encoder: TextEncoder, images: Path, out: Path, store: RowStore) -> EncodeCounts:
    """Embed every distinct caption of ``images`` into ``out``; rows that ``store`` knows are not computed again.

    Raises:
        ValueError: when there is no caption, or a file of ``images`` is damaged.
        OSError: when the disk is full, naming the file.
    """
    (out / STATS).unlink(missing_ok=True)  # a folder without it is not finished
    metadata = read_metadata(images)
    pairs = metadata[["id", "captions"]].explode("captions", ignore_index=True)
    pairs = pd.DataFrame(
        {
            "image_id": pairs["id"],
            "caption_id": pairs["captions"].map(caption_id),
            "position": pairs.groupby("id", sort=False).cumcount().astype(np.int32),
            "text": pairs["captions"],
        }
    )
    texts = pairs.drop_duplicates("caption_id")["text"].tolist()
    ids = [caption_id(text) for text in texts]
    keys = [row_key(own_id, encoder.fingerprint, encoder.pooling, str(encoder.max_tokens), DTYPES) for own_id in ids]
    progress = tqdm(total=len(ids), desc="encode_text", unit="caption")

    def compute(positions: Sequence[int]) -> Iterator[Tensors]:
        for start in range(0, len(positions), CAPTIONS_AT_ONCE):
            batch = [texts[position] for position in positions[start : start + CAPTIONS_AT_ONCE]]
            yield {"embedding": torch.from_numpy(encoder.encode(batch)).half()}
            progress.update(len(batch))

    frames, encoded = [], 0
    for shard in write_shards(out, store, ids, keys, compute):
        part = slice(shard.positions.start, shard.positions.stop)
        frames.append(_index(ids[part], texts[part], keys[part], shard.path.name, shard.tensors["embedding"]))
        encoded += shard.computed
        progress.update(len(shard.positions) - shard.computed)
    progress.close()
    store.trim()
    if not frames:
        raise ValueError(f"{images} holds no captions: run `dvc repro ingest`")
    with atomic_path(out / "index.parquet") as temporary:
        pd.concat(frames, ignore_index=True).to_parquet(temporary, index=False)
    with atomic_path(out / "pairs.parquet") as temporary:
        pairs.drop(columns="text").to_parquet(temporary, index=False)
    write_json(
        out / STATS,
        {
            "format_version": FORMAT_VERSION,
            "encoder": {
                "reference": encoder.reference,
                "class": encoder.class_name,
                "fingerprint": encoder.fingerprint,
            },
            "dim": encoder.dim,
            "rows": len(ids),
        },
    )
    return EncodeCounts(len(ids), encoded)


def read_captions(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, torch.Tensor, dict]:
    """The cache as (index, pairs, embeddings (M, dim) fp16 in the index's order, statistics).

    Raises:
        ValueError: when a file is missing or damaged, naming it.
    """
    statistics = read_json(folder / STATS)
    frames = []
    for name in ("index.parquet", "pairs.parquet"):
        try:
            frames.append(pd.read_parquet(folder / name))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder / name} is missing or damaged ({error}); delete it and run `dvc repro`"
            ) from error
    index, pairs = frames
    embeddings = load_rows(folder, index["shard"].tolist(), index["row"].to_numpy())["embedding"]
    return index, pairs, embeddings, statistics


def _index(ids: list[str], texts: list[str], keys: list[str], shard: str, embeddings: torch.Tensor) -> pd.DataFrame:
    values = embeddings.float()
    frame = pd.DataFrame(
        {
            "id": ids,
            "text": texts,
            "key": keys,
            "shard": shard,
            "row": np.arange(len(values), dtype=np.int32),
            "mean": values.mean(1).numpy(),
            "std": values.std(1, correction=0).numpy(),
            "norm": torch.linalg.vector_norm(values, dim=1).numpy(),
            "finite": values.isfinite().all(1).numpy(),
        }
    )
    return frame.assign(dim=np.int32(values.shape[1]))
