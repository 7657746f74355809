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
from latentloom.ids import first_backwards, from_hex, positions, to_hex
from latentloom.ingestion.pngs import thumbnail
from latentloom.ingestion.shards import NumberedImages, sizes_of
from latentloom.validation.rejected import SHOWN as REJECTED
from latentloom.validation.report import ValidationReport
from latentloom.validation.tables import SPLITS, Columns, Data

KEPT = 48
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
    images, captions = data.images, data.tables["captions"].columns
    chosen = to_hex(images["id"][first_backwards(images["id"], KEPT)]).to_pylist()
    alike = _most_alike(data.near_duplicates)
    worst = data.reconstructions.dropna(subset="preview").sort_values("psnr", kind="stable")
    latents_rejected = to_hex(data.latents_rejected[:REJECTED]).to_pylist()
    wanted = {*chosen, *worst["id"], *latents_rejected}.union(*((one, other) for _, one, other in alike))
    shown = _shown(data, sorted(wanted))

    def rejected(reason: str) -> list[Tile]:
        return [
            Tile(
                _address(row.preview) if row.preview is not None or row.id not in shown else shown[row.id].picture,
                row.key,
                row.detail,
            )
            for row in data.rejects.shown(reason)
        ]

    sizes = {str(size): count for size, count in sizes_of(data.manifest).items()}
    return Overview(
        counts={
            "found": data.manifest["found"],
            "kept": len(images["id"]),
            "rejected": data.samples_rejected,
            **{split: int((images["split"] == code).sum()) for code, split in enumerate(SPLITS)},
            "latents": len(data.tables["latents"]),
            "latents rejected": len(data.latents_rejected),
            "captions": len(captions),
            "captions cut": int((captions["tokens"] > data.max_tokens).sum()),
            "pairs": data.pairs,
        },
        sources=[source | _of_source(data, source["name"]) for source in data.manifest["sources"]],
        histograms={
            "Length of captions, in characters": histogram(captions["length"], _ranges(LENGTHS)),
            "Shorter side of the originals, in pixels": histogram(
                pd.Series(np.minimum(images["width"], images["height"])), _ranges(SIZES)
            ),
            "Aspect ratio of the originals": histogram(pd.Series(images["width"]) / images["height"], ASPECTS),
            **({"Size of the images, as prepared": sizes} if "sizes" in data.manifest else {}),
        },
        kept=[shown[image_id] for image_id in chosen],
        rejected={reason: (count, rejected(reason)) for reason, count in data.rejects.ordered().items()},
        reconstructions=[
            (shown[row.id], Tile(_address(row.preview), "decoded from its latent"), row.psnr)
            for row in worst.itertuples()
        ],
        near_duplicates=[(shown[one], shown[other], distance) for distance, one, other in alike],
    )


def _most_alike(near: Columns) -> list[tuple[int, str, str]]:
    """The first pairs by distance and ids: distance, and both ids."""
    if not len(near["distance"]):
        return []
    nearest = np.sort(near["distance"], kind="stable")[:NEAR_DUPLICATES][-1]
    pairs = (
        (int(near["distance"][row]), near["image_id"][row].tobytes(), near["twin_id"][row].tobytes())
        for row in np.flatnonzero(near["distance"] <= nearest)
    )
    return [(distance, one.hex(), other.hex()) for distance, one, other in heapq.nsmallest(NEAR_DUPLICATES, pairs)]


def _shown(data: Data, ids: list[str]) -> dict[str, Tile]:
    """The images of ``ids`` that are there, with their primary captions and their splits."""
    places = positions(from_hex(ids), data.images["id"])
    order = np.argsort(places)  # read in the shards' order
    order = order[places[order] >= 0]
    numbered = NumberedImages(data.folder / "images")
    read = zip(order, numbered.read(places[order]), numbered.captions(places[order]), strict=True)
    return {
        ids[own]: Tile(_address(thumbnail(pixels)), captions[0], data.splits[data.images["split"][places[own]]])
        for own, pixels, captions in read
    }


def _of_source(data: Data, name: str) -> dict[str, int]:
    """How many images of a source are in each split."""
    code = data.sources.index(name) if name in data.sources else -1
    counts = np.bincount(data.images["split"][data.images["source"] == code], minlength=len(data.splits))
    return {split: int(count) for split, count in zip(data.splits, counts, strict=True) if count}


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
