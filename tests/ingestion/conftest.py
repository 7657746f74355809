"""A source folder that a test fills picture by picture, and the ingestion of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latentloom import sharding
from latentloom.ingestion import pngs, shard_writer
from latentloom.ingestion.ingest import IngestReport, ingest
from latentloom.ingestion.shards import iterate_images, read_metadata
from latentloom.params import IngestParams

SIZE = 32
UNBOUNDED = {  # params of `ingest` that reject nothing
    "shape": "square",
    "bucket_multiple": 32,
    "max_bucket_ratio": 2.0,
    "limit": None,
    "skin_tones": 0,
    "max_pixels": 178_956_970,
    "max_aspect_ratio": 1e9,
    "near_duplicate_distance": None,
    "max_reject_fraction": 1.0,
}


def noise(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass
class Corpus:
    """A folder of images under ``path``, ingested into ``out``; ``add`` makes a new picture unless given one."""

    path: Path
    out: Path
    added: int = field(default=0)

    def add(
        self,
        name: str,
        caption: str | bytes | None = None,
        picture: Image.Image | np.ndarray | bytes | None = None,
        **options,
    ):
        self.added += 1
        if picture is None:
            picture = noise(self.added)
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            picture.save(path, **options)
        if caption is not None:
            self.write(str(Path(name).with_suffix(".txt")), caption)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    @property
    def images(self) -> Path:
        return self.out / "images"

    @property
    def rejects(self) -> Path:
        return self.out / "rejects.parquet"

    @property
    def near_duplicates(self) -> Path:
        return self.out / "near_duplicates.parquet"

    def params(self, **changes) -> IngestParams:
        own = {"source": "folder", "path": str(self.path), "image_size": SIZE, "val_fraction": 0.5}
        return IngestParams(**(UNBOUNDED | own | changes))

    def ingest(self, **changes) -> IngestReport:
        return ingest(self.params(**changes), self.images, self.rejects, self.near_duplicates, progress=False)

    def reasons(self) -> dict[str, str]:
        """Of the last ingestion: key -> reason."""
        frame = pd.read_parquet(self.rejects)
        return dict(zip(frame["key"], frame["reason"], strict=True))

    def previews(self) -> dict[str, bytes | None]:
        frame = pd.read_parquet(self.rejects)
        return dict(zip(frame["key"], frame["preview"], strict=True))

    def details(self) -> dict[str, str]:
        frame = pd.read_parquet(self.rejects)
        return dict(zip(frame["key"], frame["detail"], strict=True))

    def captions(self) -> dict[str, list[str]]:
        """Of the last ingestion: key -> captions."""
        frame = read_metadata(self.images)
        return dict(zip(frame["key"], frame["captions"], strict=True))

    def ids(self) -> dict[str, str]:
        frame = read_metadata(self.images)
        return dict(zip(frame["key"], frame["id"], strict=True))

    def pixels(self) -> dict[str, np.ndarray]:
        by_id = dict(iterate_images(self.images))
        return {key: by_id[own_id] for key, own_id in self.ids().items()}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "source").mkdir()
    return Corpus(tmp_path / "source", tmp_path / "out")


@pytest.fixture
def new_corpus(tmp_path: Path) -> Callable[[str], Corpus]:
    def make(name: str) -> Corpus:
        (tmp_path / name / "source").mkdir(parents=True)
        return Corpus(tmp_path / name / "source", tmp_path / name / "out")

    return make


@pytest.fixture
def shards_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``shards_of(rows, typical=1, most=...)`` shrinks the shards: at least ``rows`` of noise; exactly so many by
    default."""
    png = len(pngs.encode(noise(0)))  # all are of about this size

    def shrink(rows: int, typical: int = 1, most: int = 1000, group: int = 2) -> None:
        size = [int(png * bound) for bound in (rows - 0.5, typical - 0.5, most - 0.5)]
        monkeypatch.setattr(sharding, "IMAGES", sharding.ShardBytes(*size))
        monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", group)

    return shrink


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    return noise


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder: relative name -> bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        files: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
