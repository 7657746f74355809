"""What a worker does: one sample -> the row of ``data/images`` it becomes, or a reject; independent of all others.

A rejected sample gets a preview where its picture can be decoded; where it cannot, for whatever cause, it gets none.
"""

import hashlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from latentloom.ingestion import pngs
from latentloom.ingestion.caption_files import LineCounts
from latentloom.ingestion.captions import clean_captions
from latentloom.ingestion.images import image_id, prepare_image, preview
from latentloom.ingestion.near_duplicates import signature
from latentloom.ingestion.rejects import Reason, Reject, RejectedSample, printable
from latentloom.ingestion.shard_writer import ImageRow
from latentloom.ingestion.sources import Sample
from latentloom.ingestion.splits import split_of
from latentloom.params import IngestParams


@dataclass(frozen=True, slots=True)
class Known:
    """What follows from an image's file and the params alone, but the picture itself.

    It is either of an image, as `ImageRow` has it, with the length and the header of its PNG, or ``reason`` and
    ``detail`` say why the file cannot be used; ``shown`` then says whether a ``preview`` was tried. ``place`` is for a
    store to find the picture by.
    """

    id: str = ""
    width: int = 0
    height: int = 0
    profile: str = ""
    png_bytes: int = 0
    png_start: bytes = b""
    signature: bytes = b""
    file_hash: bytes = b""
    reason: str = ""
    detail: str = ""
    preview: bytes | None = None
    shown: bool = False
    place: int = -1


@dataclass(slots=True)
class Outcome:
    """What became of a sample; ``lines`` counts those of its text files. ``known`` is None where it was not decoded."""

    result: ImageRow | Reject
    known: Known | None
    lines: LineCounts


def preprocess_sample(
    source: str, sample: Sample, params: IngestParams, with_preview: Collection[Reason], known: Known | None = None
) -> Outcome:
    """Read, prepare and name one sample of the source called ``source``; a reject says why it cannot be used.

    Args:
        with_preview: the reasons of which the picture is shown.
        known: of the sample's file, from an earlier run: the file is not read then, and the row has no ``png``.
    """
    key, data, png, lines = printable(sample.key), b"", b"", LineCounts()
    try:
        data = b"" if known else sample.read()
        raw = sample.captions()
        lines = getattr(raw, "lines", lines)
        captions = clean_captions(raw)
    except RejectedSample as rejected:
        picture = None
        if rejected.reason in with_preview:
            with suppress(RejectedSample):
                picture = preview(data or sample.read(), params.max_pixels)
        return Outcome(Reject(source, key, rejected.reason, printable(rejected.detail), picture), known, lines)
    if known is None:
        known, png = _prepare(data, params, with_preview)
    if known.reason:
        return Outcome(Reject(source, key, Reason(known.reason), known.detail, known.preview), known, lines)
    row = ImageRow(
        id=known.id,
        png=png,
        captions=captions,
        split=split_of(known.id, params.val_fraction),
        source=source,
        key=key,
        width=known.width,
        height=known.height,
        profile=known.profile,
        signature=known.signature,
        file_hash=known.file_hash,
    )
    return Outcome(row, known, lines)


def _prepare(data: bytes, params: IngestParams, with_preview: Collection[Reason]) -> tuple[Known, bytes]:
    """What is to be known of a file, and the prepared picture as PNG."""
    try:
        image = prepare_image(
            data, params.tables, max_pixels=params.max_pixels, max_aspect_ratio=params.max_aspect_ratio
        )
    except RejectedSample as rejected:
        shown = rejected.reason in with_preview
        picture = preview(data, params.max_pixels) if shown else None
        detail = printable(rejected.detail)
        return Known(reason=rejected.reason, detail=detail, preview=picture, shown=shown), b""
    png = pngs.encode(image.pixels)
    known = Known(
        id=image_id(image.pixels),
        width=image.width,
        height=image.height,
        profile=image.profile,
        png_bytes=len(png),
        png_start=png[: pngs.HEADER_BYTES],
        signature=b"" if params.near_duplicate_distance is None else signature(image.compared),
        file_hash=hashlib.sha256(data).digest(),
    )
    return known, png
