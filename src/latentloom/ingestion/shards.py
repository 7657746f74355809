"""The format of ``data/images``: Parquet shards of prepared images, and the manifest that names them; and its readers.

``NNNNN.parquet`` holds rows in the sources' order, in row groups of 64, so that a reader never holds more than a row
group of pictures, and the writer a few; ``latentloom.sharding`` says where one file ends and the next begins. pandas
and ``datasets.load_dataset("parquet", ...)`` open them: the image column is a struct of PNG bytes and path, which the
schema's metadata declares to be a Hugging Face ``Image``. `latentloom.ingestion.shard_writer` writes them.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentloom.errors import UserError
from latentloom.files import check_ids, read_json
from latentloom.ingestion import pngs
from latentloom.sizes import Size

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 2
ROW_GROUP_ROWS = 64
BATCH_ROWS = 2**13  # of metadata, at most
MANIFEST = "manifest.json"

TEXT = {"dtype": "string", "_type": "Value"}
NUMBER = {"dtype": "int32", "_type": "Value"}
COLUMNS: dict[str, tuple[pa.DataType, dict[str, Any]]] = {  # name -> Arrow type, feature of Hugging Face datasets
    "id": (pa.string(), TEXT),
    "image": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
    "captions": (pa.list_(pa.string()), {"feature": TEXT, "_type": "List"}),
    "split": (pa.string(), TEXT),
    "source": (pa.string(), TEXT),
    "key": (pa.string(), TEXT),
    "width": (pa.int32(), NUMBER),
    "height": (pa.int32(), NUMBER),
}
SCHEMA = pa.schema(
    [(name, arrow_type) for name, (arrow_type, _) in COLUMNS.items()],
    metadata={"huggingface": json.dumps({"info": {"features": {name: hf for name, (_, hf) in COLUMNS.items()}}})},
)
METADATA_COLUMNS = ["id", "captions", "split", "key", "source", "width", "height"]


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest, as ``write_manifest`` has it.

    Raises:
        UserError: when there is none, since no ingestion has ended there; when it is damaged, or of a format version
            that this code does not know.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r}, not {FORMAT_VERSION}: run `dvc repro`, which writes it anew"
        )
    return manifest


def metadata_batches(folder: Path | str, columns: Sequence[str] = METADATA_COLUMNS) -> Iterator[pa.RecordBatch]:
    """Columns of all images in the shards' order, a part of a shard at a time; the pictures are never read.

    Args:
        columns: of `METADATA_COLUMNS`; a batch has them in this order.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    for shard in read_manifest(folder)["shards"]:
        with _opened(folder, shard) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                check_ids(batch)
                yield batch.select(schema.names).cast(schema)


def read_metadata(folder: Path | str) -> "pd.DataFrame":
    """One row per image, in the shards' order: id, captions (lists of str), split, key, source, width, height.

    For notebooks and for some thousands of images: a row takes a kilobyte. `metadata_batches` reads any number.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    schema = pa.schema([SCHEMA.field(name) for name in METADATA_COLUMNS])
    table = pa.Table.from_batches(metadata_batches(folder), schema)
    frame = table.drop_columns("captions").to_pandas()
    frame.insert(1, "captions", table["captions"].to_pylist())
    return frame


def prepared_sizes(folder: Path | str) -> np.ndarray:
    """Width and height of every prepared image, in the shards' order: int32 ``(N, 2)``.

    Of several sizes, they are read from the headers of the pictures.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    manifest = read_manifest(folder)
    if "sizes" not in manifest:
        return np.full((manifest["images"], 2), manifest["image_size"], np.int32)
    sizes = [np.empty((0, 2), np.int32)]
    for shard in manifest["shards"]:
        with _opened(folder, shard) as file:
            for batch in file.iter_batches(ROW_GROUP_ROWS, columns=["image.bytes"]):
                column = batch["image"].field("bytes")
                _, offsets, content = column.buffers()
                starts = np.frombuffer(offsets, np.int32)[column.offset :][: len(column)]
                header = np.frombuffer(content, np.uint8)[starts[:, None] + np.arange(*pngs.SIZE)]
                sizes.append(header.view(">i4").astype(np.int32))
    return np.concatenate(sizes)


def sizes_of(manifest: Mapping[str, Any]) -> dict[Size, int]:
    """The sizes of a manifest's images, in their order, and of how many images."""
    square = [manifest["image_size"], manifest["image_size"], manifest["images"]]
    return {Size(width, height): count for width, height, count in manifest.get("sizes", [square])}


def iterate_images(folder: Path | str, wanted: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every image's id and pixels, uint8 ``(H, W, 3)``, in the shards' order; a row group is in memory at a time.

    Args:
        wanted: the ids to decode; all where None. Of row groups without any of them, pixels are not read.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    for shard in read_manifest(folder)["shards"]:
        with _opened(folder, shard) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["id"])["id"].to_pylist()
                if wanted is not None and not any(own_id in wanted for own_id in ids):
                    continue
                column = file.read_row_group(group, columns=["image.bytes"])["image"]
                for own_id, image in zip(ids, column, strict=True):
                    if wanted is None or own_id in wanted:
                        yield own_id, pngs.decode(image["bytes"].as_py())


class NumberedImages:
    """The prepared images by their numbers in the shards' order; picklable, for workers that read some of them.

    Raises:
        UserError: when the manifest is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._shards = folder, read_manifest(folder)["shards"]
        self._ends = np.cumsum([shard["rows"] for shard in self._shards])

    def files(self, numbers: np.ndarray) -> list[Path]:
        """The shards that hold these images."""
        return [self.folder / self._shards[own]["name"] for own in np.unique(self._shard_of(numbers))]

    def read(self, numbers: np.ndarray, find: Callable[[Path], Path] = Path) -> Iterator[np.ndarray]:
        """The pixels of these images, uint8 ``(H, W, 3)``, in the order of ``numbers``; pictures of a row group are in
        memory at a time.

        Args:
            find: says where a shard is on this machine.

        Raises:
            UserError: when a shard is missing or damaged, naming the file.
        """
        return map(pngs.decode, self.pngs(numbers, find))

    def pngs(self, numbers: np.ndarray, find: Callable[[Path], Path] = Path) -> Iterator[bytes]:
        """As `read`, and not decoded."""
        for png in self._values(numbers, "image.bytes", find):
            yield png["bytes"].as_py()

    def captions(self, numbers: np.ndarray) -> Iterator[list[str]]:
        """The captions of these images, in the order of ``numbers``.

        Raises:
            UserError: when a shard is missing or damaged, naming the file.
        """
        for captions in self._values(numbers, "captions"):
            yield captions.as_py()

    def _values(self, numbers: np.ndarray, column: str, find: Callable[[Path], Path] = Path) -> Iterator[pa.Scalar]:
        for own, of_shard in _runs(numbers, self._shard_of(numbers)):
            shard = self._shards[own]
            with _opened(self.folder, shard, find) as file:
                groups = range(file.num_row_groups)
                ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])
                rows = of_shard - (self._ends[own] - shard["rows"])
                for group, of_group in _runs(rows, np.searchsorted(ends, rows, side="right")):
                    values = file.read_row_group(group, columns=[column]).column(0)
                    for row in (of_group - (ends[group] - len(values))).tolist():
                        yield values[row]

    def _shard_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, numbers, side="right")


def _runs(values: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of ``values`` that follow each other with one label, and it."""
    if len(labels):
        starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
        yield from zip(labels[starts].tolist(), np.split(values, starts[1:]), strict=True)


@contextmanager
def _opened(folder: Path | str, shard: dict[str, Any], find: Callable[[Path], Path] = Path) -> Iterator[pq.ParquetFile]:
    """A shard as its entry in the manifest has it; errors of reading it name it, and what to do."""
    path = Path(folder) / shard["name"]
    try:
        with pq.ParquetFile(find(path), page_checksum_verification=True) as file:
            if file.metadata.num_rows != shard["rows"]:
                raise ValueError(f"{file.metadata.num_rows} rows, yet {MANIFEST} says {shard['rows']}")
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error
