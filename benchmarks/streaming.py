"""How fast rows come from a cold disk, beside WebDataset, mosaicml-streaming and litdata; and what a training pays.

The rows are synthetic: latents of 4x16x16 with their standard deviations and embeddings of 384, fp16 (4.9 KB), in
shuffled batches of 256. Each library has them in its own format, and is read as its documentation says, with two
workers.
Before it is read, every file's pages are dropped from memory (`posix_fadvise`). A library that cannot be imported is
left out, and named. One format is on the disk at a time (400,000 rows: 2 GB), in a temporary folder that is removed.

    batches   what a training gets: captions drawn, latents sampled and standardised, noise and its levels, in fp32
    rows      the rows as they are stored, as the other libraries give them

With --train: training steps of the shipped model on rows streamed from the disk, against rows in memory, in turns.

    PYTHONPATH=src python benchmarks/streaming.py [--rows 400000] [--seconds 20] [--folder FOLDER]
    PYTHONPATH=src python benchmarks/streaming.py --train [--rows 100000] [--rounds 7] [--steps 10]
"""

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from synthetic import DIM, SHAPE, synthetic, write_caches
from torch import nn
from torch.utils.data import DataLoader

from latentloom.devices import autocast, autocast_dtype, choose_device
from latentloom.diffusion import get_network, get_schedule
from latentloom.encoding.dataset import LatentDataset, load_caches
from latentloom.training.batches import Batch, batches, in_advance
from latentloom.training.epochs import Blocks, epoch_rows

BATCH, WIDTHS = 64, (64, 128, 256)
READER_BATCH, BLOCK_ROWS, WORKERS = 256, 131072, 2
SHARD_ROWS, CHUNK = 2000, 64 * 2**20  # of the other libraries: rows of a tar, bytes of a chunk
PEERS = {"webdataset": "WebDataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}
TARGET = 40_000


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
    settings = {"seed": 0, "distribution": "cosine", "label_dropout": 0.15, "block_rows": BLOCK_ROWS}
    return batches(data, steps=steps, batch_size=batch_size, parts=[slice(0, batch_size)], **settings)


def rows_alone(data: LatentDataset) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows as they are stored, in the order of an epoch, without the draws of a training."""
    blocks = Blocks.of(len(data), len(data), READER_BATCH, BLOCK_ROWS)
    order = epoch_rows(0, 0, len(data), blocks=blocks, stored=data.stored)

    def read(rows: torch.Tensor) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        latents, text = data.latents.read(rows), data.text.read(data.captions[rows].primary)
        for part in rows.split(READER_BATCH):
            yield lambda part=part: latents.gather(part) | text.gather(data.captions[part].primary)

    windows = in_advance(lambda rows: list(read(rows)), order.split(BLOCK_ROWS), 1, "read")
    gathered = in_advance(lambda gather: gather(), chain.from_iterable(windows), 2, "gather")
    with closing(windows), closing(gathered):
        yield from gathered


def samples(rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows for the other libraries."""
    for start in range(0, rows, SHARD_ROWS):
        latents, embeddings = synthetic(range(start, min(start + SHARD_ROWS, rows)))
        for mean, std, text in zip(latents, np.abs(latents[::-1]), embeddings, strict=True):
            yield {"mean": mean, "std": std, "text": text}


def write_webdataset(folder: Path, rows: int) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD_ROWS, verbose=0) as writer:
        for number, sample in enumerate(samples(rows)):
            named = {f"{name}.npy": value for name, value in sample.items()}
            writer.write({"__key__": f"{number:08d}"} | named)


def read_webdataset(folder: Path) -> Iterable[list]:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=100).shuffle(5000).decode()
    data = data.to_tuple("mean.npy", "std.npy", "text.npy").batched(READER_BATCH)
    return webdataset.WebLoader(data, batch_size=None, num_workers=WORKERS)


def write_streaming(folder: Path, rows: int) -> None:
    import streaming

    shape = "ndarray:float16:" + ",".join(map(str, SHAPE))
    columns = {"mean": shape, "std": shape, "text": f"ndarray:float16:{DIM}"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK) as writer:
        for sample in samples(rows):
            writer.write(sample)


def read_streaming(folder: Path) -> Iterable[dict]:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=READER_BATCH)
    return DataLoader(data, batch_size=READER_BATCH, num_workers=WORKERS)


def write_litdata(folder: Path, rows: int) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK)
    for number, sample in enumerate(samples(rows)):
        writer[number] = sample
    writer.done()
    writer.merge()


def read_litdata(folder: Path) -> Iterable[dict]:
    import litdata

    data = litdata.StreamingDataset(str(folder), shuffle=True)
    return litdata.StreamingDataLoader(data, batch_size=READER_BATCH, num_workers=WORKERS)


def rate(found: Iterable[object], seconds: float) -> float:
    """Rows a second, the first batch included; of so many seconds at most."""
    started, count = time.perf_counter(), 0
    for _ in found:
        count += READER_BATCH
        if (taken := time.perf_counter() - started) > seconds:
            break
    return count / taken


def drop_pages(folder: Path) -> None:
    """Have the system forget the content of every file in ``folder``."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, rows: int, seconds: float) -> None:
    """Print what each library reads from a cold disk."""
    write_caches(folder, rows, std=True)
    drop_pages(folder)
    started = time.perf_counter()
    data = load_caches(folder / "latents", folder / "text", memory_share=0.0).train
    print(f"{rows:,} rows, cold, batches of {READER_BATCH}; opened in {time.perf_counter() - started:.1f} s")
    ways: dict[str, Callable[[], Iterable[object]]] = {
        "batches": lambda: batches_of(data, range(rows // READER_BATCH), READER_BATCH),
        "rows": lambda: rows_alone(data),
    }
    ours = {}
    for way, read in ways.items():
        drop_pages(folder)
        ours[way] = rate(read(), seconds)
        print(f"{'ours, ' + way:>20}: {ours[way]:9,.0f} rows/s", flush=True)
    print(f"{'target':>20}: {TARGET:9,} rows/s: {'met' if ours['batches'] >= TARGET else 'MISSED'}")
    sys.path.remove(str(Path(__file__).parent))  # where a peer's `import streaming` would find this file
    for module, name in PEERS.items():
        shutil.rmtree(folder)
        folder.mkdir()
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{name:>20}: left out ({error})")
            continue
        globals()[f"write_{module}"](folder, rows)
        drop_pages(folder)
        theirs = rate(globals()[f"read_{module}"](folder), seconds)
        ratios = f"ours are {ours['rows'] / theirs:.1f} times as fast, batches {ours['batches'] / theirs:.1f} times"
        print(f"{name:>20}: {theirs:9,.0f} rows/s; {ratios}", flush=True)


def train(folder: Path, rows: int, rounds: int, steps_of_turn: int) -> None:
    """Print what streaming costs a training."""
    device = choose_device()
    write_caches(folder, rows)
    sets = {
        way: load_caches(folder / "latents", folder / "text", device=device, memory_share=share).train
        for way, share in (("memory", 1.0), ("streamed", 0.0))
    }
    if sets["memory"].streamed:
        raise SystemExit(f"{rows:,} rows do not fit on {device}: nothing to compare; give fewer --rows")
    trainer = Trainer(WIDTHS, device)
    trainer.train(batches_of(sets["memory"], range(3)))  # what is chosen and allocated once
    seconds: dict[str, list[float]] = {way: [] for way in sets}
    for turn in range(rounds):
        steps = range(turn * steps_of_turn, (turn + 1) * steps_of_turn)
        for way in sorted(sets, reverse=bool(turn % 2)):
            seconds[way].append(trainer.train(batches_of(sets[way], steps)))
    print(f"{rows:,} rows, {device}, widths {WIDTHS}, batches of {BATCH}: {rounds} rounds")
    for way, taken in seconds.items():
        print(f"{way:>8}: {steps_of_turn * BATCH / statistics.median(taken):9,.1f} images/s trained on")
    ratio = statistics.median(s / h for s, h in zip(seconds["streamed"], seconds["memory"], strict=True))
    print(f"streaming costs {100 * (ratio - 1):+.1f} % of a step (aim: at most 5 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="400,000; with --train 100,000")
    parser.add_argument("--seconds", type=float, default=20, help="that each library is read at most")
    parser.add_argument("--train", action="store_true", help="what streaming costs a training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "rows"
        if arguments.train:
            train(folder, arguments.rows or 100_000, arguments.rounds, arguments.steps)
        else:
            cold(folder, arguments.rows or 400_000, arguments.seconds)


if __name__ == "__main__":
    main()
