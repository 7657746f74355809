"""All that the docs promise of a GPU, measured in one go: one JSON file and one page of Markdown.

    machine     what the device is, and what it can do at best: matrix products, copies
    equality    a step in fp32 on the device and on the CPU, memory formats, streamed rows, a resumed training
    step        the training step in several sizes; without fast.py; norms in fp32; cuDNN's and TF32's settings
    sampling    36 pictures in 70 guided steps, with and without decoding; 1,000 samples
    encoding    images and captions a second, from prepared shards
    graphs      the training step as CUDA graphs
    compiled    the training step under `torch.compile`
    peers       diffusers' UNet in the step of its own example, where diffusers can be imported
    training    the largest preset that fits into the time left: weights in fp16 in parts under 16 MiB, curves, a sheet

Each part runs in a process of its own with its own time limit. One that fails is written down with its error and passed
over. What was measured is on the disk at once, in OUT/on_gpu.json and OUT/on_gpu.md.

    PYTHONPATH=src python benchmarks/on_gpu.py --out OUT [--carry FOLDER] [--minutes 8] [--parts step training]

Encoders and training need the caches in --carry, which `benchmarks/gpu/carry.py` makes; no DVC and no MLflow. On a bare
machine without a network that has torch and transformers, but not all that the package imports, from a copy of the
working tree with the folder `carry`:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site carry/wheels/*.whl
    PYTHONPATH=/tmp/site:src python3 benchmarks/on_gpu.py --carry carry --out OUT --weights WEIGHTS --work WORK

The parts of a model's weights go to --weights, OUT by default; `benchmarks/gpu/weights.py` makes a model of them again.
With the same --work, a second call resumes a training that was stopped. With --device cpu, or without a GPU where that
is asked for, all sizes are tiny: that tests this script and measures nothing.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not open it here
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

from gpu import equality, page, speed, training  # noqa: E402
from gpu.parts import Job, Outcome, Part, Preset, Sizes, run_parts  # noqa: E402

LARGE = Sizes(
    widths=(128, 256, 512),
    depth=2,
    rows=16_384,
    batches=(1024, 256, 4096),
    matrices=(1024, 2048, 4096, 8192),
    seconds=1.0,
    pictures=36,
    samples=1000,
    steps=70,
    presets=(Preset(ROOT / "presets" / "h200.yaml"), Preset(ROOT / "params.yaml")),
    fewest_steps=1000,
    closing=45.0,
)
TINY = Sizes(
    widths=(16, 32),
    depth=1,
    rows=64,
    batches=(8, 4),
    matrices=(64, 128),
    seconds=0.05,
    pictures=2,
    samples=3,
    steps=3,
    presets=(
        Preset(
            ROOT / "params.yaml",
            {
                "model": {"widths": [16, 32]},
                "train": {"steps": 8, "batch_size": 8, "warmup_steps": 2},
                "monitor": {"validation_images": 4},
                "evaluate": {"diffusion_steps": 3, "training_captions": 2, "held_out_captions": 2},
            },
        ),
    ),
    fewest_steps=2,
    closing=20.0,
)
# Seconds of an 8-minute run on a GPU; they shrink with --minutes. What they leave is the training's.
PARTS = (
    Part("machine", "What the device is, and what it can do at best.", speed.machine, 20),
    Part("equality", "Two ways to the same result.", equality.equality, 45),
    Part("step", "The training step, one change at a time.", speed.step, 75),
    Part("sampling", "Guided sampling, random weights.", speed.sampling, 40),
    Part("encoding", "Both encoders, from prepared shards.", speed.encoding, 40),
    Part("graphs", "The training step as CUDA graphs.", speed.graphs, 45),
    Part("peers", "diffusers' UNet of the same widths, in its own step.", speed.peers, 30),
    Part("compiled", "The training step under torch.compile; the first step compiles.", speed.compiled, 110),
    Part("training", "The largest preset that fits into the time left.", training.training, None),
)
NEEDED_BY_TRAINING = 0.4  # of the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("on_gpu"))
    parser.add_argument("--weights", type=Path, help="where a model's weights go; OUT by default")
    parser.add_argument("--work", type=Path, help="for checkpoints and the like; OUT/work by default")
    parser.add_argument("--carry", type=Path, help="the folder that benchmarks/gpu/carry.py made")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], default=[])
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not _has_gpu():
        print("on_gpu: there is no GPU here; --device cpu tests the script in tiny sizes")
        return
    # Stages and caches choose by it.
    os.environ["LATENTLOOM_DEVICE"] = arguments.device
    out = arguments.out.resolve()
    job = Job(
        device=arguments.device,
        sizes=LARGE if arguments.device.startswith("cuda") else TINY,
        carry=arguments.carry.resolve() if arguments.carry else None,
        out=out,
        weights=(arguments.weights or out).resolve(),
        work=(arguments.work or out / "work").resolve(),
        earlier={},
    )
    for folder in (job.out, job.weights, job.work):
        folder.mkdir(parents=True, exist_ok=True)
    shrunk = arguments.minutes / 8 if job.sizes is LARGE else 1.0
    parts = [
        Part(part.name, part.about, part.run, None if part.limit is None else part.limit * shrunk)
        for part in PARTS
        if not arguments.parts or part.name in arguments.parts
    ]
    method = "fork" if sys.platform == "linux" else "spawn"
    started = time.monotonic()
    if method == "fork":
        _preload()
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")

    def save(outcomes: list[Outcome]) -> None:
        _save(outcomes, job, begun, arguments.minutes, time.monotonic() - started)

    run_parts(
        parts,
        job,
        seconds=60 * arguments.minutes - (time.monotonic() - started),
        reserve=60 * arguments.minutes * NEEDED_BY_TRAINING if parts[-1].limit is None else 0.0,
        method=method,
        changed=save,
    )
    print(f"on_gpu: see {job.out / 'on_gpu.md'}")


def _preload() -> None:
    """Import here what the parts import, once for all that are forked."""
    try:
        from diffusers import AutoencoderTiny, UNet2DConditionModel  # noqa: F401
    except ImportError as error:
        print(f"on_gpu: without diffusers ({error})", file=sys.stderr)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _save(outcomes: list[Outcome], job: Job, begun: str, minutes: float, seconds: float) -> None:
    import torch

    measured = {
        "title": f"Measured on {job.device}",
        "about": f"{begun}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPUs; widths {job.sizes.widths}, depth {job.sizes.depth}, latents of 4x16x16, text of 384. "
        f"{seconds:.0f} s of {60 * minutes:.0f}.",
        "parts": [outcome.to_dict() for outcome in outcomes],
    }
    for name, content in (("on_gpu.json", json.dumps(measured, indent=1)), ("on_gpu.md", page.render(measured))):
        temporary = job.out / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(job.out / name)


if __name__ == "__main__":
    main()
