"""From what a user calls a model to its files: a folder, `showcase`, a name of the registry, or an MLflow run.

`showcase` is the model that comes with this package, in its folder of that name. The bytes of any other may be in
several places; its hash says which are the right ones. They are looked for in `models/unet`, in `.state/models` (what
was fetched before), in DVC's cache and remote, and in the registry, in this order.
"""

import difflib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import latentloom
from latentloom.dvc_outs import bring
from latentloom.errors import UserError
from latentloom.files import user_path
from latentloom.layout import MODEL
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.tracking.evaluations import EVALUATED_TAG
from latentloom.tracking.provenance import HASH_TAG, PROVENANCE, Provenance, read_run_record
from latentloom.tracking.store import existing_store, has_error_code, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

NAME = "latentloom"  # of the registered model
SERVED = "served"  # where the training's run holds the files of a registered version
PACKED_MODEL = f"{SERVED}/artifacts/model"
SHOWCASE = "showcase"
NAMES_SHOWN = 12  # of models, where none is called as somebody wrote
SHOWCASE_FOLDER = Path(latentloom.__file__).with_name(SHOWCASE)
URI = re.compile(rf"^(runs:/|(models:/)?{NAME}[@:/])")  # as MLflow writes runs, versions and aliases


@dataclass(frozen=True)
class StoredModel:
    """What MLflow has of a model."""

    sha256: str | None  # None: the run made no model
    run: "Run | None" = None  # that trained it
    evaluation: "Run | None" = None  # with its figures: the last that is finished, unless another was asked for
    version: "ModelVersion | None" = None  # of the registry


@dataclass(frozen=True)
class FoundModel:
    """A model's files and hash, and where they are known its runs, its version, and what its training wrote down."""

    folder: Path
    sha256: str
    run_id: str | None = None
    evaluation_id: str | None = None
    version: str | None = None
    provenance: Provenance | None = None


def find_model(reference: str, root: Path) -> FoundModel:
    """The model that ``reference`` names.

    Args:
        reference: a folder; ``showcase``; ``champion``, ``candidate`` or another alias; a version's number; the id of
            an MLflow run, of a training or an evaluation, or its name; or any of these as MLflow writes them,
            ``models:/latentloom@champion`` or ``runs:/ID``.
        root: the project's root, which decides the store; MLflow is not imported for a folder or ``showcase``.

    Raises:
        UserError: when it names nothing, or several things, or the bytes are nowhere; it says what to do.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    folder = named_folder(reference)
    if is_model(folder):
        sha256 = model_hash(folder)
        return FoundModel(folder, sha256, provenance=read_run_record(root, sha256, folder))
    stored = look_up(reference, root)
    run, evaluation, version = stored.run, stored.evaluation, stored.version
    if stored.sha256 is None:
        raise UserError(
            f"the run {run.info.run_id} ({run.info.run_name}) has no model: it is {run.info.status.lower()}; train "
            "again (`dvc repro --force train`)"
        )
    client = existing_store(root)
    provenance = run_provenance(client, run) if run else None  # the run of a version may be deleted
    folder = _fetch(client, root, stored, provenance or Provenance())
    return FoundModel(
        folder,
        stored.sha256,
        run and run.info.run_id,
        evaluation and evaluation.info.run_id,
        version and str(version.version),
        provenance,
    )


def named_folder(reference: str) -> Path:
    """The folder that a reference may name: one of the user's, else the package's own of that name."""
    folder = user_path(reference)
    return SHOWCASE_FOLDER if reference == SHOWCASE and not is_model(folder) else folder


def is_model(folder: Path, sha256: str | None = None) -> bool:
    """Whether ``folder`` holds a model, and the one with that hash."""
    there = all((folder / name).is_file() for name in MODEL_FILES)
    return there and (sha256 is None or model_hash(folder) == sha256)


def look_up(reference: str, root: Path) -> StoredModel:
    """What a version's number, an alias, or a run's id or name stands for.

    Of runs of one name the one that made a model is taken, else the last that evaluated it.

    Raises:
        UserError: when it names nothing, or several runs, or a folder.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    reference = URI.sub("", reference)
    if "/" in reference or Path(reference).is_dir():
        raise UserError(
            f"{reference} holds no model ({', '.join(MODEL_FILES)}): run `dvc pull` or `dvc repro` in the project's "
            "root, or name a run, a version, champion or candidate"
        )
    try:
        client = existing_store(root)
    except UserError as error:
        raise UserError(f"{_no_model(reference, [SHOWCASE])}; {error}") from error
    get_version = client.get_model_version if reference.isdigit() else client.get_model_version_by_alias
    if version := _or_none(get_version, NAME, reference):
        if HASH_TAG not in version.tags:
            raise UserError(f"version {version.version} of {NAME} was not made by `latentloom promote`: promote a run")
        stored = stored_model(client, version.tags[HASH_TAG])
        return replace(stored, run=_or_none(client.get_run, version.run_id), version=version)
    quote = '"' if "'" in reference else "'"
    named = search_runs(client, f"attributes.run_name = {quote}{reference}{quote}")
    named += [run] if (run := _or_none(client.get_run, reference)) else []
    evaluated = {run.data.tags.get(EVALUATED_TAG): run for run in reversed(named)}  # the newest of each model
    evaluated.pop(None, None)
    runs = [run for run in named if HASH_TAG in run.data.tags] or list(evaluated.values()) or named
    if not runs:
        aliases = [alias for model in client.search_registered_models(f"name = '{NAME}'") for alias in model.aliases]
        names = [run.info.run_name for run in search_runs(client, f"tags.`{HASH_TAG}` != ''")]
        raise UserError(
            f"{_no_model(reference, [SHOWCASE, *aliases, *dict.fromkeys(names)])}; `make ui` shows all runs, "
            "`latentloom promote RUN --to champion` makes a champion"
        )
    if len(runs) > 1:
        shown = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in runs)
        raise UserError(f"{reference} names {len(runs)} runs: {shown}; give the id")
    tags = runs[0].data.tags
    sha256 = tags.get(HASH_TAG) or tags.get(EVALUATED_TAG)
    return stored_model(client, sha256, runs[0].info.run_id) if sha256 else StoredModel(None, runs[0])


def model_by_hash(sha256: str, root: Path) -> Path:
    """The folder of the model with that hash, which a run or a version of the registry has; fetched if need be.

    Raises:
        UserError: when nothing has it, or its bytes are nowhere.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    client = existing_store(root)
    stored = stored_model(client, sha256)
    if not (stored.run or stored.version):
        raise UserError(f"no run and no version of {NAME} has it")
    return _fetch(client, root, stored, (stored.run and run_provenance(client, stored.run)) or Provenance())


def fetched_folder(sha256: str, root: Path) -> Path:
    """Where the files of a model that was fetched are kept."""
    return root / ".state" / "models" / sha256


def stored_model(client: "MlflowClient", sha256: str, *run_ids: str | None) -> StoredModel:
    """What MLflow has of the model with that hash: the newest run that made it, and that measured it.

    Runs of ``run_ids`` are taken rather than the newest.
    """

    def last(condition: str) -> "Run | None":
        runs = search_runs(client, condition)
        return next((run for run in runs if run.info.run_id in run_ids), next(iter(runs), None))

    run = last(f"tags.`{HASH_TAG}` = '{sha256}'")
    evaluation = last(f"tags.`{EVALUATED_TAG}` = '{sha256}' and attributes.status = 'FINISHED'")
    versions = client.search_model_versions(f"name = '{NAME}' and tags.`{HASH_TAG}` = '{sha256}'")
    return StoredModel(sha256, run, evaluation, max(versions, key=lambda version: int(version.version), default=None))


def run_provenance(client: "MlflowClient", run: "Run") -> Provenance | None:
    """What the training wrote down of its code, data and model; None where the run does not hold it."""
    written = read_artifact(client, run, PROVENANCE)
    found = {"model_sha256": run.data.tags.get(HASH_TAG), "mlflow_run_id": run.info.run_id}
    return Provenance.from_dict(json.loads(written) | found) if written is not None else None


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


def _no_model(reference: str, names: list[str]) -> str:
    """That nothing is called ``reference``, and what else there is, the newest first."""
    close = difflib.get_close_matches(reference, names, n=1)
    shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
    return f"no model is called {reference}{f' (did you mean {close[0]}?)' if close else ''}; there is {shown}"


def _or_none(get: Callable[..., Any], *names: str) -> Any:
    """What MLflow has by that name; None where it has nothing."""
    try:
        return get(*names)
    except Exception as error:
        if has_error_code(error, "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second of an alias
            return None
        raise


def _fetch(client: "MlflowClient", root: Path, stored: StoredModel, provenance: Provenance) -> Path:
    """A folder that holds the model."""
    sha256, version = stored.sha256, stored.version
    fetched = fetched_folder(sha256, root)
    for folder in (root / MODEL, fetched):
        if is_model(folder, sha256):
            return folder
    tried = ""
    if out := provenance.outs.get(str(MODEL)):
        try:
            bring(root, {out: fetched})
        except UserError as error:
            tried = f" ({error})"
    if version and not is_model(fetched, sha256):
        fetched.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=fetched.parent, prefix=".") as temporary:
            files = client.download_artifacts(version.run_id, PACKED_MODEL, temporary)
            shutil.rmtree(fetched, ignore_errors=True)  # a damaged copy: a whole one would have been used
            Path(files).rename(fetched)
    if not is_model(fetched, sha256):
        name = stored.run.info.run_id if stored.run else version.version
        raise UserError(
            f"the model {sha256[:12]}… is not in {MODEL}, in DVC's cache or remote, or in the registry{tried}: `dvc "
            f"push` it from where it was trained, or train it again: `latentloom lineage {name}` has the commands, "
            "which know what was not committed then"
        )
    return fetched
