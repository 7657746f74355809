"""The report for a browser, one page: the data at a glance, and each check with what was observed.

Great Expectations' own Data Docs load Bootstrap, jQuery and a logo from the network, name no data asset, link to pages
that nobody wrote, hold times and random ids, and of a check say no more than which percentage is unexpected. So
templates beside this file make the page: plain HTML and CSS with the pictures in it.

Kept images are those whose ids, read backwards, come first: an id is a hash of the picture, so that is a fair sample,
and the same one for the same data. (Read forwards it would not be fair: an id's beginning decides the split.) Rejected
ones are the first of each reason, those with a picture before those without. Everything is a function of the files
alone, without time or chance: the same data gives the same page.
"""

import base64
import heapq
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from latentloom.files import write_text
from latentloom.ingestion.shards import iterate_images, sizes_of, thumbnail
from latentloom.validation.report import ValidationReport
from latentloom.validation.tables import SPLITS, Data

KEPT = 48
REJECTED = 8  # of each reason
NEAR_DUPLICATES = 12  # pairs, the most alike first

LENGTHS = (1, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)  # characters
SIZES = (1, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # pixels
ASPECTS = {  # label -> the smallest width / height
    "tall, over 3:1": 0,
    "tall, 2:1 to 3:1": 1 / 3,
    "tall, 3:2 to 2:1": 1 / 2,
    "tall, 5:4 to 3:2": 2 / 3,
    "square, within 5:4": 4 / 5,
    "wide, 5:4 to 3:2": 5 / 4,
    "wide, 3:2 to 2:1": 3 / 2,
    "wide, 2:1 to 3:1": 2,
    "wide, over 3:1": 3,
}


@dataclass(frozen=True)
class Tile:
    """One picture, as a ``data:`` address, with its text; None where there is no picture to show."""

    picture: str | None
    text: str
    note: str = ""


@dataclass(frozen=True)
class Overview:
    counts: dict[str, int]
    sources: list[dict[str, Any]]  # the manifest's, with the images in each split
    histograms: dict[str, dict[str, int]]  # title -> label -> count
    kept: list[Tile]
    rejected: dict[str, tuple[int, list[Tile]]]  # of each reason, the most frequent first
    near_duplicates: list[tuple[Tile, Tile, int]]  # the first few, with the bits in which they differ
    reconstructions: list[tuple[Tile, Tile, float]]  # the worst: the image, the same decoded, and the PSNR in dB


def write_data_docs(folder: Path, report: ValidationReport, data: Data) -> None:
    """Write ``index.html`` into ``folder``, over what is there.

    Raises:
        UserError: when a shard of images is missing or damaged, naming it.
    """
    environment = Environment(
        loader=PackageLoader("latentloom.validation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("index.j2").render(report=report, overview=describe(data))
    write_text(folder / "index.html", page)


def describe(data: Data) -> Overview:
    """The data at a glance: counts, distributions, and the few pictures by which to judge it, which are read here."""
    images, near_duplicates = data.tables["images"], data.tables["near_duplicates"]
    chosen = heapq.nsmallest(KEPT, images["id"].unique(), key=lambda image_id: image_id[::-1])
    alike = near_duplicates.sort_values(["distance", "image_id", "twin_id"], kind="stable").head(NEAR_DUPLICATES)
    worst = data.reconstructions.dropna(subset="preview").sort_values("psnr", kind="stable")
    rejects = pd.concat([data.rejects, data.latent_rejects], ignore_index=True)
    wanted = {*chosen, *worst["id"], *alike["image_id"], *alike["twin_id"], *data.latent_rejects["id"].head(REJECTED)}
    pictures = {image_id: thumbnail(pixels) for image_id, pixels in iterate_images(data.folder / "images", wanted)}
    known = {row.id: row for row in images[images["id"].isin(wanted)].itertuples()}

    def tile(image_id: str) -> Tile:
        return Tile(_address(pictures[image_id]), known[image_id].caption, known[image_id].split)

    def rejected(reason: str) -> list[Tile]:
        of_reason = rejects[rejects["reason"] == reason].sort_values("preview", key=pd.isna, kind="stable")
        return [
            Tile(_address(pictures.get(row.id) if pd.isna(row.preview) else row.preview), row.key, row.detail)
            for row in of_reason.head(REJECTED).itertuples()
        ]

    sizes = {str(size): count for size, count in sizes_of(data.manifest).items()}
    reasons = rejects["reason"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    return Overview(
        counts={
            "found": data.manifest["found"],
            "kept": len(images),
            "rejected": len(data.rejects),
            **{split: int((images["split"] == split).sum()) for split in SPLITS},
            "latents": len(data.tables["latents"]),
            "latents rejected": len(data.latent_rejects),
            "captions": len(data.tables["captions"]),
            "captions cut": int((data.tables["captions"]["tokens"] > data.max_tokens).sum()),
            "pairs": data.pairs,
        },
        sources=[
            source | images.loc[images["source"] == source["name"], "split"].value_counts().to_dict()
            for source in data.manifest["sources"]
        ],
        histograms={
            "Length of captions, in characters": histogram(data.tables["captions"]["length"], _ranges(LENGTHS)),
            "Shorter side of the originals, in pixels": histogram(
                images[["width", "height"]].min(axis=1), _ranges(SIZES)
            ),
            "Aspect ratio of the originals": histogram(images["width"] / images["height"], ASPECTS),
            **({"Size of the images, as prepared": sizes} if "sizes" in data.manifest else {}),
        },
        kept=[tile(image_id) for image_id in chosen],
        rejected={reason: (count, rejected(reason)) for reason, count in reasons.items()},
        reconstructions=[
            (tile(row.id), Tile(_address(row.preview), "decoded from its latent"), row.psnr)
            for row in worst.itertuples()
        ],
        near_duplicates=[(tile(row.image_id), tile(row.twin_id), row.distance) for row in alike.itertuples()],
    )


def histogram(values: pd.Series, edges: dict[str, float]) -> dict[str, int]:
    """How many values are from each label's edge to the next; empty ones at both ends are left out."""
    counts, _ = np.histogram(values.dropna(), [*edges.values(), math.inf])
    filled = np.flatnonzero(counts)
    bars = list(zip(edges, counts.tolist(), strict=True))
    return dict(bars[filled[0] : filled[-1] + 1]) if len(filled) else {}


def _ranges(edges: tuple[int, ...]) -> dict[str, float]:
    """Edges of whole numbers with their labels: ``1–9`` and so on, the last ``1,000 or more``."""
    between = {f"{low:,}–{high - 1:,}": low for low, high in itertools.pairwise(edges)}
    return between | {f"{edges[-1]:,} or more": edges[-1]}


def _address(png: bytes | None) -> str | None:
    return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"
