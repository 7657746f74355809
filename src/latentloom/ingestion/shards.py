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
import zlib
from collections.abc import Collection, Iterable, Iterator
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
from latentloom.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 2
ROW_GROUP_ROWS = 64
MANIFEST = "manifest.json"
SHARDS = "[0-9]*.parquet"

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
WRITER_OPTIONS = {
    "compression": {"image.bytes": "NONE"}  # PNGs are compressed already
    | dict.fromkeys(["id", "image.path", "captions.list.element", "split", "source", "key", "width", "height"], "ZSTD"),
    "use_dictionary": ["split", "source"],
    "write_statistics": ["split", "width", "height"],
    "write_page_checksum": True,
}
METADATA_COLUMNS = ["id", "captions", "split", "key", "source", "width", "height"]


# Against level 6 without run lengths, Pillow's default, of 256x256 photographs: 4.3 ms instead of 16.7, 2 % larger;
# of 128x128 emoji: 0.27 ms instead of 0.51, 3.7 KB instead of 3.2. PNG's row filters do what is worth doing.
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}


@dataclass(frozen=True)
class ImageRow:
    """One prepared image as ``png``; ``width`` and ``height`` are those of the original.

    ``signature`` is not written; it is empty where near duplicates are not looked for.
    """

    id: str
    png: bytes
    captions: list[str]
    split: str
    source: str
    key: str
    width: int
    height: int
    signature: bytes = b""


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


@dataclass(kw_only=True)
class Manifest:
    """What ``manifest.json`` says; ``attribution`` and ``licence`` are of all sources that gave images."""

    format_version: int = FORMAT_VERSION
    image_size: int
    found: int
    rejected: int
    images: int
    train: int
    validation: int
    sources: list[SourceCount]
    attribution: str | None
    licence: str | None
    shards: list[dict[str, Any]]


def encode(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **PNG_OPTIONS)
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


def write_shards(rows: Iterable[ImageRow], folder: Path) -> list[dict[str, Any]]:
    """Write ``rows`` as shards into ``folder``, which is unfinished from here on; give their names and rows."""
    (folder / MANIFEST).unlink(missing_ok=True)
    rows, shards, bytes_so_far = iter(rows), [], 0
    while (first := next(rows, None)) is not None:
        path = folder / f"{len(shards):05d}.parquet"
        rows_so_far = sum(shard["rows"] for shard in shards)
        each = bytes_so_far // rows_so_far if shards else len(first.png)
        room = each * (sharding.FEWEST_ROWS + sharding.TYPICAL_ROWS)
        shards.append({"name": path.name, "rows": _write_shard(path, itertools.chain([first], rows), room)})
        bytes_so_far += path.stat().st_size
    return shards


def move_to_train(folder: Path, shards: list[dict[str, Any]], rows: np.ndarray) -> None:
    """Write anew the shards that hold any of ``rows``, as if those had been of the training split from the start.

    Args:
        folder: the unfinished folder.
        shards: what ``write_shards`` gave.
        rows: positions, counted over all shards.
    """
    start = 0
    for shard in shards:
        stop = start + shard["rows"]
        if len(moved := rows[(start <= rows) & (rows < stop)]):
            _rewrite_shard(folder / shard["name"], moved - start)
        start = stop


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish the folder: what earlier runs left goes, then the manifest comes."""
    names = {shard["name"] for shard in manifest.shards}
    for path in [*folder.glob(SHARDS), *folder.glob(".*.tmp")]:
        if path.name not in names:
            path.unlink()
    write_json(folder / MANIFEST, asdict(manifest))


def _write_shard(path: Path, rows: Iterator[ImageRow], room: int) -> int:
    """Write one shard, of as many ``rows`` as belong into it; give their number."""
    of_shard, count = _up_to_its_end(rows), 0
    with atomic_path(path, room) as temporary, pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer:
        while group := list(itertools.islice(of_shard, ROW_GROUP_ROWS)):
            writer.write_table(_table(group))
            count += len(group)
    return count


def _up_to_its_end(rows: Iterator[ImageRow]) -> Iterator[ImageRow]:
    for count, row in enumerate(rows, start=1):
        yield row
        if sharding.ends_shard(row.id, count):
            return


def _table(group: list[ImageRow]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in group] for name in COLUMNS if name != "image"}
    return pa.table(columns | {"image": [(row.png, f"{row.id}.png") for row in group]}, SCHEMA)


def _rewrite_shard(path: Path, moved: np.ndarray) -> None:
    place, start = SCHEMA.get_field_index("split"), 0
    with (
        atomic_path(path, room=path.stat().st_size) as temporary,
        pq.ParquetFile(path) as file,
        pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer,
    ):
        for number in range(file.num_row_groups):
            group = file.read_row_group(number).combine_chunks()
            is_moved = np.isin(np.arange(start, start + len(group)), moved)
            split = pc.if_else(pa.array(is_moved), "train", group["split"])
            writer.write_table(group.set_column(place, SCHEMA.field(place), split).cast(SCHEMA))
            start += len(group)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest, as ``Manifest`` has it.

    Raises:
        UserError: when there is none, since no ingestion has ended there; when it is damaged, or of a format version
            that this code does not know.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r}, not {FORMAT_VERSION}: run `dvc repro`, which writes it anew"
        )
    return manifest


def read_metadata(folder: Path | str) -> "pd.DataFrame":
    """One row per image, in the shards' order: id, captions (lists of str), split, key, source, width, height.

    The pictures are never read.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    columns = pa.schema([SCHEMA.field(name) for name in METADATA_COLUMNS])
    tables = [columns.empty_table()]
    for path, file in _open_shards(Path(folder)):
        with _naming(path):
            tables.append(file.read(columns=METADATA_COLUMNS).replace_schema_metadata())
    table = pa.concat_tables(tables)
    frame = table.drop_columns("captions").to_pandas()
    frame.insert(1, "captions", table["captions"].to_pylist())
    return frame


def iterate_images(
    folder: Path | str, wanted: Collection[str] | None = None, batch_rows: int = ROW_GROUP_ROWS
) -> Iterator[tuple[str, np.ndarray]]:
    """Every image's id and pixels, uint8 ``(S, S, 3)``, in the shards' order, read ``batch_rows`` at a time.

    Args:
        wanted: the ids to decode; all where None. Of row groups without any of them, pixels are not read.

    Raises:
        UserError: when the manifest or a shard is missing or damaged, naming the file.
    """
    wanted = None if wanted is None else frozenset(wanted)
    for path, file in _open_shards(Path(folder)):
        with _naming(path):
            for group in _row_groups(file, wanted):
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=["id", "image.bytes"]):
                    for record in batch.to_pylist():
                        if wanted is None or record["id"] in wanted:
                            yield record["id"], decode(record["image"]["bytes"])


def _row_groups(file: pq.ParquetFile, wanted: Collection[str] | None) -> list[int]:
    """The numbers of the row groups that hold any of the ids ``wanted``; of all where None."""
    groups = range(file.num_row_groups)
    if wanted is None:
        return list(groups)
    ids = iter(file.read(columns=["id"])["id"].to_pylist())
    sizes = (file.metadata.row_group(group).num_rows for group in groups)
    return [group for group, size in enumerate(sizes) if not wanted.isdisjoint(list(itertools.islice(ids, size)))]


def _open_shards(folder: Path) -> Iterator[tuple[Path, pq.ParquetFile]]:
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise UserError(f"{path} is missing, yet {MANIFEST} names it: run `dvc repro`, which writes it anew")
        with _naming(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
        with file:
            if file.metadata.num_rows != shard["rows"]:
                raise UserError(
                    f"{path} holds {file.metadata.num_rows} rows, yet {MANIFEST} says {shard['rows']}: "
                    "run `dvc repro`, which writes it anew"
                )
            yield path, file


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Reports errors of reading a shard with its name and what to do."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `dvc repro`, which writes it anew") from error
