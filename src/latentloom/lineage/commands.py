"""The commands that bring a training's state back, in a new clone beside the project, and generate an image again.

They are for a shell, one after the other. The clone shares this project's cache of DVC, so what is here is not fetched.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import latentloom
from latentloom.dvc_outs import Place, cache_folder, locked_outs
from latentloom.evaluation.metadata import generate_command
from latentloom.evaluation.text_to_image import generating_code
from latentloom.layout import DVC_LOCK, MODEL
from latentloom.lineage.git import Git
from latentloom.lineage.links import DATA, Link
from latentloom.lineage.subject import Subject
from latentloom.registry.models import NAME, PACKED_MODEL, image_provenance
from latentloom.tracking.store import tracking_uri, without_credentials
from latentloom.tracking.training_run import CODE_DIFF

AT_HAND = (Place.HERE, Place.REMOTE)
AGAIN = "again.png"


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""

    why: str
    command: str


def commands(subject: Subject, links: tuple[Link, ...], root: Path) -> tuple[Step, ...]:
    """The commands that bring back what the links name, as far as it can be."""
    by_kind, git = {link.link: link for link in links}, Git(root)
    code, model = by_kind["code"], by_kind["model"]
    if code.place is Place.UNKNOWN:
        return (Step("fetch the commit, then ask again", _join("git", "-C", root, "fetch", "--all", "--tags")),)
    if git.commit() is None or (code.place is not Place.HERE and model.place not in AT_HAND):
        return ()
    return (
        *_clone(subject, by_kind, git, root),
        *_data(subject, by_kind, git, root),
        *_made_again(by_kind, links),
        *_encoders(by_kind, root),
        *(_image(subject) if subject.metadata else ()),
    )


def _clone(subject: Subject, by_kind: dict[str, Link], git: Git, root: Path) -> Iterator[Step]:
    run_id = subject.run.info.run_id if subject.run else "lineage"
    folder = root.parent / f"{root.name}-{(subject.sha256 or run_id)[:8]}"
    yield Step("a clone of its own beside the project", _join("git", "clone", "-q", root, folder))
    yield Step("", _join("cd", folder))
    commit, why = subject.commit, "the code" + (" and the results" if subject.results else "")
    if by_kind["code"].place is not Place.HERE:
        commit, why = git.commit(), "the training's commit is lost: the present code in its place"
    yield Step(why, _join("git", "checkout", "-q", commit))
    if subject.changes and by_kind["code"].place is Place.HERE:
        yield Step("what was not committed", _download(subject, root, CODE_DIFF, ".state"))
        yield Step("", f"git apply --whitespace=nowarn .state/{CODE_DIFF}")
    if (packages := by_kind.get("packages")) and packages.place is not Place.HERE:
        yield Step("the packages that it ran with", "make install")
        yield Step("", ". .venv/bin/activate")


def _data(subject: Subject, by_kind: dict[str, Link], git: Git, root: Path) -> Iterator[Step]:
    model = by_kind["model"]
    wanted = {  # path -> its hash and place, of what DVC has
        link.details["path"]: (link.hash, link.place)
        for name in DATA
        if (link := by_kind.get(name)) and link.place in AT_HAND and "folder" not in link.details
    }
    if model.details.get("dvc_place") in AT_HAND:
        wanted[str(MODEL)] = (model.details["dvc"], model.details["dvc_place"])
    if wanted:
        if (root / ".dvc" / "config.local").exists():
            yield Step("this project's own settings of DVC", _join("cp", root / ".dvc" / "config.local", ".dvc/"))
        if any(place is Place.HERE for _, place in wanted.values()):
            share = _join("dvc", "config", "--local", "cache.dir", cache_folder(root))
            yield Step("what DVC has here need not be fetched", share)
        locked = locked_outs(git.read(subject.commit, DVC_LOCK) if subject.commit else None)
        named = [path for path, (out, _) in wanted.items() if locked.get(path) == out]
        if named:
            verb = "checkout" if all(wanted[path][1] is Place.HERE for path in named) else "pull"
            yield Step("the data and the model, by their hashes", _join("dvc", verb, "-q", *named))
        if others := [f"{out}={path}" for path, (out, _) in wanted.items() if path not in named]:
            source = shlex.quote(str(Path(latentloom.__file__).parents[1]))
            bring = _join("python", "-m", "latentloom.dvc_outs", *others)
            yield Step("what the commit's dvc.lock does not name, by its hash", f"PYTHONPATH={source} {bring}")
    for name in DATA:
        if (link := by_kind.get(name)) and (folder := link.details.get("folder")):
            yield _copy(folder, link.details["path"])
    if str(MODEL) in wanted:
        return
    if folder := model.details.get("folder"):
        yield _copy(folder, str(MODEL))
    elif version := model.details.get("version"):
        uri = f"models:/{NAME}/{version}/{PACKED_MODEL}"
        get = _join("mlflow", "artifacts", "download", "-u", uri, "-d", ".state/registered")
        yield Step("the model, from the registry", _with_store(get, root) + " > /dev/null")
        yield Step("", f"mkdir -p models && mv .state/registered/{PACKED_MODEL} {MODEL}")


def _made_again(by_kind: dict[str, Link], links: tuple[Link, ...]) -> Iterator[Step]:
    lost = [name for name in DATA if name in by_kind and by_kind[name].place is Place.LOST]
    if {"images", "rejects", "near duplicates"} & set(lost):
        sources = [link for link in links if link.link == "source"]
        possible = bool(sources) and all(link.place in AT_HAND for link in sources)
    else:
        possible = by_kind["images"].place in AT_HAND
    model = by_kind["model"]
    if possible and by_kind["code"].place is Place.HERE and (lost or model.place is Place.LOST):
        stage = "train" if model.place is Place.LOST else "validate"
        yield Step("computes again what is lost: on the same machine's CPU, the same bytes", f"dvc repro {stage}")


def _encoders(by_kind: dict[str, Link], root: Path) -> Iterator[Step]:
    for kind in ("VAE", "text encoder"):
        link = by_kind[kind]
        reference = link.details.get("reference")
        if link.place is Place.HERE and reference and (root / reference).is_dir() and not Path(reference).is_absolute():
            yield _copy(str(root / reference), reference)


def _image(subject: Subject) -> Iterator[Step]:
    metadata = subject.metadata
    if metadata.provenance:
        record = json.dumps({**image_provenance(metadata.provenance), "model_sha256": subject.sha256})
        path = f".state/runs/{subject.sha256}.json"
        write = f"mkdir -p .state/runs && echo {shlex.quote(record)} > {path}"
        yield Step("what the picture says of its model", write)
    # The present code where it is the code that generated the picture; it may be newer than the training's.
    source = Path(latentloom.__file__).parents[1] if metadata.code == generating_code() else "src"
    program = ("python", "-m", "latentloom.cli")
    command = generate_command(metadata, str(MODEL), AGAIN, program)
    yield Step("the picture", f"PYTHONPATH={shlex.quote(str(source))} {command}")
    yield Step("no output means the same bytes", _join("cmp", subject.image, AGAIN))


def _copy(source: str, path: str) -> Step:
    make = f"mkdir -p {shlex.quote(str(Path(path).parent))} && "
    return Step(f"{path}, which is in no cache", make + _join("cp", "-r", source, path))


def _download(subject: Subject, root: Path, name: str, folder: str) -> str:
    """The command that brings a file of the run: a copy where they lie on this machine, else MLflow's own."""
    place = urlsplit(subject.run.info.artifact_uri)
    if place.scheme in ("", "file") and not place.netloc:
        return f"mkdir -p {folder} && " + _join("cp", Path(unquote(place.path)) / name, folder)
    get = _join("mlflow", "artifacts", "download", "-r", subject.run.info.run_id, "-a", name, "-d", folder)
    return _with_store(get, root) + " > /dev/null"


def _with_store(command: str, root: Path) -> str:
    """The command with the store's address, unless that holds a secret: it is in the environment then."""
    uri = tracking_uri(root)
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} {command}" if uri == without_credentials(uri) else command


def _join(*words: object) -> str:
    return shlex.join(map(str, words))
