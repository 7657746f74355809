"""The links of a lineage: each thing that a model came from, by its hash, and where its bytes are.

image -> model -> run -> params -> code and local changes -> packages
      -> latents, text, images, ... -> sources and their counts -> VAE and text encoder
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from latentloom.dvc_outs import Location, Place, locate, out_hash
from latentloom.encoding.pretrained import fingerprint, text_folder, vae_folder
from latentloom.files import sha256_file
from latentloom.ingestion.source_files import fingerprint_sources
from latentloom.layout import IMAGES, LATENTS, MODEL, NEAR_DUPLICATES, PARAMS, REJECTS, TEXT, VALIDATION_REPORT
from latentloom.lineage.git import Git
from latentloom.lineage.provenance import INPUTS, PACKAGES
from latentloom.lineage.subject import Subject
from latentloom.model_files import read_config
from latentloom.params import SourceParams
from latentloom.registry.models import is_model, number_of
from latentloom.tracking.store import first_line
from latentloom.tracking.training_run import CODE_DIFF

DATA = {  # DVC's outs, by the link that each is
    "latents": str(LATENTS),
    "text": str(TEXT),
    "images": str(IMAGES),
    "rejects": str(REJECTS),
    "near duplicates": str(NEAR_DUPLICATES),
    "validation": str(VALIDATION_REPORT),
}
BEST_FIRST = (Place.HERE, Place.REMOTE, Place.UNKNOWN, Place.LOST)


@dataclass(frozen=True)
class Link:
    """One thing that another came from.

    Attributes:
        link: what it is, such as ``latents``; the key for machines.
        name: what it is called, for the user.
        hash: what names its bytes, in full; None where nothing does.
        place: where its bytes are.
        where: where exactly, or why it is not known.
        needed: whether the state cannot be brought back without it.
        details: more, for machines.
    """

    link: str
    name: str
    hash: str | None
    place: Place
    where: str
    needed: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


def gather(subject: Subject, root: Path) -> tuple[Link, ...]:
    """All links, from what was asked for to the sources."""
    outs = subject.provenance.outs
    found = locate(root, [outs[path] for path in (str(MODEL), *DATA.values()) if path in outs]) if outs else {}
    links = [_image(subject)] if subject.image else []
    links += [_model(subject, found, root), _run(subject), *_code(subject, root)]
    data = [link for name in DATA if (link := _data(name, subject, found, root))]
    images_are_there = any(link.link == "images" and link.place in (Place.HERE, Place.REMOTE) for link in data)
    sources = [_source(listing, subject, needed=not images_are_there) for listing in subject.provenance.sources]
    encoders = [
        _encoder("VAE", "vae", vae_folder, subject, root),
        _encoder("text encoder", "text_encoder", text_folder, subject, root),
    ]
    return (*links, *data, *sources, *encoders)


def _image(subject: Subject) -> Link:
    metadata, settings = subject.metadata, subject.metadata.sampling
    prompts = ", ".join(f'"{prompt}"' for prompt in metadata.prompts)
    samples = f"{metadata.count} samples" if metadata.count > 1 else "sample"
    name = (
        f"{prompts}, {samples} {metadata.first} of seed {metadata.seed}, {settings.diffusion_steps} steps of "
        f"{settings.sampler}, guidance {settings.class_guidance:g}, {settings.precision}"
    )
    return Link("picture", name, sha256_file(subject.image), Place.HERE, str(subject.image))


def _model(subject: Subject, found: dict[str, Location], root: Path) -> Link:
    """The model: in a folder, in DVC, or in the registry."""
    sha256, out = subject.sha256, subject.provenance.outs.get(str(MODEL))
    if sha256 is None and out is None:
        ended = f"the run is {subject.run.info.status.lower()}" if subject.run else "nothing names it"
        return Link("model", "no model", None, Place.LOST, ended)
    folders = [subject.folder, root / MODEL, root / ".state" / "models" / sha256] if sha256 else []
    held = [folder for folder in dict.fromkeys(folders) if folder and is_model(folder, sha256)]
    locations = [Location(Place.HERE, str(_within(folder, root))) for folder in held]
    details: dict[str, Any] = {"folder": str(held[0]) if held else None, "dvc": out}
    if out:
        details["dvc_place"] = found[out].place
        locations.append(found[out])
    if subject.version:
        details["version"] = number_of(subject.version)
        locations.append(Location(Place.REMOTE, f"version {details['version']} of the registry"))
    place = min((own.place for own in locations), key=BEST_FIRST.index, default=Place.LOST)
    where = ", ".join(own.message for own in locations if own.place is place) or "neither in a folder nor in DVC"
    name = f"sha256 {sha256[:12]}" if sha256 else f"{MODEL} {out[:12]}"
    return Link("model", name, sha256 or out, place, where, details=details)


def _run(subject: Subject) -> Link:
    """The MLflow run; what it knows may be written down elsewhere, so it is needed only where nothing else is."""
    if subject.run is None:
        run_id = subject.provenance.mlflow_run_id
        name, needed = f"run {run_id}" if run_id else "no run is known", not subject.provenance.outs
        return Link("run", name, run_id, Place.UNKNOWN, subject.run_message, needed)
    info, experiment = subject.run.info, subject.provenance.experiment
    name = f"{info.run_name} ({info.run_id}), {info.status.lower()}"
    name += f", DVC experiment {experiment}" if experiment else ""
    details = {"run_name": info.run_name, "status": info.status, "experiment": experiment}
    return Link("run", name, info.run_id, _run_place(subject), subject.store, details=details)


def _code(subject: Subject, root: Path) -> list[Link]:
    """The commit of the training's code and params, what differed from it, and the packages."""
    git, known, commit = Git(root), subject.provenance, subject.commit
    if commit is None:
        return [
            Link("code", "no commit", None, Place.LOST, "the training ran outside git, or nothing tells its commit")
        ]
    name, details = f"commit {commit[:12]}", {"results": subject.results}
    if git.has(commit):
        branches = git.branches(commit)
        unheld = "on no branch, so git deletes it in time: `git tag NAME COMMIT` keeps it"
        place, where = Place.HERE, f"on {', '.join(branches[:3])}" if branches else unheld
        name += f", {git.subject(commit)}"
    elif git.has_remotes():
        place, where = Place.UNKNOWN, "not in this clone; `git fetch --all --tags` may bring it"
    else:
        place, where = Place.LOST, "not in this clone"
    links = [_params(subject, place), Link("code", name, commit, place, where, details=details)]
    if subject.changes:
        files = [line.split(b" b/", 1)[-1].decode() for line in subject.changes.splitlines() if line[:7] == b"diff --"]
        name = f"{', '.join(files[:3])}{' ...' if len(files) > 3 else ''}"
        digest, where = hashlib.sha256(subject.changes).hexdigest(), f"{CODE_DIFF} of the run"
        links.append(Link("local changes", name, digest, _run_place(subject), where, details={"files": files}))
    elif known.dirty and not subject.results:
        place = Place.UNKNOWN if subject.run_message else Place.LOST
        where = subject.run_message or f"the run does not hold {CODE_DIFF} any more"
        links.append(Link("local changes", "files differed from the commit", None, place, where))
    if known.packages:
        lock = root / PACKAGES
        same = lock.exists() and sha256_file(lock) == known.packages
        where = f"{PACKAGES} is the same" if same else f"PyPI: {PACKAGES} has changed since"
        place = Place.HERE if same else Place.REMOTE
        links.append(Link("packages", str(PACKAGES), known.packages, place, where, needed=False))
    return links


def _params(subject: Subject, place: Place) -> Link:
    settings = subject.provenance.settings
    name = ", ".join(f"{key} {value}" for key, value in settings.items()) or "params.yaml"
    return Link("params", name, None, place, "params.yaml of the code", details=dict(settings))


def _data(name: str, subject: Subject, found: dict[str, Location], root: Path) -> Link | None:
    """One of the data that the training read, and what those were made of."""
    path, known = DATA[name], subject.provenance
    local, details = root / path, {"path": path}
    if out := known.outs.get(path):
        place, where, counts = found[out].place, found[out].message, ""
        if place in (Place.LOST, Place.UNKNOWN) and local.exists() and out_hash(local) == out:
            place, where, details = Place.HERE, f"{path} of this folder alone", details | {"folder": str(local)}
        if name == "images" and (ingested := known.ingested):
            details["counts"] = ingested
            splits = f"{ingested['train']:,} train, {ingested['validation']:,} validation"
            counts = f": {ingested['kept']:,} images ({splits})"
        return Link(name, f"{path} {out[:12]}{counts}", out, place, where, details=details)
    if digest := known.inputs.get(name):
        same = (root / INPUTS[name]).exists() and sha256_file(root / INPUTS[name]) == digest
        place, where = (Place.HERE, path) if same else (Place.UNKNOWN, "the training ran without DVC")
        details |= {"folder": str(local)} if same else {}
        return Link(name, f"{path} {digest[:12]}", digest, place, where, details=details)
    if name in ("latents", "text", "images"):
        return Link(name, path, None, Place.UNKNOWN, "nothing names its hash")
    return None


def _source(then: dict[str, Any], subject: Subject, *, needed: bool) -> Link:
    """A source, as it was listed before the ingestion, beside what it is now."""
    kind, path = then["source"], then.get("path")
    counted = [own for own in subject.provenance.ingested.get("sources", []) if own["source"] == kind]
    counts = counted[0] if len(counted) == 1 else {}
    shown = ", ".join(f"{counts[key]:,} {key}" for key in ("found", "kept", "rejected") if key in counts)
    name = " ".join(filter(None, (kind, path))) + (f": {shown}" if shown else "")
    try:
        # A Parquet source's columns say nothing about its files.
        (now,) = fingerprint_sources([SourceParams(source=kind, path=path)], Path("/nonexistent"))
        if now == then:
            place, where = Place.HERE, "as it was"
        elif kind == "openmoji":
            packages = ", ".join(f"{own} {wanted}" for own, wanted in then["packages"].items())
            place, where = Place.REMOTE, f"PyPI: {packages}"
        else:
            place, where = Place.LOST, f"changed since: {then['files']:,} files then, {now['files']:,} now"
    except (ValueError, OSError) as error:
        place, where = Place.UNKNOWN, f"not on this machine: {first_line(error)}"
    return Link("source", name, then.get("fingerprint"), place, where, needed, {"listing": then, "counts": counts})


def _encoder(link: str, key: str, folder_of: Callable[[str], Path], subject: Subject, root: Path) -> Link:
    """The VAE or the text encoder, compared by fingerprint with what its name stands for here."""
    reference, wanted = _encoder_name(key, subject, root)
    if reference is None or wanted is None:
        where = "the model, which names its fingerprint, is not here"
        return Link(link, reference or link, wanted, Place.UNKNOWN, where, needed=reference is None)
    name, details = f"{reference} {wanted[:12]}", {"reference": reference}
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", reference) and not (root / reference).is_dir():
        where = f"the Hugging Face hub: {reference}; its fingerprint is compared when it is loaded"
        return Link(link, name, wanted, Place.REMOTE, where, details=details)
    try:
        here = fingerprint(folder_of(str(root / reference) if (root / reference).is_dir() else reference))
    except (ValueError, OSError):  # it cannot be read, or is not there
        here = None
    if here == wanted:
        place, where = Place.HERE, "the package" if reference == "bundled" else reference
    elif reference == "bundled" and Git(root).has(subject.commit or ""):
        place, where = Place.HERE, f"the package of commit {subject.commit[:12]}, or of its requirements.lock"
    elif reference != "bundled" and subject.version:
        place, where = Place.REMOTE, f"version {number_of(subject.version)} of the registry carries its files"
    elif here:
        place, where = Place.LOST, f"{reference} holds another one now"
    else:
        place, where = Place.UNKNOWN, f"the folder {reference} is not on this machine"
    return Link(link, name, wanted, place, where, details=details)


def _encoder_name(key: str, subject: Subject, root: Path) -> tuple[str | None, str | None]:
    """The encoder's reference and fingerprint: of the model, the registry, the training, or the params and the PNG."""
    folders = [subject.folder, root / MODEL, root / ".state" / "models" / str(subject.sha256)]
    for folder in folders:
        if folder and subject.sha256 and is_model(folder, subject.sha256):
            encoder = getattr(read_config(folder), key)
            return encoder.reference, encoder.fingerprint
    if subject.version:
        return subject.version.tags.get(key), subject.version.tags.get(f"{key}.fingerprint")
    if encoder := subject.provenance.encoders.get(key):
        return encoder["reference"], encoder["fingerprint"]
    params = yaml.safe_load(Git(root).read(subject.commit or "HEAD", PARAMS) or b"") or {}
    section, param = {"vae": ("encode_images", "vae"), "text_encoder": ("encode_text", "model")}[key]
    return params.get(section, {}).get(param), getattr(subject.metadata, key) if subject.metadata else None


def _run_place(subject: Subject) -> Place:
    return Place.REMOTE if subject.store.startswith("http") else Place.HERE


def _within(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
