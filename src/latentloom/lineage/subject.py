"""What `latentloom lineage` was asked for, and the provenance of its model, as it was written down.

The provenance is read in the MLflow run, else on this machine (`.state/runs`), else in the model's folder, else in the
PNG, else in the dvc.lock of the commit that is checked out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentloom.dvc_outs import locked_outs, out_hash
from latentloom.errors import UserError
from latentloom.evaluation.metadata import ImageMetadata, read_metadata
from latentloom.files import user_path
from latentloom.layout import DVC_LOCK, ENCODE_IMAGES_REPORT, ENCODE_TEXT_REPORT, INGEST_REPORT, INIT, MODEL, SOURCES
from latentloom.model_files import model_hash
from latentloom.registry.models import (
    SHOWCASE,
    StoredModel,
    is_model,
    look_up,
    named_folder,
    read_artifact,
    run_provenance,
    stored_model,
)
from latentloom.tracking.git import Git
from latentloom.tracking.provenance import CODE_DIFF, Provenance, read_run_record
from latentloom.tracking.store import existing_store, first_line, tracking_uri, without_credentials


@dataclass
class Subject:
    """What was asked for, and what is known of its training."""

    stored: StoredModel  # its hash is None where there is no model, or only DVC's hash is known
    folder: Path  # the model's, where it was asked for or is the package's, or the project's own
    image: Path | None = None  # the PNG, where one was asked for
    metadata: ImageMetadata | None = None  # of the PNG
    provenance: Provenance = field(default_factory=Provenance)  # as it was written down; empty where nothing was found
    code_diff: bytes | None = None  # what differed from the commit; None where the run does not hold it
    message: str = ""  # why MLflow does not have the run, or not its files


def find_subject(reference: str, root: Path) -> Subject:
    """What ``reference`` names, and the provenance of its model; raises as `lineage.trace`."""
    path, model = user_path(reference), root / MODEL
    if path.is_file() or path.suffix.lower() == ".png":
        metadata = read_metadata(path)
        shipped = named_folder(SHOWCASE)
        folder = shipped if is_model(shipped, metadata.model_sha256) else model
        subject = Subject(StoredModel(metadata.model_sha256), folder, path.resolve(), metadata)
    elif is_model(folder := named_folder(reference)):
        subject = Subject(StoredModel(model_hash(folder)), folder.resolve())
    elif path.resolve() == model and _committed_outs(root):  # a clone that has not pulled
        subject = Subject(StoredModel(None), model)
    else:
        subject = Subject(look_up(reference, root), model)
    known = _ask_store(subject, root) or _known_here(subject, root)
    subject.provenance = known or Provenance()
    return subject


def _ask_store(subject: Subject, root: Path) -> Provenance | None:
    """Add what MLflow has, the run, its files, and the version; what the training wrote down there."""
    store, stored = without_credentials(tracking_uri(root)), subject.stored
    try:
        client = existing_store(root)
        if stored.sha256 and not stored.run:
            run_id = subject.metadata.mlflow_run_id if subject.metadata else None
            subject.stored = stored = stored_model(client, stored.sha256, run_id)
        if stored.run:
            subject.code_diff = read_artifact(client, stored.run, CODE_DIFF)
            return run_provenance(client, stored.run)
        subject.message = f"{store} does not have it"
    except UserError as error:
        subject.message = str(error)
    except Exception as error:  # MLflow is away, damaged or not installed: what is on this machine may be enough
        subject.message = f"{store} does not answer: {first_line(error)}"
    return None


def _known_here(subject: Subject, root: Path) -> Provenance | None:
    """What was written down without MLflow, from the first place that has it."""
    sha256, metadata = subject.stored.sha256, subject.metadata
    if sha256 and (record := read_run_record(root, sha256, subject.folder)):
        return record
    if metadata and metadata.provenance:
        return Provenance.from_dict(metadata.provenance)
    outs = _committed_outs(root)
    not_pulled = sha256 is None and subject.stored.run is None
    if outs and (not_pulled or (is_model(root / MODEL, sha256) and out_hash(root / MODEL) == outs[str(MODEL)])):
        return _committed(Git(root), outs)
    return None


def _committed(git: Git, outs: dict[str, str]) -> Provenance:
    """What the commit that is checked out says of its model, in dvc.lock and in the reports of the stages."""

    def read(path: Path) -> Any:
        return json.loads(git.read(path) or "null") or {}

    reports = {"vae": (ENCODE_IMAGES_REPORT, "vae"), "text_encoder": (ENCODE_TEXT_REPORT, "encoder")}
    encoders = {
        name: {"reference": report[key], "fingerprint": report[f"{key}_fingerprint"]}
        for name, (path, key) in reports.items()
        if f"{key}_fingerprint" in (report := read(path))
    }
    return Provenance(
        commit=git.commit(),
        dirty=False,
        outs=outs,
        sources=list(read(SOURCES)),
        ingested=read(INGEST_REPORT),
        encoders=encoders,
        base=read(INIT) or None,
    )


def _committed_outs(root: Path) -> dict[str, str]:
    """DVC's outs by the commit that is checked out; empty where it has no model."""
    outs = locked_outs(Git(root).read(DVC_LOCK))
    return outs if str(MODEL) in outs else {}
