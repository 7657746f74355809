"""Stage `evaluate`: the model's figures and samples, in reports/evaluate and in the MLflow run of its training."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.dataset import load_caches
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.evaluation.run import evaluate
from latentloom.evaluation.sampling import Sampler
from latentloom.evaluation.sheet import save_sheet
from latentloom.evaluation.sweep import CHART, TABLE, save_sweep, sweep
from latentloom.files import read_json, write_json
from latentloom.layout import project_root
from latentloom.model_files import load_model
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.tracking.runs import reopened_run
from latentloom.training.curves import Curves
from latentloom.training.denoising_error import BINS, bin_name

REPORTS = Path("reports/evaluate")


def main(params: Params) -> str:
    settings, device = params.evaluate, choose_device()
    network, config = load_model(Path("models/unet"), device)
    sampler = Sampler(
        network,
        config,
        guidance=settings.sampling.class_guidance,
        steps=settings.sampling.diffusion_steps,
        threshold_percentile=settings.sampling.threshold_percentile,
        dtype=autocast_dtype(settings.sampling.precision, device),
        sampler=settings.sampling.sampler,
        guidance_interval=tuple(settings.sampling.guidance_interval),
        guidance_rescale=settings.sampling.guidance_rescale,
    )
    caches = load_caches(
        Path("data/latents"), Path("data/text"), device=device, memory_share=params.machine.data_memory_share
    )
    evaluation = evaluate(
        params,
        sampler,
        caches,
        Path("data/images"),
        decoder=load_vae(config.vae.reference, device),
        embedder=load_text_encoder(config.text_encoder.reference, device),
    )
    metrics = evaluation.metrics
    save_sheet(evaluation.sheet, REPORTS / "samples.png")
    by_noise = {f"val_mae_{bin_name(low, high)}": (low + high) / 2 for low, high in BINS}
    write_json(REPORTS / "metrics.json", {name: value for name, value in metrics.items() if name not in by_noise})
    curve = Curves(REPORTS / "plots")
    for name, noise_level in by_noise.items():
        if name in metrics:
            curve.add("mae_by_noise", {"noise_level": noise_level, "val_mae": metrics[name]})
    chart = save_sweep(sweep(sampler, caches.train, settings, params.seed), REPORTS / "plots")
    trained = read_json("reports/train/run.json")
    with reopened_run(project_root(), trained.get("run"), trained["mlflow_run_id"]) as tracked:
        tracked.log_metrics({f"evaluate/{name}": value for name, value in metrics.items()}, params.train.steps)
        tracked.log_image(np.asarray(evaluation.sheet), "evaluation", params.train.steps)
        for path in (REPORTS / "samples.png", Path("dvc.lock")):  # which names the model by now
            if path.exists():
                tracked.log_file(path)
        if chart:
            tracked.log_image(np.asarray(chart), "sweep", params.train.steps)
            for name in (CHART, TABLE):
                tracked.log_file(REPORTS / "plots" / name)
        tracked.set_tags({f"evaluate.{key}": str(value) for key, value in asdict(settings.sampling).items()})
    recall = f"caption_recall_at_1 {metrics['caption_recall_at_1']:.3f}"
    return f"{len(settings.prompts)} prompts drawn, {recall}, see {REPORTS / 'samples.png'}"


if __name__ == "__main__":
    run_stage("evaluate", main)
