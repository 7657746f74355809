"""Images a second of the stage `encode_images` against the bare VAE.

    whole     encode_images into a fresh folder, with an empty row store: Parquet is read, PNGs are decoded, encoded in
              batches of 32, shards, index and statistics are written
    bare      the VAE's encode in a loop, on float tensors of the same batches that lie in memory
    decoding  reading Parquet and decoding PNG alone, in one thread, as the stage does beside the encoding

All in one process, on the bundled VAE, in alternating rounds; figures are medians over the rounds. Were nothing done
at once, an image would cost `bare` + `decoding`. OpenMoji is ingested into a temporary folder, which is removed.

    TQDM_DISABLE=1 PYTHONPATH=src python benchmarks/encode.py [--images 1024] [--size 128] [--rounds 5]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml

from latentloom.devices import choose_device
from latentloom.encoding.latents import BATCH_SIZE, encode_images
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import Vae, load_vae
from latentloom.ingestion.shards import iterate_images

ROOT = Path(__file__).resolve().parents[1]


def ingest(folder: Path, images: int, size: int) -> Path:
    """Run the stage `ingest` in ``folder``; the folder of the prepared images."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"source": "openmoji", "path": None, "limit": images, "skin_tones": 0, "image_size": size}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, ROOT / "pipelines" / "ingest.py"], cwd=folder, env=environment, check=True)
    return folder / "data" / "images"


def seconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes, the device's work included."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def batches_in_memory(vae: Vae, images: Path) -> list[torch.Tensor]:
    """All images as the VAE takes them: (B, 3, H, W) in [-1, 1], on its device."""
    pixels = torch.from_numpy(np.stack([pixels for _, pixels in iterate_images(images)]))
    return [
        (batch.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.device, memory_format=torch.channels_last)
        for batch in pixels.split(BATCH_SIZE)
    ]


def encode_whole(vae: Vae, images: Path, beside: Path) -> None:
    """Encode into a folder that is made in ``beside`` and removed."""
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        encode_images(vae, images, Path(folder) / "latents", RowStore(Path(folder) / "state", limit=0))


@torch.inference_mode()
def encode_bare(vae: Vae, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        vae.module.encode(batch)


def decode(images: Path) -> None:
    for _ in iterate_images(images):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = choose_device()
    with tempfile.TemporaryDirectory() as folder:
        images = ingest(Path(folder), arguments.images, arguments.size)
        vae = load_vae("bundled", device)
        batches = batches_in_memory(vae, images)
        count = sum(map(len, batches))
        actions = {
            "whole": lambda: encode_whole(vae, images, images.parent),
            "bare": lambda: encode_bare(vae, batches),
            "decoding": lambda: decode(images),
        }
        encode_bare(vae, batches[:2])  # first calls choose kernels
        rounds = [{name: seconds(action) for name, action in actions.items()} for _ in range(arguments.rounds)]
    print(f"{count} images of {arguments.size} pixels on {device}, {torch.get_num_threads()} threads")
    for name in actions:
        taken = median(one[name] for one in rounds)
        print(f"{name:>9}  {count / taken:8.1f} images/s  {1000 * taken / count:7.3f} ms per image")
    print(f"whole / bare: {median(one['bare'] / one['whole'] for one in rounds):.3f} of the bare VAE's images/s")
    one_by_one = median((one["bare"] + one["decoding"]) / one["whole"] for one in rounds)
    print(f"(bare + decoding) / whole: {one_by_one:.3f}; above 1: decoding and encoding overlap")


if __name__ == "__main__":
    main()
