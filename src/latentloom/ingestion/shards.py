"""The format of ``data/images``: Parquet shards of prepared images, and the manifest that names them.

``NNNNN.parquet`` holds rows in the sources' order, in row groups of 64, so that neither writer nor reader ever holds
more than a row group of pictures; ``latentloom.sharding`` says where one file ends and the next begins. pandas and
``datasets.load_dataset("parquet", ...)`` open them: the image column is a struct of PNG bytes and path, which the
schema's metadata declares to be a Hugging Face ``Image``. The same rows give the same bytes. ``manifest.json`` is
removed before the first shard is written and comes back last: a folder without it is not finished.
"""

import io
import itertools
import json
import struct
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from latentloom import sharding
from latentloom.errors import UserError
from latentloom.files import atomic_path, check_ids, read_json, write_json
from latentloom.ingestion.growing import Texts
from latentloom.sizes import Size

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 2
ROW_GROUP_ROWS = 64
BATCH_ROWS = 2**13  # of metadata, at most
MANIFEST = "manifest.json"
SHARDS = "[0-9]*.parquet"
THUMBNAIL = 160  # pixels

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
CAPTIONS, SPLIT = map(SCHEMA.get_field_index, ("captions", "split"))
WRITER_OPTIONS = {
    "compression": {"image.bytes": "NONE"}  # PNGs are compressed already
    | dict.fromkeys(["id", "image.path", "captions.list.element", "split", "source", "key", "width", "height"], "ZSTD"),
    "use_dictionary": ["split", "source"],
    "write_statistics": ["split", "width", "height"],
    "write_page_checksum": True,
}
METADATA_COLUMNS = ["id", "captions", "split", "key", "source", "width", "height"]

PNG_SIZE = (16, 24)  # where a PNG has its width and height, four bytes each

# Against level 6 without run lengths, Pillow's default, of 256x256 photographs: 4.3 ms instead of 16.7, 2 % larger;
# of 128x128 emoji: 0.27 ms instead of 0.51, 3.7 KB instead of 3.2. PNG's row filters do what is worth doing.
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}


@dataclass(frozen=True)
class StoredPng:
    """A PNG that an earlier run has stored at a ``place``: its ``size`` in bytes, its header, and what gives it."""

    place: int
    size: int
    start: bytes
    read: Callable[[], bytes]

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return self.read()


@dataclass(frozen=True)
class ImageRow:
    """One prepared image as ``png``; ``width`` and ``height`` are those of the original.

    ``profile``, of colours, ``signature`` and ``file_hash``, the SHA-256 of the file, are not written; the signature is
    empty where near duplicates are not looked for.
    """

    id: str
    png: bytes | StoredPng
    captions: list[str]
    split: str
    source: str
    key: str
    width: int
    height: int
    profile: str = "none"
    signature: bytes = b""
    file_hash: bytes = b""


@dataclass
class SourceCount:
    """What came of one source; ``found`` is ``kept`` and ``rejected`` together."""

    name: str
    source: str
    weight: float
    attribution: str | None
    licence: str | None
    found: int = 0
    kept: int = 0
    rejected: int = 0


def encode(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **PNG_OPTIONS)
    return buffer.getvalue()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG for a page: at most `THUMBNAIL` per side."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(png: bytes) -> np.ndarray:
    """The pixels of a PNG: uint8 ``(H, W, 3)``, writable.

    Raises:
        ValueError: when the bytes are no whole PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a whole PNG ({len(png)} bytes): {type(error).__name__}") from error


def size_of(png: bytes | StoredPng) -> Size:
    """The size that the header of a PNG names."""
    return Size(*struct.unpack_from(">II", png.start if isinstance(png, StoredPng) else png, PNG_SIZE[0]))


def write_shards(
    rows: Iterable[ImageRow],
    folder: Path,
    finished: Callable[[Path], None] = lambda _: None,
    link: Callable[[Sequence[ImageRow], Path], bool] = lambda *_: False,
) -> list[dict[str, Any]]:
    """Write ``rows`` as shards into ``folder``, which is unfinished from the first one on; give their names and rows.

    Args:
        finished: is called with each shard before the next row is asked for.
        link: called with the rows of a shard where all have a `StoredPng`; puts an earlier run's shard of just these
            rows there, with `before_amending` where it was amended, and says whether there was one.
    """
    rows, shards = iter(rows), []
    first = next(rows, None)  # what goes wrong before there is a row leaves the folder as it was
    (folder / MANIFEST).unlink(missing_ok=True)
    while first is not None:
        path = folder / f"{len(shards):05d}.parquet"
        shards.append({"name": path.name, "rows": _write_shard(path, itertools.chain([first], rows), link)})
        finished(path)
        first = next(rows, None)
    return shards


class JoinedCaptions:
    """The captions of files equal to that of a row, in the order in which they came: what the row has gained by them.

    ``add`` takes the row's place, counted over all shards.
    """

    def __init__(self) -> None:
        self._places, self._ends = array("I"), array("Q", [0])  # of each file: its row, and where its captions end
        self._texts = Texts()

    def add(self, place: int, captions: Sequence[str]) -> None:
        for caption in captions:
            self._texts.append(caption)
        self._places.append(place)
        self._ends.append(len(self._texts))

    def by_rows(self) -> Callable[[range], list[list[str]]]:
        """Of a range of rows, the captions that each has gained; an empty list where none has any."""
        files = np.argsort(self._places, kind="stable")
        places = np.frombuffer(self._places, np.uint32)[files]

        def gained(rows: range) -> list[list[str]]:
            start, stop = np.searchsorted(places, [rows.start, rows.stop])
            captions: list[list[str]] = [[] for _ in rows] if start < stop else []
            for file in files[start:stop].tolist():
                own = captions[self._places[file] - rows.start]
                more = map(self._texts.__getitem__, range(self._ends[file], self._ends[file + 1]))
                own += [caption for caption in more if caption not in own]
            return captions

        return gained


def amend_shards(folder: Path, shards: list[dict[str, Any]], to_train: np.ndarray, joined: JoinedCaptions) -> int:
    """Write anew the shards whose rows turned out otherwise, as if they had been so from the start; not those that an
    earlier run has amended in the same way.

    Args:
        folder: the unfinished folder.
        shards: what ``write_shards`` gave.
        to_train: places, counted over all shards, of rows that belong into the training split.
        joined: captions that rows have behind their own, without those that they have already.

    Returns:
        how many captions have come to those that were there.
    """
    start = added = 0
    to_train, gained = np.sort(to_train), joined.by_rows()
    for shard in shards:
        path, places = folder / shard["name"], range(start, start + shard["rows"])
        start += shard["rows"]
        first, last = np.searchsorted(to_train, [places.start, places.stop])
        more = gained(places)
        if first < last or more or before_amending(path).exists():
            added += _amend_shard(path, np.isin(places, to_train[first:last]), more)
    return added


def before_amending(shard: Path) -> Path:
    """In an unfinished folder, beside an earlier run's shard: its rows' metadata before they were amended."""
    return shard.with_name(f".{shard.name}.before.tmp")


def write_manifest(
    folder: Path,
    image_size: int | list[int],
    train: int,
    sources: Collection[SourceCount],
    shards: list[dict[str, Any]],
    sizes: Mapping[Size, int] | None = None,
) -> dict[str, Any]:
    """Finish the folder: what earlier runs left goes, then the manifest comes, which is returned.

    Args:
        folder: what ``write_shards`` left.
        image_size: pixels per side of the square, or of the base sizes.
        train: how many of the images are in the training split.
        sources: what came of each; thanks go to those that gave images.
        shards: what ``write_shards`` gave.
        sizes: of how many images; None where all are squares of ``image_size``.
    """
    images = sum(shard["rows"] for shard in shards)
    manifest = {
        "format_version": FORMAT_VERSION,
        "image_size": image_size,
        **({} if sizes is None else {"sizes": [[*size, count] for size, count in sizes.items()]}),
        "found": sum(source.found for source in sources),
        "rejected": sum(source.rejected for source in sources),
        "images": images,
        "train": train,
        "validation": images - train,
        "sources": [asdict(source) for source in sources],
        "attribution": _joined(source.attribution for source in sources if source.kept),
        "licence": _joined(source.licence for source in sources if source.kept),
        "shards": shards,
    }
    names = {shard["name"] for shard in shards}
    for path in [*folder.glob(SHARDS), *folder.glob(".*.tmp")]:
        if path.name not in names:
            path.unlink()
    write_json(folder / MANIFEST, manifest)
    return manifest


def _joined(texts: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, texts))) or None


def _write_shard(path: Path, rows: Iterator[ImageRow], link: Callable[[Sequence[ImageRow], Path], bool]) -> int:
    """Write or link one shard, of as many ``rows`` as belong into it; give their number."""
    before_amending(path).unlink(missing_ok=True)  # of a run that was killed
    of_shard, count = _up_to_its_end(rows), 0
    begin: list[ImageRow] = []
    for row in of_shard:
        begin.append(row)
        if not isinstance(row.png, StoredPng):
            of_shard = itertools.chain(begin, of_shard)
            break
    else:
        if link(begin, path):
            return len(begin)
        of_shard = iter(begin)
    room = sharding.IMAGES.fewest + sharding.IMAGES.typical
    with atomic_path(path, room) as temporary, pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer:
        while group := list(itertools.islice(of_shard, ROW_GROUP_ROWS)):
            writer.write_table(_table(group))
            count += len(group)
    return count


def _up_to_its_end(rows: Iterator[ImageRow]) -> Iterator[ImageRow]:
    shard_bytes = 0
    for row in rows:
        yield row
        shard_bytes += len(row.png)
        if sharding.ends_shard(row.id, len(row.png), shard_bytes, sharding.IMAGES):
            return


def _table(group: list[ImageRow]) -> pa.Table:
    image = [pa.array([bytes(row.png) for row in group], pa.binary()), pa.array([f"{row.id}.png" for row in group])]
    metadata = metadata_table(group)
    columns = dict(zip(metadata.column_names, metadata.columns, strict=True))
    return pa.table(columns | {"image": pa.StructArray.from_arrays(image, ["bytes", "path"])}, SCHEMA)


def metadata_table(rows: Sequence[ImageRow]) -> pa.Table:
    """`METADATA_COLUMNS` of rows."""
    schema = pa.schema([SCHEMA.field(name) for name in METADATA_COLUMNS])
    return pa.table({name: [getattr(row, name) for row in rows] for name in METADATA_COLUMNS}, schema)


def _amend_shard(path: Path, is_moved: np.ndarray, more_captions: list[list[str]]) -> int:
    """Give how many captions were added; ``more_captions`` is empty or has an entry for each row."""
    before, added = before_amending(path), 0
    with pq.ParquetFile(path) as file:
        there = file.read(["captions", "split"])
        rows = pq.read_table(before, columns=there.column_names) if before.exists() else there
        captions = rows["captions"]
        if more_captions:
            own = captions.to_pylist()
            fresh = [[text for text in new if text not in old] for old, new in zip(own, more_captions, strict=True)]
            captions = [old + new for old, new in zip(own, fresh, strict=True)]
            added = sum(len(set(new)) for new in fresh)
        split = pc.if_else(pa.array(is_moved), "train", rows["split"])
        amended = pa.table({"captions": captions, "split": split}).cast(there.schema)
        if amended.equals(there):
            return added
        with (
            atomic_path(path, room=path.stat().st_size) as temporary,
            pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer,
        ):
            start = 0
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                part = amended.slice(start, len(group))
                start += len(group)
                for column in (CAPTIONS, SPLIT):
                    field = SCHEMA.field(column)
                    group = group.set_column(column, field, part[field.name])
                writer.write_table(group.combine_chunks().cast(SCHEMA))
    return added


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
                pngs = batch["image"].field("bytes")
                _, offsets, content = pngs.buffers()
                starts = np.frombuffer(offsets, np.int32)[pngs.offset :][: len(pngs)]
                header = np.frombuffer(content, np.uint8)[starts[:, None] + np.arange(*PNG_SIZE)]
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
                pngs = file.read_row_group(group, columns=["image.bytes"])["image"]
                for own_id, image in zip(ids, pngs, strict=True):
                    if wanted is None or own_id in wanted:
                        yield own_id, decode(image["bytes"].as_py())


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
        return map(decode, self.pngs(numbers, find))

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
