"""A training of the largest preset that fits into the time, by the package's own training code, from carried caches.

It needs neither DVC nor MLflow. The model stays in the folder ``--work``.
"""

from typing import Any

import train_step
import yaml
from train_step import Settings

from gpu.parts import Job, Preset, Record, Unmeasurable
from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.dataset import load_caches
from latentloom.params import Params
from latentloom.training.processes import make_accelerator
from latentloom.training.run import run_training

SPARE = 0.8  # of the time is planned for, since a training also validates


def training(job: Job, record: Record) -> None:
    """The training of the first of the presets that fits."""
    if job.carry is None:
        raise Unmeasurable("no folder of caches was given (--carry)")
    device, data = choose_device(), job.carry / "data"
    caches = load_caches(data / "latents", data / "text", device=device)
    params = _params(job, record)
    result = run_training(
        params,
        caches,
        accelerator=make_accelerator(device),
        checkpoints=None,
        resumed=None,
        model_folder=job.work / "model",
        curves_folder=job.work / "curves",
        logger=None,
    )
    figures = {"steps": params.train.steps, "batch": params.train.batch_size, "images": len(caches.train)}
    figures |= result.metrics | {"val_mae": result.val_mae, "images/s": round(result.images_per_second, 1)}
    record.add("training", **figures)


def _params(job: Job, record: Record) -> Params:
    """Those of the largest preset that fits into the time, for as many steps as do."""
    device = choose_device()
    for preset in job.sizes.presets:
        sections = _sections(preset)
        params = Params.model_validate(sections)
        batch, dtype = params.train.batch_size, autocast_dtype(params.train.precision, device)
        settings = Settings(
            tuple(params.model.widths), params.model.block_depth, batch, dtype, device, False, job.sizes.rows
        )
        contender = train_step.ours(settings)
        train_step.seconds(contender.step, 3, device)
        rate = 5 / train_step.seconds(contender.step, 5, device)
        steps = int(record.left() * SPARE * rate)
        record.add(preset.path.name, **{"images/s": round(rate * batch, 1), "steps in the time left": steps})
        if steps >= job.sizes.fewest_steps:
            return Params.model_validate(_of_length(sections, min(steps, params.train.steps)))
    raise Unmeasurable(f"no preset's {job.sizes.fewest_steps} steps fit into {record.left():.0f} s")


def _sections(preset: Preset) -> dict[str, Any]:
    sections = yaml.safe_load(preset.path.read_text(encoding="utf-8"))
    for name, values in preset.changed.items():
        sections[name] |= values
    return sections


def _of_length(sections: dict[str, Any], steps: int) -> dict[str, Any]:
    """The params of a training of so many steps: what is counted in steps or images keeps its share of them."""
    train, every = sections["train"], max(steps // 10, 1)
    share = steps / train["steps"]
    shorter = {
        "steps": steps,
        "warmup_steps": int(train["warmup_steps"] * share),
        "decay_steps": max(int(train["decay_steps"] * share), 1),
        "ema_images": train["ema_images"] * share,
    }
    monitor = {"log_every": max(steps // 200, 1), "validate_every": every}
    return sections | {
        "train": train | shorter,
        "monitor": sections["monitor"] | monitor,
        "previews": sections["previews"] | {"prompts": []},
    }
