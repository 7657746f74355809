"""The pictures by which to judge the data: some of the kept images, of the rejected ones, and of the near duplicates.

Kept images are those whose ids, read backwards, come first: an id is a hash of the picture, so that is a fair sample,
and the same one for the same data. (Read forwards it would not be fair: an id's beginning decides the split.) Rejected
ones are the first of each reason, those with a picture before those without.
"""

import hashlib
import heapq
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from latentloom.ingestion.shards import iterate_images
from latentloom.validation.inputs import Inputs
from latentloom.validation.tables import Tables

KEPT = 48
REJECTED = 8  # of each reason
NEAR_DUPLICATES = 12  # pairs, the most alike first
THUMBNAIL = 160  # pixels per side, at most


@dataclass(frozen=True)
class Tile:
    """One picture with its text; ``picture`` is a file name, or None where there is nothing to show."""

    picture: str | None
    text: str
    note: str = ""


@dataclass(frozen=True)
class NearDuplicates:
    first: Tile
    second: Tile
    distance: int  # bits of the perceptual hash


@dataclass(frozen=True)
class ContactSheets:
    kept: list[Tile]
    rejected: dict[str, list[Tile]]  # by reason
    near_duplicates: list[NearDuplicates]
    pictures: dict[str, bytes]  # file name -> PNG, of all tiles


def make_contact_sheets(inputs: Inputs, tables: Tables) -> ContactSheets:
    """Choose the pictures of all three sheets and read them, in one pass over the shards of images.

    Raises:
        UserError: when a shard of images is missing or damaged, naming it.
    """
    chosen = heapq.nsmallest(KEPT, tables.images["id"].unique(), key=lambda image_id: image_id[::-1])
    kept = tables.images[tables.images["id"].isin(chosen)].drop_duplicates("id").set_index("id").loc[chosen]
    alike = tables.near_duplicates.sort_values(["distance", "image_id", "twin_id"], kind="stable").head(NEAR_DUPLICATES)
    rejects = all_rejects(inputs).sort_values("preview", key=lambda previews: previews.isna(), kind="stable")
    rejects = rejects.groupby("reason", sort=False).head(REJECTED)

    wanted = {*chosen, *alike["image_id"], *alike["twin_id"], *rejects["id"].dropna()}
    shown = {image_id: _thumbnail(pixels) for image_id, pixels in iterate_images(inputs.folder / "images", wanted)}
    captions = _primary_captions(tables, wanted)
    pictures: dict[str, bytes] = {}

    def tile(png: bytes | None, text: str, note: str = "") -> Tile:
        if png is None:
            return Tile(None, text, note)
        name = f"{hashlib.sha256(png).hexdigest()[:16]}.png"
        pictures[name] = png
        return Tile(name, text, note)

    def member(image_id: str, split: str | float) -> Tile:
        return tile(shown.get(image_id), captions.get(image_id, image_id), split if isinstance(split, str) else "")

    rejected: dict[str, list[Tile]] = {}
    for row in rejects.itertuples():
        preview = row.preview if isinstance(row.preview, bytes) else shown.get(row.id)
        rejected.setdefault(row.reason, []).append(tile(preview, row.key, row.detail))
    return ContactSheets(
        kept=[tile(shown.get(row.Index), captions.get(row.Index, ""), row.split) for row in kept.itertuples()],
        rejected=rejected,
        near_duplicates=[
            NearDuplicates(member(row.image_id, row.split), member(row.twin_id, row.twin_split), row.distance)
            for row in alike.itertuples()
        ],
        pictures=pictures,
    )


def all_rejects(inputs: Inputs) -> pd.DataFrame:
    """The rejected samples, then the images whose latent was rejected: source, key, reason, detail, preview and id."""
    return pd.concat([inputs.rejects, inputs.latent_rejects], ignore_index=True)


def _thumbnail(pixels: np.ndarray) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _primary_captions(tables: Tables, image_ids: set[str]) -> dict[str, str]:
    pairs = tables.pairs[tables.pairs["image_id"].isin(image_ids) & (tables.pairs["position"] == 0)]
    captions = tables.captions[tables.captions["id"].isin(pairs["caption_id"])]
    texts = captions.drop_duplicates("id").set_index("id")["text"].fillna("")
    chosen: pd.Series = pairs.drop_duplicates("image_id").set_index("image_id")["caption_id"].map(texts).dropna()
    return chosen.to_dict()
