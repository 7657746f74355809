"""The data at a glance, for the first page: counts, distributions, and what was rejected and why.

Everything is a function of the files alone, without time or chance: the same data gives the same page.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from latentloom.validation.contact_sheets import ContactSheets, NearDuplicates, Tile, all_rejects, make_contact_sheets
from latentloom.validation.inputs import Inputs
from latentloom.validation.tables import SPLITS, Tables

MOST_BARS = 15
SIZES = [1, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]  # pixels
RATIOS = ["3:1", "2:1", "3:2", "5:4"]  # longer side : shorter side, the most extreme first


@dataclass(frozen=True)
class Bar:
    label: str
    count: int
    length: float  # percent of the longest bar
    share: float  # percent of all that is counted


@dataclass(frozen=True)
class SourceCounts:
    """What came of one source, in samples and images; the rest is from the manifest."""

    name: str
    found: int
    kept: int
    rejected: int
    train: int
    validation: int
    weight: float
    attribution: str | None
    licence: str | None


@dataclass(frozen=True)
class Rejections:
    """One reason: how many, the first of them in words, and some in pictures."""

    bar: Bar
    key: str
    detail: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Overview:
    counts: dict[str, int]
    sources: list[SourceCounts]
    caption_lengths: list[Bar]
    sizes: list[Bar]
    aspects: list[Bar]
    rejections: list[Rejections]
    near_duplicates: int
    moved_to_train: int
    near_duplicate_pairs: list[NearDuplicates]  # the first few
    kept: list[Tile]
    pictures: dict[str, bytes]  # file name -> PNG


def describe(inputs: Inputs, tables: Tables, val_fraction: float) -> Overview:
    """The overview of one ``data`` folder; reads the few pictures that it shows.

    Raises:
        UserError: when a shard of images is missing or damaged, naming it.
    """
    sheets = make_contact_sheets(inputs, tables)
    images, counts = tables.images, tables.images["split"].value_counts()
    return Overview(
        counts={
            "found": inputs.manifest.found,
            "kept": len(images),
            "rejected": len(inputs.rejects),
            **{split: int(counts.get(split, 0)) for split in SPLITS},
            "latents": len(tables.latents),
            "latents rejected": len(inputs.latent_rejects),
            "captions": len(tables.captions),
            "pairs": len(tables.pairs),
        },
        sources=_sources(inputs),
        caption_lengths=caption_lengths(tables.captions["length"].dropna()),
        sizes=image_sizes(images[["width", "height"]].min(axis=1)),
        aspects=aspect_ratios(images["width"] / images["height"]),
        rejections=_rejections(all_rejects(inputs), sheets),
        near_duplicates=len(tables.near_duplicates),
        moved_to_train=_moved_to_train(inputs, val_fraction),
        near_duplicate_pairs=sheets.near_duplicates,
        kept=sheets.kept,
        pictures=sheets.pictures,
    )


def no_held_out_image(inputs: Inputs, val_fraction: float) -> str | None:
    """A notice that the validation split is empty, and why; None where it is not."""
    if (inputs.latents["split"] == "validation").any():
        return None
    if val_fraction == 0:
        reason = "ingest.val_fraction is 0"
    elif moved := _moved_to_train(inputs, val_fraction):
        reason = f"{moved} images were moved to the training split with their near duplicates"
    else:
        reason = f"of {len(inputs.latents)} images, ingest.val_fraction = {val_fraction} chose none"
    return f"no held-out image: {reason}; training can neither measure val/mae nor keep the best model"


def caption_lengths(lengths: pd.Series) -> list[Bar]:
    """Bars of equal steps, round numbers of characters; the longest hundredth may share the last, open one."""
    if lengths.empty:
        return []
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    usual = int(np.percentile(lengths, 99))
    step = next(step for step in steps if usual // step < MOST_BARS)
    edges = [*range(0, usual + step + 1, step), math.inf]
    closed = [f"{low:,}" if step == 1 else f"{low:,}–{low + step - 1:,}" for low in edges[:-2]]
    return _bars([*closed, f"{edges[-2]:,} or more"], np.histogram(lengths, edges)[0])


def image_sizes(sides: pd.Series) -> list[Bar]:
    """Bars that grow with the size, two for each doubling."""
    between = [f"{low:,}–{high - 1:,}" for low, high in itertools.pairwise(SIZES)]
    return _bars([*between, f"{SIZES[-1]:,} or more"], np.histogram(sides, [*SIZES, math.inf])[0])


def aspect_ratios(ratios: pd.Series) -> list[Bar]:
    """Bars from the tallest to the widest; ``ratios`` are width / height."""
    bounds = [int(longer) / int(shorter) for longer, shorter in (ratio.split(":") for ratio in RATIOS)]
    between = [f"{low} to {high}" for high, low in itertools.pairwise(RATIOS)]
    tall = [f"tall, over {RATIOS[0]}", *(f"tall, {name}" for name in between)]
    wide = [*(f"wide, {name}" for name in reversed(between)), f"wide, over {RATIOS[0]}"]
    edges = [0, *(1 / bound for bound in bounds), *reversed(bounds), math.inf]
    return _bars([*tall, f"square, within {RATIOS[-1]}", *wide], np.histogram(ratios, edges)[0])


def _bars(labels: Sequence[str], counts: Iterable[int]) -> list[Bar]:
    """A bar for each label, but for the empty ones at both ends."""
    counts = np.array(list(counts), dtype=int)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    longest, total = counts.max(), counts.sum()
    return [
        Bar(labels[at], int(counts[at]), round(100 * counts[at] / longest, 2), round(100 * counts[at] / total, 1))
        for at in range(filled[0], filled[-1] + 1)
    ]


def _sources(inputs: Inputs) -> list[SourceCounts]:
    in_split = inputs.images.groupby("split")["source"].value_counts()
    return [
        SourceCounts(
            name=source.name,
            found=source.found,
            kept=source.kept,
            rejected=source.rejected,
            train=int(in_split.get(("train", source.name), 0)),
            validation=int(in_split.get(("validation", source.name), 0)),
            weight=source.weight,
            attribution=source.attribution,
            licence=source.licence,
        )
        for source in inputs.manifest.sources
    ]


def _rejections(rejects: pd.DataFrame, sheets: ContactSheets) -> list[Rejections]:
    """The reasons, the most frequent first."""
    counts = rejects["reason"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    first = rejects.drop_duplicates("reason").set_index("reason")
    return [
        Rejections(bar, first.loc[bar.label, "key"], first.loc[bar.label, "detail"], sheets.rejected[bar.label])
        for bar in _bars(list(counts.index), counts)
    ]


def _moved_to_train(inputs: Inputs, val_fraction: float) -> int:
    """How many images are in train for the sake of a near duplicate: the hash that is their id chose validation."""
    paired = pd.concat([inputs.near_duplicates["image_id"], inputs.near_duplicates["twin_id"]])
    in_train = inputs.images.loc[inputs.images["id"].isin(paired) & (inputs.images["split"] == "train"), "id"]
    return sum(int(image_id[:16], 16) / 2**64 < val_fraction for image_id in in_train)
