"""Stage `train`: the UNet learns to denoise the cached latents; its averaged weights become models/unet."""

import os
from pathlib import Path

from latentloom.devices import choose_device
from latentloom.encoding.vae import load_vae
from latentloom.files import write_json
from latentloom.params import Params
from latentloom.stage import project_root, run_stage
from latentloom.tracking.lineage import dvc_tags, git_tags, input_tags
from latentloom.tracking.runs import new_run
from latentloom.training.dataset import load_caches
from latentloom.training.run import run_training

# MLflow repeats a run's params beside each picture, so it gets those that decide the model; params.yaml is an artifact.
NOT_COMPARED = {
    "evaluate": True,
    "machine": True,
    "validate_": True,
    "train": {"log_every", "validate_every", "sample_every", "sample_count", "sample_guidance"},
}
LATENTS, TEXT, REPORTS = Path("data/latents"), Path("data/text"), Path("reports/train")


def main(params: Params) -> str:
    device = choose_device()
    caches = load_caches(LATENTS, TEXT)
    tags = git_tags(Path.cwd()) | dvc_tags() | {"device": str(device)}
    inputs = {
        "latents": LATENTS / "index.parquet",
        "text": TEXT / "index.parquet",
        "validation": Path("reports/validation.json"),
    }
    tags |= input_tags({name: path for name, path in inputs.items() if path.exists()})
    with new_run(project_root(), name=os.environ.get("DVC_EXP_NAME"), tags=tags) as tracked:
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
        result = run_training(
            params,
            caches,
            device=device,
            model_folder=Path("models/unet"),
            curves_folder=REPORTS / "plots",
            tracked=tracked,
            load_decoder=lambda: load_vae(caches.latent_statistics["vae"]["reference"], device),
        )
        tracked.log_file(Path("models/unet/config.json"), "model")
    write_json(REPORTS / "metrics.json", result.metrics)
    write_json(
        REPORTS / "run.json", {"mlflow_run_id": tracked.id, "images_per_second": round(result.images_per_second, 1)}
    )
    figures = f"train_mae {result.metrics['train_mae']:.3f}"
    if result.val_mae is not None:
        figures += f", val_mae {result.val_mae:.3f}"
    speed = f"{result.images_per_second:.0f} images/s on {device}"
    return f"{params.train.steps} steps on {len(caches.train)} images, {figures}, {speed}"


if __name__ == "__main__":
    run_stage("train", main)
