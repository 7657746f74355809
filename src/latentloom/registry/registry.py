"""The model registry: which model is the champion, which the candidate, who made it so, when and why.

MLflow's registry holds all of it: a version per model, the aliases, and on each version the figures it was promoted
with and, as the tags ``champion.promoted`` and ``champion.taken_back``, its last promotion and demotion. A version is
created whole before an alias moves, so an interrupted promotion leaves the aliases as they were.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import SETTINGS_FILE, default_settings
from latentloom.layout import PARAMS, state_folder
from latentloom.model_files import read_config
from latentloom.registry.models import (
    NAME,
    SERVED,
    FoundModel,
    StoredModel,
    read_artifact,
    run_provenance,
    stored_model,
)
from latentloom.registry.packing import save_served_model
from latentloom.tracking.provenance import HASH_TAG, Provenance
from latentloom.tracking.store import existing_store, has_error_code
from latentloom.user import user_name

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Alias = Literal["champion", "candidate"]
RECALL, VAL_MAE = "evaluate/held_out_recall_at_1", "evaluate/val_mae"
PROMOTED, TAKEN_BACK = ".promoted", ".taken_back"  # behind the alias, in names of tags
DESCRIPTION = "Prompts in, PNG images out: `mlflow models serve -m models:/latentloom@champion --env-manager local`"


@dataclass(frozen=True)
class Figures:
    """What decides whether a model is worse than another, None where it is not known.

    Attributes:
        held_out_recall: of held-out combinations, the share whose sample is nearest to the right image.
        val_mae: the error on held-out images.
        latents: the hash of the images, as latents, that both were measured on.
        noise: the schedule and the noise levels that ``val_mae`` is a mean over.
    """

    held_out_recall: float | None = None
    val_mae: float | None = None
    latents: str | None = None
    noise: str | None = None

    @classmethod
    def of_run(cls, run: "Run | None") -> "Figures":
        """Those of an evaluation's run."""
        if run is None:
            return cls()
        metrics, params = run.data.metrics, run.data.params
        noise = f"{params.get('diffusion.schedule')}/{params.get('diffusion.noise_levels')}"
        return cls(metrics.get(RECALL), metrics.get(VAL_MAE), run.data.tags.get("input.latents"), noise)

    @classmethod
    def of_version(cls, version: "ModelVersion") -> "Figures":
        """Those that the version was promoted with."""
        return cls.from_dict(json.loads(version.tags.get("figures", "{}")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Figures":
        """The reverse of `asdict`; figures that no longer decide, such as recall of training captions, are left out."""
        return cls(**{each.name: values.get(each.name) for each in fields(cls)})


@dataclass(frozen=True)
class Move:
    """One change of an alias, from ``previous`` to ``version``, with the figures of that; None: it named nothing."""

    alias: str
    version: str | None
    previous: str | None
    figures: Figures
    why: str | None
    taken_back: bool = False
    by: str | None = field(default_factory=user_name)
    when: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")

    def save(self, client: "MlflowClient") -> None:
        """Write it down, as a tag of the version that was promoted or taken back."""
        version, kind = (self.previous, TAKEN_BACK) if self.taken_back else (self.version, PROMOTED)
        client.set_model_version_tag(NAME, version, self.alias + kind, json.dumps(asdict(self)))

    @classmethod
    def of_tag(cls, value: str) -> "Move":
        """The reverse of `save`."""
        values = json.loads(value)
        return cls(**values | {"figures": Figures.from_dict(values["figures"])})


def promote(
    found: FoundModel, alias: Alias, root: Path, *, force: bool = False, why: str | None = None
) -> tuple[str, bool]:
    """Register a model, if it is not yet, and let ``alias`` name it.

    Returns:
        The version, and whether the alias moved: not where it named that version already.

    Raises:
        UserError: when the store has no run of the model; unless ``force``, when its data's validation failed, or it is
            worse than the champion, or either is not known.
        mlflow.exceptions.MlflowException: when the store cannot be reached; the alias has not moved then.
    """
    client = existing_store(root)
    with _one_at_a_time():
        stored, aliases = stored_model(client, found.sha256, found.run_id, found.evaluation_id), current(root)
        if stored.run is None:
            raise UserError(
                f"this store has no run of the model {found.sha256[:12]}…, so its figures are not known: `latentloom "
                "sync` delivers runs that a server missed; else train it here (`dvc repro`)"
            )
        number = str(stored.version.version) if stored.version else None
        if number and aliases.get(alias) == number:
            return number, False
        provenance = run_provenance(client, stored.run) or Provenance()
        figures, champion = Figures.of_run(stored.evaluation), aliases.get("champion")
        objections = [_invalid(provenance)]
        if champion not in (None, number):
            objections.append(worse(figures, Figures.of_version(client.get_model_version(NAME, champion))))
        if any(objections) and not force:
            listed = "\n".join(f"- {objection}" for objection in objections if objection)
            raise UserError(f'not promoted:\n{listed}\nTo promote it all the same: --force --why "..."')
        number = number or _register(client, root, found, stored, provenance)
        client.set_model_version_tag(NAME, number, "figures", json.dumps(asdict(figures)))
        client.set_registered_model_alias(NAME, alias, number)
        Move(alias, number, aliases.get(alias), figures, why).save(client)
        return number, True


def demote(alias: Alias, root: Path, *, why: str | None = None) -> tuple[str, str | None]:
    """Let ``alias`` name the version that was promoted before and not taken back; where there is none, nothing.

    Returns:
        The version that it named, and the one that it names now.

    Raises:
        UserError: when ``alias`` names nothing.
    """
    client = existing_store(root)
    with _one_at_a_time():
        now = current(root).get(alias)
        if now is None:
            raise UserError(f"there is no {alias} to take back: `latentloom history` shows what there was")
        standing: dict[str, None] = {}  # versions that were promoted and not taken back, in that order
        for move in history(root):
            if move.alias == alias:
                standing.pop(move.previous if move.taken_back else move.version, None)
                standing |= {} if move.taken_back else {move.version: None}
        previous = next((version for version in reversed(standing) if version != now), None)
        figures = Figures.of_version(client.get_model_version(NAME, previous)) if previous else Figures()
        Move(alias, previous, now, figures, why, taken_back=True).save(client)
        if previous is None:
            client.delete_registered_model_alias(NAME, alias)
        else:
            client.set_registered_model_alias(NAME, alias, previous)
        return now, previous


def history(root: Path) -> list[Move]:
    """The last promotion of each version to each alias, and its demotion, the oldest first."""
    tags = [own.tags for own in existing_store(root).search_model_versions(f"name = '{NAME}'")]
    notes = [value for each in tags for key, value in each.items() if key.endswith((PROMOTED, TAKEN_BACK))]
    return sorted(map(Move.of_tag, notes), key=lambda move: move.when)


def current(root: Path) -> dict[str, str]:
    """The version that each alias names now."""
    found = existing_store(root).search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}


def worse(figures: Figures, champion: Figures) -> str | None:
    """Why a model may not take the place of a champion; None: it may.

    Held-out recall decides; where it is the same, or one has none, the validation error. Only figures that were
    measured on the same images compare, and errors only over the same noise levels. What cannot be compared is not
    called better.
    """
    if figures.held_out_recall is None and figures.val_mae is None:
        return f"it has neither {RECALL} nor {VAL_MAE}: run `dvc repro evaluate`; both need a validation split"
    if champion.held_out_recall is None and champion.val_mae is None:
        return None
    if figures.latents != champion.latents:
        return "its figures were measured on other images than the champion's, and do not compare: look at both"
    recalls = figures.held_out_recall, champion.held_out_recall
    if None not in recalls and recalls[0] != recalls[1]:
        return _lower(RECALL, *recalls) if recalls[0] < recalls[1] else None
    if None in (figures.val_mae, champion.val_mae) or figures.noise != champion.noise:
        return None
    return _lower(VAL_MAE, figures.val_mae, champion.val_mae) if figures.val_mae > champion.val_mae else None


def _lower(name: str, value: float, champions: float) -> str:
    return f"{name} is {value:.4g}, worse than the champion's {champions:.4g}"


def _invalid(provenance: Provenance) -> str | None:
    """Why the data of a model are not known to be good; None: they are."""
    if provenance.failed_checks is None:
        return "the result of its data's validation is not known: the run does not hold it"
    failed = ", ".join(provenance.failed_checks)
    return f"the validation of its data failed: {failed}" if failed else None


def _one_at_a_time() -> AbstractContextManager:
    """Let one process of this machine at a time compare with the champion and move an alias."""
    lock = state_folder("registry.lock")
    lock.parent.mkdir(exist_ok=True)
    return FileLock(lock)


def _register(
    client: "MlflowClient", root: Path, found: FoundModel, stored: StoredModel, provenance: Provenance
) -> str:
    """Log the model's files to its training's run, and create a version of them; none where the logging breaks off.

    By the client's calls: `mlflow.pyfunc.log_model` would reopen the training's run, in the process's one global store.
    """
    run = stored.run
    # Those that its figures were measured with, else those of the project.
    measured = stored.evaluation and read_artifact(client, stored.evaluation, SETTINGS_FILE)
    if measured:
        settings = SamplingSettings.from_dict(json.loads(measured))
    else:
        settings = default_settings(found.folder, root / PARAMS)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / SERVED
        save_served_model(path, found.folder, settings, provenance.in_images())
        client.log_artifacts(run.info.run_id, str(path), SERVED)
    config = read_config(found.folder)
    tags = {
        HASH_TAG: found.sha256,
        "vae": config.vae.reference,
        "vae.fingerprint": config.vae.fingerprint,
        "text_encoder": config.text_encoder.reference,
        "text_encoder.fingerprint": config.text_encoder.fingerprint,
        "attribution": config.attribution or "",
        "licence": config.licence or "",
    }
    try:
        client.create_registered_model(NAME, description=DESCRIPTION)
    except Exception as error:
        if not has_error_code(error, "RESOURCE_ALREADY_EXISTS"):
            raise
    source = f"{run.info.artifact_uri.rstrip('/')}/{SERVED}"
    return str(client.create_model_version(NAME, source, run.info.run_id, tags=tags).version)
