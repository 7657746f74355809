"""What tracking costs a training: the same training with and without it, in turns, and each part of the cost by itself.

Both do all that a training does: steps, validation, previews, curves and checkpoints on the disk. The tracked one
also writes its journal, and its threads deliver that to a fresh SQLite store and measure the machine, as often as in a
real run. Beginning and end (MLflow's import, a new store, the last delivery) come once a run, however long it is. So
they are measured apart, and what counts is the share of a whole run of `train.steps`.

A ratio of two trainings is only as good as the machine is quiet, for processor time too. So the processor time of
tracking's own threads is measured beside it, for each second on the clock, as that is what they go by. `share` sets it
against a whole run on as many cores as the training has threads, with those to itself. Where another core is free, or
the training waits for a GPU, tracking costs less than that.

    PYTHONPATH=src python benchmarks/tracking.py [--rounds 2] [--steps 260] [--params presets/h200.yaml]
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from synthetic import write_caches

from latentloom.devices import choose_device
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.encoding.vae import load_vae
from latentloom.params import Params, load_params
from latentloom.tracking.provenance import record_start
from latentloom.tracking.runs import TrackedRun, new_run
from latentloom.training.checkpoints import Checkpoints
from latentloom.training.run import run_training

THREADS = ("tracking", "system-metrics")
CALLS = 1000


@dataclass(frozen=True)
class Cost:
    """Seconds: on the wall, of all this process's threads, and of those of tracking."""

    wall: float
    processor: float
    tracking: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=260, help="steps a turn")
    parser.add_argument("--rows", type=int, default=256, help="images in the synthetic caches")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    options = parser.parse_args()
    whole = load_params(options.params)
    params, warm_up = (of_steps(whole, steps) for steps in (options.steps, 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_caches(folder, options.rows, validation=options.rows // 8)
        caches = load_caches(folder / "latents", folder / "text", device=choose_device())
        train(warm_up, caches, folder / "warm-up", TrackedRun())
        spent: dict[str, list[Cost]] = {"begin": [], "train": [], "end": [], "plain": []}
        for number in range(options.rounds):
            for way in (tracked, plain) if number % 2 else (plain, tracked):
                way(params, caches, folder / f"{number}-{way.__name__}", spent)
        logging = log_calls(folder / "calls")
    print(f"{options.steps} steps of {params.train.batch_size} images on {choose_device()}, {options.rounds} rounds")
    for clock in ("wall", "processor"):
        with_it, without = ([getattr(cost, clock) for cost in spent[way]] for way in ("train", "plain"))
        ratios = [a / b for a, b in zip(with_it, without, strict=True)]
        print(
            f"{clock + ' time':>14}: {statistics.median(with_it):6.1f} s tracked, {statistics.median(without):6.1f} s "
            f"without; ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    a_step = median_processor(spent["plain"]) / params.train.steps
    rate = statistics.median(cost.tracking / cost.wall for cost in spent["train"])
    first, begin, end = (spent["begin"][0].processor, *(median_processor(spent[part]) for part in ("begin", "end")))
    print(f"a step takes {a_step:.3f} s of processor time, tracking {1e3 * rate:.2f} ms in each second on the clock")
    print(f"and once a run {begin + end:.2f} s; the first time, which imports MLflow, {first + end:.2f} s")
    for what, seconds in logging.items():
        print(f"{what}: {1e6 * seconds:.0f} microseconds a call in the training's own thread")
    share = rate / torch.get_num_threads() + (first + end) / (a_step * whole.train.steps)
    print(f"share of a run of {whole.train.steps:,} steps, with a new store: {100 * share:.2f} % (aim: at most 1 %)")


def of_steps(whole: Params, steps: int) -> Params:
    """The same params for a short training; previews, validation and logs as often as they are in the whole one."""
    changed = {"steps": steps, "warmup_steps": min(whole.train.warmup_steps, steps // 2), "lr_schedule": "cosine"}
    return whole.model_copy(update={"train": whole.train.model_copy(update=changed)})


def median_processor(costs: list[Cost]) -> float:
    return statistics.median(cost.processor for cost in costs)


def tracked(params: Params, caches: Caches, folder: Path, spent: dict[str, list[Cost]]) -> None:
    folder.mkdir()
    opened = new_run(folder)
    with measured(spent["begin"]):
        run = opened.__enter__()
        record_start(run, params, caches, str(caches.train.device))
        while run.id is None:
            time.sleep(0.05)
    with measured(spent["train"]):
        train(params, caches, folder, run)
    with measured(spent["end"]):
        opened.__exit__(None, None, None)


def plain(params: Params, caches: Caches, folder: Path, spent: dict[str, list[Cost]]) -> None:
    with measured(spent["plain"]):
        train(params, caches, folder, TrackedRun())


def train(params: Params, caches: Caches, folder: Path, run: TrackedRun) -> None:
    device = caches.train.device
    run_training(
        params,
        caches,
        accelerator=Accelerator(cpu=device.type == "cpu", mixed_precision="no"),
        checkpoints=Checkpoints(folder / "checkpoints", "0", keep=1, limit=2**30),
        resumed=None,
        model_folder=folder / "model",
        curves_folder=folder / "curves",
        tracked=run,
        load_decoder=lambda: load_vae("bundled", device),
    )


def log_calls(folder: Path) -> dict[str, float]:
    """Seconds that a call takes the training: of the metrics of a step, and of a preview."""
    folder.mkdir()
    metrics = {f"train/{name}": 0.5 for name in ("mae", "learning_rate", "gradient_norm", "images_per_second")}
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    taken = {}
    with new_run(folder) as run:
        for what, calls, log in (
            ("metrics", CALLS, lambda step: run.log_metrics(metrics, step)),
            ("picture", CALLS // 50, lambda step: run.log_image(picture, "samples", step)),
        ):
            started = time.thread_time()
            for step in range(calls):
                log(step)
            taken[what] = (time.thread_time() - started) / calls
    return taken


@contextmanager
def measured(costs: list[Cost]) -> Iterator[None]:
    wall, processor, tracking = time.perf_counter(), time.process_time(), of_tracking()
    yield
    costs.append(Cost(time.perf_counter() - wall, time.process_time() - processor, of_tracking() - tracking))


def of_tracking() -> float:
    """Processor time of the threads of tracking that are there now."""
    own = [thread.ident for thread in threading.enumerate() if thread.name in THREADS]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in own if ident)


if __name__ == "__main__":
    main()
