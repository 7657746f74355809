"""What pictures of any shape cost: training steps on five buckets against the square, and bytes of the cache per image.

Both ways train the shipped network on synthetic latents, as many of each bucket, with the loop of
latentloom/training/loop.py: one on the square alone, the other on the buckets of 128 pixels, multiples of 32 and ratios
up to 2:1, with the size as a condition. A batch is of one bucket, so its convolutions and its attention see five shapes
in turn. Rounds of both alternate, in one process; a round is whole turns of the buckets. The buckets differ a little in
area, so what is compared is the rate at equal pixels: images/s times the mean area of an image. The aim is a ratio of
0.9 or more.

The bytes of the cache are those of shard files (fp16, one value per latent and channel) of each bucket.

    PYTHONPATH=src python benchmarks/buckets.py [--rounds 7] [--turns 2] [--compile]
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch
import train_step
from train_step import CHANNELS, Settings, seconds

from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.cache import save_shard
from latentloom.encoding.dataset import Split
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.sizes import Size, bucket_table

BASE, MULTIPLE, MAX_RATIO = 128, 32, 2.0  # as shipped
FACTOR = 8  # of the bundled VAE
ROWS = 2000  # a bucket
SHARD_ROWS = 1000


def latents(rows: int, size: Size) -> torch.Tensor:
    return torch.randn(rows, CHANNELS, size.height // FACTOR, size.width // FACTOR)


def split_of(table: list[Size], settings: Settings) -> Split:
    captions = train_step.synthetic_data(settings)
    buckets = [
        replace(captions, latents=InMemoryRows({"mean": latents(settings.rows, size).to(settings.device)}))
        for size in table
    ]
    return Split(tuple(buckets))


def bytes_per_image(size: Size) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path, keys = Path(folder) / "shard", [f"{row:064x}" for row in range(SHARD_ROWS)]
        save_shard(path, {"mean": latents(SHARD_ROWS, size).half()}, keys)
        return path.stat().st_size / SHARD_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turns", type=int, default=2, help="a round: so many batches of each bucket")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=train_step.numbers, default=(64, 128, 256))
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = choose_device()
    settings = Settings(
        arguments.widths,
        arguments.depth,
        arguments.batch,
        autocast_dtype(arguments.precision, device),
        device,
        arguments.compile,
        rows=ROWS,
    )
    tables = {"square": [Size(BASE, BASE)], "buckets": bucket_table(BASE, MULTIPLE, MAX_RATIO)}
    contenders, area, rates = {}, {}, {}
    for name, table in tables.items():
        network = train_step.our_network(settings, size_condition=len(table) > 1)
        contenders[name] = train_step.ours(settings, network, split_of(table, settings))
        area[name], rates[name] = fmean(size.width * size.height for size in table), []
    steps = arguments.turns * len(tables["buckets"])
    for contender in contenders.values():
        seconds(contender.step, len(tables["buckets"]), device)  # first calls choose kernels, and compile
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            rates[name].append(settings.batch * steps / seconds(contender.step, steps, device))
    print(
        f"batch {settings.batch}, widths {settings.widths}, {settings.dtype or 'fp32'}"
        f"{', compiled' if settings.compile else ''}, on {device} ({torch.get_num_threads()} threads), torch "
        f"{torch.__version__}; {arguments.rounds} rounds of {steps} steps"
    )
    for name, table in tables.items():
        stored = fmean(map(bytes_per_image, table))
        print(
            f"{name:8}{median(rates[name]):9,.1f} images/s of {area[name]:,.0f} pixels, {stored:,.0f} bytes of the "
            f"cache each: {', '.join(map(str, table))}"
        )
    pixels = area["buckets"] / area["square"]
    ratios = sorted(own * pixels / its for own, its in zip(rates["buckets"], rates["square"], strict=True))
    print(f"buckets / square at equal pixels: {median(ratios):.3f} (rounds: {ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
