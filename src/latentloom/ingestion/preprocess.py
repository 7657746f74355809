"""What a worker does: one sample -> the row of ``data/images`` it becomes, or a reject; independent of all others.

A rejected sample gets a preview where its picture can be decoded; where it cannot, for whatever cause, it gets none.
"""

import hashlib
from collections.abc import Callable

from latentloom.ingestion.captions import clean_captions
from latentloom.ingestion.images import image_id, prepare_image, preview
from latentloom.ingestion.near_duplicates import signature
from latentloom.ingestion.rejects import Reason, Reject, RejectedSample, printable
from latentloom.ingestion.shards import ImageRow, encode
from latentloom.ingestion.sources import Sample
from latentloom.ingestion.splits import split_of
from latentloom.params import IngestParams


def preprocess_sample(
    source: str, sample: Sample, params: IngestParams, wants_preview: Callable[[Reason], bool]
) -> ImageRow | Reject:
    """Read, prepare and name one sample of the source called ``source``; a reject says why it cannot be used."""
    key, data = printable(sample.key), b""
    try:
        data = sample.read()
        captions = clean_captions(sample.captions())
        image = prepare_image(
            data, params.tables, max_pixels=params.max_pixels, max_aspect_ratio=params.max_aspect_ratio
        )
    except RejectedSample as rejected:
        picture = preview(data, params.max_pixels) if wants_preview(rejected.reason) else None
        return Reject(source, key, rejected.reason, printable(rejected.detail), picture)
    own_id = image_id(image.pixels)
    return ImageRow(
        id=own_id,
        png=encode(image.pixels),
        captions=captions,
        split=split_of(own_id, params.val_fraction),
        source=source,
        key=key,
        width=image.width,
        height=image.height,
        profile=image.profile,
        signature=b"" if params.near_duplicate_distance is None else signature(image.compared),
        file_hash=hashlib.sha256(data).digest(),
    )
