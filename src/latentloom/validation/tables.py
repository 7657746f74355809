"""The scalar tables that the checks look at, derived from what the earlier stages wrote.

images           one row per kept image, with its latent looked up
near_duplicates  one row per pair of images that look alike, with the splits of both
latents          one row per image in the cache: the index, with its captions counted and its shard looked up
captions         one row per distinct caption: the index, with its shard looked up
pairs            one row per (image, caption), with the image looked up
channels         one row per channel of the latents' statistics
dataset          one row for the whole: counts, shares and the encoders' fingerprints
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from latentloom.validation.inputs import Inputs, LatentStats

SPLITS = ["train", "validation"]


@dataclass(frozen=True)
class Tables:
    """The tables in the order in which they are reported."""

    images: pd.DataFrame
    near_duplicates: pd.DataFrame
    latents: pd.DataFrame
    captions: pd.DataFrame
    pairs: pd.DataFrame
    channels: pd.DataFrame
    dataset: pd.DataFrame

    def frames(self) -> dict[str, pd.DataFrame]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def derive_tables(inputs: Inputs) -> Tables:
    """The tables of ``inputs``, whose frames are extended in place."""
    images, latents, captions, pairs = inputs.images, inputs.latents, inputs.captions, inputs.pairs
    rejected = inputs.latent_rejects["id"]

    images["encoded"] = _is_in(images["id"], latents["id"], rejected)

    latents["finite"] &= _all_finite(latents, ["mean", "std", "abs_max"])
    latents["weight_usable"] = np.isfinite(latents["weight"]) & (latents["weight"] > 0)
    latents["shape"] = _shapes(latents)
    latents["shard_exists"] = _shard_exists(latents["shard"], inputs.folder / "latents")
    flipped = inputs.folder / "latents" / "flipped"
    latents["flipped_shard_exists"] = _shard_exists(latents["shard"], flipped) if inputs.latent_stats.flip else None
    ingested = latents["id"].map(images.drop_duplicates("id").set_index("id")["split"])
    latents["image_exists"] = ingested.notna()
    # Null, which checks skip, where another check finds the fault: the image is gone.
    latents["split_as_ingested"] = (latents["split"] == ingested).astype("boolean").where(latents["image_exists"])
    latents["captions"] = latents["id"].map(pairs["image_id"].value_counts()).fillna(0).astype("int64")

    stripped = captions["text"].fillna("").str.strip()
    captions["blank"] = stripped == ""
    captions["length"] = stripped.str.len().where(~captions["blank"])
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    captions["shard_exists"] = _shard_exists(captions["shard"], inputs.folder / "text")

    pairs["image_exists"] = _is_in(pairs["image_id"], latents["id"], rejected)

    return Tables(
        images=images,
        near_duplicates=_near_duplicates(inputs.near_duplicates, latents),
        latents=latents,
        captions=captions,
        pairs=pairs,
        channels=_channels(inputs.latent_stats),
        dataset=_dataset(inputs),
    )


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _near_duplicates(near: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """With the splits as training reads them; no split where the latent was rejected."""
    known = latents[_is_in(latents["id"], near["image_id"], near["twin_id"])]
    splits = known.drop_duplicates("id").set_index("id")["split"]
    first, second = near["image_id"].map(splits), near["twin_id"].map(splits)
    return near.assign(
        split=first,
        twin_split=second,
        held_out=near["image_id"].where(first == "validation", near["twin_id"]),
        apart=first.isin(SPLITS) & second.isin(SPLITS) & (first != second),
    )


def _channels(stats: LatentStats) -> pd.DataFrame:
    mean, std = pd.Series(stats.mean, dtype="float64"), pd.Series(stats.std, dtype="float64")
    frame = pd.DataFrame({"mean": mean, "std": std})
    frame.insert(0, "id", [f"channel {number}" for number in range(len(frame))])
    frame["finite"] = _all_finite(frame, ["mean", "std"])
    return frame


def _dataset(inputs: Inputs) -> pd.DataFrame:
    images, rejected = len(inputs.latents), len(inputs.latent_rejects)
    in_train, in_validation = (int((inputs.latents["split"] == split).sum()) for split in SPLITS)
    return pd.DataFrame(
        {
            "train_images": [in_train],
            "validation_images": [in_validation],
            "validation_share": [_share(in_validation, images)],
            "rejected_latents": [_share(rejected, rejected + images)],
            "vae_fingerprint": [inputs.latent_stats.vae.fingerprint],
            "text_fingerprint": [inputs.text_stats.encoder.fingerprint],
        }
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _all_finite(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return np.isfinite(frame[columns].to_numpy(dtype="float32")).all(axis=1)


def _is_in(ids: pd.Series, *among: pd.Series) -> np.ndarray:
    """Whether each of ``ids`` is in any of ``among``; pandas' own ``isin`` takes seconds for a million strings."""
    return pc.is_in(pa.array(ids), value_set=pa.array(pd.concat(among))).to_numpy(zero_copy_only=False)


def _shapes(frame: pd.DataFrame) -> pd.Series:
    """Each row's shape as text such as ``4x16x16``."""
    columns = ["channels", "height", "width"]
    names = np.array([shape_text(shape) for shape in frame[columns].drop_duplicates().to_numpy()], dtype=object)
    return pd.Series(names[frame.groupby(columns, sort=False).ngroup()], index=frame.index, dtype="str")


def _shard_exists(shards: pd.Series, folder: Path) -> pd.Series:
    return shards.map({shard: (folder / shard).is_file() for shard in shards.unique()}).astype(bool)
