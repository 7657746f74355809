"""The links of a lineage: each thing that a model came from, by its hash, where its bytes are, how they come back.

picture -> model -> run -> params, code and local changes -> latents, text, images, ..., base -> sources, encoders
"""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import latentloom
from latentloom.dvc_outs import Place, locate, out_hash
from latentloom.encoding.pretrained import has_fingerprint
from latentloom.evaluation.metadata import generate_command
from latentloom.evaluation.text_to_image import generating_code
from latentloom.files import sha256_file, user_path
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.layout import MODEL, PARAMS
from latentloom.lineage.subject import Subject
from latentloom.params import SourceParams
from latentloom.registry.base import Base, at_hand
from latentloom.registry.models import PACKED_MODEL, fetched_folder, is_model, stored_model
from latentloom.tracking.git import Git
from latentloom.tracking.provenance import CODE_DIFF, DATA, Provenance
from latentloom.tracking.store import existing_store, first_line, tracking_uri, without_credentials

AT_HAND = (Place.HERE, Place.REMOTE)
AGAIN = "again.png"
PRESENT_CODE = Path(latentloom.__file__).parents[1]  # an earlier commit's cannot bring outs back


@dataclass(frozen=True)
class Link:
    """One thing that another came from."""

    link: str  # what it is, such as ``latents``; the key for machines
    name: str  # what it is called, for the user
    hash: str | None  # what names its bytes, in full; None where nothing does
    place: Place
    where: str  # exactly, or why it is not known
    needed: bool = True  # whether the state cannot be brought back without it
    command: str = ""  # for a shell in the new clone, to bring it back where it is at hand; the code's makes the clone


def gather(subject: Subject, root: Path) -> tuple[Link, ...]:
    """All links, from what was asked for to the sources."""
    known = subject.provenance
    outs = {*known.outs.values(), *([known.base["out"]] if known.base and known.base["out"] else [])}
    found = locate(root, outs) if outs else {}
    code = _code(subject, root)
    named = [name for name, path in DATA.items() if path in known.outs or name in ("latents", "text", "images")]
    data = [_out(name, DATA[name], known, found, root / DATA[name]) for name in named]
    if known.converted_from:  # it is complete without its data, and their source gives them again
        left_behind = {"place": Place.LOST, "where": "did not come with the model", "needed": False}
        data = [link if link.place in AT_HAND else replace(link, **left_behind) for link in data]
    model = _model(subject, found, root)
    images_are_there = any(link.link == "images" and link.place in AT_HAND for link in data)
    return (
        *([_picture(subject)] if subject.metadata else []),
        model,
        *_runs(subject, root),
        Link("params", str(PARAMS), None, code.place, "of the code"),
        code,
        *_changes(subject, root),
        *data,
        *_base(known, found, root, needed=model.place not in AT_HAND),
        *(_source(listing, known.ingested, needed=not images_are_there) for listing in known.sources),
        _encoder("VAE", known.encoders.get("vae"), root),
        _encoder("text encoder", known.encoders.get("text_encoder"), root),
    )


def _picture(subject: Subject) -> Link:
    """The PNG; its command writes down what it says of its model, which goes into the new picture, and compares."""
    metadata, settings = subject.metadata, subject.metadata.sampling
    prompts = ", ".join(f'"{prompt}"' for prompt in metadata.prompts)
    last = metadata.first + metadata.count - 1
    samples = f"samples {metadata.first} to {last}" if metadata.count > 1 else f"sample {last}"
    name = (
        f"{prompts}, {samples} of seed {metadata.seed}, {settings.diffusion_steps} steps of "
        f"{settings.sampler}, guidance {settings.class_guidance:g}, {settings.precision}"
        + (f", {metadata.size}" if metadata.size else "")
        + (f', away from "{metadata.negative}"' if metadata.negative else "")
        + (
            f", strength {metadata.strength:g} of the picture {metadata.start_image[:12]}"
            if metadata.start_image
            else ""
        )
        + (f", {metadata.between} pictures on the way" if metadata.between else "")
        + (f" to seed {metadata.to_seed}" if metadata.to_seed is not None else "")
    )
    lines = []
    if metadata.provenance:
        record = json.dumps(asdict(Provenance.from_dict(metadata.provenance)))
        path = f".state/runs/{metadata.model_sha256}.json"
        lines.append(f"mkdir -p .state/runs && echo {shlex.quote(record)} > {path}")
    # The present code where it is the code that generated the picture; it may be newer than the training's.
    source = PRESENT_CODE if metadata.code == generating_code() else "src"
    again = generate_command(metadata, str(MODEL), AGAIN, ("python", "-m", "latentloom.cli"))
    lines += [f"PYTHONPATH={shlex.quote(str(source))} {again}", _join("cmp", subject.image, AGAIN)]
    return Link("picture", name, sha256_file(subject.image), Place.HERE, str(subject.image), command="\n".join(lines))


def _model(subject: Subject, found: Mapping[str, tuple[Place, str]], root: Path) -> Link:
    """The model: in DVC, in a folder that DVC does not know, or in the registry."""
    stored = subject.stored
    link = _out("model", str(MODEL), subject.provenance, found, subject.folder)
    if stored.sha256 is None:
        return replace(link, where=f"the run is {stored.run.info.status.lower()}") if stored.run else link
    link = replace(link, name=f"sha256 {stored.sha256[:12]}", hash=stored.sha256)
    if link.place not in AT_HAND and is_model(subject.folder, stored.sha256):
        copy = f"mkdir -p {MODEL.parent} && " + _join("cp", "-r", subject.folder, MODEL)
        return replace(link, place=Place.HERE, where=f"{subject.folder} alone", command=copy)
    if stored.version is None or link.place in AT_HAND:
        return link
    command = f"mkdir -p {MODEL.parent} && cp -r {_downloaded(root, stored.version.run_id, PACKED_MODEL)} {MODEL}"
    where = f"version {stored.version.version} of the registry"
    return replace(link, place=Place.REMOTE, where=where, command=command)


def _runs(subject: Subject, root: Path) -> list[Link]:
    """The MLflow run of the training, and the one that holds the model's figures and sheets, where there are.

    What the first knows may be written down elsewhere, so it is needed only where nothing else is; the second never is.
    """
    known, run, evaluation = subject.provenance, subject.stored.run, subject.stored.evaluation
    place, store = _store_place(root), without_credentials(tracking_uri(root))
    if run is None:
        name = f"run {known.mlflow_run_id}" if known.mlflow_run_id else "no run is known"
        links = [Link("run", name, known.mlflow_run_id, Place.UNKNOWN, subject.message, needed=not known.outs)]
    else:
        name = f"{run.info.run_name} ({run.info.run_id}), {run.info.status.lower()}"
        name += f", DVC experiment {known.experiment}" if known.experiment else ""
        links = [Link("run", name, run.info.run_id, place, store)]
    if evaluation is not None:
        name = f"{evaluation.info.run_name} ({evaluation.info.run_id})"
        links.append(Link("evaluation", name, evaluation.info.run_id, place, store, needed=False))
    return links


def _code(subject: Subject, root: Path) -> Link:
    """The commit of the training's code and params; its command makes a clone, which shares DVC's cache."""
    commit = subject.provenance.commit
    if commit is None:
        where = "the training ran outside git, or nothing tells its commit"
        return Link("code", "no commit", None, Place.LOST, where)
    name = f"commit {commit[:12]}"
    if not Git(root).has(commit):
        fetch = _join("git", "-C", root, "fetch", "--all", "--tags")
        where = "not in this clone; `git fetch --all --tags` may bring it"
        return Link("code", name, commit, Place.UNKNOWN, where, command=fetch)
    clone = root.parent / f"{root.name}-{(subject.stored.sha256 or commit)[:8]}"
    own = root / ".dvc" / "config.local"
    lines = [
        *(_join("git", "clone", "-q", root, clone), _join("cd", clone), _join("git", "checkout", "-q", commit)),
        *([_join("cp", own, ".dvc/")] if own.exists() else []),
        f'dvc config --local cache.dir "$(dvc --cd {shlex.quote(str(root))} cache dir)"',
    ]
    return Link("code", name, commit, Place.HERE, "this clone's history", command="\n".join(lines))


def _changes(subject: Subject, root: Path) -> list[Link]:
    """What differed from the commit."""
    if diff := subject.code_diff:
        command = f"git apply --whitespace=nowarn {_downloaded(root, subject.stored.run.info.run_id, CODE_DIFF)}"
        digest = hashlib.sha256(diff).hexdigest()
        return [Link("local changes", CODE_DIFF, digest, _store_place(root), "the run's files", command=command)]
    if subject.provenance.dirty:
        where = subject.message or f"the run does not hold {CODE_DIFF} any more"
        return [Link("local changes", "files differed from the commit", None, Place.UNKNOWN, where)]
    return []


def _out(link: str, path: str, known: Provenance, found: Mapping[str, tuple[Place, str]], local: Path) -> Link:
    """One of DVC's outs: in its cache or remote, or in the folder or file ``local`` alone."""
    out = known.outs.get(path)
    if out is None:
        return Link(link, path, None, Place.UNKNOWN, "nothing names its hash")
    name = f"{path} {out[:12]}"
    if link == "images" and (counts := known.ingested):
        name += f": {counts['kept']:,} images ({counts['train']:,} train, {counts['validation']:,} validation)"
        name += f" of {', '.join(known.sizes)}" if known.sizes else ""
    place, where = found[out]
    if place not in AT_HAND and local.exists() and out_hash(local) == out:
        copy = f"mkdir -p {Path(path).parent} && " + _join("cp", "-r", local, path)
        return Link(link, name, out, Place.HERE, f"{local} alone", command=copy)
    bring = f"PYTHONPATH={shlex.quote(str(PRESENT_CODE))} python -m latentloom.dvc_outs {out}={path}"
    return Link(link, name, out, place, where, command=bring)


def _base(known: Provenance, found: Mapping[str, tuple[Place, str]], root: Path, *, needed: bool) -> list[Link]:
    """The model that the training started from; its command puts it where a training looks for it."""
    if known.base is None:
        return []
    sha256, out, kept = known.base["sha256"], known.base["out"], fetched_folder(known.base["sha256"], Path())
    name = f"{known.base['reference']}, sha256 {sha256[:12]}"
    if out and found[out][0] in AT_HAND:
        bring = f"PYTHONPATH={shlex.quote(str(PRESENT_CODE))} python -m latentloom.dvc_outs {out}={kept}"
        return [Link("base", name, sha256, *found[out], needed, bring)]
    if folder := at_hand(Base(**known.base), root):
        copy = f"mkdir -p {kept.parent} && " + _join("cp", "-r", folder.resolve(), kept)
        return [Link("base", name, sha256, Place.HERE, f"{folder} alone", needed, copy)]
    try:
        version = stored_model(existing_store(root), sha256).version
    except Exception as error:  # the store is away, or MLflow is not installed
        return [Link("base", name, sha256, Place.UNKNOWN, first_line(error), needed)]
    if version is None:
        return [Link("base", name, sha256, Place.LOST, "neither here, nor in DVC or the registry", needed)]
    fetch = f"mkdir -p {kept.parent} && cp -r {_downloaded(root, version.run_id, PACKED_MODEL)} {kept}"
    return [Link("base", name, sha256, Place.REMOTE, f"version {version.version} of the registry", needed, fetch)]


def _source(then: Mapping[str, Any], ingested: Mapping[str, Any], *, needed: bool) -> Link:
    """A source, as it was listed before the ingestion, beside what it is now."""
    kind, path = then["source"], then.get("path")
    name = " ".join(filter(None, (kind, path)))
    counted = [own for own in ingested.get("sources", []) if own["source"] == kind]
    if len(counted) == 1:
        name += ": {found:,} found, {kept:,} kept, {rejected:,} rejected".format(**counted[0])
    try:
        # A Parquet source's columns say nothing about its files, and neither do the plugins that read images.
        (now,) = fingerprint_sources([SourceParams(source=kind, path=path)], Path("/nonexistent"))
        changed = {key for key in now.keys() | then.keys() if now.get(key) != then.get(key)} - {"plugins"}
        place, where = (Place.LOST, "it has changed since") if changed else (Place.HERE, "as it was")
    except (ValueError, OSError) as error:
        place, where = Place.UNKNOWN, f"not on this machine: {first_line(error)}"
    return Link("source", name, then.get("fingerprint"), place, where, needed)


def _encoder(link: str, encoder: Mapping[str, str] | None, root: Path) -> Link:
    """The VAE or the text encoder, compared by fingerprint with what its name stands for here."""
    if encoder is None:
        return Link(link, f"as {PARAMS} names it", None, Place.UNKNOWN, "nothing tells its hash", needed=False)
    reference, wanted = encoder["reference"], encoder["fingerprint"]
    folder = root / user_path(reference)
    if reference == "bundled":
        place, where = Place.HERE, "the package, and its requirements.lock"
    elif folder.is_dir():
        same = has_fingerprint(folder, wanted)
        place, where = (Place.HERE, reference) if same else (Place.LOST, f"{reference} holds another one now")
    elif reference.startswith(("/", ".", "~")) or reference.count("/") != 1:
        place, where = Place.UNKNOWN, f"the folder {reference} is not on this machine"
    else:
        place, where = Place.REMOTE, "the Hugging Face hub; compared when it is loaded"
    return Link(link, f"{reference} {wanted[:12]}", wanted, place, where)


def _store_place(root: Path) -> Place:
    return Place.REMOTE if tracking_uri(root).startswith("http") else Place.HERE


def _downloaded(root: Path, run_id: str, name: str) -> str:
    """In a command, the path of a run's file, once MLflow has downloaded it."""
    in_environment = os.environ.get("MLFLOW_TRACKING_URI")  # it may hold a password
    store = "" if in_environment else f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri(root))} "
    return f'"$({store}{_join("mlflow", "artifacts", "download", "-r", run_id, "-a", name)} | tail -1)"'


def _join(*words: object) -> str:
    return shlex.join(map(str, words))
