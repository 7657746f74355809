"""The links of a lineage: each thing that a model came from, by its hash, where its bytes are, how they come back.

picture -> model -> run -> params -> code and local changes -> packages
        -> latents, text, images, ... -> sources -> VAE and text encoder
"""

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import latentloom
from latentloom.dvc_outs import Place, locate, out_hash
from latentloom.encoding.pretrained import fingerprint
from latentloom.evaluation.metadata import generate_command
from latentloom.evaluation.text_to_image import generating_code
from latentloom.files import sha256_file
from latentloom.ingestion.source_files import fingerprint_sources
from latentloom.layout import IMAGES, LATENTS, MODEL, NEAR_DUPLICATES, PARAMS, REJECTS, TEXT, VALIDATION_REPORT
from latentloom.lineage.git import Git
from latentloom.lineage.provenance import PACKAGES
from latentloom.lineage.subject import Subject
from latentloom.params import SourceParams
from latentloom.registry.models import PACKED_MODEL, image_provenance, is_model
from latentloom.tracking.store import first_line, tracking_uri, without_credentials
from latentloom.tracking.training_run import CODE_DIFF

DATA = {  # DVC's outs, by the link that each is
    "latents": str(LATENTS),
    "text": str(TEXT),
    "images": str(IMAGES),
    "rejects": str(REJECTS),
    "near duplicates": str(NEAR_DUPLICATES),
    "validation": str(VALIDATION_REPORT),
}
AT_HAND = (Place.HERE, Place.REMOTE)
AGAIN = "again.png"
PRESENT_CODE = Path(latentloom.__file__).parents[1]  # an earlier commit's cannot bring outs back


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
        command: for a shell in the new clone, brings it back where it is at hand; that of the code makes the clone.
    """

    link: str
    name: str
    hash: str | None
    place: Place
    where: str
    needed: bool = True
    command: str = ""


def gather(subject: Subject, root: Path) -> tuple[Link, ...]:
    """All links, from what was asked for to the sources."""
    known = subject.provenance
    found = locate(root, known.outs.values()) if known.outs else {}
    code = _code(subject, root)
    named = [name for name, path in DATA.items() if path in known.outs or name in ("latents", "text", "images")]
    data = [_out(name, DATA[name], subject, found, root) for name in named]
    images_are_there = any(link.link == "images" and link.place in AT_HAND for link in data)
    return (
        *([_picture(subject)] if subject.image else []),
        _model(subject, found, root),
        _run(subject, root),
        Link("params", ", ".join(f"{k} {v}" for k, v in known.settings.items()), None, code.place, "of the code"),
        code,
        *_around_the_code(subject, root),
        *data,
        *(_source(listing, subject, needed=not images_are_there) for listing in known.sources),
        _encoder("VAE", "vae", ("encode_images", "vae"), subject, root),
        _encoder("text encoder", "text_encoder", ("encode_text", "model"), subject, root),
    )


def _picture(subject: Subject) -> Link:
    """The PNG; its command writes down what it says of its model, which goes into the new picture, and compares."""
    metadata, settings = subject.metadata, subject.metadata.sampling
    prompts = ", ".join(f'"{prompt}"' for prompt in metadata.prompts)
    samples = f"{metadata.count} samples" if metadata.count > 1 else "sample"
    name = (
        f"{prompts}, {samples} {metadata.first} of seed {metadata.seed}, {settings.diffusion_steps} steps of "
        f"{settings.sampler}, guidance {settings.class_guidance:g}, {settings.precision}"
    )
    lines = []
    if metadata.provenance:
        record = json.dumps({**image_provenance(metadata.provenance), "model_sha256": subject.sha256})
        lines.append(f"mkdir -p .state/runs && echo {shlex.quote(record)} > .state/runs/{subject.sha256}.json")
    # The present code where it is the code that generated the picture; it may be newer than the training's.
    source = PRESENT_CODE if metadata.code == generating_code() else "src"
    again = generate_command(metadata, str(MODEL), AGAIN, ("python", "-m", "latentloom.cli"))
    lines += [f"PYTHONPATH={shlex.quote(str(source))} {again}", _join("cmp", subject.image, AGAIN)]
    return Link("picture", name, sha256_file(subject.image), Place.HERE, str(subject.image), command="\n".join(lines))


def _model(subject: Subject, found: dict[str, tuple[Place, str]], root: Path) -> Link:
    """The model: in DVC, in a folder, or in the registry."""
    sha256 = subject.sha256
    if str(MODEL) in subject.provenance.outs:
        link = _out("model", str(MODEL), subject, found, root)
    else:
        ended = f"the run is {subject.run.info.status.lower()}" if subject.run else "neither in a folder nor in DVC"
        link = Link("model", "no model", None, Place.LOST, ended)
    if sha256 is None:
        return link
    link = replace(link, name=f"sha256 {sha256[:12]}", hash=sha256)
    if link.place is Place.HERE:
        return link
    for folder in (subject.folder, root / ".state" / "models" / sha256):
        if is_model(folder, sha256):
            return replace(link, place=Place.HERE, where=str(folder), command=_copy(folder, MODEL))
    if subject.version and link.place is not Place.REMOTE:
        where = f"version {subject.version.version} of the registry"
        command = f"mkdir -p {MODEL.parent} && cp -r {_downloaded(root, subject.version.run_id, PACKED_MODEL)} {MODEL}"
        return replace(link, place=Place.REMOTE, where=where, command=command)
    return link


def _run(subject: Subject, root: Path) -> Link:
    """The MLflow run; what it knows may be written down elsewhere, so it is needed only where nothing else is."""
    if subject.run is None:
        run_id = subject.provenance.mlflow_run_id
        name = f"run {run_id}" if run_id else "no run is known"
        return Link("run", name, run_id, Place.UNKNOWN, subject.message, needed=not subject.provenance.outs)
    info, experiment = subject.run.info, subject.provenance.experiment
    name = f"{info.run_name} ({info.run_id}), {info.status.lower()}"
    name += f", DVC experiment {experiment}" if experiment else ""
    return Link("run", name, info.run_id, _store_place(root), without_credentials(tracking_uri(root)))


def _code(subject: Subject, root: Path) -> Link:
    """The commit of the training's code and params; its command makes a clone, which shares DVC's cache."""
    git, commit = Git(root), subject.commit
    if commit is None:
        where = "the training ran outside git, or nothing tells its commit"
        return Link("code", "no commit", None, Place.LOST, where)
    name = f"commit {commit[:12]}"
    if not git.has(commit):
        fetch = _join("git", "-C", root, "fetch", "--all", "--tags")
        where = "not in this clone; `git fetch --all --tags` may bring it"
        return Link("code", name, commit, Place.UNKNOWN, where, command=fetch)
    branches = git.branches(commit)
    unheld = "on no branch, so git deletes it in time: `git tag NAME COMMIT` keeps it"
    clone = root.parent / f"{root.name}-{(subject.sha256 or commit)[:8]}"
    lines = [_join("git", "clone", "-q", root, clone), _join("cd", clone), _join("git", "checkout", "-q", commit)]
    if subject.provenance.outs:
        own = root / ".dvc" / "config.local"
        lines += [_join("cp", own, ".dvc/")] if own.exists() else []
        lines.append(f'dvc config --local cache.dir "$(dvc --cd {shlex.quote(str(root))} cache dir)"')
    where = f"on {', '.join(branches[:3])}" if branches else unheld
    return Link("code", name, commit, Place.HERE, where, command="\n".join(lines))


def _around_the_code(subject: Subject, root: Path) -> list[Link]:
    """What differed from the commit, and the packages."""
    known, links = subject.provenance, []
    if subject.code_diff:
        name = ", ".join(re.findall(r"^diff --git a/.* b/(.*)$", subject.code_diff.decode(errors="replace"), re.M))
        digest, where = hashlib.sha256(subject.code_diff).hexdigest(), f"{CODE_DIFF} of the run"
        command = f"git apply --whitespace=nowarn {_downloaded(root, subject.run.info.run_id, CODE_DIFF)}"
        links.append(Link("local changes", name, digest, _store_place(root), where, command=command))
    elif known.dirty:
        place = Place.UNKNOWN if subject.message else Place.LOST
        where = subject.message or f"the run does not hold {CODE_DIFF} any more"
        links.append(Link("local changes", "files differed from the commit", None, place, where))
    if known.packages:
        lock = root / PACKAGES
        same = lock.exists() and sha256_file(lock) == known.packages
        place, where = (Place.HERE, "the same as now") if same else (Place.REMOTE, "PyPI: it has changed since")
        command = "" if same else "make install\n. .venv/bin/activate"
        links.append(Link("packages", str(PACKAGES), known.packages, place, where, needed=False, command=command))
    return links


def _out(link: str, path: str, subject: Subject, found: dict[str, tuple[Place, str]], root: Path) -> Link:
    """One of DVC's outs: in its cache or remote, or in the project's folder alone."""
    out, ingested = subject.provenance.outs.get(path), subject.provenance.ingested
    if out is None:
        return Link(link, path, None, Place.UNKNOWN, "nothing names its hash")
    name = f"{path} {out[:12]}"
    if link == "images" and ingested:
        name += f": {ingested['kept']:,} images ({ingested['train']:,} train, {ingested['validation']:,} validation)"
    (place, where), local = found[out], root / path
    bring = f"PYTHONPATH={shlex.quote(str(PRESENT_CODE))} python -m latentloom.dvc_outs {out}={shlex.quote(path)}"
    if place not in AT_HAND and local.exists() and out_hash(local) == out:
        return Link(link, name, out, Place.HERE, f"{path} of this folder alone", command=_copy(local, path))
    return Link(link, name, out, place, where, command=bring)


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
        place, where = (Place.HERE, "as it was") if now == then else (Place.LOST, "it has changed since")
    except (ValueError, OSError) as error:
        place, where = Place.UNKNOWN, f"not on this machine: {first_line(error)}"
    return Link("source", name, then.get("fingerprint"), place, where, needed)


def _encoder(link: str, key: str, param: tuple[str, str], subject: Subject, root: Path) -> Link:
    """The VAE or the text encoder, compared by fingerprint with what its name stands for here."""
    if encoder := subject.provenance.encoders.get(key):
        reference, wanted = encoder["reference"], encoder["fingerprint"]
    else:  # the params name it, and a picture its fingerprint
        params = yaml.safe_load(Git(root).read(subject.commit or "HEAD", PARAMS) or b"") or {}
        reference = params.get(param[0], {}).get(param[1], "bundled")
        wanted = getattr(subject.metadata, key) if subject.metadata else None
    name, folder = f"{reference} {(wanted or '')[:12]}".strip(), root / Path(reference).expanduser()
    if reference == "bundled":
        return Link(link, name, wanted, Place.HERE, "the package, and its requirements.lock")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", reference) and not folder.is_dir():
        return Link(link, name, wanted, Place.REMOTE, "the Hugging Face hub; compared when it is loaded")
    try:
        same = wanted in (fingerprint(folder), None)
        place, where = (Place.HERE, reference) if same else (Place.LOST, f"{reference} holds another one now")
    except (ValueError, OSError):  # it cannot be read, or is not there
        place, where = Place.UNKNOWN, f"the folder {reference} is not on this machine"
    outside = reference.startswith(("/", "~"))
    return Link(link, name, wanted, place, where, command="" if outside else _copy(folder, reference))


def _store_place(root: Path) -> Place:
    return Place.REMOTE if tracking_uri(root).startswith("http") else Place.HERE


def _downloaded(root: Path, run_id: str, name: str) -> str:
    """In a command, the path of a run's file, once MLflow has downloaded it."""
    in_environment = os.environ.get("MLFLOW_TRACKING_URI")  # it may hold a password
    store = "" if in_environment else f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri(root))} "
    return f'"$({store}{_join("mlflow", "artifacts", "download", "-r", run_id, "-a", name)} | tail -1)"'


def _copy(source: str | Path, path: str | Path) -> str:
    return f"mkdir -p {shlex.quote(str(Path(path).parent))} && " + _join("cp", "-r", source, path)


def _join(*words: object) -> str:
    return shlex.join(map(str, words))
