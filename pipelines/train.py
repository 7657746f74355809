"""Stage `train`: the UNet learns to denoise the cached latents; its averaged weights become models/unet.

Run it alone, or in many processes: `accelerate launch pipelines/train.py` (docs/scaling.md).
"""

import os
import sys
import warnings
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs

from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.encoding.vae import load_vae
from latentloom.files import sha256_file, write_json
from latentloom.layout import project_root, state_folder, state_limit
from latentloom.model_files import model_hash
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.tracking.provenance import DECIDING, LATENTS, TEXT, record_model, record_start
from latentloom.tracking.runs import TrackedRun, new_run
from latentloom.training.checkpoints import Checkpoints, code_hash, training_fingerprint
from latentloom.training.run import TrainingResult, run_training, usable_checkpoint

REPORTS, MODEL = Path("reports/train"), Path("models/unet")


def main(params: Params) -> str | None:
    accelerator = Accelerator(
        cpu=choose_device().type == "cpu",
        mixed_precision="no",  # the loop has its own autocast, the same on every device
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    caches = load_caches(LATENTS, TEXT, device=accelerator.device, memory_share=_memory_share(params, accelerator))
    if accelerator.is_main_process:
        print(f"train: {caches.placement}", file=sys.stderr, flush=True)
    code = code_hash(Path(__file__))
    checkpoints = Checkpoints(
        state_folder("checkpoints"),
        training_fingerprint(
            params,
            {name: sha256_file(path) for name, path in DECIDING.items()},
            code,
            str(autocast_dtype(params.train.precision, accelerator.device)),
        ),
        keep=params.machine.checkpoints_kept,
        limit=state_limit(),
    )
    settings = {
        "accelerator": accelerator,
        "checkpoints": checkpoints,
        "model_folder": MODEL,
        "curves_folder": REPORTS / "plots",
        "load_decoder": lambda: load_vae(caches.latent_statistics["vae"]["reference"], accelerator.device),
    }
    if accelerator.is_main_process:
        result = _train_tracked(params, caches, **settings)
    else:
        result = run_training(params, caches, resumed=None, tracked=TrackedRun(), **settings)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    if code_hash(Path(__file__)) != code:
        warnings.warn("the code changed while the training ran: run `dvc repro --force train`", stacklevel=1)
    figures = f"train_mae {result.metrics['train_mae']:.3f}"
    if result.val_mae is not None:
        figures += f", val_mae {result.val_mae:.3f}"
    speed = f"{result.images_per_second:.0f} images/s on {accelerator.device}"
    return f"{params.train.steps} steps on {len(caches.train)} images, {figures}, {speed}"


def _memory_share(params: Params, accelerator: Accelerator) -> float:
    """Of the memory that is free, what this process may take; processes on one CPU have it in common."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if accelerator.device.type == "cpu" else 1
    return params.machine.data_memory_share / sharing


def _train_tracked(params: Params, caches: Caches, *, checkpoints: Checkpoints, **settings) -> TrainingResult:
    """The training in the main process, which alone reads checkpoints, writes files and talks to MLflow."""
    resumed, known = usable_checkpoint(checkpoints, params), checkpoints.read_run()
    if resumed:
        print(f"train: goes on from step {resumed.step} of {params.train.steps}", file=sys.stderr, flush=True)
    own_run = None if "finished_steps" in known else known.get("run")
    with new_run(project_root(), name=os.environ.get("DVC_EXP_NAME"), key=own_run) as tracked:
        checkpoints.begin({"run": tracked.key}, resumed)
        record_start(tracked, params, caches, str(settings["accelerator"].device))
        result = run_training(params, caches, checkpoints=checkpoints, resumed=resumed, tracked=tracked, **settings)
        record_model(tracked, params, caches, MODEL, result)
    write_json(REPORTS / "metrics.json", result.metrics)
    ids = {"run": tracked.key, "mlflow_run_id": tracked.id, "model_sha256": model_hash(MODEL)}
    write_json(REPORTS / "run.json", ids | {"images_per_second": round(result.images_per_second, 1)})
    checkpoints.end({"run": tracked.key, "finished_steps": params.train.steps})
    return result


if __name__ == "__main__":
    run_stage("train", main)
