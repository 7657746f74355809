"""Opening and shuffling a cache of synthetic latents: Latent Loom, Hugging Face `datasets`, WebDataset.

A row is a latent of 4x16x16 and a text embedding of 384 numbers, in fp16. Each reader runs in a process of its own and
reads shuffled batches of 256 as fp32 tensors:

    memory      `load_caches`, as the stage `train` does: raw rows in memory; a batch is an index, then standardised
    streamed    the same with no row in memory: a batch is read from the mapped shards
    datasets    an Arrow file, memory-mapped, torch format, shuffled by indices
    webdataset  tar shards of 10,000 rows, shuffled by shard and through a buffer of 10,000 rows, one process

`open` is the time until the first batch is there (imports left out), the rate is that of the batches after it: of a
whole epoch for the first two, of at most --peer-batches for the peers. Peak memory is the process's VmHWM; anonymous
and file-mapped memory are as they are at the end, file-mapped pages being the system's to take back. Each format
is written into a temporary folder (of a million rows: at most 5 GB at a time), which is removed.

    PYTHONPATH=src python benchmarks/cache.py [--rows 1000000] [--peer-batches 400] [--folder FOLDER]
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from synthetic import DIM, SHAPE, memory, synthetic, write_caches

from latentloom.encoding.dataset import load_caches

BATCH = 256
TAR_ROWS, BUFFER = 10_000, 10_000

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # latents (256, 4, 16, 16) and embeddings (256, 384), fp32


def portions(rows: int) -> list[range]:
    return [range(start, min(start + TAR_ROWS, rows)) for start in range(0, rows, TAR_ROWS)]


def write_datasets(folder: Path, rows: int) -> None:
    types = {"latent": pa.list_(pa.float16(), int(np.prod(SHAPE))), "embedding": pa.list_(pa.float16(), DIM)}
    with pa.ipc.new_stream(folder / "rows.arrow", pa.schema(types)) as writer:
        for places in portions(rows):
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=type_)
                for values, type_ in zip(synthetic(places), types.values(), strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=pa.schema(types)), max_chunksize=1000)


def write_webdataset(folder: Path, rows: int) -> None:
    import webdataset

    for number, places in enumerate(portions(rows)):
        latents, embeddings = synthetic(places)
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for row, latent, embedding in zip(places, latents, embeddings, strict=True):
                tar.write({"__key__": f"{row:09d}", "latent.npy": latent, "embedding.npy": embedding})


def read_memory(folder: Path, memory_share: float = 1.0) -> Batches:
    data = load_caches(folder / "latents", folder / "text", memory_share=memory_share).train
    for rows in torch.randperm(len(data)).split(BATCH):
        yield data.latents_at(rows)[0], data.primary_embeddings(rows)


def read_streamed(folder: Path) -> Batches:
    return read_memory(folder, memory_share=0.0)


def read_datasets(folder: Path) -> Batches:
    import datasets

    data = datasets.Dataset.from_file(str(folder / "rows.arrow")).with_format("torch")
    for batch in data.shuffle(seed=0, keep_in_memory=True).iter(BATCH):
        yield batch["latent"].float().view(-1, *SHAPE), batch["embedding"].float()


def read_webdataset(folder: Path) -> Batches:
    import webdataset

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(BUFFER).decode()
    for latents, embeddings in data.to_tuple("latent.npy", "embedding.npy").batched(BATCH):
        yield torch.as_tensor(latents).float(), torch.as_tensor(embeddings).float()


PEERS = ("datasets", "webdataset")
READERS = {
    "memory": read_memory,
    "streamed": read_streamed,
    "datasets": read_datasets,
    "webdataset": read_webdataset,
}
FORMATS = {  # who writes it -> who reads it
    write_caches: ("memory", "streamed"),
    write_datasets: ("datasets",),
    write_webdataset: ("webdataset",),
}


def measure(name: str, folder: Path, most_batches: int) -> dict[str, float]:
    """Open and read, in this process."""
    if name in PEERS:
        importlib.import_module(name)
    before = memory()
    torch.manual_seed(0)
    started = time.perf_counter()
    batches = READERS[name](folder)
    first = next(batches)
    opened = time.perf_counter()
    assert first[0].shape == (BATCH, *SHAPE) and first[1].shape == (BATCH, DIM)
    read = sum(len(latents) for latents, _ in islice(batches, most_batches))
    taken = time.perf_counter() - opened
    return {"open": opened - started, "samples": read, "rate": read / taken, "base": before["RssAnon"]} | memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-batches", type=int, default=400, help="batches that datasets and WebDataset read")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)  # what the processes are given
    arguments = parser.parse_args()
    if arguments.measure:
        most = arguments.rows // BATCH - 1  # not to the end, where a reader lets go of its memory
        if arguments.measure in PEERS:
            most = min(most, arguments.peer_batches)
        print(json.dumps(measure(arguments.measure, arguments.folder, most)))
        return
    results = {}
    for write, readers in FORMATS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write(Path(folder), arguments.rows)
            for name in readers:
                command = [sys.executable, __file__, "--measure", name, "--folder", folder]
                command += ["--rows", str(arguments.rows), "--peer-batches", str(arguments.peer_batches)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[name] = json.loads(done.stdout)
    report(arguments.rows, results)


def report(rows: int, results: dict[str, dict[str, float]]) -> None:
    print(f"{rows:,} rows, batches of {BATCH}; memory in MiB")
    print("            open s  samples/s    of samples  peak RSS  anonymous  (before)  file-mapped")
    for name, result in results.items():
        print(
            f"{name:>10}  {result['open']:6.2f}  {result['rate']:9,.0f}  {result['samples']:12,.0f}  "
            f"{result['VmHWM']:8,.0f}  {result['RssAnon']:9,.0f}  {result['base']:8,.0f}  {result['RssFile']:11,.0f}"
        )
    for own in ("memory", "streamed"):
        for peer in ("datasets", "webdataset"):
            faster = results[own]["rate"] / results[peer]["rate"]
            larger = results[own]["VmHWM"] / results[peer]["VmHWM"]
            print(f"{own} / {peer}: {faster:.1f} x the samples/s, {larger:.1f} x the peak memory")


if __name__ == "__main__":
    main()
