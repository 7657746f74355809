"""From what a person calls a model to its files: a folder, a name of the registry, or an MLflow run.

A model's bytes may lie in several places; its hash says which are the right ones. They are looked for in `models/unet`,
in `.state/models` (what was brought before), in DVC's cache and remote, and in the registry, in this order.
"""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.files import read_json
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.tracking.store import experiment_id, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

NAME = "latentloom"  # of the registered model
ALIASES = ("champion", "candidate")
MODEL = Path("models/unet")
HASH_TAG, DVC_TAG = "model.sha256", "dvc.models/unet"
PACKED_MODEL = "artifacts/model"  # where a registered version holds the model folder
REGISTERED = re.compile(r"(?:models:/)?latentloom[@:/](?P<name>.+)")
SHOWN_RUNS = 5


@dataclass(frozen=True)
class FoundModel:
    """A model's files, their hash, and where it is known the run that trained it and its version in the registry."""

    folder: Path
    sha256: str
    run_id: str | None
    version: str | None


def find_model(reference: str, root: Path) -> FoundModel:
    """The model that ``reference`` names.

    Args:
        reference: a folder; ``champion``, ``candidate`` or another alias; a version number, ``latentloom:3``; the id of
            an MLflow run, the beginning of one, or a run's name.
        root: the project's root, which decides the store; MLflow is not imported for a folder.

    Raises:
        ValueError: when it names nothing, or several things, or the bytes are nowhere; it says what to do.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    folder = Path(reference).expanduser()
    if (folder / "config.json").is_file():
        return model_in_folder(folder, root)
    registered = REGISTERED.fullmatch(reference)
    if not registered and (folder.is_dir() or "/" in reference or reference.startswith(".")):
        raise ValueError(
            f"{reference} holds no model ({', '.join(MODEL_FILES)}): run `dvc pull` or `dvc repro`, or name a run, a "
            "version, champion or candidate"
        )
    client = open_client(root)
    from mlflow.entities import Run  # once the client has seen to MLflow's settings

    found = look_up(client, root, reference)
    if not isinstance(found, Run):
        sha256, version = found.tags[HASH_TAG], found
        return FoundModel(_bring(client, root, sha256, {}, version), sha256, version.run_id or None, number_of(version))
    run, sha256 = found, found.data.tags.get(HASH_TAG)
    if sha256 is None:
        raise ValueError(
            f"the run {run.info.run_id} ({run.info.run_name}) has no model: it is {run.info.status.lower()}, or older "
            "than the tag model.sha256; train again (`dvc repro --force train`)"
        )
    version = version_of(client, sha256)
    folder = _bring(client, root, sha256, run.data.tags, version)
    return FoundModel(folder, sha256, run.info.run_id, number_of(version) if version else None)


def look_up(client: "MlflowClient", root: Path, reference: str) -> "Run | ModelVersion":
    """What of the store ``reference`` names: a version that `latentloom promote` made, else a run.

    Raises:
        ValueError: when it names neither, or several runs.
    """
    registered = REGISTERED.fullmatch(reference)
    name = registered["name"] if registered else reference
    if version := _version(client, name):
        if HASH_TAG not in version.tags:
            raise ValueError(f"version {version.version} of {NAME} was not made by `latentloom promote`: promote a run")
        return version
    if registered or reference in ALIASES:
        raise ValueError(f"{name} is nothing in the registry yet: `latentloom promote RUN --to champion` puts it there")
    return find_run(client, root, reference)


def find_run(client: "MlflowClient", root: Path, reference: str) -> "Run":
    """The run of our experiment with that id, beginning of an id, or name; of several, the one that has a model.

    Raises:
        ValueError: when there is none, or more than one.
    """
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", reference):
        with suppress(MlflowException):
            return client.get_run(reference)
    quoted = reference.replace("'", "_")  # as LIKE takes it, any one character: a filter knows no other way
    experiments = [experiment_id(client, root)]
    found = {
        run.info.run_id: run
        for attribute, pattern in (("run_id", f"{quoted}%"), ("run_name", quoted))
        for run in client.search_runs(experiments, f"attributes.{attribute} LIKE '{pattern}'", max_results=100)
        if run.info.run_id.startswith(reference) or run.info.run_name == reference
    }
    runs = list(found.values())
    if len(runs) > 1:
        runs = [run for run in runs if HASH_TAG in run.data.tags] or runs
    if not runs:
        raise ValueError(
            f"{reference} names no folder, no version or alias of the registry, and no run of this store; `make ui` "
            "shows the runs with their names and ids, `latentloom history` the registry"
        )
    if len(runs) > 1:
        shown = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in runs[:SHOWN_RUNS])
        raise ValueError(f"{reference} names {len(runs)} runs: {shown}; give more of the id")
    return runs[0]


def registered_model(client: "MlflowClient") -> "RegisteredModel | None":
    """Our model in the registry, with its aliases and tags, once something was promoted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(NAME)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def version_of(client: "MlflowClient", sha256: str) -> "ModelVersion | None":
    """The newest registered version of the model with that hash."""
    versions = client.search_model_versions(f"name = '{NAME}' and tags.`{HASH_TAG}` = '{sha256}'")
    return max(versions, key=lambda version: int(version.version), default=None)


def number_of(version: "ModelVersion") -> str:
    """A version's number; MLflow gives it as an integer from a database and as text from a server."""
    return str(version.version)


def model_in_folder(folder: Path, root: Path) -> FoundModel:
    """The model in a folder, with its run where `reports/train/run.json` is of it."""
    sha256 = model_hash(folder)
    report = root / "reports" / "train" / "run.json"
    run = read_json(report) if report.exists() else {}
    return FoundModel(folder, sha256, run.get("mlflow_run_id") if run.get("model_sha256") == sha256 else None, None)


def _version(client: "MlflowClient", name: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    model = registered_model(client)
    if model is None:
        return None
    number = str(model.aliases.get(name, name))
    if not number.isdigit():
        return None
    try:
        return client.get_model_version(NAME, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _bring(
    client: "MlflowClient", root: Path, sha256: str, tags: dict[str, str], version: "ModelVersion | None"
) -> Path:
    """A folder that holds the model with that hash."""
    brought = root / ".state" / "models" / sha256
    for folder in (root / MODEL, brought):
        if _holds(folder, sha256):
            return folder
    tried = []
    if oid := tags.get(DVC_TAG):
        try:
            _from_dvc(root, oid, brought)
        except (ImportError, OSError) as error:
            tried.append(f"DVC: {error}")
    if version and not _holds(brought, sha256):
        _from_registry(client, root, version, brought)
    if not _holds(brought, sha256):
        commit = tags.get("mlflow.source.git.commit")
        again = f"train it again: `git checkout {commit[:12]} && dvc repro`" if commit else "train it again"
        told = f" ({'; '.join(tried)})" if tried else ""
        raise ValueError(
            f"the model {sha256[:12]}… is not in {MODEL}, in DVC's cache and remote, or in the registry{told}: "
            f"{again}, or `dvc push` it from where it was trained"
        )
    return brought


def _holds(folder: Path, sha256: str) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES) and model_hash(folder) == sha256


def _from_dvc(root: Path, oid: str, folder: Path) -> None:
    from latentloom.lineage.dvc_objects import bring

    bring(root, oid, folder)


def _from_registry(client: "MlflowClient", root: Path, version: "ModelVersion", folder: Path) -> None:
    """The files of a registered version, encoders that it carries included."""
    from tempfile import TemporaryDirectory

    import mlflow.artifacts

    place = client.get_model_version_download_uri(NAME, version.version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        given = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{place.rstrip('/')}/{PACKED_MODEL}",
            dst_path=temporary,
            tracking_uri=tracking_uri(root),
        )
        shutil.rmtree(folder, ignore_errors=True)  # half of a model at most: a whole one would have been used
        Path(given).rename(folder)
