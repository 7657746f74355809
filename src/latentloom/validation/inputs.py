"""What the earlier stages left in ``data``, read and checked for the form that each file must have.

    images/                   one row per kept image, without its pixels; how many samples each source held
    rejects.parquet           one row per rejected sample, some with a small picture
    near_duplicates.parquet   one row per pair of kept images that look alike
    latents/                  index, statistics, and one row per image whose latent was rejected
    text/                     index, statistics, and one row per (image, caption)

Whether the values make sense is for ``checks`` to say. Tensors are never opened: each index carries the mean, std and
finiteness of its tensors, taken when they were made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from latentloom.errors import UserError
from latentloom.files import read_json
from latentloom.ingestion.rejects import SCHEMA as REJECTS
from latentloom.ingestion.shards import MANIFEST, read_manifest, read_metadata

TEXT, NUMBER, COUNT, FLAG = pa.string(), pa.float32(), pa.int32(), pa.bool_()
NEAR_DUPLICATES = pa.schema({"image_id": TEXT, "twin_id": TEXT, "distance": COUNT})
LATENT_INDEX = pa.schema(
    {
        **dict.fromkeys(["id", "split", "shard"], TEXT),
        **dict.fromkeys(["weight", "mean", "std", "abs_max"], NUMBER),
        "finite": FLAG,
        **dict.fromkeys(["channels", "height", "width"], COUNT),
    }
)
LATENT_REJECTS = pa.schema(dict.fromkeys(["id", "source", "key", "reason", "detail"], TEXT))
TEXT_INDEX = pa.schema(
    {
        **dict.fromkeys(["id", "text", "shard"], TEXT),
        **dict.fromkeys(["mean", "std", "norm"], NUMBER),
        "finite": FLAG,
        "dim": COUNT,
    }
)
PAIRS = pa.schema({"image_id": TEXT, "caption_id": TEXT, "position": COUNT})

Document = TypeVar("Document", bound=BaseModel)


class Source(BaseModel):
    name: str
    weight: float
    found: int
    kept: int
    rejected: int
    attribution: str | None
    licence: str | None


class Manifest(BaseModel):
    found: int
    sources: list[Source]


class Encoder(BaseModel):
    fingerprint: str


class LatentStats(BaseModel):
    format_version: Literal[2]
    vae: Encoder
    flip: bool
    latent_shape: tuple[int, int, int]
    mean: list[float | None]
    std: list[float | None]


class TextStats(BaseModel):
    format_version: Literal[2]
    encoder: Encoder
    dim: int


@dataclass(frozen=True)
class Inputs:
    """The files of one ``data`` folder; a frame's columns are those of its schema above."""

    folder: Path
    manifest: Manifest
    images: pd.DataFrame  # id, split, source, width, height (of the original), in the shards' order
    rejects: pd.DataFrame
    near_duplicates: pd.DataFrame
    latents: pd.DataFrame
    latent_rejects: pd.DataFrame
    latent_stats: LatentStats
    captions: pd.DataFrame
    pairs: pd.DataFrame
    text_stats: TextStats


def read_inputs(folder: Path) -> Inputs:
    """Read everything in ``data`` but pixels and tensors.

    Raises:
        UserError: naming the file that is missing, damaged, or lacks a column or a value, and what to do.
    """
    images, latents, text = folder / "images", folder / "latents", folder / "text"
    return Inputs(
        folder=folder,
        manifest=_parse(images / MANIFEST, read_manifest(images), Manifest),
        images=read_metadata(images)[["id", "split", "source", "width", "height"]],
        rejects=_read_table(folder / "rejects.parquet", REJECTS, may_be_null=("preview",)),
        near_duplicates=_read_table(folder / "near_duplicates.parquet", NEAR_DUPLICATES),
        latents=_read_table(latents / "index.parquet", LATENT_INDEX),
        latent_rejects=_read_table(latents / "rejects.parquet", LATENT_REJECTS),
        latent_stats=_read_document(latents / "stats.json", LatentStats),
        captions=_read_table(text / "index.parquet", TEXT_INDEX, may_be_null=("text",)),
        pairs=_read_table(text / "pairs.parquet", PAIRS),
        text_stats=_read_document(text / "stats.json", TextStats),
    )


def _read_table(path: Path, schema: pa.Schema, may_be_null: tuple[str, ...] = ()) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path} does not exist: run `dvc repro`, which makes it")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in schema.names if name not in file.schema_arrow.names]
            if missing:
                raise pa.ArrowKeyError(f"no column {', '.join(missing)}")
            table = file.read(columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it and run `dvc repro`") from error
    for name in schema.names:
        nulls = table[name].null_count
        if nulls and name not in may_be_null and not pa.types.is_floating(schema.field(name).type):
            raise UserError(f"{path} lacks {name} in {nulls} of {len(table)} rows: delete it and run `dvc repro`")
    return table.to_pandas(ignore_metadata=True)


def _read_document(path: Path, model: type[Document]) -> Document:
    return _parse(path, read_json(path), model)


def _parse(path: Path, document: object, model: type[Document]) -> Document:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors())
        raise UserError(f"{path} cannot be used ({faults}): delete it and run `dvc repro`") from error
