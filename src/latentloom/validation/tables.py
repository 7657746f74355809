"""What the earlier stages left in ``data``, as the scalar tables that the checks look at.

images           one row per kept image, with its latent looked up
near_duplicates  one row per pair of images that look alike, with the splits of both
latents          one row per image in the cache: the index, with its image looked up and its captions counted
captions         one row per distinct caption: the index
channels         one row per channel of the latents' statistics
dataset          one row for the whole: counts, shares and the encoders' fingerprints

Pixels and tensors are never opened: each index carries the mean, std and finiteness of its tensors, taken when they
were made.
"""

import math
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
LATENTS = ["id", "split", "mean", "std", "abs_max", "finite"]
LATENT_REJECTS = ["id", "source", "key", "reason", "detail"]
CAPTIONS = ["id", "text", "mean", "std", "norm", "finite"]
PAIRS = ["image_id"]


@dataclass(frozen=True)
class Data:
    """One ``data`` folder: the tables by name, in the order in which they are reported, and what else pages show."""

    folder: Path
    tables: dict[str, pd.DataFrame]
    found: int  # samples in all sources
    sources: list[dict[str, Any]]  # the manifest's
    rejects: pd.DataFrame  # of samples: source, key, reason, detail, preview
    latent_rejects: pd.DataFrame  # of images whose latent is not finite: id, source, key, reason, detail
    pairs: int  # of an image and a caption


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
    latent_stats = _read_stats(folder / "latents/stats.json", "vae", "mean", "std")
    captions = _read_table(folder / "text/index.parquet", CAPTIONS)
    pairs = _read_table(folder / "text/pairs.parquet", PAIRS)
    text_stats = _read_stats(folder / "text/stats.json", "encoder")

    images["encoded"] = _is_in(images["id"], latents["id"], latent_rejects["id"])
    ingested = latents["id"].map(images.set_index("id")["split"])
    latents["split_as_ingested"] = latents["split"] == ingested
    latents["captions"] = latents["id"].map(pairs["image_id"].value_counts()).fillna(0).astype("int64")
    latents["finite"] &= _all_finite(latents, ["mean", "std", "abs_max"])
    captions["length"] = captions["text"].str.strip().str.len()
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    return Data(
        folder=folder,
        tables={
            "images": images,
            "near_duplicates": _near_duplicates(near_duplicates, latents),
            "latents": latents,
            "captions": captions,
            "channels": _channels(latent_stats),
            "dataset": _dataset(latents, latent_rejects, latent_stats, text_stats),
        },
        found=manifest["found"],
        sources=manifest["sources"],
        rejects=rejects,
        latent_rejects=latent_rejects,
        pairs=len(pairs),
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


def _near_duplicates(near: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """Whether the splits tell a pair apart, as training reads them, and the id of the image that is held out."""
    known = latents[_is_in(latents["id"], near["image_id"], near["twin_id"])]
    splits = known.set_index("id")["split"]
    first, second = near["image_id"].map(splits), near["twin_id"].map(splits)
    return near.assign(
        id=near["image_id"].where(first == "validation", near["twin_id"]),
        apart=first.isin(SPLITS) & second.isin(SPLITS) & (first != second),
    )


def _channels(stats: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame({"mean": stats["mean"], "std": stats["std"]}, dtype="float64")
    return frame.assign(id=[f"channel {number}" for number in frame.index])


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
