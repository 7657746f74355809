"""Synthetic caches for benchmarks: rows of random numbers, in the form that the encode stages leave; and memory."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.cache import FORMAT_VERSION, save_shard
from latentloom.files import write_json
from latentloom.ids import from_hex
from latentloom.sharding import TENSORS, shard_ranges

SHAPE, DIM = (4, 16, 16), 384


def synthetic(rows: range) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, 4, 16, 16) and embeddings (N, 384) of ``rows``, fp16."""
    random = np.random.default_rng(rows.start)
    latents = random.standard_normal((len(rows), *SHAPE), dtype=np.float32)
    return latents.astype(np.float16), random.standard_normal((len(rows), DIM), dtype=np.float32).astype(np.float16)


def write_caches(folder: Path, rows: int, validation: int = 0) -> None:
    """Write ``latents`` and ``text`` in ``folder``, one caption per image; hold the last ``validation`` rows out."""
    ids = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows)]
    images, captions = [], []
    for number, places in enumerate(shard_ranges(from_hex(ids), 2 * math.prod(SHAPE), TENSORS)):
        own = ids[places.start : places.stop]
        name = f"{number:05d}.safetensors"
        latents, embeddings = map(torch.from_numpy, synthetic(places))
        save_shard(folder / "latents" / name, {"mean": latents}, own)
        save_shard(folder / "text" / name, {"embedding": embeddings}, own)
        place = pd.DataFrame({"id": own, "key": own, "shard": name, "row": np.arange(len(own), dtype=np.int32)})
        place = place.assign(mean=np.float32(0.0), std=np.float32(1.0), finite=True)
        shape = {name: np.int32(size) for name, size in zip(("channels", "height", "width"), SHAPE, strict=True)}
        split = np.where(np.asarray(places) < rows - validation, "train", "validation")
        shown = {"split": split, "source": "synthetic", "abs_max": np.float32(4.0), "weight": np.float32(1.0)}
        images.append(place.assign(**shown, **shape))
        texts = [f"caption {row}" for row in places]
        captions.append(place.assign(text=texts, norm=np.float32(DIM**0.5), dim=np.int32(DIM)))
    pd.concat(images, ignore_index=True).to_parquet(folder / "latents" / "index.parquet", index=False)
    pd.concat(captions, ignore_index=True).to_parquet(folder / "text" / "index.parquet", index=False)
    pairs = pd.DataFrame({"image_id": ids, "caption_id": ids, "position": np.int32(0)})
    pairs.to_parquet(folder / "text" / "pairs.parquet", index=False)
    made_by = {"reference": "bundled", "class": "Synthetic", "fingerprint": "0" * 64}
    statistics = {"format_version": FORMAT_VERSION, "flip": False, "mean": [0.0] * SHAPE[0], "std": [1.0] * SHAPE[0]}
    statistics |= {"bound": 3.0, "vae": made_by, "attribution": "", "licence": ""}
    write_json(folder / "latents" / "stats.json", statistics)
    read = {"dim": DIM, "token_dim": None, "max_tokens": 77}
    write_json(folder / "text" / "stats.json", {"format_version": FORMAT_VERSION, "encoder": made_by} | read)


def memory() -> dict[str, float]:
    """This process's memory in MiB: VmHWM (the peak), RssAnon, RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) / 1024
        for name, value in (line.split(":", 1) for line in lines)
        if name in ("VmHWM", "RssAnon", "RssFile")
    }
