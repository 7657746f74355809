"""What the earlier stages left in ``data``, as the scalar tables that the checks look at.

images           one row per kept image, with its latent looked up
near_duplicates  one row per pair of images that look alike, with the splits of both
latents          one row per image in the cache: the index, with its image looked up and its captions counted
captions         one row per distinct caption: the index
channels         one row per channel of the latents' statistics
dataset          one row for the whole: counts, shares and the encoders' fingerprints

Pixels and tensors are never opened: each index carries the mean, std and finiteness of its tensors, taken when they
were made. Files are read in parts, and only numbers, truth values and the images' ids stay in memory: texts are
measured as they pass, and what names a row is looked up when the row breaks a check.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from latentloom.files import read_json, read_table
from latentloom.ids import Lookup, from_hex, to_hex
from latentloom.ingestion.shards import SCHEMA, metadata_batches, read_manifest
from latentloom.validation.rejected import Rejected, record_batches

SPLITS = ["train", "validation"]
TRAIN, VALIDATION = range(2)  # their codes
EMBEDDING = ["mean", "std", "norm"]

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """The columns that checks look at, and the ids of rows, given their numbers."""

    columns: pd.DataFrame
    ids: Callable[[Sequence[int]], list[str]]

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Data:
    """One ``data`` folder: the tables by name, in the order in which they are reported, and what else pages show."""

    folder: Path
    tables: dict[str, Table]
    manifest: dict[str, Any]  # of the images
    images: Columns  # id (N, 32), split and source as codes, width, height
    splits: list[str]  # what the codes mean: `SPLITS`, and what else is there
    sources: list[str]
    near_duplicates: Columns  # image_id, twin_id (P, 32), distance
    rejects: Rejected  # of samples, and of images whose latent is not finite
    samples_rejected: int
    latents_rejected: np.ndarray  # their ids, (M, 32)
    reconstructions: pd.DataFrame  # of sampled images: id, psnr, preview (of the worst)
    pairs: int  # of an image and a caption
    max_tokens: int  # that the text encoder read of a caption


def read_data(folder: Path) -> Data:
    """Read everything in ``data`` but pixels and tensors.

    Raises:
        UserError: naming the file that is missing, damaged, or lacks a column, and what to do.
    """
    manifest, splits, sources = read_manifest(folder / "images"), [*SPLITS], []
    images = _images(folder / "images", splits, sources)
    rejects = Rejected()
    samples_rejected = rejects.add(folder / "rejects.parquet", ["source", "preview"])
    near_duplicates = _near_duplicates(folder / "near_duplicates.parquet")
    latents = _latents(folder / "latents/index.parquet", splits)
    of_latents = folder / "latents/rejects.parquet"
    latents_rejected = np.concatenate([from_hex(batch["id"]) for batch in record_batches(of_latents, ["id"])])
    rejects.add(of_latents, ["source", "id"])
    reconstructions = read_table(folder / "latents/reconstructions.parquet", ["id", "psnr", "preview"])
    latent_stats = read_json(folder / "latents/stats.json")
    caption_index = folder / "text/index.parquet"
    captions = _captions(caption_index)
    latent_places = Lookup(latents["id"])
    pairs, captions_of = _pairs(folder / "text/pairs.parquet", latent_places, len(latents["id"]))
    text_stats = read_json(folder / "text/stats.json")

    held_out = latents["split"] == VALIDATION
    known = Lookup(images["id"]).positions(latents["id"])
    ingested = np.where(known < 0, -1, images["split"][known]) if len(images["id"]) else known
    encoded = np.zeros(len(images["id"]), bool)
    encoded[known[known >= 0]] = True
    encoded[_known(Lookup(images["id"]).positions(latents_rejected))] = True
    means = latent_stats["mean"]
    names = [f"channel {number}" for number in range(len(means))]
    return Data(
        folder=folder,
        tables={
            "images": Table(pd.DataFrame({"encoded": encoded}), partial(_ids_at, images["id"])),
            "near_duplicates": _pairs_apart(near_duplicates, latents["split"], latent_places),
            "latents": Table(
                pd.DataFrame(
                    {
                        "split_as_ingested": latents["split"] == ingested,
                        "captions": captions_of,
                        "finite": latents["finite"],
                        "mean": latents["mean"],
                        "std": latents["std"],
                    }
                ),
                partial(_ids_at, latents["id"]),
            ),
            "captions": Table(
                pd.DataFrame(captions | {"told_apart": _told_apart(captions, text_stats["max_tokens"], caption_index)}),
                partial(_ids_in, caption_index),
            ),
            "channels": Table(
                pd.DataFrame({"mean": means, "std": latent_stats["std"]}), lambda rows: [names[row] for row in rows]
            ),
            "dataset": Table(
                pd.DataFrame(
                    {
                        "train_images": [int((latents["split"] == TRAIN).sum())],
                        "validation_images": [int(held_out.sum())],
                        "validation_share": [pd.Series(held_out).mean()],
                        "rejected_latents": [len(latents_rejected) / max(len(latents_rejected) + len(held_out), 1)],
                        "vae_fingerprint": [latent_stats["vae"]["fingerprint"]],
                        "text_fingerprint": [text_stats["encoder"]["fingerprint"]],
                        "reconstruction_psnr": [reconstructions["psnr"].mean()],
                    }
                ),
                lambda _: [],
            ),
        },
        manifest=manifest,
        images=images,
        splits=splits,
        sources=sources,
        near_duplicates=near_duplicates,
        rejects=rejects,
        samples_rejected=samples_rejected,
        latents_rejected=latents_rejected,
        reconstructions=reconstructions,
        pairs=pairs,
        max_tokens=text_stats["max_tokens"],
    )


def _images(folder: Path, splits: list[str], sources: list[str]) -> Columns:
    names = ["id", "split", "source", "width", "height"]
    nothing = pa.RecordBatch.from_pylist([], pa.schema([SCHEMA.field(name) for name in names]))
    return _joined(
        {
            "id": from_hex(batch["id"]),
            "split": _codes(batch["split"], splits),
            "source": _codes(batch["source"], sources),
            "width": batch["width"].to_numpy(zero_copy_only=False),
            "height": batch["height"].to_numpy(zero_copy_only=False),
        }
        for part in ([nothing], metadata_batches(folder, names))
        for batch in part
    )


def _latents(path: Path, splits: list[str]) -> Columns:
    def read(batch: pa.RecordBatch) -> Columns:
        values = {name: batch[name].to_numpy(zero_copy_only=False) for name in ("mean", "std", "abs_max")}
        finite = batch["finite"].to_numpy(zero_copy_only=False) & _all_finite(values.values())
        split = _codes(batch["split"], splits)
        return {"id": from_hex(batch["id"]), "split": split, "finite": finite} | {
            name: values[name] for name in ("mean", "std")
        }

    return _joined(map(read, record_batches(path, ["id", "split", "mean", "std", "abs_max", "finite"])))


def _captions(path: Path) -> Columns:
    def read(batch: pa.RecordBatch) -> Columns:
        values = {name: batch[name].to_numpy(zero_copy_only=False) for name in ("tokens", *EMBEDDING)}
        length = pc.utf8_length(pc.utf8_trim_whitespace(batch["text"])).to_numpy(zero_copy_only=False)
        finite = batch["finite"].to_numpy(zero_copy_only=False) & _all_finite(values[name] for name in EMBEDDING)
        return values | {"length": length, "finite": finite}

    return _joined(map(read, record_batches(path, ["id", "text", "tokens", *EMBEDDING, "finite"])))


def _near_duplicates(path: Path) -> Columns:
    return _joined(
        {name: from_hex(batch[name]) for name in ("image_id", "twin_id")}
        | {"distance": batch["distance"].to_numpy(zero_copy_only=False)}
        for batch in record_batches(path, ["image_id", "twin_id", "distance"])
    )


def _pairs(path: Path, latents: Lookup, count: int) -> tuple[int, np.ndarray]:
    """How many pairs there are, and how many captions each latent has, int64 ``(count,)``."""
    pairs, captions_of = 0, np.zeros(count, np.int64)
    for batch in record_batches(path, ["image_id"]):
        pairs += len(batch)
        places, counts = np.unique(_known(latents.positions(from_hex(batch["image_id"]))), return_counts=True)
        captions_of[places] += counts
    return pairs, captions_of


def _pairs_apart(near: Columns, splits: np.ndarray, latents: Lookup) -> Table:
    """Whether the splits tell a pair apart, as training reads them, and the id of the image that is held out."""
    splits = np.append(splits, -1)  # of an image without a latent, whose place is -1
    first, second = (splits[latents.positions(near[name])] for name in ("image_id", "twin_id"))
    apart = np.isin(first, (TRAIN, VALIDATION)) & np.isin(second, (TRAIN, VALIDATION)) & (first != second)

    def held_out(rows: Sequence[int]) -> list[str]:
        places = np.asarray(rows, np.int64)
        is_first = (first[places] == VALIDATION)[:, None]
        return to_hex(np.where(is_first, near["image_id"][places], near["twin_id"][places])).to_pylist()

    return Table(pd.DataFrame({"apart": apart}), held_out)


def _told_apart(captions: Columns, max_tokens: int, path: Path) -> np.ndarray:
    """Whether no caption of other words has the same embedding, by its statistics.

    Words that differ in case, accents or spaces alone are the same; captions that were cut have a check of their own.
    """
    told_apart = np.ones(len(captions["finite"]), bool)
    rows = np.flatnonzero(captions["finite"] & (captions["tokens"] <= max_tokens))
    rows = rows[np.lexsort([captions[name][rows] for name in EMBEDDING])]
    repeats = np.ones(max(len(rows) - 1, 0), bool)  # the embedding before it
    for name in EMBEDDING:
        repeats &= captions[name][rows[1:]] == captions[name][rows[:-1]]
    alike = np.append(repeats, False) | np.append(False, repeats)[: len(rows)]
    if not alike.any():
        return told_apart
    starts = np.flatnonzero(np.append(True, ~repeats)[alike])
    rows = rows[alike]
    words = np.empty(len(told_apart), np.uint64)
    start, wanted = 0, np.sort(rows)
    for batch in record_batches(path, ["text"]):
        of_batch = wanted[slice(*np.searchsorted(wanted, [start, start + len(batch)]))]
        texts = batch["text"].take(pa.array(of_batch - start)).to_pylist()
        words[of_batch] = np.frombuffer(b"".join(map(_words, texts)), np.uint64)
        start += len(batch)
    words = words[rows]
    differ = np.minimum.reduceat(words, starts) != np.maximum.reduceat(words, starts)
    told_apart[rows[np.repeat(differ, np.diff(starts, append=len(rows)))]] = False
    return told_apart


def _words(text: str) -> bytes:
    """A hash of 8 bytes of the words: to tell which of millions differ, without keeping them."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return hashlib.blake2b(" ".join(plain.casefold().split()).encode(), digest_size=8).digest()


def _joined(parts: Iterable[Columns]) -> Columns:
    """One column of each name, of at least one part."""
    listed = list(parts)
    return {name: np.concatenate([part.pop(name) for part in listed]) for name in list(listed[0])}


def _codes(column: pa.Array, names: list[str]) -> np.ndarray:
    """The place of each text in ``names``, to which new ones are added: int16."""
    encoded = column.dictionary_encode("encode")
    own = encoded.dictionary.to_pylist()
    names += [name for name in own if name not in names]
    return np.array([names.index(name) for name in own], np.int16)[encoded.indices.to_numpy()]


def _ids_at(ids: np.ndarray, rows: Sequence[int]) -> list[str]:
    return to_hex(ids[np.asarray(rows, np.int64)]).to_pylist()


def _ids_in(path: Path, rows: Sequence[int]) -> list[str]:
    """The ids of some rows of a file."""
    found, start = {}, 0
    for batch in record_batches(path, ["id"]) if len(rows) else ():
        found |= {row: batch["id"][row - start].as_py() for row in rows if start <= row < start + len(batch)}
        start += len(batch)
    return [found[row] for row in rows]


def _all_finite(columns: Iterable[np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce([np.isfinite(column.astype(np.float32)) for column in columns])


def _known(places: np.ndarray) -> np.ndarray:
    return places[places >= 0]
