"""What the earlier stages left in ``data``, as the scalar tables that the checks look at.

images           one row per kept image, with its latent looked up
near_duplicates  one row per pair of images that look alike, with the splits of both
latents          one row per image in the cache: the index, with its captions counted and its shard looked up
captions         one row per distinct caption: the index, with its shard looked up
pairs            one row per (image, caption), with the image looked up
channels         one row per channel of the latents' statistics
dataset          one row for the whole: counts, shares and the encoders' fingerprints

Pixels and tensors are never opened: each index carries the mean, std and finiteness of its tensors, taken when they
were made.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentloom.errors import UserError
from latentloom.files import read_json
from latentloom.ingestion.rejects import SCHEMA as REJECTS
from latentloom.ingestion.shards import read_manifest, read_metadata

SPLITS = ["train", "validation"]
NEAR_DUPLICATES = ["image_id", "twin_id", "distance"]
LATENT_SHAPE = ["channels", "height", "width"]
LATENTS = ["id", "split", "shard", "weight", "mean", "std", "abs_max", "finite", *LATENT_SHAPE]
LATENT_REJECTS = ["id", "source", "key", "reason", "detail"]
CAPTIONS = ["id", "text", "shard", "mean", "std", "norm", "finite", "dim"]
PAIRS = ["image_id", "caption_id"]


@dataclass(frozen=True)
class Data:
    """One ``data`` folder: the tables by name, in the order in which they are reported, and what else pages show."""

    folder: Path
    tables: dict[str, pd.DataFrame]
    found: int  # samples in all sources
    sources: list[dict[str, Any]]  # the manifest's
    rejects: pd.DataFrame  # of samples: source, key, reason, detail, preview
    latent_rejects: pd.DataFrame  # of images whose latent is not finite: id, source, key, reason, detail
    latent_shape: str  # as stats.json says, such as "4x16x16"
    embedding_dim: int


def read_data(folder: Path) -> Data:
    """Read everything in ``data`` but pixels and tensors.

    Raises:
        UserError: naming the file that is missing, damaged, or lacks a column, and what to do.
    """
    manifest = read_manifest(folder / "images")
    images = read_metadata(folder / "images")
    images["caption"] = [captions[0] for captions in images.pop("captions")]
    rejects = _read_table(folder / "rejects.parquet", REJECTS.names)
    near_duplicates = _read_table(folder / "near_duplicates.parquet", NEAR_DUPLICATES)
    latents = _read_table(folder / "latents/index.parquet", LATENTS)
    latent_rejects = _read_table(folder / "latents/rejects.parquet", LATENT_REJECTS)
    latent_stats = _read_stats(folder / "latents/stats.json", "vae", "flip", "latent_shape", "mean", "std")
    captions = _read_table(folder / "text/index.parquet", CAPTIONS)
    pairs = _read_table(folder / "text/pairs.parquet", PAIRS)
    text_stats = _read_stats(folder / "text/stats.json", "encoder", "dim")

    encoded = latents["id"], latent_rejects["id"]
    images["encoded"] = _is_in(images["id"], *encoded)
    pairs["image_exists"] = _is_in(pairs["image_id"], *encoded)
    _look_up_latents(latents, images, pairs, folder / "latents", latent_stats["flip"])
    _look_up_captions(captions, folder / "text")
    return Data(
        folder=folder,
        tables={
            "images": images,
            "near_duplicates": _near_duplicates(near_duplicates, latents),
            "latents": latents,
            "captions": captions,
            "pairs": pairs,
            "channels": _channels(latent_stats),
            "dataset": _dataset(latents, latent_rejects, latent_stats, text_stats),
        },
        found=manifest["found"],
        sources=manifest["sources"],
        rejects=rejects,
        latent_rejects=latent_rejects,
        latent_shape=_shape_text(latent_stats["latent_shape"]),
        embedding_dim=text_stats["dim"],
    )


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path} does not exist: run `dvc repro`, which makes it")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise pa.ArrowKeyError(f"no column {', '.join(missing)}")
            return file.read(columns=columns).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it and run `dvc repro`") from error


def _read_stats(path: Path, *needed: str) -> dict[str, Any]:
    stats = read_json(path)
    if missing := [name for name in needed if stats.get(name) is None]:
        raise UserError(f"{path} cannot be used (no {', '.join(missing)}): delete it and run `dvc repro`")
    return stats


def _look_up_latents(
    latents: pd.DataFrame, images: pd.DataFrame, pairs: pd.DataFrame, folder: Path, flip: bool
) -> None:
    latents["finite"] &= _all_finite(latents, ["mean", "std", "abs_max"])
    latents["weight_usable"] = np.isfinite(latents["weight"]) & (latents["weight"] > 0)
    latents["shape"] = _shapes(latents)
    latents["shard_exists"] = _shard_exists(latents["shard"], folder)
    latents["flipped_shard_exists"] = _shard_exists(latents["shard"], folder / "flipped") if flip else None
    ingested = latents["id"].map(images.drop_duplicates("id").set_index("id")["split"])
    latents["image_exists"] = ingested.notna()
    # Null, which checks skip, where another check finds the fault: the image is gone.
    latents["split_as_ingested"] = (latents["split"] == ingested).astype("boolean").where(latents["image_exists"])
    latents["captions"] = latents["id"].map(pairs["image_id"].value_counts()).fillna(0).astype("int64")


def _look_up_captions(captions: pd.DataFrame, folder: Path) -> None:
    stripped = captions["text"].fillna("").str.strip()
    captions["blank"] = stripped == ""
    captions["length"] = stripped.str.len().where(~captions["blank"])
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    captions["shard_exists"] = _shard_exists(captions["shard"], folder)


def _near_duplicates(near: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """With the splits as training reads them; no split where the latent was rejected."""
    known = latents[_is_in(latents["id"], near["image_id"], near["twin_id"])]
    splits = known.drop_duplicates("id").set_index("id")["split"]
    first, second = near["image_id"].map(splits), near["twin_id"].map(splits)
    return near.assign(
        held_out=near["image_id"].where(first == "validation", near["twin_id"]),
        apart=first.isin(SPLITS) & second.isin(SPLITS) & (first != second),
    )


def _channels(stats: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame({"mean": stats["mean"], "std": stats["std"]}, dtype="float64")
    frame.insert(0, "id", [f"channel {number}" for number in range(len(frame))])
    frame["finite"] = _all_finite(frame, ["mean", "std"])
    return frame


def _dataset(
    latents: pd.DataFrame, rejected: pd.DataFrame, latent_stats: dict[str, Any], text_stats: dict[str, Any]
) -> pd.DataFrame:
    in_train, in_validation = (int((latents["split"] == split).sum()) for split in SPLITS)
    return pd.DataFrame(
        {
            "train_images": [in_train],
            "validation_images": [in_validation],
            "validation_share": [_share(in_validation, len(latents))],
            "rejected_latents": [_share(len(rejected), len(rejected) + len(latents))],
            "vae_fingerprint": [latent_stats["vae"]["fingerprint"]],
            "text_fingerprint": [text_stats["encoder"]["fingerprint"]],
        }
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _all_finite(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return np.isfinite(frame[columns].to_numpy(dtype="float32")).all(axis=1)


def _is_in(ids: pd.Series, *among: pd.Series) -> np.ndarray:
    """Whether each of ``ids`` is in any of ``among``; pandas' own ``isin`` takes seconds for a million strings."""
    return pc.is_in(pa.array(ids), value_set=pa.array(pd.concat(among))).to_numpy(zero_copy_only=False)


def _shapes(latents: pd.DataFrame) -> pd.Series:
    """Each row's shape as text such as ``4x16x16``."""
    names = np.array([_shape_text(shape) for shape in latents[LATENT_SHAPE].drop_duplicates().to_numpy()], dtype=object)
    return pd.Series(names[latents.groupby(LATENT_SHAPE, sort=False).ngroup()], index=latents.index, dtype="str")


def _shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _shard_exists(shards: pd.Series, folder: Path) -> pd.Series:
    return shards.map({shard: (folder / shard).is_file() for shard in shards.unique()}).astype(bool)
