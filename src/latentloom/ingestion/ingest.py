"""The stage `ingest`: samples of a source -> kept images in shards, the rest in the table of rejects.

Samples stream through one at a time: decoded, prepared, named by the hash of their pixels, put into a split by that
name. The first of several images with equal pixels is kept; the others are refused as duplicates, captions and all,
so that no image's captions depend on how many copies of it a source holds. ``limit`` counts the images kept.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentloom.ingestion.captions import clean_captions
from latentloom.ingestion.folder import FolderSource
from latentloom.ingestion.images import image_id, prepare_image
from latentloom.ingestion.openmoji import OpenMojiSource
from latentloom.ingestion.parquet import ParquetSource
from latentloom.ingestion.rejects import Reason, Reject, RejectWriter, Unusable
from latentloom.ingestion.shards import ImageRow, Manifest, write_images
from latentloom.ingestion.sources import IngestError, Sample, Source
from latentloom.ingestion.webdataset import WebDatasetSource
from latentloom.params import IngestParams, SourceParams


@dataclass(frozen=True)
class IngestReport:
    """What an ingestion came to. ``captions`` counts those of all kept images, an image's second one too."""

    source: str
    found: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    train: int
    validation: int
    captions: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        refused = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.kept} images ({self.train} train, {self.validation} validation), "
            f"{self.rejected} rejected{f' ({refused})' if refused else ''}"
        )


def ingest(
    params: IngestParams, images_folder: Path | str, rejects_path: Path | str, progress: bool = True
) -> IngestReport:
    """Bring the source of ``params`` into ``images_folder`` and what it refused into ``rejects_path``.

    Raises:
        IngestError: when the source cannot be used, or nothing of it can; the images folder is then as before.
    """
    images_folder, rejects_path = Path(images_folder), Path(rejects_path)
    _refuse_outputs_in_source(params, images_folder, rejects_path)
    entry = params.sources[0]
    name, source = entry.name or entry.source, open_source(entry, params.image_size)
    total = source.total or 0
    counts: Counter[str] = Counter()
    bar = tqdm(
        total=min(total, params.limit or total),
        desc="ingest",
        unit="image",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    with bar, RejectWriter(rejects_path, name) as rejects:

        def refuse(reject: Reject) -> None:
            rejects.add(reject)
            bar.total = min(total, bar.total + 1) if params.limit else bar.total

        def seen(item: Sample | Reject) -> Sample | Reject:
            counts["found"] += 1
            bar.update()
            return item

        rows = itertools.islice(_kept(map(seen, source.samples()), name, params, refuse), params.limit)
        first = next(rows, None)
        manifest = Manifest(
            source=name,
            image_size=params.image_size,
            attribution=source.attribution,
            licence=source.licence,
        )
        if first is not None:
            manifest = write_images(_counted(itertools.chain([first], rows), counts), images_folder, manifest)
    report = IngestReport(
        source=name,
        found=counts["found"],
        kept=manifest.images,
        rejected=rejects.reasons.total(),
        reasons={reason.value: rejects.reasons[reason] for reason in sorted(rejects.reasons)},
        train=manifest.train,
        validation=manifest.validation,
        captions=counts["captions"],
    )
    if report.found != report.kept + report.rejected:
        raise RuntimeError(
            f"{report.found} samples found, but {report.kept} kept and {report.rejected} rejected: one was lost"
        )
    if not report.kept:
        raise IngestError(f"no image of the source {name} can be used: {report}; {rejects_path} says why, one by one")
    return report


def open_source(entry: SourceParams, image_size: int) -> Source:
    """The source that ``entry`` names.

    Raises:
        IngestError: when it is not there, or cannot be used as a whole.
    """
    match entry.source:
        case "openmoji":
            return OpenMojiSource(image_size)
        case "folder":
            return FolderSource(entry.path)
        case "webdataset":
            return WebDatasetSource(entry.path)
        case "parquet":
            return ParquetSource(entry.path, entry.image_column, entry.caption_column)


def split_of(image_id: str, val_fraction: float) -> str:
    """``train`` or ``validation``: a function of the id alone, so that new data never moves old data."""
    return "validation" if int(image_id[:16], 16) / 2**64 < val_fraction else "train"


def _kept(
    items: Iterator[Sample | Reject], source: str, params: IngestParams, refuse: Callable[[Reject], None]
) -> Iterator[ImageRow]:
    """The rows of all samples that can be used and are met for the first time."""
    keys: dict[bytes, str] = {}
    for item in items:
        if isinstance(item, Reject):
            refuse(item)
            continue
        try:
            row = _row(item, source, params)
            own_id = bytes.fromhex(row.id)
            if own_id in keys:
                raise Unusable(Reason.DUPLICATE, f"the same picture as {keys[own_id]}")
        except Unusable as unusable:
            refuse(Reject(item.key, unusable.reason, unusable.detail))
        else:
            keys[own_id] = item.key
            yield row


def _row(sample: Sample, source: str, params: IngestParams) -> ImageRow:
    captions = clean_captions(sample.captions)
    try:
        data = sample.read()
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, error.strerror or type(error).__name__) from error
    image = prepare_image(
        data, params.image_size, max_pixels=params.max_pixels, max_aspect_ratio=params.max_aspect_ratio
    )
    own_id = image_id(image.pixels)
    split = split_of(own_id, params.val_fraction)
    return ImageRow(own_id, image.pixels, captions, split, source, sample.key, image.width, image.height)


def _counted(rows: Iterator[ImageRow], counts: Counter[str]) -> Iterator[ImageRow]:
    for row in rows:
        counts["captions"] += len(row.captions)
        yield row


def _refuse_outputs_in_source(params: IngestParams, *outputs: Path) -> None:
    if params.path is None:
        return
    source = Path(params.path).expanduser().resolve()
    for output in outputs:
        if output.resolve().is_relative_to(source):
            raise IngestError(
                f"ingest.path: {params.path} holds {output}, which this stage writes; sources are never written to. "
                "Move your images to a folder of their own"
            )
