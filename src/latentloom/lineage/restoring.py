"""The commands that bring a training's state back, in a new clone beside the project, and draw a picture again.

They are for a shell, one after the other. The clone shares this project's cache of DVC, so what is here is not fetched.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import latentloom
from latentloom.evaluation.pictures import redraw_command
from latentloom.lineage.dvc_objects import Place, cache_folder
from latentloom.lineage.history import History
from latentloom.lineage.links import Link
from latentloom.lineage.training_record import IN_GIT, LOCK, RUN_REPORT, Subject, TrainingRecord, outs_of
from latentloom.registry.models import MODEL, NAME, PACKED_MODEL
from latentloom.tracking.provenance import CODE_DIFF, INGESTED, SOURCES
from latentloom.tracking.store import tracking_uri, without_credentials

AT_HAND = (Place.HERE, Place.REMOTE)
MADE_OF_DATA = ("latents", "text", "images", "rejects", "near duplicates", "validation")
AGAIN = "again.png"
FETCHED = {  # artifacts of the run, and what each tells
    LOCK: "which data and which model: DVC's hashes",
    SOURCES.name: "what the sources held",
    INGESTED.name: "what the ingestion counted",
}


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""

    why: str
    command: str


def steps(
    subject: Subject, record: TrainingRecord, links: tuple[Link, ...], history: History, root: Path
) -> tuple[Step, ...]:
    """The commands that bring back what the links name, as far as it can be."""
    by_kind = {link.link: link for link in links}
    if by_kind["code"].place is Place.UNKNOWN:
        fetch = _join("git", "-C", root, "fetch", "--all", "--tags")
        return (Step("the commit is not in this clone: fetch it, and ask again", fetch),)
    if history.head() is None:
        return ()
    if by_kind["code"].place is not Place.HERE and by_kind["model"].place not in AT_HAND:
        return ()
    return (
        *_code(subject, record, by_kind, history, root),
        *_data(record, by_kind, root),
        *_model(by_kind["model"], root),
        *_encoders(by_kind, root),
        *_made_again(by_kind, links),
        *_run_report(subject, record),
        *(_picture(subject, by_kind["drawing code"]) if subject.facts else ()),
    )


def _code(
    subject: Subject, record: TrainingRecord, by_kind: dict[str, Link], history: History, root: Path
) -> Iterator[Step]:
    named = subject.sha256 or record.run_id or "lineage"
    folder = root.parent / f"{root.name}-{named[:8]}"
    yield Step("a clone of its own beside the project", _join("git", "clone", "-q", root, folder))
    yield Step("", _join("cd", folder))
    commit, why = record.results, "the code and the results"
    if commit is None and by_kind["code"].place is Place.HERE:
        commit, why = record.commit, "the code"
    if commit is None:
        commit, why = history.head(), "the training's commit is lost: the present code in its place"
    yield Step(why, _join("git", "checkout", "-q", commit))
    if commit == record.commit != record.results and record.diff is not None and record.code is not None:
        yield Step("what was not committed", _download(record, root, CODE_DIFF, ".state"))
        yield Step("", f"git apply --whitespace=nowarn .state/{CODE_DIFF}")
    packages = by_kind.get("packages")
    if packages and packages.place is not Place.HERE:
        yield Step("the packages that it ran with", "make install")
        yield Step("", ". .venv/bin/activate")
    if record.results is None:
        for name, path in IN_GIT.items():
            if name in FETCHED and name in record.files and record.files[name] != history.read(commit, path):
                yield Step(FETCHED[name], _download(record, root, name, str(Path(path).parent)))


def _data(record: TrainingRecord, by_kind: dict[str, Link], root: Path) -> Iterator[Step]:
    model, locked = by_kind["model"], outs_of(record.files.get(LOCK))
    wanted = {  # path -> its hash and place, of what DVC has
        link.details["path"]: (link.hash, link.place)
        for kind in MADE_OF_DATA
        if (link := by_kind.get(kind)) and link.place in AT_HAND and "folder" not in link.details
    }
    if model.details.get("dvc_place") in AT_HAND:
        wanted[str(MODEL)] = (model.details["dvc"], model.details["dvc_place"])
    if wanted:
        if (root / ".dvc" / "config.local").exists():
            yield Step("this project's own settings of DVC", _join("cp", root / ".dvc" / "config.local", ".dvc/"))
        if any(place is Place.HERE for _, place in wanted.values()):
            share = _join("dvc", "config", "--local", "cache.dir", cache_folder(root))
            yield Step("what DVC has here need not be fetched", share)
        targets = [path for path, (oid, _) in wanted.items() if locked.get(path) == oid]
        if targets:
            verb = "checkout" if all(wanted[path][1] is Place.HERE for path in targets) else "pull"
            yield Step("the data and the model, by their hashes", _join("dvc", verb, "-q", *targets))
        for path in wanted.keys() - set(targets):  # no dvc.lock is at hand that names it
            code = f"from latentloom.lineage.dvc_objects import bring; bring('.', {wanted[path][0]!r}, {path!r})"
            source = Path(latentloom.__file__).parents[1]
            yield Step(f"{path}, by its hash", f"PYTHONPATH={shlex.quote(str(source))} {_join('python', '-c', code)}")
    for kind in MADE_OF_DATA:
        if (link := by_kind.get(kind)) and (folder := link.details.get("folder")):
            yield _copy(folder, link.details["path"])


def _model(model: Link, root: Path) -> Iterator[Step]:
    if model.details.get("dvc_place") not in AT_HAND:
        if folder := model.details.get("folder"):
            yield _copy(folder, str(MODEL))
        elif version := model.details.get("version"):
            uri = f"models:/{NAME}/{version}/{PACKED_MODEL}"
            get = _join("mlflow", "artifacts", "download", "-u", uri, "-d", ".state/registered")
            yield Step("the model, from the registry", _with_store(get, root) + " > /dev/null")
            yield Step("", f"mkdir -p models && mv .state/registered/{PACKED_MODEL} {MODEL}")


def _made_again(by_kind: dict[str, Link], links: tuple[Link, ...]) -> Iterator[Step]:
    lost = [by_kind[kind] for kind in MADE_OF_DATA if kind in by_kind and by_kind[kind].place is Place.LOST]
    sources = [link for link in links if link.link == "source"]
    if any(link.link in ("images", "rejects", "near duplicates") for link in lost):
        possible = bool(sources) and all(link.place in AT_HAND for link in sources)
    else:
        possible = by_kind["images"].place in AT_HAND
    model = by_kind["model"]
    if possible and by_kind["code"].place is Place.HERE and (lost or model.place is Place.LOST):
        stage = "train" if model.place is Place.LOST else "validate"
        yield Step("what is lost is made again: on the same machine's CPU the same bytes", f"dvc repro {stage}")


def _run_report(subject: Subject, record: TrainingRecord) -> Iterator[Step]:
    """The report by which `latentloom sample` knows the model's run: a picture holds the run's id."""
    named = subject.facts.mlflow_run_id if subject.facts else record.run_id
    ids = {"mlflow_run_id": named, "model_sha256": subject.sha256}
    committed = json.loads(record.run_report) if record.run_report else {}
    if subject.sha256 and ids.items() - committed.items():
        kept = committed if committed.get("model_sha256") == subject.sha256 else {}
        write = f"mkdir -p reports/train && echo {shlex.quote(json.dumps(kept | ids))} > {RUN_REPORT}"
        yield Step("which run the model is of, as pictures say it", write)


def _encoders(by_kind: dict[str, Link], root: Path) -> Iterator[Step]:
    for kind in ("VAE", "text encoder"):
        link = by_kind[kind]
        reference = link.details.get("reference")
        if link.place is Place.HERE and reference and (root / reference).is_dir() and not Path(reference).is_absolute():
            yield _copy(str(root / reference), reference)


def _picture(subject: Subject, drawn_by: Link) -> Iterator[Step]:
    if commit := drawn_by.details.get("commit"):
        yield Step("the code that drew the picture; the model stays", _join("git", "checkout", "-q", "-f", commit))
    source = drawn_by.details.get("folder", "src")
    program = ("python", "-m", "latentloom.cli")
    command = redraw_command(subject.facts, str(MODEL), AGAIN, program)
    yield Step("the picture", f"PYTHONPATH={shlex.quote(source)} {command}")
    yield Step("no word: the same bytes", _join("cmp", subject.picture, AGAIN))


def _copy(source: str, path: str) -> Step:
    make = f"mkdir -p {shlex.quote(str(Path(path).parent))} && "
    return Step(f"{path}, which is in no cache", make + _join("cp", "-r", source, path))


def _download(record: TrainingRecord, root: Path, name: str, folder: str) -> str:
    """The command that brings a file of the run: a copy where they lie on this machine, else MLflow's own."""
    place = urlsplit(record.run.info.artifact_uri)
    if place.scheme in ("", "file") and not place.netloc:
        return f"mkdir -p {folder} && " + _join("cp", Path(unquote(place.path)) / name, folder)
    get = _join("mlflow", "artifacts", "download", "-r", record.run_id, "-a", name, "-d", folder)
    return _with_store(get, root) + " > /dev/null"


def _with_store(command: str, root: Path) -> str:
    """The command with the store's address, unless that holds a secret: it is in the environment then."""
    uri = tracking_uri(root)
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} {command}" if uri == without_credentials(uri) else command


def _join(*words: object) -> str:
    return shlex.join(map(str, words))
