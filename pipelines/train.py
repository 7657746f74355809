"""Stage `train`: the UNet learns to denoise the cached latents; its averaged weights become models/unet.

``LATENTLOOM_LAUNCH="accelerate launch --num-processes 4"`` runs it in many processes (docs/scaling.md).
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

import latentloom
from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.errors import notify
from latentloom.files import write_json
from latentloom.layout import LATENTS, MODEL, TEXT, TRAIN_METRICS, TRAIN_PLOTS, project_root, state_folder, state_limit
from latentloom.model_files import model_hash
from latentloom.params import Params
from latentloom.registry.base import base_folder, named_base
from latentloom.source_code import code_hash, deciding_modules
from latentloom.stage import run_stage
from latentloom.tracking.provenance import collect, record_model, record_start, save_run_record
from latentloom.tracking.runs import new_run
from latentloom.training.checkpoints import Checkpoints, CodeVersion, training_fingerprint
from latentloom.training.loop import open_ended_steps
from latentloom.training.processes import launch, make_accelerator
from latentloom.training.run import TrainingResult, run_training, usable_checkpoint


def main(params: Params) -> str | None:
    launch(__file__)
    accelerator = make_accelerator(choose_device(), static_graph=params.train.gradient_accumulation == 1)
    folder = None
    if base := named_base(params.train.init):
        with accelerator.main_process_first():  # which fetches it where it is not on this machine
            folder = base_folder(base, project_root())
    caches = load_caches(LATENTS, TEXT, device=accelerator.device, memory_share=_memory_share(params, accelerator))
    train = partial(
        run_training,
        params,
        caches,
        accelerator=accelerator,
        model_folder=MODEL,
        curves_folder=TRAIN_PLOTS,
        base=folder,
    )
    if not accelerator.is_main_process:
        train(checkpoints=None, resumed=None, logger=None)
        accelerator.end_training()
        return None
    notify(f"train: {caches.placement}")
    code = _code_hash()
    result = _train_tracked(train, params, caches, accelerator, code)
    accelerator.end_training()
    if _code_hash() != code:
        warnings.warn("the code changed while the training ran: run `dvc repro --force train`", stacklevel=1)
    error = f"train_mae {result.metrics['train_mae']:.3f}"
    error += ", no validation images" if result.val_mae is None else f", val_mae {result.val_mae:.3f}"
    speed = f"{result.images_per_second:.0f} images/s on {accelerator.device}"
    return f"{params.train.steps} steps on {len(caches.train)} images, {error}, {speed}"


def _train_tracked(
    train: Callable[..., TrainingResult], params: Params, caches: Caches, accelerator: Accelerator, code: str
) -> TrainingResult:
    """The training in the main process, which alone reads checkpoints, writes files and logs."""
    provenance = collect(Path.cwd())
    inputs = {name: digest for name, digest in provenance.inputs.items() if name != "validation"}
    if provenance.base:
        inputs["base"] = provenance.base["sha256"]
    precision = str(autocast_dtype(params.train.precision, accelerator.device))
    checkpoints = Checkpoints(
        state_folder("checkpoints") / training_fingerprint(params, inputs, precision),
        code=CodeVersion(code, provenance.commit),
        keep=params.machine.checkpoints_kept,
        pinned=open_ended_steps(params.train),
        limit=state_limit(),
    )
    images = {"training": len(caches.train), "validation": len(caches.validation)}
    with checkpoints.locked(wait=accelerator.num_processes == 1):
        resumed, known = usable_checkpoint(checkpoints, params), checkpoints.read_run()
        key = None if "finished_steps" in known else known.get("run")  # a finished run is not continued but extended
        with new_run(project_root(), name=provenance.experiment, key=key) as tracked:
            checkpoints.begin({"run": tracked.key}, resumed)
            record_start(
                tracked,
                params,
                provenance,
                images=images,
                digests=caches.digests,
                device=str(accelerator.device),
            )
            result = train(checkpoints=checkpoints, resumed=resumed, logger=tracked)
            provenance = provenance.with_model(MODEL, model_hash(MODEL), tracked.key)
            record_model(tracked, provenance, MODEL)
        write_json(TRAIN_METRICS, result.metrics)
        save_run_record(project_root(), replace(provenance, mlflow_run_id=tracked.id))  # MLflow has answered by now
        checkpoints.end({"run": tracked.key, "finished_steps": params.train.steps})
    return result


def _memory_share(params: Params, accelerator: Accelerator) -> float:
    """Of the memory that is free, what this process may take; processes on one CPU have it in common."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if accelerator.device.type == "cpu" else 1
    return params.machine.data_memory_share / sharing


def _code_hash() -> str:
    script, package = Path(__file__).resolve(), Path(latentloom.__file__).resolve().parent
    return code_hash(deciding_modules(script, package), script.parents[1])


if __name__ == "__main__":
    run_stage("train", main)
