"""The scalar tables that the expectations look at, derived from what the encoders wrote.

Index files and statistics -> five frames, one row a thing that can be wrong:

    latents   one row an image: the index, with its captions counted and its shard looked for
    captions  one row a distinct caption: the index, with its images counted and its shard looked for
    pairs     one row an (image, caption), with both ends looked for
    channels  one row a channel of the latents' statistics
    dataset   one row for the whole: counts, shares and the encoders' fingerprints

Tensors are never opened: each index carries the mean, std and finiteness of its tensors, taken when they were made.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from latentloom.files import read_json

TEXT, NUMBER, COUNT, FLAG = pa.string(), pa.float32(), pa.int32(), pa.bool_()
LATENT_INDEX = pa.schema(
    {
        **dict.fromkeys(["id", "key", "split", "shard"], TEXT),
        **dict.fromkeys(["mean", "std", "abs_max"], NUMBER),
        "finite": FLAG,
        **dict.fromkeys(["channels", "height", "width"], COUNT),
    }
)
TEXT_INDEX = pa.schema(
    {
        **dict.fromkeys(["id", "text", "key", "shard"], TEXT),
        **dict.fromkeys(["mean", "std", "norm"], NUMBER),
        "finite": FLAG,
        "dim": COUNT,
    }
)
PAIRS = pa.schema({"image_id": TEXT, "caption_id": TEXT, "position": COUNT})


Stats = TypeVar("Stats", bound=BaseModel)


class Encoder(BaseModel):
    fingerprint: str


class LatentStats(BaseModel):
    format_version: Literal[1]
    vae: Encoder
    distribution: Literal["mean", "moments"]
    latent_shape: tuple[int, int, int]
    rows: int
    train_rows: int
    mean: list[float | None]
    std: list[float | None]


class TextStats(BaseModel):
    format_version: Literal[1]
    encoder: Encoder
    dim: int
    rows: int


@dataclass(frozen=True)
class CacheTables:
    latents: pd.DataFrame
    captions: pd.DataFrame
    pairs: pd.DataFrame
    channels: pd.DataFrame
    dataset: pd.DataFrame
    latent_stats: LatentStats
    text_stats: TextStats

    def frames(self) -> dict[str, pd.DataFrame]:
        return {name: getattr(self, name) for name in ("latents", "captions", "pairs", "channels", "dataset")}


def read_tables(latents: Path, text: Path) -> CacheTables:
    """Read both caches' indexes and statistics and derive the scalar columns.

    Args:
        latents: the folder with ``index.parquet``, ``stats.json`` and the shards of ``encode_images``.
        text: the folder with ``index.parquet``, ``pairs.parquet``, ``stats.json`` and the shards of ``encode_text``.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the file that is damaged, or lacks a column or a value it must have, and what to do.
    """
    latent_stats = _read_stats(latents / "stats.json", LatentStats)
    text_stats = _read_stats(text / "stats.json", TextStats)
    images = _read_index(latents / "index.parquet", LATENT_INDEX)
    captions = _read_index(text / "index.parquet", TEXT_INDEX, may_be_null=("text",))
    pairs = _read_index(text / "pairs.parquet", PAIRS)

    images["finite"] &= _all_finite(images, ["mean", "std", "abs_max"])
    images["shape"] = _shapes(images)
    images["shard_exists"] = _shard_exists(images["shard"], latents)
    images["splits"] = _count_for(images["id"], images[["id", "split"]].drop_duplicates()["id"])
    images["captions"] = _count_for(images["id"], pairs["image_id"])
    # Null, which expectations pass over, where there is no caption at all: that is another check's finding.
    primary = _count_for(images["id"], pairs.loc[pairs["position"] == 0, "image_id"])
    images["primary_captions"] = primary.where(images["captions"] > 0)

    stripped = captions["text"].fillna("").str.strip()
    captions["blank"] = stripped == ""
    captions["length"] = stripped.str.len().where(~captions["blank"])
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    captions["shard_exists"] = _shard_exists(captions["shard"], text)
    captions["images"] = _count_for(captions["id"], pairs["caption_id"])

    pairs["image_exists"] = pairs["image_id"].isin(images["id"])
    pairs["caption_exists"] = pairs["caption_id"].isin(captions["id"])

    in_train = int((images["split"] == "train").sum())
    in_validation = int((images["split"] == "validation").sum())
    dataset = pd.DataFrame(
        {
            "train_images": [in_train],
            "validation_share": [in_validation / len(images) if len(images) else math.nan],
            "latent_rows_in_stats": [latent_stats.rows],
            "train_rows_in_stats": [latent_stats.train_rows],
            "channels_in_stats": [_channels_in(latent_stats)],
            "caption_rows_in_stats": [text_stats.rows],
            "vae_fingerprint": [latent_stats.vae.fingerprint],
            "text_fingerprint": [text_stats.encoder.fingerprint],
        }
    )
    return CacheTables(images, captions, pairs, _channels(latent_stats), dataset, latent_stats, text_stats)


def _read_index(path: Path, schema: pa.Schema, may_be_null: tuple[str, ...] = ()) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `dvc repro`, which makes it")
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in schema.names if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        table = file.read(columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error}): delete it and run `dvc repro`") from error
    for name in schema.names:
        nulls = table[name].null_count
        if nulls and name not in may_be_null and not pa.types.is_floating(schema.field(name).type):
            raise ValueError(f"{path} lacks {name} in {nulls} of {len(table)} rows: delete it and run `dvc repro`")
    return table.to_pandas(ignore_metadata=True)


def _read_stats(path: Path, model: type[Stats]) -> Stats:
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors())
        raise ValueError(f"{path} cannot be used ({faults}): delete it and run `dvc repro`") from error


def _all_finite(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return np.isfinite(frame[columns].to_numpy(dtype="float32")).all(axis=1)


def _count_for(ids: pd.Series, mentions: pd.Series) -> pd.Series:
    """How often each of ``ids`` is mentioned."""
    return ids.map(mentions.value_counts()).fillna(0).astype("int64")


def _shapes(frame: pd.DataFrame) -> pd.Series:
    """Each row's shape as text such as ``4x16x16``."""
    columns = ["channels", "height", "width"]
    names = np.array([shape_text(shape) for shape in frame[columns].drop_duplicates().to_numpy()], dtype=object)
    return pd.Series(names[frame.groupby(columns, sort=False).ngroup()], index=frame.index, dtype="str")


def _shard_exists(shards: pd.Series, folder: Path) -> pd.Series:
    return shards.map({shard: (folder / shard).is_file() for shard in shards.unique()}).astype(bool)


def _channels(stats: LatentStats) -> pd.DataFrame:
    mean, std = pd.Series(stats.mean, dtype="float64"), pd.Series(stats.std, dtype="float64")
    frame = pd.DataFrame({"mean": mean, "std": std})
    frame.insert(0, "id", [f"channel {number}" for number in range(len(frame))])
    frame["finite"] = _all_finite(frame, ["mean", "std"])
    return frame


def _channels_in(stats: LatentStats) -> str:
    """How many channels the statistics cover, as ``MEANS and STDS``: ``4 and 4``."""
    return f"{len(stats.mean)} and {len(stats.std)}"


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
