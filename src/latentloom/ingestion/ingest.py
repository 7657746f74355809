"""The stage `ingest`: samples of all sources -> kept images in shards, the rest in the table of rejects.

Samples stream through, one source after another:

    source -> ``preprocess`` (in workers) -> ``Deduplicator`` -> ``write_shards``

The first of several images with equal pixels is kept; the others are rejected as duplicates, captions and all, so that
no image's captions depend on how many copies of it the sources hold. But where samples are a picture with one of its
captions, as rows of a table are, those of one source whose files are equal are one image with all their captions.
``limit`` counts the images kept. An image's id puts it into a split; at the end, near duplicates of training images
follow those into the training split.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from latentloom.engine import engine_name, ordered_map
from latentloom.ids import ascending
from latentloom.ingestion.colours import Profile
from latentloom.ingestion.deduplicator import Deduplicator
from latentloom.ingestion.folder import FolderSource
from latentloom.ingestion.huggingface import HuggingFaceSource
from latentloom.ingestion.images import pillow_settings
from latentloom.ingestion.near_duplicates import Pairs, find_near_duplicates, write_near_duplicates
from latentloom.ingestion.openmoji import OpenMojiSource
from latentloom.ingestion.parquet import ParquetSource
from latentloom.ingestion.prepared import Key, PreparedStore
from latentloom.ingestion.preprocess import Known, Outcome, preprocess_sample
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.remote import is_remote
from latentloom.ingestion.shard_writer import (
    ImageRow,
    SourceCount,
    StoredPng,
    amend_shards,
    write_manifest,
    write_shards,
)
from latentloom.ingestion.size_table import render
from latentloom.ingestion.source_files import resolve_source_path
from latentloom.ingestion.sources import IngestError, Sample, Source
from latentloom.ingestion.splits import linked_to_train
from latentloom.ingestion.webdataset import WebDatasetSource
from latentloom.params import IngestParams, SourceParams

KNOWN_AT_ONCE = 64  # samples for a worker that need not be decoded, so that handing them over costs little


@dataclass(frozen=True)
class IngestReport:
    """The result of an ingestion, in counts.

    ``captions`` counts those of all kept images, an image's second one too; ``joined`` the samples that gave captions
    to an equal picture, and are neither found nor kept; ``near_duplicates`` the pairs; ``moved_to_train`` the images
    that left the validation split because a near duplicate is in train. Of kept images with a colour profile other than
    sRGB's, ``profiles_converted`` counts those that were converted, and ``profiles_ignored`` those whose profile could
    not be used. ``sizes`` is what `SizeTable.rows` gives; empty where all images are squares of one size. ``crowded``
    counts the images of which not all near duplicates are listed (`Pairs`).
    """

    found: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    train: int
    validation: int
    captions: int
    joined: int
    sources: list[dict[str, Any]]
    near_duplicates: int
    moved_to_train: int
    profiles_converted: int
    profiles_ignored: int
    sizes: list[dict[str, Any]] = field(default_factory=list)
    crowded: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name not in ("sizes", "crowded") or value}

    @property
    def size_table(self) -> str:
        """The table of sizes, to print; empty where all images are squares of one size."""
        return render(self.sizes) if self.sizes else ""

    def __str__(self) -> str:
        pairs = f", {self.near_duplicates} pairs of near duplicates" if self.near_duplicates else ""
        pairs += f" (of {self.crowded} images of one layout, not all)" if self.crowded else ""
        joined = f", captions of {self.joined} equal pictures joined" if self.joined else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        colours = f", {self.profiles_converted} converted to sRGB" if self.profiles_converted else ""
        colours += f", {self.profiles_ignored} colour profiles ignored" if self.profiles_ignored else ""
        sizes = ""
        if self.sizes:
            *each, together = self.sizes
            sizes = f" of {len(each)} sizes, {together['cut_off']:.1%} cut off on average"
        warning = "; no held-out image: training can neither validate nor keep the best"
        return (
            f"{self.kept} images ({self.train} train, {self.validation} validation){sizes}{pairs}{joined}{colours}, "
            f"{self.rejected} rejected{f' ({reasons})' if reasons else ''}{'' if self.validation else warning}"
        )


def ingest(
    params: IngestParams,
    images_folder: Path,
    rejects_path: Path,
    near_duplicates_path: Path,
    progress: bool = True,
    store: PreparedStore | None = None,
) -> IngestReport:
    """Bring the sources of ``params`` into ``images_folder``; write what was rejected, and which images look alike.

    What is in the ``store`` of earlier runs is not read again; the result is the same without one.

    Raises:
        IngestError: when a source cannot be used, and everything stays as it was; or when nothing can be used, or more
            is rejected than ``max_reject_fraction`` allows: then the rejects are written, but no manifest of images.
        WriteError: when a file cannot be written, naming it.
    """
    for entry in params.sources:
        _check_outputs_outside_source(entry, (images_folder, rejects_path, near_duplicates_path))
    sources = {entry.label: open_source(entry, params, store) for entry in params.sources}
    counts = {
        entry.label: SourceCount(entry.label, entry.source, entry.weight, source.attribution, source.licence)
        for entry, source in zip(params.sources, sources.values(), strict=True)
    }
    deduplicator = Deduplicator(counts, {name for name, source in sources.items() if source.joins_captions})
    with (
        pillow_settings(params.max_pixels),
        closing(_preprocessed(sources, params, deduplicator.rejects, store)) as results,
        tqdm(
            results,
            "ingest",
            _expected(sources.values(), params.limit),
            unit="image",
            disable=not progress,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        ) as shown,
    ):
        kept = deduplicator.kept(shown, params.limit)
        shards = write_shards(kept, images_folder, *([store.keep, store.link] if store else []))
    for name, source in sources.items():
        for notice in source.notices():
            print(f"ingest: {name}: {notice}", file=sys.stderr, flush=True)
    deduplicator.rejects.write(rejects_path)
    written = sum(shard["rows"] for shard in shards)
    found, rejected = sum(count.found for count in counts.values()), len(deduplicator.rejects)
    if found != written + rejected:
        raise RuntimeError(f"{found} samples found, but {written} kept and {rejected} rejected: one was lost")
    if rejected == found or rejected > params.max_reject_fraction * found:
        raise IngestError(_too_many_rejects(deduplicator.rejects, found, params.max_reject_fraction, rejects_path))
    pairs, moved = _keep_near_duplicates_together(deduplicator, params.near_duplicate_distance, near_duplicates_path)
    more_captions = amend_shards(images_folder, shards, moved, deduplicator.joined_captions)
    train = int(deduplicator.in_train().sum()) + len(moved)
    sizes = deduplicator.sizes.counts(params.tables) if params.several_sizes else None
    manifest = write_manifest(images_folder, params.image_size, train, counts.values(), shards, sizes)
    if store:
        store.finish(images_folder / shard["name"] for shard in shards)
    return IngestReport(
        found=found,
        kept=written,
        rejected=rejected,
        reasons={reason.value: count for reason, count in sorted(deduplicator.rejects.reasons().items())},
        train=train,
        validation=written - train,
        captions=deduplicator.captions + more_captions,
        joined=deduplicator.joined,
        sources=[
            {name: value for name, value in source.items() if name not in ("attribution", "licence")}
            for source in manifest["sources"]
        ],
        near_duplicates=len(pairs),
        moved_to_train=len(moved),
        profiles_converted=deduplicator.profiles[Profile.CONVERTED],
        profiles_ignored=deduplicator.profiles[Profile.IGNORED],
        sizes=deduplicator.sizes.rows(params.tables) if params.several_sizes else [],
        crowded=pairs.crowded,
    )


def open_source(entry: SourceParams, params: IngestParams, store: PreparedStore | None = None) -> Source:
    """The source that an entry of the params names.

    Raises:
        IngestError: when it is not there, or cannot be used as a whole.
    """
    match entry.source:
        case "openmoji":
            return OpenMojiSource(params.image_sizes[-1], params.skin_tones, params.limit)
        case "folder":
            return FolderSource(entry.path, entry.captions, entry.caption_column)
        case "webdataset":
            return WebDatasetSource(entry.path, entry.captions, entry.caption_column, entry.key)
        case "parquet":
            known = [store.knows] if store else []
            return ParquetSource(entry.path, entry.image_column, entry.caption_column, *known)
        case "huggingface":
            return HuggingFaceSource(entry.path, entry.image_column, entry.caption_column, entry.config, entry.splits)


class _Item(NamedTuple):
    """A sample of a source, what is known of it, and by which key it is known."""

    source: str
    sample: Sample
    with_preview: frozenset[Reason]
    known: Known | None = None
    key: Key | None = None

    def preprocess(self, params: IngestParams) -> Outcome:
        return preprocess_sample(self.source, self.sample, params, self.with_preview, self.known)


def _preprocessed(
    sources: Mapping[str, Source], params: IngestParams, rejects: RejectTable, store: PreparedStore | None
) -> Iterator[ImageRow | Reject]:
    """What becomes of every sample, in order; what the store has is not read."""
    under_way: deque[list[_Item]] = deque()

    def batches() -> Iterator[list[_Item]]:
        for batch in _batches(_found(sources, rejects, store)):
            under_way.append(batch)
            yield batch

    work = partial(_preprocess if engine_name() == "local" else _preprocess_elsewhere, params)
    with closing(ordered_map(work, batches(), redo=_has_reject)) as results:
        for outcomes in results:
            for item, outcome in zip(under_way.popleft(), outcomes, strict=True):
                source = sources[item.source]
                source.lines = source.lines.plus(outcome.lines)
                yield _kept_in_store(item, outcome, params, store).result


def _found(sources: Mapping[str, Source], rejects: RejectTable, store: PreparedStore | None) -> Iterator[_Item]:
    """Every sample, with what the store knows of it."""
    for name, source in sources.items():
        for sample in source.samples():
            item = _Item(name, sample, rejects.with_preview)
            if store and (key := store.key(sample.origin)):
                known = store.find(key)
                if known and not known.shown and known.reason in rejects.with_preview:
                    known = None
                item = item._replace(key=key, known=known)
            yield item


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Samples that are known, whose captions alone are read, some at a time; any other ends its batch."""
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if item.known is None or len(batch) == KNOWN_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _preprocess(params: IngestParams, batch: list[_Item]) -> list[Outcome]:
    return [item.preprocess(params) for item in batch]


def _preprocess_elsewhere(params: IngestParams, batch: list[_Item]) -> list[Outcome]:
    """The same in a process that has not been made ready for it."""
    with pillow_settings(params.max_pixels):
        return _preprocess(params, batch)


def _has_reject(outcomes: list[Outcome]) -> bool:
    """Whether a sample could not be used: another machine may not see its file, or lack a plugin to read it."""
    return any(isinstance(outcome.result, Reject) for outcome in outcomes)


def _kept_in_store(item: _Item, outcome: Outcome, params: IngestParams, store: PreparedStore | None) -> Outcome:
    """The outcome with its picture, which the store has where the sample was known; and noted there."""
    if item.known and isinstance(outcome.result, ImageRow):
        read = partial(_stored_png, item, params, store)
        png = StoredPng(item.known.place, item.known.png_bytes, item.known.png_start, read)
        outcome.result = replace(outcome.result, png=png)
    # A file that changed while it was read has other times than its hash is known by.
    if item.key and outcome.known and (item.known or store.key(item.sample.origin) == item.key):
        store.note(item.key, outcome.known)
    return outcome


def _stored_png(item: _Item, params: IngestParams, store: PreparedStore) -> bytes:
    """The picture of a known sample; where it is gone or damaged, its file is decoded again."""
    if png := store.picture(item.known):
        return png
    row = item._replace(known=None).preprocess(params).result
    if not isinstance(row, ImageRow) or row.id != item.known.id:
        raise IngestError(f"ingest: {item.source}: {item.sample.key} changed while it was read; run `dvc repro` again")
    return row.png


def _expected(sources: Iterable[Source], limit: int | None) -> int | None:
    """How many samples there are to read: about as many as ``limit`` keeps; None where only reading tells."""
    totals = [source.total for source in sources]
    total = None if None in totals else sum(totals)
    return min((bound for bound in (total, limit) if bound is not None), default=None)


def _too_many_rejects(rejects: RejectTable, found: int, most: float, rejects_path: Path) -> str:
    rejected = len(rejects)
    reasons = "".join(
        f"\n  {count} {reason.value}, such as {rejects.examples[reason].source}: {rejects.examples[reason].key}"
        for reason, count in sorted(rejects.reasons().items(), key=lambda item: (-item[1], item[0]))
    )
    if not found:
        return "the sources hold no samples: look at ingest.source and ingest.path"
    bound = "no image is left" if rejected == found else f"ingest.max_reject_fraction allows {most:.1%}"
    return (
        f"{rejected} of {found} samples ({rejected / max(found, 1):.1%}) were rejected, and {bound}:{reasons}\n"
        f"{rejects_path} gives the reason for each. Fix the data, or raise ingest.max_reject_fraction to accept it."
    )


def _keep_near_duplicates_together(
    deduplicator: Deduplicator, distance: int | None, path: Path
) -> tuple[Pairs, np.ndarray]:
    """Write the near duplicates; give them, and the rows that move to the training split."""
    images, in_train, signatures = deduplicator.ids(), deduplicator.in_train(), deduplicator.signatures()
    order = ascending(images)  # by id, so that the sources' order does not matter
    pairs = find_near_duplicates(signatures, distance or 0, None if distance is None else order)
    write_near_duplicates(path, images[order], pairs)
    return pairs, order[linked_to_train(pairs, in_train[order])]


def _check_outputs_outside_source(entry: SourceParams, outputs: Iterable[Path]) -> None:
    if entry.path is None or is_remote(entry.path):
        return
    source = resolve_source_path(entry.path).resolve()
    for output in outputs:
        written = output.resolve()
        inside = written.is_relative_to(source) or source.is_relative_to(written)
        if inside or written.match(str(source)) or (written / "00000.parquet").match(str(source)):  # a pattern's
            raise IngestError(
                f"ingest.path: {entry.path} holds {output}, which this stage writes; sources are never written to. "
                "Move your images to a folder of their own"
            )
