"""What `latentloom lineage` was asked for, and the provenance of its model, as it was written down.

The provenance is read in the MLflow run, else on this machine (`.state/runs`), else in the PNG, else in the commit that
is checked out.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.dvc_outs import locked_outs, out_hash
from latentloom.errors import UserError
from latentloom.evaluation.metadata import ImageMetadata, read_metadata
from latentloom.layout import DVC_LOCK, MODEL
from latentloom.lineage.git import Git
from latentloom.lineage.provenance import Provenance, read_run_record
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.registry.models import HASH_TAG, look_up, read_artifact, run_of_model, run_provenance, version_of
from latentloom.tracking.store import first_line, open_client, tracking_uri, without_credentials
from latentloom.tracking.training_run import CODE_DIFF

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Subject:
    """What was asked for, and what is known of its training.

    Attributes:
        sha256: the model's hash; None where there is no model, or only DVC's hash of it is known.
        provenance: as it was written down; empty where nothing was found.
        run: of the training; None where MLflow does not have it, which ``run_message`` explains.
        version: of the registry.
        folder: the model's folder, where one was asked for.
        image: the PNG, where one was asked for, and its ``metadata``.
        code_diff: what differed from the commit; None where the run does not hold it.
        store: MLflow's address, without credentials.
        results: the commit that holds the model in its dvc.lock, where its code is the training's.
    """

    sha256: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    run: "Run | None" = None
    run_message: str = ""
    version: "ModelVersion | None" = None
    folder: Path | None = None
    image: Path | None = None
    metadata: ImageMetadata | None = None
    code_diff: bytes | None = None
    store: str = ""
    results: str | None = None

    @property
    def commit(self) -> str | None:
        """The commit to check out."""
        return self.results or self.provenance.commit

    @property
    def changes(self) -> bytes | None:
        """What to apply to it."""
        return None if self.results else self.code_diff


def find_subject(reference: str, root: Path) -> Subject:
    """What ``reference`` names, and the provenance of its model; raises as `lineage.trace`."""
    subject = _on_disk(reference, root)
    store = without_credentials(tracking_uri(root))
    if subject is None:
        client = _client(root)
        run, version = look_up(client, root, reference)
        sha256 = version.tags[HASH_TAG] if version else run.data.tags.get(HASH_TAG)
        subject = Subject(sha256, run=run, version=version)
        message = f"{store} does not have it"
    else:
        client, message = None, f"{store} does not have it"
        try:
            client = _client(root)
            if subject.sha256:
                run_id = subject.metadata.mlflow_run_id if subject.metadata else None
                subject = replace(subject, run=run_of_model(client, subject.sha256, run_id))
        except UserError as error:
            message = str(error)
        except Exception as error:  # MLflow is away, damaged or not installed: what is on this machine may be enough
            client, message = None, f"{store} does not answer: {first_line(error)}"
    subject = replace(subject, store=store, run_message="" if subject.run else message)
    if client and subject.sha256 and not subject.version:
        subject = replace(subject, version=version_of(client, subject.sha256))
    return _with_code(_with_provenance(subject, client, root), Git(root))


def _on_disk(reference: str, root: Path) -> Subject | None:
    path = Path(reference).expanduser()
    if path.is_file() or path.suffix.lower() == ".png":
        metadata = read_metadata(path)
        return Subject(metadata.model_sha256, image=path.resolve(), metadata=metadata)
    if (path / "config.json").is_file():
        return Subject(model_hash(path), folder=path.resolve())
    if path.resolve() == root / MODEL and str(MODEL) in _locked(root):  # a clone that has not pulled
        return Subject()
    if path.is_dir() or (("/" in reference or reference.startswith(".")) and not reference.startswith("models:/")):
        raise UserError(
            f"{reference} is neither a PNG of `latentloom sample` nor a folder with a model ({', '.join(MODEL_FILES)})"
        )
    return None


def _client(root: Path) -> "MlflowClient":
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise UserError("this project has no MLflow store (mlflow.db) yet; a server's is named by MLFLOW_TRACKING_URI")
    return open_client(root)


def _with_provenance(subject: Subject, client: "MlflowClient | None", root: Path) -> Subject:
    """The subject with what was written down of its training, from the first place that has it."""
    if client and subject.run:
        try:
            known = Provenance.from_dict(run_provenance(client, subject.run))
            return replace(subject, provenance=known, code_diff=read_artifact(client, subject.run, CODE_DIFF))
        except Exception as error:  # each kind of artifact store has its own
            subject = replace(subject, run_message=f"its files cannot be read: {first_line(error)}")
    known = read_run_record(root, subject.sha256) if subject.sha256 else None
    if known is None and subject.metadata and subject.metadata.provenance:
        known = Provenance.from_dict({**subject.metadata.provenance, "model_sha256": subject.sha256})
    if known is None and (outs := _locked(root)):
        folder = subject.folder or root / MODEL
        if subject.sha256 is None or (folder.is_dir() and out_hash(folder) == outs.get(str(MODEL))):
            known = Provenance(commit=Git(root).commit(), dirty=False, outs=outs)
    return replace(subject, provenance=known or Provenance())


def _with_code(subject: Subject, git: Git) -> Subject:
    """The subject with the commit that holds its results, if somebody committed them with the training's code."""
    known = subject.provenance
    results = git.first_naming(known.outs[str(MODEL)], DVC_LOCK) if str(MODEL) in known.outs else None
    if results and known.commit and git.has(known.commit):
        changes = (subject.code_diff or b"") if subject.code_diff or not known.dirty else None
        if changes is not None and git.code_between(known.commit, results) != changes:
            results = None
    return replace(subject, results=results)


def _locked(root: Path) -> dict[str, str]:
    lock = root / DVC_LOCK
    return locked_outs(lock.read_bytes()) if lock.exists() else {}
