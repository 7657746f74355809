"""The model registry: which model is the champion, which the candidate, who made it so, when and why.

A registered version is made once for a model's hash, whole, before any alias moves, so an interrupted promotion leaves
the aliases as they were. An alias's moves are kept as tags of the registered model (`move.TIME`), so a demotion knows
where to go back to, and `history` needs nothing else.
"""

import getpass
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import yaml

from latentloom.evaluation.drawing import SamplingSettings, default_settings
from latentloom.files import read_json
from latentloom.model_files import read_config
from latentloom.registry.models import HASH_TAG, NAME, FoundModel, number_of, registered_model, version_of
from latentloom.registry.packing import save_served_model
from latentloom.tracking.store import experiment_id, open_client

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Alias = Literal["champion", "candidate"]
MOVE = "move."
RECALL, VAL_MAE = "evaluate/caption_recall_at_1", "evaluate/val_mae"
DESCRIPTION = "Prompts in, PNG pictures out: `mlflow models serve -m models:/latentloom@champion --env-manager local`"


class PromotionRefused(ValueError):
    """The model is not good enough, or it cannot be told; the message says why, and how to promote it all the same."""


@dataclass(frozen=True)
class Figures:
    """What decides whether a model is worse than another, None where it is not known.

    Attributes:
        recall: of training captions, the share whose sample is nearest to the right picture.
        val_mae: the error on held-out images.
        latents: the hash of the images, as latents, that both were measured on.
        noise: the schedule and the noise levels that ``val_mae`` is a mean over.
    """

    recall: float | None
    val_mae: float | None
    latents: str | None
    noise: str | None

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
        return cls(**json.loads(version.tags.get("figures", "null")) or dict.fromkeys(cls.__dataclass_fields__))


@dataclass(frozen=True)
class Move:
    """One change of an alias: to ``version``, or away where it is None, with the figures it was promoted with."""

    when: str
    alias: str
    what: Literal["promote", "demote"]
    version: str | None
    before: str | None
    why: str | None
    by: str | None
    figures: Figures | None


def promote(
    found: FoundModel, alias: Alias, root: Path, *, force: bool = False, why: str | None = None
) -> tuple[str, bool]:
    """Register a model, if it is not yet, and let ``alias`` name it.

    Returns:
        The version, and whether the alias moved: not where it named that version already.

    Raises:
        PromotionRefused: when its data's validation failed, or it is worse than the champion, or either is not known,
            unless ``force``.
        ValueError: when the store has no run of the model.
        mlflow.exceptions.MlflowException: when the store cannot be reached; the alias has not moved then.
    """
    from filelock import FileLock

    client = open_client(root)
    (root / ".state").mkdir(exist_ok=True)
    with FileLock(root / ".state" / "registry.lock"):
        run = _run_of(client, root, found)
        figures = Figures.of_run(run)
        version = version_of(client, found.sha256)
        aliases = _aliases(client)
        if version and aliases.get(alias) == number_of(version):
            return number_of(version), False
        if not force and (objections := _objections(client, root, run, figures, version, aliases.get("champion"))):
            listed = "\n".join(f"- {objection}" for objection in objections)
            raise PromotionRefused(f'not promoted:\n{listed}\nTo promote it all the same: --force --why "..."')
        number = number_of(version or _register(client, root, found, run))
        client.set_model_version_tag(NAME, number, "figures", json.dumps(asdict(figures)))
        if why:
            client.set_model_version_tag(NAME, number, "why", why)
        client.set_registered_model_alias(NAME, alias, number)
        _record(client, alias, "promote", number, aliases.get(alias), why, figures)
        return number, True


def demote(alias: Alias, root: Path, *, why: str | None = None) -> tuple[str, str | None]:
    """Let ``alias`` name again what it named before; where that is nothing, it names nothing.

    Returns:
        The version that it named, and the one that it names now.

    Raises:
        ValueError: when ``alias`` names nothing.
    """
    client = open_client(root)
    now = _aliases(client).get(alias)
    if now is None:
        raise ValueError(f"there is no {alias} to take back: `latentloom history` shows what there was")
    existing = {number_of(version): version for version in client.search_model_versions(f"name = '{NAME}'")}
    earlier = [version for version in _line(history(root), alias, now)[:-1] if version in existing and version != now]
    back = earlier[-1] if earlier else None
    if back is None:
        client.delete_registered_model_alias(NAME, alias)
    else:
        client.set_registered_model_alias(NAME, alias, back)
    _record(client, alias, "demote", back, now, why, Figures.of_version(existing[back]) if back else None)
    return now, back


def history(root: Path) -> list[Move]:
    """The moves of all aliases, the oldest first."""
    model = registered_model(open_client(root))
    tags = model.tags if model else {}
    moves = []
    for key in sorted(key for key in tags if key.startswith(MOVE)):
        record = json.loads(tags[key])
        moves.append(Move(**record | {"figures": Figures(**record["figures"]) if record["figures"] else None}))
    return moves


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


def _objections(
    client: "MlflowClient",
    root: Path,
    run: "Run",
    figures: Figures,
    version: "ModelVersion | None",
    champion: str | None,
) -> list[str]:
    found = [_validation_objection(client, root, run)]
    if champion and not (version and number_of(version) == champion):
        found.append(worse(figures, Figures.of_version(client.get_model_version(NAME, champion))))
    return [objection for objection in found if objection]


def _validation_objection(client: "MlflowClient", root: Path, run: "Run") -> str | None:
    report = _validation(client, root, run)
    if report is None:
        return "what the validation of its data found is not known: the run has no validation.json"
    if report["success"]:
        return None
    failed = [name for name, check in report["checks"].items() if not check["success"]]
    return f"the validation of its data failed: {', '.join(failed)}"


def _validation(client: "MlflowClient", root: Path, run: "Run") -> dict[str, Any] | None:
    """The run's report, else the one in the project if it is the one that the run read."""
    if any(artifact.path == "validation.json" for artifact in client.list_artifacts(run.info.run_id)):
        with TemporaryDirectory() as temporary:
            return read_json(client.download_artifacts(run.info.run_id, "validation.json", temporary))
    path = root / "reports" / "validation.json"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == run.data.tags.get("input.validation"):
        return read_json(path)
    return None


def _run_of(client: "MlflowClient", root: Path, found: FoundModel) -> "Run":
    """The run that trained the model: its figures, and what its data were like, are there."""
    from mlflow.exceptions import MlflowException

    if found.run_id:
        with suppress(MlflowException):
            return client.get_run(found.run_id)
    runs = client.search_runs([experiment_id(client, root)], f"tags.`{HASH_TAG}` = '{found.sha256}'", max_results=1)
    if not runs:
        raise ValueError(
            f"this store has no run of the model {found.sha256[:12]}…, so its figures are not known: `latentloom sync` "
            "delivers runs that a server missed; else train it here (`dvc repro`)"
        )
    return runs[0]


def _register(client: "MlflowClient", root: Path, found: FoundModel, run: "Run") -> "ModelVersion":
    """Log the model's files, and make a version of them; nothing is registered when the logging breaks off."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    run_id, config = run.info.run_id, read_config(found.folder)
    tags = {
        HASH_TAG: found.sha256,
        "vae": config.vae.reference,
        "vae.fingerprint": config.vae.fingerprint,
        "text_encoder": config.text_encoder.reference,
        "text_encoder.fingerprint": config.text_encoder.fingerprint,
        "attribution": config.attribution or "",
        "licence": config.licence or "",
    }
    logged = client.create_logged_model(run.info.experiment_id, NAME, source_run_id=run_id, tags=tags)
    entry = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=run_id,
        metadata=tags | {"config": config.model_dump(mode="json")},
    )
    settings = _settings(run, found, root)
    try:
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / "served"
            save_served_model(path, found.folder, settings, entry, {"mlflow_run_id": run_id})
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


def _settings(run: "Run", found: FoundModel, root: Path) -> SamplingSettings:
    """The settings that the run's figures were measured with, else those of the project."""
    names = {
        "steps": "diffusion_steps",
        "guidance": "class_guidance",
        "sampler": "sampler",
        "guidance_interval": "guidance_interval",
        "guidance_rescale": "guidance_rescale",
        "threshold": "threshold_percentile",
    }
    tags: Mapping[str, str] = run.data.tags
    measured = {own: yaml.safe_load(tags[f"evaluate.{key}"]) for own, key in names.items() if f"evaluate.{key}" in tags}
    precision = run.data.params.get("train.precision")
    return default_settings(found.folder, root / "params.yaml").changed(**measured, precision=precision)


def _aliases(client: "MlflowClient") -> dict[str, str]:
    model = registered_model(client)
    return {alias: str(version) for alias, version in model.aliases.items()} if model else {}


def _line(moves: list[Move], alias: str, now: str) -> list[str]:
    """The versions that an alias named, without those that were taken back; ``now`` is the last."""
    line: list[str] = []
    for move in moves:
        if move.alias != alias:
            continue
        if move.what == "demote":
            line = line[:-1]
        for version in (move.before if move.what == "promote" else None, move.version):
            if version and version not in line[-1:]:
                line.append(version)
    return line if line and line[-1] == now else [*line, now]  # someone may have moved it in MLflow's own pages


def _record(
    client: "MlflowClient",
    alias: str,
    what: str,
    version: str | None,
    before: str | None,
    why: str | None,
    figures: Figures | None,
) -> None:
    when = datetime.now(UTC)
    move = Move(when.isoformat(timespec="seconds"), alias, what, version, before, why, _user(), figures)
    client.set_registered_model_tag(NAME, f"{MOVE}{when:%Y%m%dT%H%M%S.%fZ}", json.dumps(asdict(move)))


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return None
