"""The text cache: distinct captions -> embeddings.

data/images/*.parquet -> data/text/NNNNN.safetensors   `embedding` (M, dim), fp16, one row per distinct caption
                         data/text/index.parquet       one row per caption: its text, its row, statistics
                         data/text/pairs.parquet       which image has which caption; position 0 is the primary one
                         data/text/stats.json          what made it
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.cache import FORMAT_VERSION, EncodeCounts, Plan, RowStore, Shard, row_key
from latentloom.encoding.shard_files import INDEX, PAIRS, STATS, Tensors
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.errors import UserError
from latentloom.files import atomic_path, write_json
from latentloom.ingestion.shards import read_metadata

DTYPES = "float32->float16"
CAPTIONS_AT_ONCE = 256


def caption_id(text: str) -> str:
    """The id of a caption: the SHA-256 of its text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def encode_captions(encoder: TextEncoder, images: Path, out: Path, store: RowStore) -> EncodeCounts:
    """Embed every distinct caption of ``images`` into ``out``; rows that ``store`` knows are not computed again.

    The encoder is loaded when there is a row to compute.

    Raises:
        UserError: when there is no caption, or a file of ``images`` is damaged.
        WriteError: when the disk is full, naming the file.
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
    distinct = pairs.drop_duplicates("caption_id")
    texts, ids = distinct["text"].tolist(), distinct["caption_id"].tolist()
    keys = [row_key(own_id, encoder.fingerprint, encoder.pooling, str(encoder.max_tokens), DTYPES) for own_id in ids]
    if not ids:
        raise UserError(f"{images} holds no captions: run `dvc repro ingest`")
    plan = Plan(store, out, ids, keys)
    batches = _encode(encoder, [texts[position] for position in plan.missing])
    index = [
        _index(ids[shard.rows], texts[shard.rows], keys[shard.rows], shard)
        for shard in plan.write(batches, "encode_text", "caption")
    ]
    store.trim()
    with atomic_path(out / INDEX) as temporary:
        pd.concat(index, ignore_index=True).to_parquet(temporary, index=False)
    with atomic_path(out / PAIRS) as temporary:
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
    return EncodeCounts(len(ids), len(plan.missing))


def _encode(encoder: TextEncoder, texts: Sequence[str]) -> Iterator[Tensors]:
    """What the cache stores of each caption, a batch at a time: a row of every tensor, fp16."""
    for start in range(0, len(texts), CAPTIONS_AT_ONCE):
        embeddings = encoder.encode(texts[start : start + CAPTIONS_AT_ONCE])
        yield {"embedding": torch.from_numpy(embeddings).half()}


def _index(ids: list[str], texts: list[str], keys: list[str], shard: Shard) -> pd.DataFrame:
    values = shard.tensors["embedding"].float()
    columns = {
        "id": ids,
        "text": texts,
        "key": keys,
        "shard": shard.path.name,
        "row": np.arange(len(values), dtype=np.int32),
        "mean": values.mean(1).numpy(),
        "std": values.std(1, correction=0).numpy(),
        "norm": torch.linalg.vector_norm(values, dim=1).numpy(),
        "finite": values.isfinite().all(1).numpy(),
        "dim": np.int32(values.shape[1]),
    }
    return pd.DataFrame(columns)
