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
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from latentloom.encoding.cache import FORMAT_VERSION, Done, EncodeCounts, Plan, Shard, Task, row_keys
from latentloom.encoding.index_files import ROW_GROUP, STRING, shard_names, write_table
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import ENDS, INDEX, PAIRS, STATS, TOKENS, Tensors, ragged
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.errors import UserError
from latentloom.files import write_json
from latentloom.ids import ID_BYTES, positions, to_hex
from latentloom.ingestion.shards import metadata_batches

DTYPES = "float32->float16"
CAPTIONS_AT_ONCE = 256
BYTES_PER_TOKEN = 4  # of a caption, about: what it takes with its tokens' states is needed before they are counted

FIGURES = pa.schema(  # of each row, in the order of the shards
    [
        ("tokens", pa.int32()),
        ("number", pa.int32()),  # of the shard
        ("row", pa.int32()),
        *((name, pa.float32()) for name in ("mean", "std", "norm")),
        ("finite", pa.bool_()),
        ("dim", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        *((name, STRING) for name in ("id", "text")),
        FIGURES.field("tokens"),
        *((name, STRING) for name in ("key", "shard")),
        *list(FIGURES)[2:],
    ]
)
PAIR_COLUMNS = pa.schema([("image_id", STRING), ("caption_id", STRING), ("position", pa.int32())])


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
    captions = Captions(images, out / PAIRS)
    if not len(captions.ids):
        raise UserError(f"{images} holds no captions: run `dvc repro ingest`")
    plan = plan_captions(encoder, captions, out, store, tokens=tokens)
    function = partial(make_shards, tokens)
    parts = plan.run(function, encoder=encoder, title="encode_text", unit="caption")
    figures = pa.concat_tables(parts).combine_chunks()
    store.trim()
    write_table(out / INDEX, SCHEMA, _index(captions, plan.keys, figures))
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
            "rows": len(captions.ids),
        },
    )
    cut = pc.sum(pc.greater(figures["tokens"], encoder.max_tokens)).as_py()
    return CaptionCounts(len(captions.ids), plan.computed, cut=cut)


class Captions:
    """The distinct captions of all images, in the order in which they are first met; writes which image has which.

    Of captions that several images have, only hashes are held more than once, and only while they are looked for.

    Attributes:
        ids: uint8 (M, 32).
        texts: strings (M,), as Arrow has them: their bytes, and where each begins.
    """

    def __init__(self, images: Path, pairs: Path) -> None:
        hashes = [np.empty((0, ID_BYTES), np.uint8)]
        write_table(pairs, PAIR_COLUMNS, _pairs(images, hashes))
        ids = np.concatenate(hashes)
        hashes.clear()
        is_first = positions(ids, ids) == np.arange(len(ids))
        self.ids, texts, start = ids[is_first], [], 0
        for batch in metadata_batches(images, ["captions"]):
            own = batch["captions"].flatten()
            texts.append(own.filter(pa.array(is_first[start : start + len(own)])))
            start += len(own)
        self.texts = pa.chunked_array(texts, pa.string())


def _pairs(images: Path, hashes: list[np.ndarray]) -> Iterator[pa.Table]:
    """Which image has which caption, in parts; ``hashes`` is given the captions' ids."""
    for batch in metadata_batches(images, ["id", "captions"]):
        hashes.append(_hashes(batch["captions"].flatten()))
        owner = pc.list_parent_indices(batch["captions"]).to_numpy()
        firsts = np.searchsorted(owner, owner)
        columns = [batch["id"].take(pa.array(owner)), to_hex(hashes[-1]), np.arange(len(owner)) - firsts]
        yield pa.table(dict(zip(PAIR_COLUMNS.names, columns, strict=True))).cast(PAIR_COLUMNS)


def plan_captions(encoder: TextEncoder, captions: Captions, out: Path, store: RowStore, *, tokens: bool) -> Plan:
    """Where the rows of all captions come from."""
    made_by = [encoder.fingerprint, encoder.pooling, str(encoder.max_tokens), DTYPES, *([TOKENS] if tokens else [])]
    row_bytes: int | np.ndarray = 2 * encoder.dim
    if tokens:
        about = pc.binary_length(captions.texts).to_numpy() // BYTES_PER_TOKEN + 2
        row_bytes = row_bytes + 2 * encoder.token_dim * np.minimum(about, encoder.max_tokens)
    return Plan(store, out, captions.ids, row_keys(captions.ids, *made_by), row_bytes, captions.texts)


def make_shards(tokens: bool, encoder: TextEncoder, task: Task) -> Done:
    """Make the shards of a task, and give the `FIGURES` of their rows."""
    batches = _encode(encoder, task.made_of.take(task.link()).to_pylist(), tokens)
    figures = [_figures(encoder, task.made_of[shard.rows].to_pylist(), shard) for shard in task.write(batches)]
    return Done(task.computed, pa.concat_tables(figures))


def _hashes(texts: pa.Array) -> np.ndarray:
    """The ids of captions, uint8 (N, 32), each text hashed once."""
    distinct = texts.dictionary_encode()
    hashes = b"".join(bytes.fromhex(caption_id(text)) for text in distinct.dictionary.to_pylist())
    return np.frombuffer(hashes, np.uint8).reshape(-1, ID_BYTES)[distinct.indices.to_numpy()]


def _encode(encoder: TextEncoder, texts: Sequence[str], tokens: bool) -> Iterator[Tensors]:
    """What the cache stores of each caption, a batch at a time: a row of every tensor, fp16."""
    for start in range(0, len(texts), CAPTIONS_AT_ONCE):
        encoded = encoder.encode_tokens(texts[start : start + CAPTIONS_AT_ONCE], states=tokens)
        states = ragged([torch.from_numpy(own).half() for own in encoded.states], TOKENS) if tokens else {}
        yield {"embedding": torch.from_numpy(encoded.pooled).half(), **states}


def _figures(encoder: TextEncoder, texts: list[str], shard: Shard) -> pa.Table:
    values = shard.tensors["embedding"].float()
    finite = values.isfinite().all(1).numpy()
    if TOKENS in shard.tensors:
        broken = (~shard.tensors[TOKENS].isfinite().all(1)).cumsum(0)
        up_to = broken[shard.tensors[TOKENS + ENDS] - 1]
        finite &= up_to.diff(prepend=up_to.new_zeros(1)).eq(0).numpy()
    columns = {
        "tokens": encoder.count_tokens(texts),
        "number": np.full(len(values), shard.number),
        "row": np.arange(len(values)),
        "mean": values.mean(1).numpy(),
        "std": values.std(1, correction=0).numpy(),
        "norm": torch.linalg.vector_norm(values, dim=1).numpy(),
        "finite": finite,
        "dim": np.full(len(values), values.shape[1]),
    }
    return pa.table(columns, FIGURES)


def _index(captions: Captions, keys: np.ndarray, figures: pa.Table) -> Iterator[pa.Table]:
    """The index, in parts."""
    for start in range(0, len(keys), ROW_GROUP):
        own = slice(start, start + ROW_GROUP)
        part = figures[own]
        columns = {name: part[name] for name in part.column_names} | {
            "id": to_hex(captions.ids[own]),
            "text": captions.texts[own],
            "key": to_hex(keys[own]),
            "shard": shard_names(part["number"]),
        }
        yield pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)
