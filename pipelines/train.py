"""Stage `train`: the UNet learns to denoise the cached latents; its averaged weights become models/unet.

Run it alone, or in many processes: `accelerate launch pipelines/train.py` (docs/scaling.md).
"""

import os
import sys
import warnings
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs

from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.vae import load_vae
from latentloom.files import sha256_file, write_json
from latentloom.params import Params
from latentloom.stage import project_root, run_stage, state_folder, state_limit
from latentloom.tracking.lineage import dvc_tags, git_tags, input_tags
from latentloom.tracking.runs import TrackedRun, new_run
from latentloom.training.checkpoints import Checkpoints, code_hash, training_fingerprint
from latentloom.training.dataset import Caches, load_caches
from latentloom.training.run import TrainingResult, run_training, usable_checkpoint

# MLflow repeats a run's params beside each picture, so it gets those that decide the model; params.yaml is an artifact.
NOT_COMPARED = {
    "evaluate": True,
    "machine": True,
    "validate_": True,
    "train": {"log_every", "validate_every", "sample_every", "sample_count", "sample_guidance"},
}
LATENTS, TEXT, REPORTS = Path("data/latents"), Path("data/text"), Path("reports/train")
MODEL = Path("models/unet")
DECIDING = {  # files that name the content of every row of the caches
    "latents": LATENTS / "index.parquet",
    "latent statistics": LATENTS / "stats.json",
    "text": TEXT / "index.parquet",
    "captions": TEXT / "pairs.parquet",
}


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
    tags = git_tags(Path.cwd()) | dvc_tags() | {"device": str(settings["accelerator"].device)}
    inputs = DECIDING | {"validation": Path("reports/validation.json")}
    tags |= input_tags({name: path for name, path in inputs.items() if path.exists()})
    own_run = None if "finished_steps" in known else known.get("mlflow_run_id")
    with new_run(project_root(), name=os.environ.get("DVC_EXP_NAME"), tags=tags, run_id=own_run) as tracked:
        checkpoints.begin({"mlflow_run_id": tracked.id}, resumed)
        tracked.log_params(params.model_dump(by_alias=True, exclude=NOT_COMPARED))
        tracked.log_file(Path("params.yaml"))
        sources = "+".join(entry.label for entry in params.ingest.sources)
        for context, data in (("training", caches.train), ("validation", caches.validation)):
            tracked.log_dataset(
                data.table(),
                name=f"{sources}-{context}",
                source=str(LATENTS),
                digest=data.digest(),
                context=context,
            )
        result = run_training(params, caches, checkpoints=checkpoints, resumed=resumed, tracked=tracked, **settings)
        tracked.log_file(MODEL / "config.json", "model")
    write_json(REPORTS / "metrics.json", result.metrics)
    write_json(
        REPORTS / "run.json", {"mlflow_run_id": tracked.id, "images_per_second": round(result.images_per_second, 1)}
    )
    checkpoints.end({"mlflow_run_id": tracked.id, "finished_steps": params.train.steps})
    return result


if __name__ == "__main__":
    run_stage("train", main)
