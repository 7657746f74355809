"""Stage `evaluate`: the model's metrics and samples, in reports/evaluate and in an MLflow run below the training's."""

import json
from dataclasses import asdict

import numpy as np

from latentloom.encoding.dataset import load_caches
from latentloom.evaluation.noise_curves import save_noise_curves
from latentloom.evaluation.report import evaluate
from latentloom.evaluation.sweep import CHART, TABLE, save_sweep, sweep
from latentloom.evaluation.text_to_image import SETTINGS_FILE, load_text_to_image
from latentloom.layout import (
    DVC_LOCK,
    EXTREMES_SHEET,
    IMAGES,
    LATENTS,
    MODEL,
    PARAMS,
    SAMPLE_SHEET,
    TEXT,
    TRAIN_PLOTS,
    project_root,
)
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.tracking.evaluations import STEP, evaluation_run


def main(params: Params) -> str:
    model = load_text_to_image(MODEL)
    caches = load_caches(LATENTS, TEXT, device=model.device, memory_share=params.machine.data_memory_share)
    evaluation = evaluate(params, model, caches, IMAGES)
    evaluation.save()
    images = {
        "evaluation": np.asarray(evaluation.sheet),
        "extremes": np.asarray(evaluation.extremes),
        "sweep": save_sweep(sweep(model, caches, params.evaluate, params.seed)),
        "noise_curves": save_noise_curves(TRAIN_PLOTS),
    }
    with evaluation_run(project_root(), params, model.model_sha256, evaluation.metrics) as tracked:
        split, digest = caches.validation, caches.digests["validation"]
        tracked.log_dataset(name="held-out", source=str(LATENTS), digest=digest, rows=len(split), context="validation")
        tracked.log_metrics(
            {f"evaluate/seconds/{name}": own for name, own in evaluation.distribution.seconds.items()}, STEP
        )
        tracked.log_text(json.dumps(asdict(params.evaluate.sampling), indent=2), SETTINGS_FILE)
        if evaluation.encoders:
            tracked.log_text(json.dumps(evaluation.encoders, indent=2), "feature_encoders.json")
        for name, image in images.items():
            if image is not None:
                tracked.log_image(image, name, STEP)
        for path in (PARAMS, SAMPLE_SHEET, EXTREMES_SHEET, DVC_LOCK, CHART, TABLE):  # dvc.lock names the model by now
            if path.exists():
                tracked.log_file(path)
    return f"{len(params.evaluate.prompts or [])} prompts sampled, {evaluation.summary}"


if __name__ == "__main__":
    run_stage("evaluate", main)
