"""The text cache: distinct captions -> embeddings.

data/images/*.parquet -> data/text/NNNNN.safetensors   `embedding` (M, dim), fp16, one row per distinct caption;
                                                       where asked for, `tokens` (S, token_dim), fp16: the states of
                                                       the tokens of all captions, without padding, and `tokens_ends`
                         data/text/index.parquet       one row per caption: its text, its tokens before any were cut,
                                                       its row, statistics
                         data/text/pairs.parquet       which image has which caption; position 0 is the primary one,
                                                       and what is to be learnt more often comes more often
                         data/text/stats.json          what made it
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.cache import FORMAT_VERSION, EncodeCounts, Plan, RowStore, Shard, row_key
from latentloom.encoding.shard_files import ENDS, INDEX, PAIRS, STATS, TOKENS, Tensors, ragged
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.errors import UserError
from latentloom.files import atomic_path, write_json
from latentloom.ingestion.shards import read_metadata

DTYPES = "float32->float16"
CAPTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class CaptionCounts(EncodeCounts):
    """Also how many captions are longer than what the encoder reads of them."""

    cut: int = 0


def caption_id(text: str) -> str:
    """The id of a caption: the SHA-256 of its text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def encode_captions(
    encoder: TextEncoder, images: Path, out: Path, store: RowStore, *, tokens: bool = False
) -> CaptionCounts:
    """Embed every distinct caption of ``images`` into ``out``; rows that ``store`` knows are not computed again.

    With ``tokens``, the states of each caption's tokens are stored too. Rows with them have keys of their own.

    The encoder is loaded when there is a row to compute; what is cut is counted in any case.

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
    made_by = [encoder.fingerprint, encoder.pooling, str(encoder.max_tokens), DTYPES, *([TOKENS] if tokens else [])]
    keys = [row_key(own_id, *made_by) for own_id in ids]
    if not ids:
        raise UserError(f"{images} holds no captions: run `dvc repro ingest`")
    plan = Plan(store, out, ids, keys)
    batches = _encode(encoder, [texts[position] for position in plan.missing], tokens)
    index = pd.concat(
        [
            _index(encoder, ids[shard.rows], texts[shard.rows], keys[shard.rows], shard)
            for shard in plan.write(batches, "encode_text", "caption")
        ],
        ignore_index=True,
    )
    store.trim()
    with atomic_path(out / INDEX) as temporary:
        index.to_parquet(temporary, index=False)
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
            "token_dim": encoder.token_dim if tokens else None,
            "max_tokens": encoder.max_tokens,
            "rows": len(ids),
        },
    )
    return CaptionCounts(len(ids), len(plan.missing), cut=int((index["tokens"] > encoder.max_tokens).sum()))


def _encode(encoder: TextEncoder, texts: Sequence[str], tokens: bool) -> Iterator[Tensors]:
    """What the cache stores of each caption, a batch at a time: a row of every tensor, fp16."""
    for start in range(0, len(texts), CAPTIONS_AT_ONCE):
        encoded = encoder.encode_tokens(texts[start : start + CAPTIONS_AT_ONCE], states=tokens)
        states = ragged([torch.from_numpy(own).half() for own in encoded.states], TOKENS) if tokens else {}
        yield {"embedding": torch.from_numpy(encoded.pooled).half(), **states}


def _index(encoder: TextEncoder, ids: list[str], texts: list[str], keys: list[str], shard: Shard) -> pd.DataFrame:
    values = shard.tensors["embedding"].float()
    finite = values.isfinite().all(1).numpy()
    if TOKENS in shard.tensors:
        broken = (~shard.tensors[TOKENS].isfinite().all(1)).cumsum(0)
        up_to = broken[shard.tensors[TOKENS + ENDS] - 1]
        finite &= up_to.diff(prepend=up_to.new_zeros(1)).eq(0).numpy()
    columns = {
        "id": ids,
        "text": texts,
        "tokens": encoder.count_tokens(texts),
        "key": keys,
        "shard": shard.path.name,
        "row": np.arange(len(values), dtype=np.int32),
        "mean": values.mean(1).numpy(),
        "std": values.std(1, correction=0).numpy(),
        "norm": torch.linalg.vector_norm(values, dim=1).numpy(),
        "finite": finite,
        "dim": np.int32(values.shape[1]),
    }
    return pd.DataFrame(columns)
