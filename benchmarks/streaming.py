"""What streaming costs: training steps with rows streamed from the disk, against rows held on the device.

A step is that of the shipped model (widths 64/128/256, batches of 64): noise, forward, mean absolute error, backward,
AdamW, in the precision that `auto` gives. Both ways run the same steps, in turns of --steps; a turn starts its reader
anew, so nothing is made ahead while the other way runs. What counts is the median over --rounds turns; the aim is that
streaming costs at most 5 %. Then the reader alone, without a network: a batch after another, in epochs over all rows.

The cache is synthetic (4x16x16 latents, 384-dim embeddings, fp16), in a temporary folder that is removed. It has just
been written, so its pages are in memory: a first epoch from a cold disk waits for that disk.

    PYTHONPATH=src python benchmarks/streaming.py [--rows 100000] [--rounds 7] [--steps 10] [--folder FOLDER]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from synthetic import DIM, SHAPE, write_caches
from torch import nn

from latentloom.devices import autocast, autocast_dtype, choose_device
from latentloom.diffusion import get_network, get_schedule
from latentloom.encoding.dataset import LatentDataset, load_caches
from latentloom.training.batches import Batch, batches

BATCH, WIDTHS = 64, (64, 128, 256)
READER_BATCH, READER_STEPS = 256, 200


class Trainer:
    """A network and its optimizer, to train on whatever batches are given."""

    def __init__(self, widths: tuple[int, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        network = get_network(SHAPE[1], 1, 256, SHAPE[0], widths=widths, text_dim=DIM)
        self.network = network.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), fused=device.type in ("cpu", "cuda"))
        self.schedule, self.device, self.dtype = get_schedule("vp"), device, autocast_dtype("auto", device)

    def train(self, steps: Iterator[list[Batch]]) -> float:
        """The seconds that the steps take, reading included."""
        started = time.perf_counter()
        for parts in steps:
            for batch in parts:
                noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.noise_levels)
                with autocast(self.dtype, self.device):
                    predicted = self.network(noisy, batch.noise_levels, batch.labels)
                nn.functional.l1_loss(predicted.float(), batch.latents).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        wait(self.device)
        return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches_of(data: LatentDataset, steps: range, batch_size: int = BATCH) -> Iterator[list[Batch]]:
    """The batches of ``steps``, each in one part."""
    settings = {"seed": 0, "distribution": "cosine", "label_dropout": 0.15}
    return batches(data, steps=steps, batch_size=batch_size, parts=[slice(0, batch_size)], **settings)


def reading_rate(data: LatentDataset) -> float:
    """Rows a second of batches that nobody trains on."""
    started = time.perf_counter()
    for _ in batches_of(data, range(READER_STEPS), READER_BATCH):
        pass
    wait(data.device)
    return READER_BATCH * READER_STEPS / (time.perf_counter() - started)


def gathering_rate(data: LatentDataset) -> float:
    """Rows a second of latents and embeddings in random order, without the draws of a training."""
    rows = torch.randperm(len(data), device=data.device)[: READER_BATCH * READER_STEPS]
    started = time.perf_counter()
    for part in rows.split(READER_BATCH):
        data.latents_at(part)
        data.embeddings_at(data.captions[part, 0])
    wait(data.device)
    return len(rows) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    device = choose_device()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_caches(folder, arguments.rows)
        sets = {
            way: load_caches(folder / "latents", folder / "text", device=device, memory_share=share).train
            for way, share in (("memory", 1.0), ("streamed", 0.0))
        }
        if sets["memory"].streamed:
            raise SystemExit(f"{arguments.rows:,} rows do not fit on {device}: nothing to compare; give fewer --rows")
        trainer = Trainer(WIDTHS, device)
        trainer.train(batches_of(sets["memory"], range(3)))  # what is chosen and allocated once
        seconds: dict[str, list[float]] = {way: [] for way in sets}
        for turn in range(arguments.rounds):
            steps = range(turn * arguments.steps, (turn + 1) * arguments.steps)
            for way in sorted(sets, reverse=bool(turn % 2)):
                seconds[way].append(trainer.train(batches_of(sets[way], steps)))
        print(f"{arguments.rows:,} rows, {device}, widths {WIDTHS}, batches of {BATCH}: {arguments.rounds} rounds")
        for way, taken in seconds.items():
            rate = arguments.steps * BATCH / statistics.median(taken)
            print(f"{way:>8}: {rate:9,.1f} images/s trained on")
        ratio = statistics.median(s / h for s, h in zip(seconds["streamed"], seconds["memory"], strict=True))
        print(f"streaming costs {100 * (ratio - 1):+.1f} % of a step (aim: at most 5 %)")
        for way, data in sets.items():
            print(
                f"{way:>8}: {reading_rate(data):9,.0f} rows/s of batches, {gathering_rate(data):,.0f} rows/s read alone"
            )


if __name__ == "__main__":
    main()
