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

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from latentloom.files import read_json, read_table
from latentloom.ingestion.rejects import SCHEMA as REJECTS
from latentloom.ingestion.shards import read_manifest, read_metadata

SPLITS = ["train", "validation"]
LATENT_REJECTS = ["id", "source", "key", "reason", "detail"]


@dataclass(frozen=True)
class Data:
    """One ``data`` folder: the tables by name, in the order in which they are reported, and what else pages show."""

    folder: Path
    tables: dict[str, pd.DataFrame]
    manifest: dict[str, Any]  # of the images
    rejects: pd.DataFrame  # of samples: source, key, reason, detail, preview
    latent_rejects: pd.DataFrame  # of images whose latent is not finite: id, source, key, reason, detail
    reconstructions: pd.DataFrame  # of sampled images: id, psnr, preview (of the worst)
    pairs: int  # of an image and a caption
    max_tokens: int  # that the text encoder read of a caption


def read_data(folder: Path) -> Data:
    """Read everything in ``data`` but pixels and tensors.

    Raises:
        UserError: naming the file that is missing, damaged, or lacks a column, and what to do.
    """
    manifest, images = read_manifest(folder / "images"), read_metadata(folder / "images")
    images["caption"] = [captions[0] for captions in images.pop("captions")]
    rejects = read_table(folder / "rejects.parquet", REJECTS.names)
    near_duplicates = read_table(folder / "near_duplicates.parquet", ["image_id", "twin_id", "distance"])
    latents = read_table(folder / "latents/index.parquet", ["id", "split", "mean", "std", "abs_max", "finite"])
    latent_rejects = read_table(folder / "latents/rejects.parquet", LATENT_REJECTS)
    reconstructions = read_table(folder / "latents/reconstructions.parquet", ["id", "psnr", "preview"])
    latent_stats = read_json(folder / "latents/stats.json")
    captions = read_table(folder / "text/index.parquet", ["id", "text", "tokens", "mean", "std", "norm", "finite"])
    pairs = read_table(folder / "text/pairs.parquet", ["image_id"])
    text_stats = read_json(folder / "text/stats.json")

    means = latent_stats["mean"]
    names = [f"channel {number}" for number in range(len(means))]
    images["encoded"] = _is_in(images["id"], latents["id"], latent_rejects["id"])
    ingested = latents["id"].map(images.set_index("id")["split"])
    latents["split_as_ingested"] = latents["split"] == ingested
    latents["captions"] = latents["id"].map(pairs["image_id"].value_counts()).fillna(0).astype("int64")
    latents["finite"] &= _all_finite(latents, ["mean", "std", "abs_max"])
    captions["length"] = captions["text"].str.strip().str.len()
    captions["finite"] &= _all_finite(captions, ["mean", "std", "norm"])
    captions["told_apart"] = _told_apart(captions, text_stats["max_tokens"])
    return Data(
        folder=folder,
        tables={
            "images": images,
            "near_duplicates": _near_duplicates(near_duplicates, latents),
            "latents": latents,
            "captions": captions,
            "channels": pd.DataFrame({"mean": means, "std": latent_stats["std"], "id": names}),
            "dataset": pd.DataFrame(
                {
                    **{f"{split}_images": [int((latents["split"] == split).sum())] for split in SPLITS},
                    "validation_share": [(latents["split"] == "validation").mean()],
                    "rejected_latents": [len(latent_rejects) / max(len(latent_rejects) + len(latents), 1)],
                    "vae_fingerprint": [latent_stats["vae"]["fingerprint"]],
                    "text_fingerprint": [text_stats["encoder"]["fingerprint"]],
                    "reconstruction_psnr": [reconstructions["psnr"].mean()],
                }
            ),
        },
        manifest=manifest,
        rejects=rejects,
        latent_rejects=latent_rejects,
        reconstructions=reconstructions,
        pairs=len(pairs),
        max_tokens=text_stats["max_tokens"],
    )


def _near_duplicates(near: pd.DataFrame, latents: pd.DataFrame) -> pd.DataFrame:
    """Whether the splits tell a pair apart, as training reads them, and the id of the image that is held out."""
    known = latents[_is_in(latents["id"], near["image_id"], near["twin_id"])]
    splits = known.set_index("id")["split"]
    first, second = near["image_id"].map(splits), near["twin_id"].map(splits)
    return near.assign(
        id=near["image_id"].where(first == "validation", near["twin_id"]),
        apart=first.isin(SPLITS) & second.isin(SPLITS) & (first != second),
    )


def _told_apart(captions: pd.DataFrame, max_tokens: int) -> np.ndarray:
    """Whether no caption of other words has the same embedding, by its statistics.

    Words that differ in case, accents or spaces alone are the same; captions that were cut have a check of their own.
    """
    embedding = ["mean", "std", "norm"]
    alike = captions[
        captions.duplicated(embedding, keep=False) & captions["finite"] & (captions["tokens"] <= max_tokens)
    ]
    wordings = alike.assign(words=alike["text"].map(_words)).groupby(embedding)["words"].transform("nunique")
    return ~captions.index.isin(wordings.index[wordings > 1])


def _words(text: str) -> str:
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return " ".join(plain.casefold().split())


def _all_finite(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return np.isfinite(frame[columns].to_numpy(dtype="float32")).all(axis=1)


def _is_in(ids: pd.Series, *among: pd.Series) -> np.ndarray:
    """Whether each of ``ids`` is in any of ``among``; pandas' own ``isin`` takes seconds for a million strings."""
    return pc.is_in(pa.array(ids), value_set=pa.array(pd.concat(among))).to_numpy(zero_copy_only=False)
