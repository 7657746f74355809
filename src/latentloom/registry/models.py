"""From what a user calls a model to its files: a folder, a name of the registry, or an MLflow run.

A model's bytes may be in several places; its hash says which are the right ones. They are looked for in `models/unet`,
in `.state/models` (what was fetched before), in DVC's cache and remote, and in the registry, in this order.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from latentloom.dvc_outs import bring
from latentloom.errors import UserError
from latentloom.layout import MODEL
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.tracking.store import open_client
from latentloom.tracking.training_run import PROVENANCE

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

NAME = "latentloom"  # of the registered model
HASH_TAG = "model.sha256"
SERVED = "served"  # where the training's run holds the files of a registered version
PACKED_MODEL = f"{SERVED}/artifacts/model"
REGISTERED = r"^(models:/)?latentloom[@:/]"


@dataclass(frozen=True)
class FoundModel:
    """A model's files and hash, and where they are known its run, its version, and what its training wrote down."""

    folder: Path
    sha256: str
    run_id: str | None = None
    version: str | None = None
    provenance: Mapping[str, Any] | None = None


def find_model(reference: str, root: Path) -> FoundModel:
    """The model that ``reference`` names.

    Args:
        reference: a folder; ``champion``, ``candidate`` or another alias; a version number, ``latentloom:3``,
            ``models:/latentloom/3``; the id of an MLflow run, the beginning of one, or a run's name.
        root: the project's root, which decides the store; MLflow is not imported for a folder.

    Raises:
        UserError: when it names nothing, or several things, or the bytes are nowhere; it says what to do.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    folder = Path(reference).expanduser()
    if all((folder / name).is_file() for name in MODEL_FILES):
        return FoundModel(folder, model_hash(folder))
    is_uri = reference.startswith(("models:/", "runs:/"))
    if not is_uri and (folder.is_dir() or "/" in reference or reference.startswith(".")):
        raise UserError(
            f"{reference} holds no model ({', '.join(MODEL_FILES)}): run `dvc pull` or `dvc repro`, or name a run, a "
            "version, champion or candidate"
        )
    client = open_client(root)
    run, version = look_up(client, reference)
    sha256 = version.tags[HASH_TAG] if version else run.data.tags.get(HASH_TAG)
    if sha256 is None:
        raise UserError(
            f"the run {run.info.run_id} ({run.info.run_name}) has no model: it is {run.info.status.lower()}; train "
            "again (`dvc repro --force train`)"
        )
    version = version or version_of(client, sha256)
    provenance = run_provenance(client, run) if run else {}  # the run of a version may be deleted
    folder = _fetch(client, root, sha256, provenance, version)
    return FoundModel(folder, sha256, run and run.info.run_id, version and str(version.version), provenance or None)


def look_up(client: "MlflowClient", reference: str) -> "tuple[Run | None, ModelVersion | None]":
    """What ``reference`` names in the store: a version that `latentloom promote` made and its run, else a run alone.

    Raises:
        UserError: when it names neither, or several runs.
    """
    name = re.sub(REGISTERED, "", reference)
    get_version = client.get_model_version if name.isdigit() else client.get_model_version_by_alias
    version = _or_none(get_version, NAME, name)
    if version is None:
        return find_run(client, reference.removeprefix("runs:/")), None
    if HASH_TAG not in version.tags:
        raise UserError(f"version {version.version} of {NAME} was not made by `latentloom promote`: promote a run")
    return _or_none(client.get_run, version.run_id), version


def find_run(client: "MlflowClient", reference: str) -> "Run":
    """The run with that id, beginning of an id, or name; of several, the one that has a model.

    Raises:
        UserError: when there is none, or more than one.
    """
    quoted = reference.replace("'", "_")  # in LIKE, any one character: a filter knows no other way
    filters = (f"attributes.run_id LIKE '{quoted}%'", f"attributes.run_name LIKE '{quoted}'")
    found = {run.info.run_id: run for each in filters for run in _search(client, each)}
    named = [run for own, run in found.items() if own.startswith(reference) or run.info.run_name == reference]
    runs = [run for run in named if HASH_TAG in run.data.tags] or named
    if not runs:
        raise UserError(
            f"{reference} names no folder, no version or alias of the registry (`latentloom promote RUN --to champion` "
            "makes one), and no run of this store (`make ui` shows their names and ids)"
        )
    if len(runs) > 1:
        shown = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in runs)
        raise UserError(f"{reference} names {len(runs)} runs: {shown}; give more of the id")
    return runs[0]


def run_of_model(client: "MlflowClient", sha256: str, run_id: str | None = None) -> "Run | None":
    """The run that trained the model with that hash: ``run_id`` if it did, else the newest of any experiment."""
    runs = _search(client, f"tags.`{HASH_TAG}` = '{sha256}'")
    return next((run for run in runs if run.info.run_id == run_id), next(iter(runs), None))


def run_provenance(client: "MlflowClient", run: "Run") -> dict[str, Any]:
    """What the training wrote down of its code, data and model; empty where the run does not hold it."""
    written = read_artifact(client, run, PROVENANCE)
    found = {"model_sha256": run.data.tags.get(HASH_TAG), "mlflow_run_id": run.info.run_id}
    return json.loads(written) | found if written is not None else {}


def image_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's provenance that goes into each PNG: the run, the commit, and DVC's hashes."""
    return {key: provenance.get(key) for key in ("mlflow_run_id", "commit", "dirty", "outs")}


def read_artifact(client: "MlflowClient", run: "Run", name: str) -> bytes | None:
    """A file of a run; None where the run does not have it.

    Raises:
        UserError: when the place of the run's files does not answer.
        mlflow.exceptions.MlflowException: when the server does not.
    """
    try:
        if name not in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}:
            return None
        with TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run.info.run_id, name, folder)).read_bytes()
    except OSError as error:
        raise UserError(f"the files of the run {run.info.run_id} cannot be read: {error}") from error


def version_of(client: "MlflowClient", sha256: str) -> "ModelVersion | None":
    """The newest registered version of the model with that hash."""
    versions = client.search_model_versions(f"name = '{NAME}' and tags.`{HASH_TAG}` = '{sha256}'")
    return max(versions, key=lambda version: int(version.version), default=None)


def is_model(folder: Path, sha256: str) -> bool:
    """Whether ``folder`` holds the model with that hash."""
    return all((folder / name).is_file() for name in MODEL_FILES) and model_hash(folder) == sha256


def _search(client: "MlflowClient", condition: str) -> "list[Run]":
    """Runs of all experiments, the newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, condition, max_results=100)


def _or_none(get: Callable[..., Any], *names: str) -> Any:
    """What MLflow has by that name; None where it has nothing."""
    from mlflow.exceptions import MlflowException

    try:
        return get(*names)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second of an alias
            return None
        raise


def _fetch(
    client: "MlflowClient", root: Path, sha256: str, provenance: Mapping[str, Any], version: "ModelVersion | None"
) -> Path:
    """A folder that holds the model with that hash."""
    fetched = root / ".state" / "models" / sha256
    for folder in (root / MODEL, fetched):
        if is_model(folder, sha256):
            return folder
    tried = ""
    if out := provenance.get("outs", {}).get(str(MODEL)):
        try:
            bring(root, {out: fetched})
        except UserError as error:
            tried = f" ({error})"
    if version and not is_model(fetched, sha256):
        _download(client, version, fetched)
    if not is_model(fetched, sha256):
        again = (
            f"`git checkout {provenance['commit'][:12]} && dvc repro`" if provenance.get("commit") else "`dvc repro`"
        )
        raise UserError(
            f"the model {sha256[:12]}… is not in {MODEL}, in DVC's cache or remote, or in the registry{tried}: "
            f"train it again ({again}), or `dvc push` it from where it was trained"
        )
    return fetched


def _download(client: "MlflowClient", version: "ModelVersion", folder: Path) -> None:
    """The files of a registered version, with the encoders that it carries."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        files = client.download_artifacts(version.run_id, PACKED_MODEL, temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged copy: a whole one would have been used
        Path(files).rename(folder)
