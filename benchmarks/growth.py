"""How the cost of training data grows with their number: 10,000, 100,000 and 1,000,000 rows, and on two processes.

Each size is written once, as a synthetic cache (4x16x16 latents, 384-dim embeddings, fp16; a million rows take 2.9 GB),
into a temporary folder that is removed. On it, each in processes of its own:

    memory    rows on the device; `open` is `load_caches`, until the first batch is there
    streamed  rows read from the mapped shards. Their pages count as memory while the system has no better use for them;
              `anonymous` is what the process cannot give back
    stage     pipelines/train.py as users run it, alone and on two processes (`torch.distributed.run`), one thread each;
              the rate is the one that it reports

The network is tiny (widths 16/32), so that the data, not the network, are what is measured.

    PYTHONPATH=src python benchmarks/growth.py [--rows 10000 100000 1000000] [--steps 100] [--processes 1 2]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from streaming import BATCH, Trainer, batches_of
from synthetic import memory, write_caches

from latentloom.devices import choose_device
from latentloom.encoding.dataset import load_caches

ROOT = Path(__file__).parents[1]
WIDTHS = (16, 32)
SHARES = {"memory": 1.0, "streamed": 0.0}  # of the free memory that rows may take
HELD_OUT = 100


def measure(way: str, folder: Path, steps: int) -> dict[str, float]:
    """Open the caches and train, in this process."""
    device = choose_device()
    trainer = Trainer(WIDTHS, device)
    started = time.perf_counter()
    data = load_caches(folder / "latents", folder / "text", device=device, memory_share=SHARES[way]).train
    next(batches_of(data, range(1)))
    opened = time.perf_counter() - started
    trainer.train(batches_of(data, range(3)))
    rate = steps * BATCH / trainer.train(batches_of(data, range(steps)))
    return {"open": opened, "rate": rate} | memory()


def measure_apart(way: str, folder: Path, steps: int) -> dict[str, float]:
    """`measure` in a process of its own, so that its peak of memory is its own."""
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder), "--steps", str(steps)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def train_stage(folder: Path, way: str, processes: int, steps: int) -> float:
    """The images/s that pipelines/train.py reports on ``processes`` processes, in a project of its own."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"] |= {"widths": list(WIDTHS)}
    params["machine"] |= {"data_memory_share": SHARES[way], "checkpoint_every": steps}
    params["train"] |= {"steps": steps, "batch_size": BATCH, "warmup_steps": 1, "decay_steps": 1}
    params["monitor"] |= dict.fromkeys(("log_every", "validate_every"), steps)
    params["previews"] |= {"every": steps, "captions": 1, "prompts": []}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        project = Path(name)
        (project / "data").mkdir()
        for cache in ("latents", "text"):
            (project / "data" / cache).symlink_to(folder / cache)
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        environment |= {"LATENTLOOM_DEVICE": "cpu"} if processes > 1 and choose_device().type != "cuda" else {}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "pipelines" / "train.py")]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return float(re.search(r"([\d.]+) images/s", done.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the stage; none: leave it out")
    parser.add_argument("--folder", type=Path, help="where the temporary folders are made")
    parser.add_argument("--measure", choices=SHARES, help=argparse.SUPPRESS)  # what the processes are given
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.steps)))
        return
    stages = "".join(f"  stage x {processes}" for processes in arguments.processes)
    print(f"batches of {BATCH}, widths {WIDTHS}; memory in MiB, rates in images/s")
    print(f"     rows        way  open s  peak RSS  anonymous  file-mapped      rate{stages}")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            write_caches(folder, rows, HELD_OUT)
            for way in SHARES:
                own = measure_apart(way, folder, arguments.steps)
                rates = [train_stage(folder, way, processes, arguments.steps) for processes in arguments.processes]
                print(
                    f"{rows:9,}  {way:>9}  {own['open']:6.2f}  {own['VmHWM']:8,.0f}  {own['RssAnon']:9,.0f}  "
                    f"{own['RssFile']:11,.0f}  {own['rate']:8,.1f}" + "".join(f"  {rate:9,.1f}" for rate in rates),
                    flush=True,
                )


if __name__ == "__main__":
    main()
