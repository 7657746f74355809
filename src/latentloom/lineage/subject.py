"""What `latentloom lineage` was asked for, and the provenance of its model, as it was written down.

The provenance is read in the MLflow run, else on this machine (`.state/runs`), else in the PNG, else in the dvc.lock of
the commit that is checked out.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.dvc_outs import locked_outs, out_hash
from latentloom.errors import UserError
from latentloom.evaluation.metadata import ImageMetadata, read_metadata
from latentloom.layout import DVC_LOCK, MODEL
from latentloom.lineage.git import Git
from latentloom.lineage.provenance import Provenance, read_run_record
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.registry.models import (
    HASH_TAG,
    is_model,
    look_up,
    read_artifact,
    run_of_model,
    run_provenance,
    version_of,
)
from latentloom.tracking.store import first_line, open_client, tracking_uri, without_credentials
from latentloom.tracking.training_run import CODE_DIFF

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


@dataclass
class Subject:
    """What was asked for, and what is known of its training.

    Attributes:
        sha256: the model's hash; None where there is no model, or only DVC's hash of it is known.
        folder: the model's, where it was asked for, or the project's own.
        image: the PNG, where one was asked for, and its ``metadata``.
        run: of the training; ``message`` says why MLflow does not have it, or not its files.
        version: of the registry.
        provenance: as it was written down; empty where nothing was found, None before it was looked for.
        commit: of the code: where the commit that is checked out has the same code and the results, that one.
        code_diff: what differed from the commit; None where the run does not hold it.
    """

    sha256: str | None
    folder: Path
    image: Path | None = None
    metadata: ImageMetadata | None = None
    run: "Run | None" = None
    message: str = ""
    version: "ModelVersion | None" = None
    provenance: Provenance | None = None
    commit: str | None = None
    code_diff: bytes | None = None


def find_subject(reference: str, root: Path) -> Subject:
    """What ``reference`` names, and the provenance of its model; raises as `lineage.trace`."""
    git = Git(root)
    results = locked_outs(git.read("HEAD", DVC_LOCK))
    subject = _on_disk(reference, root, results) or _in_store(reference, root)
    _ask_store(subject, root)
    known = subject.provenance = subject.provenance or _known_here(subject, root, results)
    committed = results and known.commit and results.get(str(MODEL)) == known.outs.get(str(MODEL))
    subject.commit = git.commit() if committed and git.same_code(known.commit, "HEAD") else known.commit
    return subject


def _on_disk(reference: str, root: Path, results: dict[str, str]) -> Subject | None:
    path = Path(reference).expanduser()
    if path.is_file() or path.suffix.lower() == ".png":
        metadata = read_metadata(path)
        return Subject(metadata.model_sha256, root / MODEL, path.resolve(), metadata)
    if (path / "config.json").is_file():
        return Subject(model_hash(path), path.resolve())
    if path.resolve() == root / MODEL and str(MODEL) in results:  # a clone that has not pulled
        return Subject(None, root / MODEL)
    if path.is_dir() or (("/" in reference or reference.startswith(".")) and not reference.startswith("models:/")):
        raise UserError(
            f"{reference} is neither a PNG of `latentloom sample` nor a folder with a model ({', '.join(MODEL_FILES)})"
        )
    return None


def _in_store(reference: str, root: Path) -> Subject:
    run, version = look_up(_client(root), reference)
    sha256 = version.tags[HASH_TAG] if version else run.data.tags.get(HASH_TAG)
    return Subject(sha256, root / MODEL, run=run, version=version)


def _ask_store(subject: Subject, root: Path) -> None:
    """Add what MLflow has: the run and its files, and the version."""
    store = without_credentials(tracking_uri(root))
    try:
        client = _client(root)
        if subject.sha256:
            named = subject.metadata.mlflow_run_id if subject.metadata else None
            subject.run = subject.run or run_of_model(client, subject.sha256, named)
            subject.version = subject.version or version_of(client, subject.sha256)
        if subject.run:
            if known := run_provenance(client, subject.run):
                subject.provenance = Provenance.from_dict(known)
            subject.code_diff = read_artifact(client, subject.run, CODE_DIFF)
        else:
            subject.message = f"{store} does not have it"
    except UserError as error:
        subject.message = str(error)
    except Exception as error:  # MLflow is away, damaged or not installed: what is on this machine may be enough
        subject.message = f"{store} does not answer: {first_line(error)}"


def _client(root: Path) -> "MlflowClient":
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise UserError("this project has no MLflow store (mlflow.db) yet; a server's is named by MLFLOW_TRACKING_URI")
    return open_client(root)


def _known_here(subject: Subject, root: Path, results: dict[str, str]) -> Provenance:
    """What was written down without MLflow, from the first place that has it."""
    if subject.sha256 and (record := read_run_record(root, subject.sha256)):
        return record
    if subject.metadata and subject.metadata.provenance:
        return Provenance.from_dict(subject.metadata.provenance)
    folder, out = subject.folder, results.get(str(MODEL))
    is_here = subject.sha256 and is_model(folder, subject.sha256) and out_hash(folder) == out
    if out and not subject.run and (subject.sha256 is None or is_here):
        return Provenance(commit=Git(root).commit(), dirty=False, outs=results)
    return Provenance()
