"""The model registry: which model is the champion, which the candidate, who made it so, when and why.

MLflow's registry holds all of it: a version per model, the aliases, and on each version, as tags of one value each, its
figures and its moves (`moves.py`). A version is created whole before an alias moves, so an interrupted promotion leaves
the aliases as they were.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from latentloom.errors import UserError, notify
from latentloom.evaluation.text_to_image import default_settings
from latentloom.layout import PARAMS, SAMPLE_SHEET, state_folder
from latentloom.model_files import read_config
from latentloom.params import Params
from latentloom.params_file import load_params
from latentloom.registry.figures import Figures, figures_of, in_the_same_way, sampling_settings
from latentloom.registry.gate import NO_LIMITS, objections, seen_by_base, worse
from latentloom.registry.measuring import measure_again
from latentloom.registry.models import NAME, SERVED, FoundModel, StoredModel, find_model, run_provenance, stored_model
from latentloom.registry.moves import Move, all_moves, moves_of
from latentloom.registry.packing import save_served_model
from latentloom.tracking.provenance import HASH_TAG, Provenance, user_name
from latentloom.tracking.store import existing_store, has_error_code

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Alias = Literal["champion", "candidate"]
LOCK = "registry.lock"  # of the process of this machine that compares with the champion and moves an alias
REMEASURED = "remeasured."  # before the names of tags that keep the figures of a champion that was measured again
MEANINGS = {
    "held_out_recall_at_1": "generates what captions it has never seen ask for",
    "copied_share": "samples nearer to a training image than 95 % of real held-out images are",
    "val_mae": "error on held-out images",
    "memorisation_recall": "knows its training images by heart",
}
DESCRIPTION = "Prompts in, PNG images out: `mlflow models serve -m models:/latentloom@champion --env-manager local`"


def promote(
    found: FoundModel, alias: Alias, root: Path, *, force: bool = False, why: str | None = None
) -> tuple[str, bool]:
    """Register a model, if it is not yet, and let ``alias`` name it.

    A champion that was measured in another way than the model is measured again, which is kept with its version.

    Returns:
        The version, and whether the alias moved: not where it named that version already.

    Raises:
        UserError: when the store has no run of the model; unless ``force``, when its data's validation failed, it is
            beyond the limits of ``registry`` in the params or worse than the champion, or one of these is not known,
            or when its training started from a model that may have seen what is held out.
        mlflow.exceptions.MlflowException: when the store cannot be reached; the alias has not moved then.
    """
    client = existing_store(root)
    with FileLock(state_folder(LOCK)):
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
        figures, champion = figures_of(client, stored), aliases.get("champion")
        if not force:
            params = _params(root)
            against = objections(figures, provenance, params.registry if params else NO_LIMITS)
            against += seen_by_base(client, stored.run)
            if not against and champion not in (None, number):
                against = _compare(client, root, stored, figures, champion)
            if against:
                listed = "\n".join(f"- {objection}" for objection in against)
                raise UserError(f'not promoted:\n{listed}\nTo promote it all the same: --force --why "..."')
        number = number or _register(client, root, found, stored, provenance)
        _set_tags(client, number, figures.tags())
        client.set_registered_model_alias(NAME, alias, number)
        Move("force" if force else "promote", alias, number, aliases.get(alias), why).save(client)
        _describe(client, number)
        return number, True


def demote(alias: Alias, root: Path, *, why: str | None = None) -> tuple[str, str | None]:
    """Let ``alias`` name the version that was promoted before and not taken back; where there is none, nothing.

    Returns:
        The version that it named, and the one that it names now.

    Raises:
        UserError: when ``alias`` names nothing.
    """
    client = existing_store(root)
    with FileLock(state_folder(LOCK)):
        now = current(root).get(alias)
        if now is None:
            raise UserError(f"there is no {alias} to take back: `latentloom history` shows what there was")
        standing: dict[str, None] = {}  # versions that were promoted and not taken back, in that order
        for move in all_moves(client):
            if move.alias == alias:
                standing.pop(move.subject, None)
                standing |= {} if move.kind == "demote" else {move.version: None}
        previous = next((version for version in reversed(standing) if version != now), None)
        Move("demote", alias, previous, now, why).save(client)
        if previous is None:
            client.delete_registered_model_alias(NAME, alias)
        else:
            client.set_registered_model_alias(NAME, alias, previous)
        _describe(client, now)
        return now, previous


def history(root: Path) -> list[tuple[Move, Figures]]:
    """All moves, the oldest first, each with the figures of the version that the alias named then."""
    client = existing_store(root)
    versions = {str(own.version): own.tags for own in client.search_model_versions(f"name = '{NAME}'")}
    return [(move, Figures.of_tags(versions.get(move.version, {}))) for move in all_moves(client)]


def current(root: Path) -> dict[str, str]:
    """The version that each alias names now."""
    found = existing_store(root).search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}


def known_figures(client: "MlflowClient", stored: StoredModel) -> list[Figures]:
    """All that is kept of a model: of its evaluation, of its version when promoted, and when measured again."""
    tags = stored.version.tags if stored.version else {}
    kept = [Figures.of_tags(tags, prefix) for prefix in ("", REMEASURED)]
    return [figures for figures in (figures_of(client, stored), *kept) if figures.values]


def _compare(client: "MlflowClient", root: Path, own: StoredModel, figures: Figures, champion: str) -> list[str]:
    """Whether a model is worse than the champion, as a list of one; the champion is measured again where it must be."""
    version = client.get_model_version(NAME, champion)
    known = known_figures(client, replace(stored_model(client, version.tags.get(HASH_TAG, "")), version=version))
    pair = in_the_same_way([figures], known)
    if pair is None:
        ways = figures.differences(known[0]) if known else ["it has no figures"]
        otherwise = f"the champion (version {champion}) was measured otherwise: {'; '.join(ways) or 'no common figure'}"
        notify(f"{otherwise}. It is measured again")
        try:
            settings = sampling_settings(client, own)
            if settings is None:
                raise UserError("the settings that the model's figures were measured with are not known")
            folder, params = find_model(champion, root).folder, _params(root)
            share = params.machine.data_memory_share if params else 1.0
            again = measure_again(folder, figures, settings, root, memory_share=share)
        except UserError as error:
            return [f"{otherwise}; and it cannot be measured again: {error}"]
        _set_tags(client, champion, again.tags(REMEASURED) | {f"{REMEASURED}by": user_name() or "unknown"})
        pair = figures, again
    return [objection] if (objection := worse(*pair)) else []


def _params(root: Path) -> Params | None:
    """The project's; None where there is only a store."""
    return load_params(root / PARAMS) if (root / PARAMS).exists() else None


def _set_tags(client: "MlflowClient", version: str, tags: dict[str, str]) -> None:
    """Set those that differ."""
    held = client.get_model_version(NAME, version).tags
    for key, value in tags.items():
        if held.get(key) != value:
            client.set_model_version_tag(NAME, version, key, value)


def _describe(client: "MlflowClient", number: str) -> None:
    """Let MLflow's page of a version show a person its moves, figures, picture and training.

    A version whose run is gone stays as it was.
    """
    version = client.get_model_version(NAME, number)
    stored = stored_model(client, version.tags.get(HASH_TAG, ""), version.run_id)
    if stored.run is None:
        return
    figures, run = figures_of(client, stored), stored.run.info
    provenance = run_provenance(client, stored.run) or Provenance()
    parts = [
        f"- {move.when:%Y-%m-%d %H:%M} UTC: {' '.join(move.text.split())}" for move in moves_of(number, version.tags)
    ]
    parts.append("\n| figure | value (95 % interval) | |\n|---|---|---|")
    parts += [f"| `{name}` | {figures.in_words(name)} | {MEANINGS.get(name, '')} |" for name in figures.names]
    if figures.samples:
        parts.append(f"\nOf {figures.samples} held-out captions, seed {figures.seed}: {figures.sampling}.")
    # By addresses relative to MLflow's page, wherever its server is.
    trained = f"\nTrained by the run [{run.run_name}](#/experiments/{run.experiment_id}/runs/{run.run_id})"
    trained += f", code of the commit `{provenance.commit[:10]}`" if provenance.commit else ""
    trained += f", on images of {', '.join(provenance.sizes)}" if provenance.sizes else ""
    picture = f"get-artifact?path={SAMPLE_SHEET.name}&run_uuid={figures.run_id}"
    parts.append(f"{trained}.\n\n![{SAMPLE_SHEET.name} of the evaluation]({picture})")
    client.update_model_version(NAME, number, description="\n".join(parts))


def _register(
    client: "MlflowClient", root: Path, found: FoundModel, stored: StoredModel, provenance: Provenance
) -> str:
    """Log the model's files to its training's run, and create a version of them; none where the logging breaks off.

    By the client's calls: `mlflow.pyfunc.log_model` would reopen the training's run, in the process's one global store.
    """
    run = stored.run
    # Those that its figures were measured with, else those of the project.
    settings = sampling_settings(client, stored) or default_settings(found.folder, root / PARAMS)
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
