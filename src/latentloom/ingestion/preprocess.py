"""What a worker does: one sample -> the row of ``data/images`` it becomes, or a reject; independent of all others.

A rejected sample gets a preview where its picture can be decoded; where it cannot, for whatever cause, it gets none.
"""

import hashlib
from collections.abc import Collection

from latentloom.ingestion.caption_files import LineCounts
from latentloom.ingestion.captions import clean_captions
from latentloom.ingestion.images import image_id, prepare_image, preview
from latentloom.ingestion.near_duplicates import signature
from latentloom.ingestion.rejects import Reason, Reject, RejectedSample, printable
from latentloom.ingestion.shards import ImageRow, encode
from latentloom.ingestion.sources import Sample
from latentloom.ingestion.splits import split_of
from latentloom.params import IngestParams


def preprocess_sample(
    source: str, sample: Sample, params: IngestParams, with_preview: Collection[Reason]
) -> tuple[ImageRow | Reject, LineCounts]:
    """Read, prepare and name one sample of the source called ``source``; a reject says why it cannot be used.

    Of the reasons ``with_preview`` it shows the picture. The counts are those of the sample's text files.
    """
    key, data, lines = printable(sample.key), b"", LineCounts()
    try:
        data = sample.read()
        raw = sample.captions()
        lines = getattr(raw, "lines", lines)
        captions = clean_captions(raw)
        image = prepare_image(
            data, params.tables, max_pixels=params.max_pixels, max_aspect_ratio=params.max_aspect_ratio
        )
    except RejectedSample as rejected:
        picture = preview(data, params.max_pixels) if rejected.reason in with_preview else None
        return Reject(source, key, rejected.reason, printable(rejected.detail), picture), lines
    own_id = image_id(image.pixels)
    row = ImageRow(
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
    return row, lines
