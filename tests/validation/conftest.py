"""A small valid data folder on disk, and the way to break one thing in it."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentloom.files import read_json, write_json
from latentloom.ingestion.shards import FORMAT_VERSION
from latentloom.params import ValidateParams
from latentloom.validation.report import ValidationReport
from latentloom.validation.runner import validate

LIMITS = ValidateParams(
    on_failure="stop",
    min_train_images=16,
    caption_length=[2, 300],
    latent_mean=[-10.0, 10.0],
    latent_std=[0.05, 20.0],
    max_cut_captions=0.05,
    max_same_embeddings=0.05,
    min_reconstruction_psnr=23.0,
    embedding_norm=[0.1, 1000.0],
    val_fraction_tolerance=0.1,
)
TABLES = {
    "images": "images/00000.parquet",
    "rejects": "rejects.parquet",
    "near_duplicates": "near_duplicates.parquet",
    "latents": "latents/index.parquet",
    "latent_rejects": "latents/rejects.parquet",
    "reconstructions": "latents/reconstructions.parquet",
    "captions": "text/index.parquet",
    "pairs": "text/pairs.parquet",
}
REJECT_COLUMNS = ("source", "key", "reason", "detail")
IMAGES = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "captions": pa.list_(pa.string()),
        **dict.fromkeys(["split", "source", "key"], pa.string()),
        **dict.fromkeys(["width", "height"], pa.int32()),
    }
)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Caches:
    root: Path
    limits = LIMITS
    preview = (20, 200, 140)  # the colour of the rejected pictures
    decoded = (120, 20, 20)  # and of what the VAE decoded

    @staticmethod
    def colour(number: int) -> tuple[int, int, int]:
        """The flat colour of image ``number``: no two alike, none of them a shade that the pages are drawn in."""
        return (250, 10 + 2 * number, 200 - 2 * number)

    def read(self, table: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / TABLES[table])

    def write(self, table: str, frame: pd.DataFrame) -> None:
        frame.to_parquet(self.root / TABLES[table], index=False, schema=IMAGES if table == "images" else None)

    def set(self, table: str, rows: list[int], **values: object) -> list[str]:
        """Overwrite columns in the given rows; return those rows' ids as they are then."""
        frame = self.read(table)
        for column, value in values.items():
            frame.loc[rows, column] = value
        self.write(table, frame)
        return list(frame[next(name for name in ("id", "image_id", "key") if name in frame)].iloc[rows])

    def set_stats(self, cache: str, **values: object) -> None:
        self._update(self.root / cache / "stats.json", values)

    def set_manifest(self, **values: object) -> None:
        self._update(self.root / "images" / "manifest.json", values)

    @staticmethod
    def _update(path: Path, values: dict[str, object]) -> None:
        write_json(path, read_json(path) | values)

    def validate(
        self, limits: ValidateParams | None = None, docs: bool = False, **arguments: object
    ) -> ValidationReport:
        return validate(
            self.root,
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
    """What the earlier stages leave of ``images`` images of two sources, and of eight samples that were rejected.

    Every tenth image is for validation. Each has two captions, the second shared with the next image. The latent of
    one image more was rejected. Images 0 and 1 are near duplicates.
    """
    caches = Caches(root)
    ids = [digest(f"image {n}") for n in range(images)]
    texts = [f"caption number {n}" for n in range(images)]
    caption_ids = [digest(text) for text in texts]
    splits = np.where(np.arange(images) % 10 == 9, "validation", "train")
    for folder in ("images", "latents/flipped", "text"):
        (root / folder).mkdir(parents=True)
    for shard in ("latents/00000", "latents/flipped/00000", "text/00000"):
        (root / f"{shard}.safetensors").touch()
    kept = [*ids, digest("rejected latent")]
    sources = np.where(np.arange(images + 1) % 4 == 3, "drawings", "photos")
    write_images(root / "images", kept, [*splits, "train"], list(sources))
    pq.write_table(
        pa.Table.from_pylist(
            [
                {
                    "source": "photos",
                    "key": f"broken/{n}.jpg",
                    "reason": "truncated" if n < 5 else "no_caption",
                    "detail": f"the file ends after {n} bytes" if n < 5 else "there is no text beside it",
                    "preview": None if n < 5 else png(caches.preview),
                }
                for n in range(8)
            ],
            pa.schema([*((name, pa.string()) for name in REJECT_COLUMNS), ("preview", pa.binary())]),
        ),
        root / "rejects.parquet",
    )
    caches.write(
        "near_duplicates",
        pd.DataFrame({"image_id": [ids[0]], "twin_id": [ids[1]], "distance": np.array([3], dtype="int32")}),
    )
    caches.write(
        "latents",
        pd.DataFrame({
            "id": ids,
            "key": [digest(f"latent {n}") for n in range(images)],
            "split": splits,
            "source": sources[:images],
            "weight": np.where(sources[:images] == "drawings", 2.0, 1.0).astype("float32"),
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
        "latent_rejects",
        pd.DataFrame({
            "id": [digest("rejected latent")],
            "source": ["photos"],
            "key": ["too bright.png"],
            "reason": ["latent_not_finite"],
            "detail": ["7 of 1024 numbers are not finite in fp32"],
        }),
    )  # fmt: skip
    caches.write(
        "reconstructions",
        pd.DataFrame({
            "id": [ids[2], ids[3]],
            "psnr": np.array([21.0, 31.0], dtype="float32"),
            "preview": [png(caches.decoded), None],
        }),
    )  # fmt: skip
    caches.write(
        "captions",
        pd.DataFrame({
            "id": caption_ids,
            "text": texts,
            "tokens": np.int32(6),
            "key": [digest(f"embedding {n}") for n in range(images)],
            "shard": "00000.safetensors",
            "row": np.arange(images, dtype="int32"),
            "mean": np.linspace(-0.01, 0.01, images, dtype="float32"),
            "std": np.float32(0.05),
            "norm": np.float32(1.0),
            "finite": True,
            "dim": np.int32(384),
        }),
    )  # fmt: skip
    pairs = pd.DataFrame({
        "image_id": np.repeat(ids, 2),
        "caption_id": np.stack([caption_ids, np.roll(caption_ids, -1)], axis=1).ravel(),
        "position": np.tile(np.array([0, 1], dtype="int32"), images),
    })  # fmt: skip
    of_rejected = pairs.iloc[[0]].assign(image_id=digest("rejected latent"))
    caches.write("pairs", pd.concat([pairs, of_rejected]))
    write_json(
        root / "latents/stats.json",
        {
            "format_version": 2,
            "vae": {"reference": "bundled", "class": "AutoencoderTiny", "fingerprint": "vae-1"},
            "distribution": "mean",
            "precision": "fp32",
            "flip": True,
            "latent_shape": [4, 16, 16],
            "rows": images,
            "train_rows": int((splits == "train").sum()),
            "rejected": 1,
            "mean": [0.0, 0.1, -0.1, 0.0],
            "std": [1.0, 0.9, 1.1, 1.0],
            "attribution": None,
            "licence": None,
        },
    )
    write_json(
        root / "text/stats.json",
        {
            "format_version": 2,
            "encoder": {"reference": "bundled", "class": "BertModel", "fingerprint": "text-1"},
            "dim": 384,
            "max_tokens": 77,
            "rows": images,
        },
    )
    return caches


def png(rgb: tuple[int, int, int], size: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, ids: list[str], splits: list[str], sources: list[str]) -> None:
    """One shard and its manifest, as ``ingest`` writes them: originals of 100 to 1,000 pixels, from tall to wide."""
    rows = [
        {
            "id": image_id,
            "image": {"bytes": png(Caches.colour(n)), "path": f"{image_id}.png"},
            "captions": [f"caption number {n}"],
            "split": split,
            "source": source,
            "key": f"{n}.jpg",
            "width": 100 + 20 * n,
            "height": 1000 - 20 * n,
        }
        for n, (image_id, split, source) in enumerate(zip(ids, splits, sources, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows, IMAGES), folder / "00000.parquet", row_group_size=16)
    write_json(
        folder / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            "image_size": 48,
            "found": len(ids) + 8,
            "rejected": 8,
            "images": len(ids),
            "train": splits.count("train"),
            "validation": splits.count("validation"),
            "sources": [
                source("photos", 1.0, sources.count("photos"), 8),
                source("drawings", 2.0, sources.count("drawings"), 0),
            ],
            "attribution": "a test",
            "licence": "CC0",
            "shards": [{"name": "00000.parquet", "rows": len(ids)}],
        },
    )


def source(name: str, weight: float, kept: int, rejected: int) -> dict[str, object]:
    return {
        "name": name,
        "source": "folder",
        "weight": weight,
        "found": kept + rejected,
        "kept": kept,
        "rejected": rejected,
        "attribution": f"the {name} of a test",
        "licence": "CC0",
    }


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return write_caches(tmp_path, images=40)


@pytest.fixture
def make_caches(tmp_path: Path) -> Callable[..., Caches]:
    """Caches in a folder of their own; equal ones for an equal number of images."""
    return lambda name, images=40: write_caches(tmp_path / name, images)
