"""What a training's run in MLflow holds besides its curves: what it came from, and the model that it made.

All of it comes as plain values: `lineage.provenance` collects them, and reads them back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentloom.layout import LATENTS, PARAMS, VALIDATION_REPORT
from latentloom.tracking.runs import TrackedRun

PROVENANCE, CODE_DIFF = "provenance.json", "code.diff"
# MLflow repeats a run's params above each image, so it gets the sections that decide the model.
SECTIONS = ("seed", "ingest", "encode_images", "encode_text", "model", "diffusion", "train")


def record_start(
    tracked: TrackedRun,
    params: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    images: Mapping[str, int],
    digest: Mapping[str, str],
    device: str,
    code_diff: str = "",
) -> None:
    """Before the first step: record the code, the params and the data, and describe the run.

    Args:
        tracked: the training's run.
        params: of all sections, nested.
        provenance: as `lineage.provenance.Provenance.to_dict` gives it.
        images: the number of images per split, ``training`` first.
        digest: a hash of each split's content.
        device: what trains.
        code_diff: how the code differs from its commit, for ``git apply``.
    """
    dirty, inputs = provenance.get("dirty"), provenance.get("inputs", {})
    tracked.set_tags(
        {
            "mlflow.source.git.commit": provenance.get("commit"),
            "git.dirty": None if dirty is None else str(dirty).lower(),
            "git.branch": provenance.get("branch"),
            "dvc.experiment": provenance.get("experiment"),
            "mlflow.user": provenance.get("user"),
            "device": device,
            "input.latents": inputs.get("latents"),
            "input.validation": inputs.get("validation"),
        }
    )
    tracked.log_params({section: params[section] for section in SECTIONS})
    tracked.log_text(json.dumps(provenance, indent=2) + "\n", PROVENANCE)
    if code_diff:
        tracked.log_text(code_diff, CODE_DIFF)
    sources = [source["name"] for source in provenance.get("ingested", {}).get("sources", [])] or ["images"]
    for split, rows in images.items():
        name = f"{'+'.join(sources)}-{split}"
        tracked.log_dataset(name=name, source=str(LATENTS), digest=digest[split], rows=rows, context=split)
    for path in (PARAMS, VALIDATION_REPORT):
        if path.exists():
            tracked.log_file(path)
    tracked.describe(_description(params, provenance, images, sources))


def record_model(
    tracked: TrackedRun,
    *,
    metrics: Mapping[str, float],
    val_mae: float | None,
    model_folder: Path,
    model_sha256: str,
    provenance: Mapping[str, Any],
) -> None:
    """After the last step: record the model's hash and config, and add its errors to the description.

    Args:
        tracked: the training's run.
        metrics: of the training, with ``train_mae``.
        val_mae: the model's error on the validation split; None without one.
        model_folder: where the model is.
        model_sha256: names it.
        provenance: as `record_start` got it, with the model.
    """
    tracked.set_tags({"model.sha256": model_sha256})
    tracked.log_file(model_folder / "config.json", "model")
    tracked.log_text(json.dumps(provenance, indent=2) + "\n", PROVENANCE)
    errors = f"train MAE **{metrics['train_mae']:.3f}**"
    if val_mae is not None:
        errors += f", validation MAE **{val_mae:.3f}**"
    tracked.describe(f"{tracked.description}\n\nResult: {errors}. Model `{model_sha256[:12]}`.")


def _description(
    params: Mapping[str, Any], provenance: Mapping[str, Any], images: Mapping[str, int], sources: list[str]
) -> str:
    training, *held_out = images.values()
    train, widths = params["train"], "/".join(map(str, params["model"]["widths"]))
    lines = [
        f"**{training:,} images of {' and '.join(sources)}** ({sum(held_out):,} held out), {train['steps']:,} steps of "
        f"{train['batch_size']} images, widths {widths}, learning rate {train['learning_rate']:g}, "
        f"seed {params['seed']}."
    ]
    if commit := provenance.get("commit"):
        changes = f", with local changes (`{CODE_DIFF}`)" if provenance.get("dirty") else ""
        lines.append(f"Code: commit `{commit[:10]}` of branch `{provenance.get('branch')}`{changes}.")
    if name := provenance.get("experiment"):
        lines.append(f"DVC experiment `{name}`; `dvc exp apply {name}` restores it.")
    failed = provenance.get("failed_checks")
    if failed is not None:
        lines.append(f"Validation failed: **{', '.join(failed)}**." if failed else "Validation: all checks passed.")
    return "\n\n".join(lines)
