"""The format of ``data/images``: Parquet shards of prepared images, and the manifest that names them.

``NNNNN.parquet`` holds at most 1,024 rows, in the source's order, in row groups of 64, so that neither writer nor
reader ever holds more than a row group of pictures. pandas and ``datasets.load_dataset("parquet", ...)`` open them:
the image column is a struct of PNG bytes and path, which the schema's metadata declares to be a Hugging Face
``Image``. The same rows give the same bytes. ``manifest.json`` is removed before the first shard is written and comes
back last: a folder without it is not finished.
"""

import io
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentloom.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
SHARD_ROWS = 1024
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


class ShardError(ValueError):
    """A file of ``data/images`` is missing or damaged; the message names it."""


@dataclass(frozen=True)
class ImageRow:
    """One prepared image: ``pixels`` uint8 ``(S, S, 3)``; ``width`` and ``height`` are those of the original."""

    id: str
    pixels: np.ndarray
    captions: list[str]
    split: str
    source: str
    key: str
    width: int
    height: int


@dataclass(kw_only=True)
class Manifest:
    """What ``manifest.json`` says; ``write_images`` fills in the counts and the shards' names and rows."""

    format_version: int = FORMAT_VERSION
    source: str
    image_size: int
    sources: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    train: int = 0
    validation: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    attribution: str | None
    licence: str | None


def encode(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
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


def write_images(rows: Iterable[ImageRow], folder: Path, manifest: Manifest) -> Manifest:
    """Write ``rows`` as shards into ``folder``, then what is counted of them into the manifest.

    Shards of an earlier run, and temporary files of a killed one, go once all new shards are whole.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    splits: Counter[str] = Counter()
    rows, shards = iter(rows), []
    while (first := next(rows, None)) is not None:
        name = f"{len(shards):05d}.parquet"
        of_shard = itertools.chain([first], itertools.islice(rows, SHARD_ROWS - 1))
        of_splits = _write_shard(folder / name, of_shard)
        shards.append({"name": name, "rows": of_splits.total()})
        splits += of_splits
    names = {shard["name"] for shard in shards}
    for path in [*folder.glob(SHARDS), *folder.glob(".*.tmp")]:
        if path.name not in names:
            path.unlink()
    manifest.images, manifest.shards = splits.total(), shards
    manifest.train, manifest.validation = splits["train"], splits["validation"]
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _write_shard(path: Path, rows: Iterator[ImageRow]) -> Counter[str]:
    splits: Counter[str] = Counter()
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer:
        while group := [_record(row) for row in itertools.islice(rows, ROW_GROUP_ROWS)]:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            splits.update(record["split"] for record in group)
    return splits


def _record(row: ImageRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in COLUMNS if name != "image"}
    return values | {"image": {"bytes": encode(row.pixels), "path": f"{row.id}.png"}}


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest, as ``Manifest`` has it.

    Raises:
        FileNotFoundError: when there is none, since no ingestion has ended there.
        ValueError: when it is damaged, or of a format version that this code does not know.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version!r}, not {FORMAT_VERSION}: run `dvc repro`, which writes it anew"
        )
    return manifest


def read_metadata(folder: Path | str) -> "pd.DataFrame":
    """One row an image, in the shards' order: id, captions (lists of str), split, key, source, width, height.

    The pictures are never read.

    Raises:
        FileNotFoundError, ValueError: when the manifest or a shard is missing or damaged, naming the file.
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
        wanted: the ids to decode; all where None. Row groups without any of them are not read.

    Raises:
        FileNotFoundError, ValueError: when the manifest or a shard is missing or damaged, naming the file.
    """
    wanted = None if wanted is None else frozenset(wanted)
    for path, file in _open_shards(Path(folder)):
        with _naming(path):
            for group in range(file.num_row_groups):
                if wanted is not None:
                    ids = file.read_row_group(group, columns=["id"])["id"].to_pylist()
                    if wanted.isdisjoint(ids):
                        continue
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=["id", "image.bytes"]):
                    for record in batch.to_pylist():
                        if wanted is None or record["id"] in wanted:
                            pixels = decode(record["image"]["bytes"])
                            yield record["id"], pixels


def _open_shards(folder: Path) -> Iterator[tuple[Path, pq.ParquetFile]]:
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, yet {MANIFEST} names it: run `dvc repro`, which writes it anew"
            )
        with _naming(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
        with file:
            if file.metadata.num_rows != shard["rows"]:
                raise ShardError(
                    f"{path} holds {file.metadata.num_rows} rows, yet {MANIFEST} says {shard['rows']}: "
                    "run `dvc repro`, which writes it anew"
                )
            yield path, file


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of reading a shard, told with its name and what to do."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ShardError(f"{path} is damaged ({error}): delete it and run `dvc repro`, which writes it anew") from error
