"""An evaluation's MLflow run: below its training's, with the name of the DVC experiment that it was made in.

The training's run stays as it was. An evaluation that measures the same of the same model is the same run again: its
key is a hash of the model, of what it was measured on and how, and of what came out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentloom.params import Params
from latentloom.tracking.delivery import KEY_TAG
from latentloom.tracking.provenance import HASH_TAG, NOTE, Provenance, collect, origin, read_run_record, record_code
from latentloom.tracking.runs import TrackedRun, new_run

EVALUATED_TAG = "evaluated.model.sha256"
STEP = 0  # of all figures and sheets: so those of trainings of any length are side by side in MLflow
DECIDING = {"seed": True, "evaluate": True, "diffusion": {"schedule", "noise_levels"}}


@contextmanager
def evaluation_run(root: Path, params: Params, model_sha256: str, figures: Mapping[str, float]) -> Iterator[TrackedRun]:
    """Open the run of an evaluation of the model ``model_sha256``, with its settings and ``figures``."""
    provenance, record = collect(Path.cwd()), read_run_record(root, model_sha256)
    data = {name: provenance.inputs[name] for name in ("latents", "text", "captions") if name in provenance.inputs}
    settings = _settings(params)
    identity = json.dumps([model_sha256, data, settings, dict(figures)], sort_keys=True)
    with new_run(
        root,
        name=provenance.experiment or f"evaluation of {model_sha256[:8]}",
        # With a hyphen, by which `sync` tells it from a training's.
        key=f"evaluation-{hashlib.sha256(identity.encode()).hexdigest()[:32]}",
        parent=(KEY_TAG, record.run_key) if record and record.run_key else (HASH_TAG, model_sha256),
    ) as run:
        record_code(run, provenance)
        run.set_tags({EVALUATED_TAG: model_sha256, NOTE: _description(params, model_sha256, provenance)})
        settings["evaluate"].pop("prompts")  # MLflow repeats params above each image; the sheet shows them
        run.log_params(settings)
        run.log_metrics({f"evaluate/{name}": value for name, value in figures.items()}, STEP)
        yield run


def _settings(params: Params) -> dict[str, Any]:
    """What decides an evaluation, by the keys of ``params.yaml``."""
    settings = params.model_dump(mode="json", include=DECIDING)
    evaluate = settings["evaluate"]
    return settings | {"evaluate": evaluate.pop("sampling") | evaluate}


def _description(params: Params, model_sha256: str, provenance: Provenance) -> str:
    sampling = params.evaluate.sampling
    measured = (
        f"**Evaluation** of the model `{model_sha256[:12]}`: guidance {sampling.class_guidance:g}, "
        f"{sampling.diffusion_steps} steps of {sampling.sampler}, seed {params.seed}."
    )
    return "\n\n".join([measured, *origin(provenance)])
