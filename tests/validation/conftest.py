"""A small valid pair of caches on disk, and the way to break one thing in it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latentloom.files import read_json, write_json
from latentloom.params import ValidateParams
from latentloom.validation import ValidationReport, validate

LIMITS = ValidateParams(
    on_failure="stop",
    min_train_images=16,
    caption_length=[2, 300],
    latent_mean=[-10.0, 10.0],
    latent_std=[0.05, 20.0],
    embedding_norm=[0.1, 1000.0],
    val_fraction_tolerance=0.1,
)
TABLES = {"latents": "latents/index.parquet", "captions": "text/index.parquet", "pairs": "text/pairs.parquet"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Caches:
    root: Path
    limits = LIMITS

    def read(self, table: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / TABLES[table])

    def write(self, table: str, frame: pd.DataFrame) -> None:
        frame.to_parquet(self.root / TABLES[table], index=False)

    def set(self, table: str, rows: list[int], **values: object) -> list[str]:
        """Overwrite columns in the given rows; return those rows' ids as they are then."""
        frame = self.read(table)
        for column, value in values.items():
            frame.loc[rows, column] = value
        self.write(table, frame)
        return list(frame["id" if "id" in frame else "image_id"].iloc[rows])

    def set_stats(self, cache: str, **values: object) -> None:
        path = self.root / cache / "stats.json"
        write_json(path, read_json(path) | values)

    def validate(
        self, limits: ValidateParams | None = None, docs: bool = False, **arguments: object
    ) -> ValidationReport:
        return validate(
            self.root / "latents",
            self.root / "text",
            limits or self.limits,
            docs_folder=self.root / "docs" if docs else None,
            **{
                "val_fraction": 0.1,
                "expected_vae_fingerprint": "vae-1",
                "expected_text_fingerprint": "text-1",
                **arguments,
            },
        )


def write_caches(root: Path, images: int) -> Caches:
    """``images`` images (every tenth for validation) of two captions each, the second shared with the next image."""
    caches = Caches(root)
    ids = [digest(f"image {n}") for n in range(images)]
    texts = [f"caption number {n}" for n in range(images)]
    caption_ids = [digest(text) for text in texts]
    validation = np.arange(images) % 10 == 9
    for cache in ("latents", "text"):
        (root / cache).mkdir(parents=True)
        (root / cache / "00000.safetensors").touch()
    caches.write(
        "latents",
        pd.DataFrame({
            "id": ids,
            "key": [digest(f"latent {n}") for n in range(images)],
            "split": np.where(validation, "validation", "train"),
            "shard": "00000.safetensors",
            "row": np.arange(images, dtype="int32"),
            "mean": np.linspace(-0.5, 0.5, images, dtype="float32"),
            "std": np.linspace(0.8, 1.2, images, dtype="float32"),
            "abs_max": np.float32(4.0),
            "finite": True,
            "channels": np.int32(4),
            "height": np.int32(16),
            "width": np.int32(16),
        }),
    )  # fmt: skip
    caches.write(
        "captions",
        pd.DataFrame({
            "id": caption_ids,
            "text": texts,
            "key": [digest(f"embedding {n}") for n in range(images)],
            "shard": "00000.safetensors",
            "row": np.arange(images, dtype="int32"),
            "mean": np.float32(0.0),
            "std": np.float32(0.05),
            "norm": np.float32(1.0),
            "finite": True,
            "dim": np.int32(384),
        }),
    )  # fmt: skip
    caches.write(
        "pairs",
        pd.DataFrame({
            "image_id": np.repeat(ids, 2),
            "caption_id": np.stack([caption_ids, np.roll(caption_ids, -1)], axis=1).ravel(),
            "position": np.tile(np.array([0, 1], dtype="int32"), images),
        }),
    )  # fmt: skip
    write_json(
        root / "latents/stats.json",
        {
            "format_version": 1,
            "vae": {"reference": "bundled", "class": "AutoencoderTiny", "fingerprint": "vae-1"},
            "distribution": "mean",
            "latent_shape": [4, 16, 16],
            "rows": images,
            "train_rows": int((~validation).sum()),
            "mean": [0.0, 0.1, -0.1, 0.0],
            "std": [1.0, 0.9, 1.1, 1.0],
            "attribution": None,
            "licence": None,
        },
    )
    write_json(
        root / "text/stats.json",
        {
            "format_version": 1,
            "encoder": {"reference": "bundled", "class": "BertModel", "fingerprint": "text-1"},
            "dim": 384,
            "rows": images,
        },
    )
    return caches


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return write_caches(tmp_path, images=40)


@pytest.fixture
def make_caches(tmp_path: Path) -> Callable[[str], Caches]:
    """Equal caches, each in a folder of its own."""
    return lambda name: write_caches(tmp_path / name, images=40)
