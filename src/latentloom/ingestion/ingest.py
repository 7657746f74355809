"""The stage `ingest`: samples of all sources -> kept images in shards, the rest in the table of rejects.

Samples stream through, the sources one after another: workers decode and prepare them, and here, in the sources'
order, each is kept or refused. The first of several images with equal pixels is kept; the others are refused as
duplicates, captions and all, so that no image's captions depend on how many copies of it the sources hold. ``limit``
counts the images kept. An image's id puts it into a split; at the end, near duplicates of training images follow
those into the training split.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentloom.ingestion.folder import FolderSource
from latentloom.ingestion.near_duplicates import find_near_duplicates, joined_by_twins, write_near_duplicates
from latentloom.ingestion.openmoji import OpenMojiSource
from latentloom.ingestion.parallel import ordered_map, worker_count
from latentloom.ingestion.parquet import ParquetSource
from latentloom.ingestion.prepared import Prepared, prepare_sample
from latentloom.ingestion.rejects import Reject
from latentloom.ingestion.shards import Manifest, SourceCount, move_to_train, write_manifest, write_shards
from latentloom.ingestion.sieve import ID_BYTES, Sieve
from latentloom.ingestion.source_files import located
from latentloom.ingestion.sources import IngestError, Sample, Source
from latentloom.ingestion.webdataset import WebDatasetSource
from latentloom.params import IngestParams, SourceParams


@dataclass(frozen=True)
class IngestReport:
    """What an ingestion came to.

    ``captions`` counts those of all kept images, an image's second one too; ``near_duplicates`` the pairs;
    ``moved_to_train`` the images that left the validation split since a twin is in train.
    """

    found: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    train: int
    validation: int
    captions: int
    sources: list[dict[str, Any]]
    near_duplicates: int
    moved_to_train: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        twins = f", {self.near_duplicates} pairs of near duplicates" if self.near_duplicates else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        refused = f" ({reasons})" if reasons else ""
        return (
            f"{self.kept} images ({self.train} train, {self.validation} validation){twins}, "
            f"{self.rejected} rejected{refused}"
        )


def ingest(
    params: IngestParams,
    images_folder: Path | str,
    rejects_path: Path | str,
    near_duplicates_path: Path | str,
    progress: bool = True,
) -> IngestReport:
    """Bring the sources of ``params`` into ``images_folder``; write what was refused, and which images look alike.

    Raises:
        IngestError: when a source cannot be used, and all is as before then; or when nothing can be used, or more is
            refused than ``max_reject_fraction`` allows: the rejects are written then, and the images have no manifest.
        OSError: when a file cannot be written, naming it.
    """
    outputs = Path(images_folder), Path(rejects_path), Path(near_duplicates_path)
    images_folder, rejects_path, near_duplicates_path = outputs
    for entry in params.sources:
        _refuse_outputs_in_source(entry, outputs)
    sources = {entry.label: open_source(entry, params.image_size) for entry in params.sources}
    counts = [
        SourceCount(name, entry.source, entry.weight, source.attribution, source.licence)
        for entry, (name, source) in zip(params.sources, sources.items(), strict=True)
    ]
    sieve = Sieve(counts)
    samples = ((name, sample) for name, source in sources.items() for sample in source.samples())
    prepare = partial(_prepare, params, sieve)
    # Pillow's remarks on odd but readable files are not for here; filters are the process's, not a thread's.
    with warnings.catch_warnings(), closing(ordered_map(prepare, samples, worker_count())) as results:
        warnings.filterwarnings("ignore", module="PIL")
        watched = _watched(results, _total(sources), params.limit, sieve, progress)
        shards = write_shards(islice(sieve.kept(watched), params.limit), images_folder)
    sieve.rejects.write(rejects_path)
    _check_none_was_lost(sieve, shards)
    _refuse_too_many_rejects(sieve, params.max_reject_fraction, rejects_path)
    pairs, moved = _keep_twins_together(sieve, params.near_duplicate_distance, near_duplicates_path)
    move_to_train(images_folder, shards, moved)
    manifest = Manifest(
        image_size=params.image_size,
        found=sieve.found,
        rejected=sieve.rejected,
        images=sieve.found - sieve.rejected,
        train=int(sieve.in_train().sum()) + len(moved),
        validation=int((~sieve.in_train()).sum()) - len(moved),
        sources=counts,
        attribution=_joined(count.attribution for count in counts if count.kept),
        licence=_joined(count.licence for count in counts if count.kept),
        shards=shards,
    )
    write_manifest(images_folder, manifest)
    return _report(manifest, sieve, pairs, len(moved))


def open_source(entry: SourceParams, image_size: int) -> Source:
    """The source that an entry of the params names.

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


def _prepare(params: IngestParams, sieve: Sieve, item: tuple[str, Sample | Reject]) -> tuple[str, Prepared | Reject]:
    """What a worker does with a sample of the source it is named with."""
    name, sample = item
    if isinstance(sample, Reject):
        return name, sample
    return name, prepare_sample(name, sample, params, sieve.rejects.wants_preview)


def _watched(
    results: Iterable[tuple[str, Prepared | Reject]], total: int | None, limit: int | None, sieve: Sieve, progress: bool
) -> Iterator[tuple[str, Prepared | Reject]]:
    """The results as they are, with a progress bar of how many of all, or as many as ``limit`` takes."""
    most = total or sys.maxsize
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(desc="ingest", unit="image", disable=not progress, mininterval=interval) as bar:
        bar.total = total if limit is None else min(most, limit)
        for result in results:
            bar.update()
            yield result
            if limit is not None:
                bar.total = min(most, limit + sieve.rejected)


def _total(sources: Mapping[str, Source]) -> int | None:
    totals = [source.total for source in sources.values()]
    return None if None in totals else sum(totals)


def _check_none_was_lost(sieve: Sieve, shards: list[dict[str, Any]]) -> None:
    written = sum(shard["rows"] for shard in shards)
    if sieve.found != written + sieve.rejected:
        raise RuntimeError(
            f"{sieve.found} samples found, but {written} kept and {sieve.rejected} rejected: one was lost"
        )


def _refuse_too_many_rejects(sieve: Sieve, most: float, rejects_path: Path) -> None:
    found, refused, rejects = sieve.found, sieve.rejected, sieve.rejects
    if refused < found and refused <= most * found:
        return
    reasons = "".join(
        f"\n  {count} {reason.value}, such as {rejects.examples[reason]}"
        for reason, count in sorted(rejects.reasons.items(), key=lambda item: (-item[1], item[0]))
    )
    bound = "no image is left" if refused == found else f"ingest.max_reject_fraction allows {most:.1%}"
    raise IngestError(
        f"{refused} of {found} samples ({refused / max(found, 1):.1%}) were refused, and {bound}:{reasons}\n"
        f"{rejects_path} says why, one by one. Mend the data, or raise ingest.max_reject_fraction if so many may go."
    )


def _keep_twins_together(sieve: Sieve, distance: int | None, path: Path) -> tuple[int, np.ndarray]:
    """Write the near duplicates; give the number of pairs, and the rows that follow a twin into the training split."""
    order = np.argsort(sieve.ids().view(f"S{ID_BYTES}").ravel())  # by id, so that no order of the sources matters
    hashes = sieve.hashes() if distance is None else sieve.hashes()[order]
    pairs = find_near_duplicates(hashes, distance or 0)
    write_near_duplicates(path, sieve.ids()[order], pairs)
    return len(pairs), order[joined_by_twins(pairs, sieve.in_train()[order])]


def _joined(texts: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(text for text in texts if text)) or None


def _report(manifest: Manifest, sieve: Sieve, near_duplicates: int, moved_to_train: int) -> IngestReport:
    reasons = sieve.rejects.reasons
    return IngestReport(
        found=manifest.found,
        kept=manifest.images,
        rejected=manifest.rejected,
        reasons={reason.value: reasons[reason] for reason in sorted(reasons)},
        train=manifest.train,
        validation=manifest.validation,
        captions=sieve.captions,
        sources=[
            {name: value for name, value in asdict(count).items() if name not in ("attribution", "licence")}
            for count in manifest.sources
        ],
        near_duplicates=near_duplicates,
        moved_to_train=moved_to_train,
    )


def _refuse_outputs_in_source(entry: SourceParams, outputs: Iterable[Path]) -> None:
    if entry.path is None:
        return
    source = located(entry.path).resolve()
    for output in outputs:
        written = output.resolve()
        inside = written.is_relative_to(source) or source.is_relative_to(written)
        if inside or written.match(str(source)) or (written / "00000.parquet").match(str(source)):  # a pattern's
            raise IngestError(
                f"ingest.path: {entry.path} holds {output}, which this stage writes; sources are never written to. "
                "Move your images to a folder of their own"
            )
