"""Make the model that ships out of a finished project: rounded to fp16, measured, with its card and its origin.

    PYTHONPATH=src:tools python -m showcase.pack PROJECT

PROJECT is a clone of this repository in which `dvc repro` has ended with the params of presets/openmoji.yaml,
committed before: the commit is where the shipped model's lineage ends, so it must reach the repository's history.
What it writes, into src/latentloom/showcase, and beside it docs/showcase.png:

    config.json, model.safetensors   the model; parameters in fp16, what is measured from data in fp32
    sampling.json                    the settings that its figures were measured with
    provenance.json                  commit, DVC's hashes of the data, encoders, counts: `latentloom lineage` reads it
    metrics.json                     figures of the weights as they ship, and as they were trained; the cost
    held_out.csv                     the held-out captions that were measured
    README.md                        the card
"""

import argparse
import os
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from latentloom.devices import autocast_dtype
from latentloom.encoding.dataset import load_caches
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import load_text_to_image, store_settings
from latentloom.files import read_json, write_json, write_text
from latentloom.ingestion.shards import read_metadata
from latentloom.layout import EVALUATE_METRICS, IMAGES, LATENTS, MODEL, PARAMS, TEXT, TRAIN_METRICS
from latentloom.model_files import load_model, model_hash, save_model
from latentloom.params import Params
from latentloom.params_file import load_params
from latentloom.registry.models import SHOWCASE_FOLDER, is_model
from latentloom.tracking.provenance import PROVENANCE, Provenance, read_run_record
from latentloom.tracking.store import existing_store
from showcase.card import card, readme_lines
from showcase.figures import check_recall, compare, measure_held_out, table
from showcase.sheet import HELD_OUT, METRICS, SHEET
from showcase.sheet import main as draw_sheet

LARGEST = 30 * 10**6  # bytes of weights
OWN_TO_THE_MACHINE = ("branch", "experiment", "user", "mlflow_run_id", "run_key")


def pack(project: Path, folder: Path, *, shared: bool = False) -> None:
    """Write the model folder that ships, all but the sheet; ``shared`` says that its training did not have the machine.

    Raises:
        UserError: when the project is not finished, or was not trained from a commit; when rounding changes its recall,
            or the weights are larger than `LARGEST`.
    """
    params, trained = load_params(project / PARAMS), project / MODEL
    record = _record(project, trained)
    convert(trained, folder)
    store_settings(folder, params.evaluate.sampling)
    known = _shipped(record, model_hash(folder))
    write_json(folder / PROVENANCE, asdict(known))

    model = load_text_to_image(folder)
    caches = load_caches(project / LATENTS, project / TEXT, device=model.device, memory_share=0.5)
    measured = measure_held_out(model, caches, params)
    as_trained = read_json(project / EVALUATE_METRICS) | read_json(project / TRAIN_METRICS)
    check_recall(measured.figures, as_trained)
    rounding = compare(measured, model, load_text_to_image(trained), caches, params)
    metrics = {
        "figures": measured.figures,
        "as_trained": as_trained,
        "rounding": asdict(rounding),
        "training": _training(project, params, record.mlflow_run_id) | {"shared": shared},
    }
    write_json(folder / METRICS, metrics)
    keys = read_metadata(project / IMAGES).set_index("id")["key"]
    write_text(folder / HELD_OUT, table(measured, keys).to_csv(index=False))
    write_text(folder / "README.md", card(metrics, params, known, model.config))


def convert(trained: Path, folder: Path) -> None:
    """Copy a model with its parameters rounded to fp16. The whitening of texts, which was measured, stays as it is.

    Raises:
        UserError: when a parameter is too large for fp16, or the file is larger than `LARGEST`.
    """
    network, config = load_model(trained)
    parameters = dict(network.named_parameters())
    tensors = {name: own.half() if name in parameters else own for name, own in network.state_dict().items()}
    if broken := [name for name, own in tensors.items() if not torch.isfinite(own).all()]:
        raise UserError(f"{trained}: {broken[0]} does not fit into fp16")
    if (size := sum(own.nbytes for own in tensors.values())) > LARGEST:
        raise UserError(f"{trained}: {size:,} bytes in fp16, more than the {LARGEST:,} that ship")
    save_model(folder, tensors, config)


def _record(project: Path, trained: Path) -> Provenance:
    """What the training wrote down."""
    if not is_model(trained):
        raise UserError(f"{trained} holds no model: run `dvc repro` in {project}")
    record = read_run_record(project, model_hash(trained))
    if record is None or record.commit is None or record.dirty:
        raise UserError(f"{project}: the training did not start from a commit; commit params.yaml and train again")
    return record


def _shipped(record: Provenance, model_sha256: str) -> Provenance:
    """The record of the converted model, without what names only things of the machine that trained."""
    outs = {path: out for path, out in record.outs.items() if path != str(MODEL)}
    named = {"converted_from": record.model_sha256, "model_sha256": model_sha256, "outs": outs}
    return replace(record, **dict.fromkeys(OWN_TO_THE_MACHINE), **named)


def _training(project: Path, params: Params, run_id: str | None) -> dict[str, Any]:
    """What the training was, and what it cost if this is the machine; seconds only where MLflow has its rates."""
    train, seconds = params.train, None
    if run_id:
        rates = existing_store(project).get_metric_history(run_id, "train/images_per_second")
        steps = [0, *(point.step for point in rates)]
        images = [train.batch_size * (end - start) for start, end in pairwise(steps)]
        seconds = round(sum(own / point.value for own, point in zip(images, rates, strict=True)))
    bf16 = autocast_dtype(train.precision, torch.device("cpu")) is torch.bfloat16
    measured = {"seconds": seconds, "bf16": bf16, "cores": os.cpu_count()}
    return {"steps": train.steps, "batch_size": train.batch_size} | measured


def main(project: Path, folder: Path, sheet: Path, *, shared: bool) -> None:
    pack(project.resolve(), folder, shared=shared)
    draw_sheet(folder, sheet)
    print(readme_lines(read_json(folder / METRICS)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, help="a clone whose training has ended")
    parser.add_argument("--folder", type=Path, default=SHOWCASE_FOLDER, help="where to; the package's own by default")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="docs/showcase.png by default")
    parser.add_argument("--shared", action="store_true", help="the machine did other work while it trained: say so")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(str(error))
