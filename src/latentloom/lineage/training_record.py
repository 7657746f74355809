"""What is known of a model's training: from its MLflow run, else from the commit that holds its results.

A run has the commit and the diff of its code, its params, DVC's lock and the listings of its sources as tags and
artifacts. Where somebody committed the results afterwards, one commit holds all of that, and the model's hash finds it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from latentloom.evaluation.pictures import PictureFacts, read_facts
from latentloom.files import read_json
from latentloom.lineage.dvc_objects import Place, directory_oid
from latentloom.lineage.history import History
from latentloom.model_files import MODEL_FILES
from latentloom.registry.models import DVC_TAG, HASH_TAG, MODEL, look_up, model_in_folder, version_of
from latentloom.tracking.delivery import first_line
from latentloom.tracking.provenance import CODE_DIFF, COMMIT, INGESTED, SOURCES
from latentloom.tracking.store import open_client, tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

LOCK, RUN_REPORT = "dvc.lock", "reports/train/run.json"
IN_GIT = {  # artifacts of a run, and where the project has the same file
    "params.yaml": "params.yaml",
    LOCK: LOCK,
    SOURCES.name: str(SOURCES),
    INGESTED.name: str(INGESTED),
}
CONFIG = "model/config.json"


@dataclass(frozen=True)
class Subject:
    """What was asked for: the model, and how it was named.

    ``sha256`` is None where a training left no model, or nothing but DVC's hash ``oid`` of it is known.
    """

    sha256: str | None
    oid: str | None = None
    run_id: str | None = None
    folder: Path | None = None
    version: "ModelVersion | None" = None
    picture: Path | None = None
    facts: PictureFacts | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """All that is known of a training.

    Attributes:
        run: as MLflow has it; None where it does not, which ``told`` explains.
        run_id: MLflow's id, also where the run is gone.
        store: the address of the store, without credentials.
        files: the contents of the artifacts of the names in `IN_GIT`, of code.diff, config.json and requirements.lock.
        commit: in which the training ran.
        results: the commit that holds its code, params and results; None where there is none.
        code: its files of code, path -> git's id; None where the commit is not here or the diff does not fit.
        model_oid: DVC's hash of the model.
        origin: where the params were read, for a person.
        has_artifacts: whether the run still has files.
        unread: why the run's files could not be read, where the place that holds them does not answer.
        run_report: reports/train/run.json as it is in the commit that is to be checked out.
        tags: of the run.
    """

    run: "Run | None"
    run_id: str | None
    store: str
    told: str | None
    files: Mapping[str, bytes]
    commit: str | None
    results: str | None
    code: Mapping[str, str] | None
    model_oid: str | None
    origin: str
    has_artifacts: bool
    unread: str | None
    run_report: bytes | None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def diff(self) -> bytes | None:
        """What of the code was not as in the commit."""
        return self.files.get(CODE_DIFF)

    @property
    def diff_is_missing(self) -> bool:
        """Whether files differed from the commit, and the run's artifacts, which would say how, are gone."""
        return self.tags.get("git.dirty") == "true" and not self.has_artifacts

    @property
    def run_place(self) -> Place:
        """Where the run is."""
        if self.run is None:
            return Place.UNKNOWN
        return Place.REMOTE if self.store.startswith("http") else Place.HERE

    @property
    def ended(self) -> str | None:
        """How a run without a model ended."""
        return f"the run is {self.run.info.status.lower()}" if self.run else None

    @cached_property
    def params(self) -> dict[str, Any]:
        """The training's params, as they were written."""
        return _mapping(self.files.get("params.yaml"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return _mapping(self.files.get(CONFIG))

    @cached_property
    def listings(self) -> list[dict[str, Any]]:
        """What the sources held, as `find_sources` wrote it."""
        return json.loads(self.files.get(SOURCES.name, b"[]"))

    @cached_property
    def ingested(self) -> dict[str, Any] | None:
        """What `ingest` counted."""
        return _mapping(self.files.get(INGESTED.name)) or None

    @cached_property
    def oids(self) -> dict[str, str]:
        """DVC's hashes of the data: path -> hash."""
        locked, tagged = outs_of(self.files.get(LOCK)), _tagged(self.tags)
        agree = all(locked.get(path) == oid for path, oid in tagged.items())
        return (locked if agree else {}) | tagged


def find_training(reference: str, root: Path) -> tuple[Subject, TrainingRecord]:
    """What ``reference`` names, and what is known of its training.

    Args:
        reference: a PNG of `latentloom sample`, a model folder, ``champion`` or another name of the registry, or a run.
        root: the project's root.

    Raises:
        FileNotFoundError: when it is a picture that is not there.
        ValueError: when it names nothing, several things, or a file that is no picture of ours.
        mlflow.exceptions.MlflowException: when it names a run or a version, and the store cannot be reached.
    """
    history, store = History(root), without_credentials(tracking_uri(root))
    subject = _on_disk(reference, root)
    run, told, client = None, None, None
    if subject is None:
        client = _client(root)
        subject, run = _in_store(client, root, reference)
    else:
        try:
            client = _client(root)
            run = _run_of(client, subject)
            told = None if run else f"{store} does not have it"
            if subject.sha256:
                subject = _with_version(subject, client)
        except Exception as error:  # MLflow is away, or not installed: git and DVC may know enough
            told = str(error) if isinstance(error, NoStoreError) else f"{store} does not answer: {first_line(error)}"
    return subject, _record(subject, run, client, told, store, history, root)


class NoStoreError(ValueError):
    """There is no MLflow store in this folder, and the environment names none."""


def outs_of(lock: bytes | None) -> dict[str, str]:
    """The outs that a dvc.lock names: path -> DVC's hash."""
    stages = _mapping(lock).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def _on_disk(reference: str, root: Path) -> Subject | None:
    path = Path(reference).expanduser()
    if path.is_file() or path.suffix.lower() == ".png":
        facts = read_facts(path)
        return Subject(facts.model_sha256, run_id=facts.mlflow_run_id, picture=path.resolve(), facts=facts)
    if (path / "config.json").is_file():
        found = model_in_folder(path, root)
        return Subject(found.sha256, run_id=found.run_id, folder=path.resolve())
    if path.resolve() == (root / MODEL).resolve() and (root / LOCK).exists():  # a clone that has not pulled
        trained = read_json(root / RUN_REPORT) if (root / RUN_REPORT).exists() else {}
        if oid := outs_of((root / LOCK).read_bytes()).get(str(MODEL)):
            return Subject(trained.get("model_sha256"), oid, trained.get("mlflow_run_id"))
    if path.is_dir() or (("/" in reference or reference.startswith(".")) and not reference.startswith("models:/")):
        raise ValueError(
            f"{reference} is neither a PNG of `latentloom sample` nor a folder with a model ({', '.join(MODEL_FILES)})"
        )
    return None


def _client(root: Path) -> "MlflowClient":
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (root / "mlflow.db").exists():
        raise NoStoreError(
            "this folder has no MLflow store (mlflow.db): go to the project's root, or set MLFLOW_TRACKING_URI"
        )
    return open_client(root)


def _in_store(client: "MlflowClient", root: Path, reference: str) -> "tuple[Subject, Run | None]":
    from mlflow.entities import Run

    found = look_up(client, root, reference)
    if isinstance(found, Run):
        subject = Subject(found.data.tags.get(HASH_TAG), run_id=found.info.run_id)
        return (_with_version(subject, client) if subject.sha256 else subject), found
    subject = Subject(found.tags[HASH_TAG], run_id=found.run_id or None, version=found)
    return subject, _run_of(client, subject)


def _with_version(subject: Subject, client: "MlflowClient") -> Subject:
    return replace(subject, version=version_of(client, subject.sha256))


def _run_of(client: "MlflowClient", subject: Subject) -> "Run | None":
    """The run that trained the model: the one that is named, if its model is that one, else one with its hash."""
    from mlflow.exceptions import MlflowException

    if subject.run_id:
        try:
            run = client.get_run(subject.run_id)
            if subject.sha256 is None or run.data.tags.get(HASH_TAG) == subject.sha256:
                return run
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if subject.sha256 is None:
        return None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{HASH_TAG}` = '{subject.sha256}'", max_results=1)
    return runs[0] if runs else None


def _record(
    subject: Subject,
    run: "Run | None",
    client: "MlflowClient | None",
    told: str | None,
    store: str,
    history: History,
    root: Path,
) -> TrainingRecord:
    tags = dict(run.data.tags) if run else {}
    files: dict[str, bytes] = {}
    unread = None
    if client and run:
        try:
            files = _artifacts(client, run.info.run_id)
        except Exception as error:  # each kind of artifact store has its own
            unread = f"the run's files cannot be read: {first_line(error)}"
    has_artifacts = bool(files)
    oid = tags.get(DVC_TAG) or _oid_in_folder(subject, root)
    commit, diff = tags.get(COMMIT), files.get(CODE_DIFF)
    code = history.code(commit, diff) if commit else None
    results = _results(history, subject.sha256, oid, tags, code)
    origin = "params.yaml of the run"
    clean = tags.get("git.dirty") == "false" and diff is None
    if (known := results or (commit if clean else None)) and "params.yaml" not in files:
        origin = f"commit {known[:12]}"
    for name, path in IN_GIT.items():
        if known and name not in files and (data := history.read(known, path)) is not None:
            files[name] = data
    if results and code is None:
        code = history.code(results)
    if code and (lock := code.get("requirements.lock")):
        files["requirements.lock"] = history.blob(lock)
    if subject.folder and CONFIG not in files:
        files[CONFIG] = (subject.folder / "config.json").read_bytes()
    return TrainingRecord(
        run=run,
        run_id=run.info.run_id if run else subject.run_id,
        store=store,
        told=told,
        files=files,
        commit=commit,
        results=results,
        code=code,
        model_oid=oid or outs_of(files.get(LOCK) if results else None).get(str(MODEL)),
        origin=origin,
        has_artifacts=has_artifacts,
        unread=unread,
        run_report=history.read(results or commit, RUN_REPORT) if results or commit else None,
        tags=tags,
    )


def _artifacts(client: "MlflowClient", run_id: str) -> dict[str, bytes]:
    """The run's files that tell where it came from; those that are gone are left out."""
    there = [artifact.path for folder in (None, "model") for artifact in client.list_artifacts(run_id, folder)]
    with TemporaryDirectory() as folder:
        names = [name for name in (*IN_GIT, CODE_DIFF, CONFIG) if name in there]
        return {name: Path(client.download_artifacts(run_id, name, folder)).read_bytes() for name in names}


def _oid_in_folder(subject: Subject, root: Path) -> str | None:
    """DVC's hash of the model where its folder is here and as the training left it."""
    for folder in (subject.folder, root / MODEL):
        names = {path.name for path in folder.iterdir()} if folder and folder.is_dir() else set()
        if names == set(MODEL_FILES) and model_in_folder(folder, root).sha256 == subject.sha256:
            return directory_oid(folder)
    return subject.oid


def _results(
    history: History,
    sha256: str | None,
    oid: str | None,
    tags: Mapping[str, str],
    code: Mapping[str, str] | None,
) -> str | None:
    """The first commit with this model in its dvc.lock, made of the same data by the same code and params."""
    named = history.naming(oid, LOCK) if oid else history.naming(sha256, RUN_REPORT) if sha256 else []
    for commit in named:
        outs = outs_of(history.read(commit, LOCK))
        if str(MODEL) not in outs or (oid and outs[str(MODEL)] != oid):
            continue
        if oid is None and _mapping(history.read(commit, RUN_REPORT)).get("model_sha256") != sha256:
            continue
        if all(outs.get(path) == value for path, value in _tagged(tags).items()) and (
            code is None or history.code(commit) == code
        ):
            return commit
    return None


def _tagged(tags: Mapping[str, str]) -> dict[str, str]:
    return {tag.removeprefix("dvc."): value for tag, value in tags.items() if tag.startswith("dvc.data/")}


def _mapping(text: bytes | None) -> dict[str, Any]:
    """A YAML or JSON file's content; empty where there is none."""
    return (yaml.safe_load(text) or {}) if text else {}
