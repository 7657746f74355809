"""Stage `evaluate`: the model's metrics and samples, in reports/evaluate and in the MLflow run of its training."""

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict

import numpy as np

from latentloom.encoding.dataset import load_caches
from latentloom.evaluation.report import evaluate
from latentloom.evaluation.sweep import CHART, TABLE, save_sweep, sweep
from latentloom.evaluation.text_to_image import SETTINGS_FILE, load_text_to_image
from latentloom.layout import DVC_LOCK, IMAGES, LATENTS, MODEL, SAMPLE_SHEET, TEXT, project_root
from latentloom.lineage.provenance import read_run_record
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.tracking.runs import TrackedRun, reopened_run


def main(params: Params) -> str:
    model = load_text_to_image(MODEL)
    caches = load_caches(LATENTS, TEXT, device=model.device, memory_share=params.machine.data_memory_share)
    evaluation = evaluate(params, model, caches, IMAGES)
    evaluation.save()
    chart = save_sweep(sweep(model, caches.train, params.evaluate, params.seed))
    with training_run(model.model_sha256) as tracked:
        step = params.train.steps
        tracked.log_metrics({f"evaluate/{name}": value for name, value in evaluation.metrics.items()}, step)
        tracked.log_text(json.dumps(asdict(params.evaluate.sampling), indent=2), SETTINGS_FILE)
        tracked.log_image(np.asarray(evaluation.sheet), "evaluation", step)
        if chart is not None:
            tracked.log_image(chart, "sweep", step)
        for path in (SAMPLE_SHEET, DVC_LOCK, CHART, TABLE):  # dvc.lock names the model by now
            if path.exists():
                tracked.log_file(path)
    return f"{len(params.evaluate.prompts)} prompts sampled, {evaluation.summary}"


def training_run(model_sha256: str) -> AbstractContextManager[TrackedRun]:
    """The run that trained the model; one that keeps nothing where this machine does not know it."""
    record = read_run_record(project_root(), model_sha256)
    if record is None:
        print(f"evaluate: {MODEL} was not trained on this machine, so nothing is logged to MLflow", file=sys.stderr)
    return reopened_run(project_root(), record and record.run_key, record and record.mlflow_run_id)


if __name__ == "__main__":
    run_stage("evaluate", main)
