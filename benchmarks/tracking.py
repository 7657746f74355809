"""What tracking costs a training: processor time of each of its parts, and their share of a whole run.

A run logs what a training logs, as often as one does, into a fresh SQLite store. Trainings with and without tracking
differ by less than a machine's noise, so each part is measured by itself: the calls in the training's own thread, the
thread that delivers, and begin and end (MLflow's import, a new store, the last delivery), which come once per run.

    PYTHONPATH=src python benchmarks/tracking.py [--seconds 60] [--steps 1300] [--step-seconds 1.3]
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentloom.params_file import load_params
from latentloom.tracking.runs import TrackedRun, new_run

METRICS = {f"train/{name}": 0.5 for name in ("mae", "learning_rate", "gradient_norm", "images_per_second")}
IMAGE = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long a run is observed")
    parser.add_argument("--steps", type=int, default=1300, help="of the training to compare with")
    parser.add_argument("--step-seconds", type=float, default=1.3, help="processor time of one of its steps")
    options = parser.parse_args()
    log_every, preview_every = load_params().monitor.log_every, load_params().previews.every
    with tempfile.TemporaryDirectory() as root:
        begun = time.process_time()
        opened = new_run(Path(root))
        run = opened.__enter__()
        while run.id is None:
            time.sleep(0.05)
        once = time.process_time() - begun
        rate = observed(run, options.seconds, options.step_seconds, log_every, preview_every)
        begun = time.process_time()
        opened.__exit__(None, None, None)
        once += time.process_time() - begun
        with new_run(Path(root)) as run:
            metrics_call = seconds_of_a_call(lambda step: run.log_metrics(METRICS, step), 1000)
            image_call = seconds_of_a_call(lambda step: run.log_image(IMAGE, "samples", step), 20)
    logs, images = options.steps / log_every, options.steps / preview_every
    training = options.steps * options.step_seconds
    tracking = once + rate * training + logs * metrics_call + images * image_call
    print(f"metrics: {1e6 * metrics_call:.0f} microseconds per call in the training's own thread")
    print(f"image of 512x512 pixels of noise: {1e3 * image_call:.0f} ms per call in the training's own thread")
    print(f"delivery: {1e3 * rate:.2f} ms of processor time per second")
    print(f"begin and end, with MLflow's import and a new store: {once:.2f} s of processor time per run")
    print(f"share of {options.steps:,} steps of {options.step_seconds} s: {tracking / training:.2%} (aim: at most 1 %)")


def seconds_of_a_call(call: Callable[[int], None], count: int) -> float:
    """Processor time of this thread per call."""
    begun = time.thread_time()
    for step in range(count):
        call(step)
    return (time.thread_time() - begun) / count


def observed(run: TrackedRun, seconds: float, step_seconds: float, log_every: int, preview_every: int) -> float:
    """Processor time of the delivering thread per second, while ``run`` logs at the pace of a training."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "tracking")
    clock = time.pthread_getcpuclockid(thread.ident)
    begun, wall = time.clock_gettime(clock), time.monotonic()
    step = 0
    while time.monotonic() - wall < seconds:
        step += 1
        if step % log_every == 0:
            run.log_metrics(METRICS, step)
        if step % preview_every == 0:
            run.log_image(IMAGE, "samples", step)
        time.sleep(step_seconds)
    return (time.clock_gettime(clock) - begun) / (time.monotonic() - wall)


if __name__ == "__main__":
    main()
