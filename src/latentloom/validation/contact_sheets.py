"""The pictures a person looks at to judge the data: some of the kept images, of the refused ones, and of the twins.

Kept images are those whose ids, read backwards, come first: an id is a hash of the picture, so that is a fair sample,
and the same one for the same data. (Read forwards it would not be fair: an id's beginning decides the split.) Refused
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
REFUSED = 8  # of each reason
TWINS = 12  # pairs, the most alike first
THUMBNAIL = 160  # pixels a side, at most


@dataclass(frozen=True)
class Tile:
    """One picture with its words; ``picture`` is a file name, or None where there is nothing to show."""

    picture: str | None
    text: str
    note: str = ""


@dataclass(frozen=True)
class Twins:
    image: Tile
    twin: Tile
    distance: int


@dataclass(frozen=True)
class ContactSheets:
    kept: list[Tile]
    refused: dict[str, list[Tile]]  # by reason
    twins: list[Twins]
    pictures: dict[str, bytes]  # file name -> PNG, of all tiles


def make_contact_sheets(inputs: Inputs, tables: Tables) -> ContactSheets:
    """Choose the pictures of all three sheets and read them, in one pass over the shards of images.

    Raises:
        FileNotFoundError, ValueError: when a shard of images is missing or damaged, naming it.
    """
    chosen = heapq.nsmallest(KEPT, tables.images["id"].unique(), key=lambda image_id: image_id[::-1])
    kept = tables.images[tables.images["id"].isin(chosen)].drop_duplicates("id").set_index("id").loc[chosen]
    alike = tables.near_duplicates.sort_values(["distance", "image_id", "twin_id"], kind="stable").head(TWINS)
    rejects = tables.rejects.sort_values("preview", key=lambda previews: previews.isna(), kind="stable")
    rejects = rejects.groupby("reason", sort=False).head(REFUSED)

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

    def twin(image_id: str, split: str | float) -> Tile:
        return tile(shown.get(image_id), captions.get(image_id, image_id), split if isinstance(split, str) else "")

    refused: dict[str, list[Tile]] = {}
    for row in rejects.itertuples():
        preview = row.preview if isinstance(row.preview, bytes) else shown.get(row.id)
        refused.setdefault(row.reason, []).append(tile(preview, row.key, row.detail))
    return ContactSheets(
        kept=[tile(shown.get(row.Index), captions.get(row.Index, ""), row.split) for row in kept.itertuples()],
        refused=refused,
        twins=[
            Twins(twin(row.image_id, row.split), twin(row.twin_id, row.twin_split), row.distance)
            for row in alike.itertuples()
        ],
        pictures=pictures,
    )


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
