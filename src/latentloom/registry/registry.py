"""The model registry: which model is the champion, which the candidate, who made it so, when and why.

MLflow's registry holds all of it: a version per model, the aliases, and on each version, as tags such as
``champion.when``, how it came to an alias and whether it was taken back. A version is created whole before an alias
moves, so an interrupted promotion leaves the aliases as they were.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import default_settings
from latentloom.registry.models import (
    NAME,
    FoundModel,
    image_provenance,
    number_of,
    read_artifact,
    run_of_model,
    run_provenance,
    version_of,
)
from latentloom.registry.packing import save_served_model, version_tags
from latentloom.tracking.store import open_client
from latentloom.user import user_name

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Alias = Literal["champion", "candidate"]
RECALL, VAL_MAE = "evaluate/caption_recall_at_1", "evaluate/val_mae"
SAMPLING = "sampling.json"  # the artifact of a run's evaluation
DESCRIPTION = "Prompts in, PNG images out: `mlflow models serve -m models:/latentloom@champion --env-manager local`"


class PromotionRejected(UserError):
    """The model is not good enough, or it is not known whether it is; the message says why, and how to promote it."""


@dataclass(frozen=True)
class Figures:
    """What decides whether a model is worse than another, None where it is not known.

    Attributes:
        recall: of training captions, the share whose sample is nearest to the right image.
        val_mae: the error on held-out images.
        latents: the hash of the images, as latents, that both were measured on.
        noise: the schedule and the noise levels that ``val_mae`` is a mean over.
    """

    recall: float | None = None
    val_mae: float | None = None
    latents: str | None = None
    noise: str | None = None

    @classmethod
    def of_run(cls, run: "Run") -> "Figures":
        params = run.data.params
        noise = [params.get(f"diffusion.{name}") for name in ("schedule", "noise_levels")]
        return cls(
            run.data.metrics.get(RECALL),
            run.data.metrics.get(VAL_MAE),
            run.data.tags.get("input.latents") or run.data.tags.get("dvc.data/latents"),
            "/".join(noise) if all(noise) else None,
        )

    @classmethod
    def of_version(cls, version: "ModelVersion") -> "Figures":
        """Those that the version was promoted with."""
        return cls(**json.loads(version.tags.get("figures", "{}")))


@dataclass(frozen=True)
class Move:
    """One change of an alias, from ``previous`` to ``version``, with the figures of that; None: it named nothing."""

    when: str
    alias: str
    taken_back: bool
    version: str | None
    previous: str | None
    why: str | None
    by: str | None
    figures: Figures


def promote(
    found: FoundModel, alias: Alias, root: Path, *, force: bool = False, why: str | None = None
) -> tuple[str, bool]:
    """Register a model, if it is not yet, and let ``alias`` name it.

    Returns:
        The version, and whether the alias moved: not where it named that version already.

    Raises:
        PromotionRejected: when its data's validation failed, or it is worse than the champion, or either is not known,
            unless ``force``.
        UserError: when the store has no run of the model.
        mlflow.exceptions.MlflowException: when the store cannot be reached; the alias has not moved then.
    """
    with _locked_client(root) as client:
        run = run_of_model(client, found.sha256, found.run_id)
        if run is None:
            raise UserError(
                f"this store has no run of the model {found.sha256[:12]}…, so its figures are not known: `latentloom "
                "sync` delivers runs that a server missed; else train it here (`dvc repro`)"
            )
        figures, version, aliases = Figures.of_run(run), version_of(client, found.sha256), _aliases(client)
        if version and aliases.get(alias) == number_of(version):
            return number_of(version), False
        objections = [_validation_objection(client, run)]
        champion = aliases.get("champion")
        if champion and not (version and number_of(version) == champion):
            objections.append(worse(figures, Figures.of_version(client.get_model_version(NAME, champion))))
        if not force and any(objections):
            listed = "\n".join(f"- {objection}" for objection in objections if objection)
            raise PromotionRejected(f'not promoted:\n{listed}\nTo promote it all the same: --force --why "..."')
        number = number_of(version or _register(client, root, found, run))
        tags = {"figures": json.dumps(asdict(figures))}
        tags |= {f"{alias}.by": user_name(), f"{alias}.why": why, f"{alias}.previous": aliases.get(alias)}
        _set_tags(client, number, tags)
        client.set_registered_model_alias(NAME, alias, number)
        _set_tags(client, number, {f"{alias}.when": _now(), f"{alias}.taken_back": None})
        return number, True


def demote(alias: Alias, root: Path, *, why: str | None = None) -> tuple[str, str | None]:
    """Let ``alias`` name again what it named before; where that is nothing, it names nothing.

    Returns:
        The version that it named, and the one that it names now.

    Raises:
        UserError: when ``alias`` names nothing.
    """
    with _locked_client(root) as client:
        now = _aliases(client).get(alias)
        if now is None:
            raise UserError(f"there is no {alias} to take back: `latentloom history` shows what there was")
        previous = _previous(client, alias, now)
        record = {"when": _now(), "by": user_name(), "why": why, "version": previous}
        _set_tags(client, now, {f"{alias}.taken_back": json.dumps(record)})
        if previous is None:
            client.delete_registered_model_alias(NAME, alias)
        else:
            client.set_registered_model_alias(NAME, alias, previous)
        return now, previous


def history(root: Path) -> list[Move]:
    """The last promotion of each version to each alias, and its demotion, the oldest first."""
    versions, moves = _versions(open_client(root)), []
    for number, version in versions.items():
        tags = version.tags
        for alias in (key.removesuffix(".when") for key in tags if key.endswith(".when")):
            promotion = {key: tags.get(f"{alias}.{key}") for key in ("when", "previous", "why", "by")}
            moves.append(
                Move(alias=alias, taken_back=False, version=number, figures=Figures.of_version(version), **promotion)
            )
            if f"{alias}.taken_back" in tags:
                demotion = json.loads(tags[f"{alias}.taken_back"])
                back = demotion.pop("version")
                figures = Figures.of_version(versions[back]) if back in versions else Figures()
                moves.append(
                    Move(alias=alias, taken_back=True, version=back, previous=number, figures=figures, **demotion)
                )
    return sorted(moves, key=lambda move: move.when)


def current(root: Path) -> dict[str, str]:
    """The version that each alias names now."""
    return _aliases(open_client(root))


def worse(figures: Figures, champion: Figures) -> str | None:
    """Why a model may not take the place of a champion; None: it may.

    Recall decides; where it is the same, the validation error. Only figures that were measured on the same images
    compare, and errors only over the same noise levels. What cannot be compared is not called better.
    """
    if figures.recall is None:
        return f"it has no {RECALL}: run `dvc repro evaluate`"
    if champion.recall is None:
        return None
    if figures.latents != champion.latents:
        return "its figures were measured on other images than the champion's, and do not compare: look at both"
    if figures.recall != champion.recall:
        return _lower(RECALL, figures.recall, champion.recall) if figures.recall < champion.recall else None
    if None in (figures.val_mae, champion.val_mae) or figures.noise != champion.noise:
        return None
    return _lower(VAL_MAE, figures.val_mae, champion.val_mae) if figures.val_mae > champion.val_mae else None


def _lower(name: str, value: float, champions: float) -> str:
    return f"{name} is {value:.4g}, worse than the champion's {champions:.4g}"


def _validation_objection(client: "MlflowClient", run: "Run") -> str | None:
    failed = run_provenance(client, run).get("failed_checks")
    if failed is None and (report := read_artifact(client, run, "validation.json")):  # of an earlier version's run
        failed = [name for name, check in json.loads(report)["checks"].items() if not check["success"]]
    if failed is None:
        return "the result of its data's validation is not known: the run does not hold it"
    return f"the validation of its data failed: {', '.join(failed)}" if failed else None


def _register(client: "MlflowClient", root: Path, found: FoundModel, run: "Run") -> "ModelVersion":
    """Log the model's files, and create a version of them; nothing is registered when the logging breaks off.

    By the client's calls: `mlflow.pyfunc.log_model` would reopen the training's run, in the process's one global store.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    run_id, tags = run.info.run_id, version_tags(found)
    logged = client.create_logged_model(run.info.experiment_id, NAME, source_run_id=run_id, tags=tags)
    try:
        with TemporaryDirectory() as temporary:
            path, provenance = Path(temporary) / "served", image_provenance(run_provenance(client, run))
            save_served_model(path, found.folder, _settings(client, run, found, root), logged, tags, provenance)
            client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(NAME, description=DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        NAME, source=logged.artifact_location, run_id=run_id, model_id=logged.model_id, tags=tags
    )


def _settings(client: "MlflowClient", run: "Run", found: FoundModel, root: Path) -> SamplingSettings:
    """The settings that the run's figures were measured with, else those of the project."""
    if written := read_artifact(client, run, SAMPLING):
        return SamplingSettings.from_dict(json.loads(written))
    return default_settings(found.folder, root / "params.yaml")


def _previous(client: "MlflowClient", alias: str, now: str) -> str | None:
    """What an alias named before ``now``: the version noted then, else the last one promoted and not taken back."""
    versions = _versions(client)
    kept = {
        number: version.tags
        for number, version in versions.items()
        if number != now and f"{alias}.taken_back" not in version.tags
    }
    noted = versions[now].tags.get(f"{alias}.previous")
    if noted in kept:
        return noted
    promoted = [number for number in kept if f"{alias}.when" in kept[number]]
    return max(promoted, key=lambda number: kept[number][f"{alias}.when"], default=None)


@contextmanager
def _locked_client(root: Path) -> "Iterator[MlflowClient]":
    """A client, for one change of the registry at a time on this machine."""
    from filelock import FileLock

    client = open_client(root)
    (root / ".state").mkdir(exist_ok=True)
    with FileLock(root / ".state" / "registry.lock"):
        yield client


def _versions(client: "MlflowClient") -> "dict[str, ModelVersion]":
    return {number_of(version): version for version in client.search_model_versions(f"name = '{NAME}'")}


def _aliases(client: "MlflowClient") -> dict[str, str]:
    found = client.search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}


def _set_tags(client: "MlflowClient", version: str, tags: dict[str, str | None]) -> None:
    """Set tags of a version; one whose value is None is deleted."""
    held = client.get_model_version(NAME, version).tags
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(NAME, version, key, value)
        elif key in held:
            client.delete_model_version_tag(NAME, version, key)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
