"""The scalar tables that the expectations look at, derived from what the earlier stages wrote.

sources          one row a source: found, kept and refused samples counted
images           one row a kept image, with its latent looked for
rejects          one row a refused sample, and one an image whose latent was refused
near_duplicates  one row a pair of images that look alike, with the splits of both
latents          one row an image in the cache: the index, with its captions counted and its shard looked for
captions         one row a distinct caption: the index, with its images counted and its shard looked for
pairs            one row an (image, caption), with both ends looked for
channels         one row a channel of the latents' statistics
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

from latentloom.validation.inputs import Inputs, LatentStats, Manifest

SPLITS = ["train", "validation"]


@dataclass(frozen=True)
class Tables:
    """The tables in the order in which they are reported."""

    sources: pd.DataFrame
    images: pd.DataFrame
    rejects: pd.DataFrame
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
    refused = inputs.latent_rejects["id"]

    images["encoded"] = _is_in(images["id"], latents["id"], refused)

    latents["finite"] &= _all_finite(latents, ["mean", "std", "abs_max"])
    latents["weight_usable"] = np.isfinite(latents["weight"]) & (latents["weight"] > 0)
    latents["shape"] = _shapes(latents)
    latents["shard_exists"] = _shard_exists(latents["shard"], inputs.folder / "latents")
    flipped = inputs.folder / "latents" / "flipped"
    latents["flipped_shard_exists"] = _shard_exists(latents["shard"], flipped) if inputs.latent_stats.flip else None
    latents["splits"] = _count_for(latents["id"], latents[["id", "split"]].drop_duplicates()["id"])
    drawn = latents["id"].map(images.drop_duplicates("id").set_index("id")["split"])
    latents["image_exists"] = drawn.notna()
    # Null, which expectations pass over, where another check finds the fault: here, the split itself or the image.
    judged = latents["split"].isin(SPLITS) & (latents["splits"] == 1) & latents["image_exists"]
    latents["split_as_ingested"] = (latents["split"] == drawn).astype("boolean").where(judged)
    latents["captions"] = _count_for(latents["id"], pairs["image_id"])
    primary = _count_for(latents["id"], pairs.loc[pairs["position"] == 0, "image_id"])
    latents["primary_captions"] = primary.where(latents["captions"] > 0)

    stripped = captions["text"].fillna("").str.strip()
    captions["blank"] = stripped == ""
    captions["length"] = stripped.str.len().where(~captions["blank"])
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    captions["shard_exists"] = _shard_exists(captions["shard"], inputs.folder / "text")
    captions["images"] = _count_for(captions["id"], pairs["caption_id"])

    pairs["image_exists"] = _is_in(pairs["image_id"], latents["id"], refused)
    pairs["caption_exists"] = _is_in(pairs["caption_id"], captions["id"])

    return Tables(
        sources=_sources(inputs.manifest, images, inputs.rejects),
        images=images,
        rejects=pd.concat([inputs.rejects, inputs.latent_rejects], ignore_index=True),
        near_duplicates=_near_duplicates(inputs.near_duplicates, latents),
        latents=latents,
        captions=captions,
        pairs=pairs,
        channels=_channels(inputs.latent_stats),
        dataset=_dataset(inputs),
    )


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _sources(manifest: Manifest, images: pd.DataFrame, rejects: pd.DataFrame) -> pd.DataFrame:
    """Also a source that the manifest does not name, if an image or a reject bears its name."""
    kept, refused = images["source"].value_counts(), rejects["source"].value_counts()
    found = pd.Series({source.name: source.found for source in manifest.sources}, dtype="int64")
    names = found.index.union(kept.index, sort=False).union(refused.index, sort=False)
    frame = pd.DataFrame({"id": names.astype("str")})
    for name, counts in {"found": found, "kept": kept, "refused": refused}.items():
        frame[name] = counts.reindex(names, fill_value=0).to_numpy()
    return frame.assign(unaccounted=frame["found"] - frame["kept"] - frame["refused"])


def _near_duplicates(near: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """With the splits as training reads them; no split where the latent was refused."""
    known = latents[_is_in(latents["id"], near["image_id"], near["twin_id"])]
    splits = known.drop_duplicates("id").set_index("id")["split"]
    ours, theirs = near["image_id"].map(splits), near["twin_id"].map(splits)
    return near.assign(
        split=ours,
        twin_split=theirs,
        held_out=near["image_id"].where(ours == "validation", near["twin_id"]),
        apart=ours.isin(SPLITS) & theirs.isin(SPLITS) & (ours != theirs),
    )


def _channels(stats: LatentStats) -> pd.DataFrame:
    mean, std = pd.Series(stats.mean, dtype="float64"), pd.Series(stats.std, dtype="float64")
    frame = pd.DataFrame({"mean": mean, "std": std})
    frame.insert(0, "id", [f"channel {number}" for number in range(len(frame))])
    frame["finite"] = _all_finite(frame, ["mean", "std"])
    return frame


def _dataset(inputs: Inputs) -> pd.DataFrame:
    latents, stats = inputs.latents, inputs.latent_stats
    in_train, in_validation = ((latents["split"] == split).sum() for split in SPLITS)
    refused = len(inputs.latent_rejects)
    return pd.DataFrame(
        {
            "train_images": [int(in_train)],
            "validation_share": [_share(in_validation, len(latents))],
            "refused_latents": [_share(refused, refused + len(latents))],
            "found_in_manifest": [inputs.manifest.found],
            "latent_rows_in_stats": [stats.rows],
            "train_rows_in_stats": [stats.train_rows],
            "refused_rows_in_stats": [stats.rejected],
            # How many channels the statistics cover, as "MEANS and STDS": "4 and 4".
            "channels_in_stats": [f"{len(stats.mean)} and {len(stats.std)}"],
            "caption_rows_in_stats": [inputs.text_stats.rows],
            "vae_fingerprint": [stats.vae.fingerprint],
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
