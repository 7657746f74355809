"""The source ``huggingface``: a data set of the library ``datasets``, from the Hugging Face hub or a local folder.

A local folder is what ``save_to_disk`` wrote, of one split or of several. A data set on the hub (`hub`) is streamed:
its rows come one after another, and none is kept on the disk. ``table_columns`` says which columns hold images and
captions. Images stay encoded here: our own decoder judges their bytes, as it does those of all sources. Where the hub
has image files, a row holds the address of one, which a worker reads.

What a row's image was made into is known by the hash of its bytes, in whatever row, split or commit it stands.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentloom.ingestion import remote
from latentloom.ingestion.captions import columns_of_captions, flat_captions, notice_of_several
from latentloom.ingestion.hub import HOW_TO_LOG_IN, commit_to_read, hub_id
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message
from latentloom.ingestion.source_files import resolve_source_path
from latentloom.ingestion.sources import IngestError, Origin, Sample, Source
from latentloom.ingestion.table_columns import image_of, table_columns

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class HuggingFaceSource(Source):
    """The rows of the splits, one split after another.

    Args:
        path: a local folder, or an id on the hub.
        image_column: of encoded images; None for the first of ``table_columns.IMAGE_COLUMNS`` that holds some.
        caption_columns: and how often a caption of each counts; None for all of the usual names.
        config: of a data set on the hub, which of its parts; None for its only or default one.
        splits: which are read, in this order; None for all.

    Raises:
        IngestError: when there is no such data set, config, split or column, or it cannot be read.
    """

    joins_captions = True

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        caption_columns: Mapping[str, int] | None = None,
        config: str | None = None,
        splits: Sequence[str] | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise IngestError(
                'ingest.source: huggingface needs the package datasets: pip install "latentloom[huggingface]"'
            ) from error
        self._path, self._caption_columns, self._encoded = path, caption_columns, datasets.Image(decode=False)
        self._files_below = None  # the address that those of files on the hub begin with
        folder = resolve_source_path(path)
        if folder.exists():
            there = _of_folder(path, folder, config)
        else:
            name, commit = hub_id(path), commit_to_read(path)
            there = _of_hub(name, commit, config)
            self._files_below = f"hf://datasets/{name}@{commit}/"
        if missing := [name for name in splits or [] if name not in there]:
            raise IngestError(f"ingest: {path} has no split {missing[0]!r}; it has {', '.join(there)}")
        self._splits = {name: there[name] for name in splits or there}
        self._columns = {
            name: table_columns(_schema(split), image_column, caption_columns, f"{path}, {name},", "huggingface")
            for name, split in self._splits.items()
        }
        if folder.exists():
            self.total = sum(map(len, self._splits.values()))

    def samples(self) -> Iterator[Sample]:
        for name, split in self._splits.items():
            image, *captions = self._columns[name]
            of_captions = columns_of_captions(captions, self._caption_columns)
            split = split.select_columns([image, *captions])
            if isinstance(split.features[image], type(self._encoded)):
                split = split.cast_column(image, self._encoded)
            number = 0
            try:
                for row in split:
                    read, origin = self._image(row[image])
                    texts = {column: row[column] for column in of_captions}
                    yield Sample(f"{name}:{number}", read, partial(flat_captions, texts, of_captions), origin)
                    number += 1
            except _failures() as error:
                raise IngestError(
                    f"ingest: {self._path}, {name}, cannot be read from row {number} on ({_said(error)}); where it is "
                    "the network's fault, run the stage again: images of finished shards are not prepared again"
                ) from error

    def notices(self) -> list[str]:
        several = {tuple(captions): name for name, (_, *captions) in reversed(self._columns.items()) if captions[1:]}
        return [] if self._caption_columns else [notice_of_several(name, names) for names, name in several.items()]

    def _image(self, value: bytes | dict[str, Any] | None) -> tuple[Callable[[], bytes], Origin | None]:
        """How to read the image of a row, and its origin."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return partial(image_of, data), Origin(None, hashlib.sha256(data).hexdigest())
        # A row may name files of this data set alone, at this commit: no other one's, nor this machine's.
        in_zip, _, address = (path or "").rpartition("::")
        own = self._files_below is not None and address.startswith(self._files_below)
        if own and (not in_zip or (in_zip.startswith("zip://") and "::" not in in_zip)):
            return partial(_file_on_hub, path), Origin(None, path)
        return partial(image_of, value), None


def _of_folder(path: str, folder: Path, config: str | None) -> "dict[str, Dataset]":
    from datasets import Dataset, load_from_disk

    if config is not None:
        raise IngestError(f"ingest: {path} is a folder, which has no config {config!r}; that is for ids on the hub")
    try:
        loaded = load_from_disk(str(folder))
    except _failures() as error:
        raise IngestError(
            f"ingest: {folder} cannot be read as a data set of save_to_disk ({_said(error)}). For image files use "
            "source: folder, for Parquet files source: parquet"
        ) from error
    return {str(loaded.split or "train"): loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _of_hub(name: str, commit: str, config: str | None) -> "dict[str, IterableDataset]":
    import datasets

    try:
        return dict(datasets.load_dataset(name, config, revision=commit, streaming=True))
    except _failures() as error:
        raise IngestError(
            f"ingest: the data set {name} cannot be opened: {_said(error)}. For one that is private or gated, "
            f"{HOW_TO_LOG_IN}; where it has several configs, name one (config: ...)"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What the library raises of data sets that are not as they should be, and of the network."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    return OSError, ValueError, RuntimeError, pa.ArrowException, DatasetsError, httpx.HTTPError


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error_message(error)}"


def _schema(split: "Dataset | IterableDataset") -> pa.Schema:
    """Of the columns; of none where the hub does not tell them, as with a data set of text alone."""
    return split.features.arrow_schema if split.features else pa.schema([])


def _file_on_hub(address: str) -> bytes:
    try:
        return remote.read(address)
    except OSError as error:
        raise RejectedSample(Reason.UNREADABLE, error_message(error)) from error
