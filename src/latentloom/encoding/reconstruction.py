"""What the VAE makes of pictures: a sample of them, decoded from their latents and compared with the originals.

    data/images, data/latents -> data/latents/reconstructions.parquet   per sampled image: id, psnr in dB, and of those
                                                                        that come out worst the decoded picture

No model trained on these latents can generate better pictures than the VAE decodes from them. One that was made for
other pictures smears yours, and the latents do not show it.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.cache import Done, Plan, Task, row_keys
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import INDEX, RECONSTRUCTIONS, Tensors, load_shard
from latentloom.encoding.vae import Vae
from latentloom.files import atomic_path, iterate_table
from latentloom.ids import first_backwards, from_hex, positions
from latentloom.ingestion.pngs import thumbnail
from latentloom.ingestion.shards import NumberedImages, metadata_batches

SAMPLE, SHOWN = 32, 12
BATCH_SIZE = 8
MOST_SIDE = 2**16
HIGHEST = 99.0  # dB, also of a picture that comes out the same


def psnr(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio (N,) in dB, at most `HIGHEST`, between pictures, both uint8 (N, H, W, 3)."""
    error = np.square(pixels.astype(np.float64) - others).mean((1, 2, 3)) / 255**2
    return -10 * np.log10(np.maximum(error, 10 ** (-HIGHEST / 10)))


def reconstruct(vae: Vae, images: Path, out: Path, store: RowStore) -> float:
    """Write `RECONSTRUCTIONS` of the latents in ``out``; what ``store`` knows is not decoded again.

    The sampled images are those whose ids, read backwards, come first: as good as chosen at random, and the same ones
    for the same images.

    Returns:
        The mean PSNR in dB.
    """
    sample = _sample(out / INDEX)

    def decode(task: Task) -> Done:
        batches = _decode(vae, images, out, sample.iloc[task.made_of[task.link()]])
        shards = [shard.tensors for shard in task.write(batches)]
        return Done(task.computed, shards)

    with TemporaryDirectory() as folder:  # the store keeps the shards
        keys = row_keys(from_hex(sample["key"]), "decoded")
        shapes = (sample["height"] * MOST_SIDE + sample["width"]).to_numpy()
        plan = Plan(store, Path(folder), from_hex(sample["id"]), keys, 1, np.arange(len(sample)), groups=shapes)
        shards = [shard for part in plan.run(decode, title="decode again", unit="image") for shard in part]
        ratios = torch.cat([shard["psnr"] for shard in shards]).numpy()
        decoded = [pixels for shard in shards for pixels in shard["pixels"].numpy()]
        worst = set(np.argsort(ratios, kind="stable")[:SHOWN].tolist())
        previews = [thumbnail(own) if number in worst else None for number, own in enumerate(decoded)]
    store.trim()
    with atomic_path(out / RECONSTRUCTIONS) as temporary:
        frame = pd.DataFrame({"id": sample["id"].tolist(), "psnr": ratios, "preview": previews})
        frame.to_parquet(temporary, index=False)
    return float(ratios.mean(dtype=np.float64))


def _sample(index: Path) -> pd.DataFrame:
    """The rows of the sampled images, in the order of the index, of which a part is in memory at a time."""
    sample = pd.DataFrame()
    for table in iterate_table(index, ["id", "key", "shard", "row", "height", "width"]):
        first = np.sort(first_backwards(from_hex(table["id"]), SAMPLE))
        sample = pd.concat([sample, table.take(first).to_pandas()], ignore_index=True)
        sample = sample.iloc[np.sort(first_backwards(from_hex(sample["id"]), SAMPLE))]
    return sample


def _originals(images: Path, ids: pd.Series) -> dict[str, np.ndarray]:
    """The pixels of prepared images."""
    wanted, start = from_hex(ids), 0
    numbers = np.empty(len(wanted), np.int64)
    for batch in metadata_batches(images, ["id"]):
        found = positions(wanted, from_hex(batch["id"]))
        numbers[found >= 0] = start + found[found >= 0]
        start += len(batch)
    return dict(zip(ids, NumberedImages(images).read(numbers), strict=True))


def _decode(vae: Vae, images: Path, out: Path, rows: pd.DataFrame) -> Iterator[Tensors]:
    """The rows of an index, which come shape by shape, as the store keeps them: ``psnr`` (N,) and ``pixels``
    (N, H, W, 3).
    """
    originals = _originals(images, rows["id"]) if len(rows) else {}
    of_shapes = [own for _, own in rows.groupby(["height", "width"], sort=False)]
    for batch in (own[start : start + BATCH_SIZE] for own in of_shapes for start in range(0, len(own), BATCH_SIZE)):
        places = zip(batch["shard"], batch["row"], strict=True)
        latents = torch.stack([load_shard(out / shard)["mean"][row] for shard, row in places]).float()
        # Always the same batch size: a row's bytes must not depend on how many others are decoded with it.
        filled = torch.cat([latents, latents[-1:].expand(BATCH_SIZE - len(latents), -1, -1, -1)])
        decoded = vae.decode(filled)[: len(latents)]
        ratios = psnr(np.stack([originals[image] for image in batch["id"]]), decoded)
        yield {"psnr": torch.from_numpy(ratios.astype(np.float32)), "pixels": torch.from_numpy(decoded.copy())}
