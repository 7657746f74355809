"""What a model came from, written down when it is trained; `latentloom lineage` reads it back.

It goes into the MLflow run as ``provenance.json``, with tags and a description for people, and into
``.state/runs/MODEL_SHA256.json`` on this machine; a model that is passed on carries it in its folder. `latentloom
sample` writes a part of it into each PNG.
"""

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentloom.dvc_outs import locked_outs, out_hash
from latentloom.files import read_json, sha256_file, write_json
from latentloom.layout import (
    DVC_LOCK,
    IMAGES,
    INGEST_REPORT,
    INIT,
    LATENTS,
    MODEL,
    NEAR_DUPLICATES,
    PARAMS,
    REJECTS,
    SOURCES,
    TEXT,
    VALIDATED,
    VALIDATION_REPORT,
)
from latentloom.params import Params
from latentloom.tracking.git import Git
from latentloom.tracking.runs import TrackedRun

PROVENANCE, CODE_DIFF = "provenance.json", "code.diff"
HASH_TAG, NOTE = "model.sha256", "mlflow.note.content"  # MLflow shows the latter as the run's description
DATA = {  # DVC's outs before the training, by what `latentloom lineage` calls each
    "latents": str(LATENTS),
    "text": str(TEXT),
    "images": str(IMAGES),
    "rejects": str(REJECTS),
    "near duplicates": str(NEAR_DUPLICATES),
    "validation": str(VALIDATED),
}
INPUTS = {  # files that name the content of every row that the training reads
    "latents": LATENTS / "index.parquet",
    "latent statistics": LATENTS / "stats.json",
    "text": TEXT / "index.parquet",
    "captions": TEXT / "pairs.parquet",
    "validation": VALIDATED,
}
ENCODERS = {"vae": (LATENTS / "stats.json", "vae"), "text_encoder": (TEXT / "stats.json", "encoder")}
IN_IMAGES = ("mlflow_run_id", "commit", "dirty", "outs", "encoders")
# MLflow repeats a run's params above each image, so it gets the sections that decide the model.
SECTIONS = {"seed", "ingest", "encode_images", "encode_text", "model", "diffusion", "train"}


@dataclass(frozen=True)
class Provenance:
    """What a training came from; None or empty where it is not known."""

    commit: str | None = None  # what was checked out when the training began
    dirty: bool | None = None  # whether code or params differed from it; the run has the difference, as `CODE_DIFF`
    branch: str | None = None
    experiment: str | None = None  # DVC's, that ran the training
    user: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # the SHA-256 of the files of `INPUTS`
    outs: Mapping[str, str] = field(default_factory=dict)  # DVC's hashes of the data and the finished model, by path
    sources: list[dict[str, Any]] = field(default_factory=list)  # as `find_sources` listed them
    ingested: dict[str, Any] = field(default_factory=dict)  # what `ingest` counted
    encoders: Mapping[str, dict[str, str]] = field(default_factory=dict)  # of `ENCODERS`: reference and fingerprint
    base: Mapping[str, str | None] | None = None  # the model that it started from, as `registry.base.Base` has it
    failed_checks: list[str] | None = None  # of the validation; None: there was none
    model_sha256: str | None = None  # names the finished model, see `model_files.model_hash`
    converted_from: str | None = None  # the trained model, where the present one is a copy in another precision
    mlflow_run_id: str | None = None  # where MLflow answered
    run_key: str | None = None  # names the training's run on this machine

    @property
    def sizes(self) -> list[str]:
        """Of the images, as ``192x128``; empty where all are squares of one size."""
        return [row["size"] for row in self.ingested.get("sizes", [])[:-1]]  # the last is of all together

    def with_model(self, folder: Path, model_sha256: str, run_key: str | None) -> "Provenance":
        """This and the finished model in ``folder``, with DVC's hash of it."""
        outs = {**self.outs, str(MODEL): out_hash(folder)}
        return replace(self, outs=outs, model_sha256=model_sha256, run_key=run_key)

    def in_images(self) -> dict[str, Any]:
        """The part that goes into each PNG: the run, the commit, and what names data, encoders and the base."""
        return {name: getattr(self, name) for name in (*IN_IMAGES, *(["base"] if self.base else []))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Provenance":
        """The reverse of `asdict`; keys of another version are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def collect(root: Path) -> Provenance:
    """What a training that begins now in ``root`` comes from."""
    git, lock = Git(root), root / DVC_LOCK
    commit = git.commit()
    outs = locked_outs(lock.read_bytes() if lock.exists() else None)
    return Provenance(
        commit=commit,
        dirty=bool(git.code_diff()) if commit else None,
        branch=git.branch(),
        experiment=os.environ.get("DVC_EXP_NAME"),
        user=user_name(),
        inputs={name: sha256_file(root / path) for name, path in INPUTS.items() if (root / path).exists()},
        outs={path: outs[path] for path in DATA.values() if path in outs},
        sources=_read(root / SOURCES, []),
        ingested=_read(root / INGEST_REPORT, {}),
        encoders={name: own for name, (path, key) in ENCODERS.items() if (own := _read(root / path, {}).get(key))},
        base=_read(root / INIT, None),
        failed_checks=_read(root / VALIDATED, {}).get("failed"),
    )


def user_name() -> str | None:
    """Who runs this; None where the user id has no name, as in a container."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # as Python's versions have it
        return None


def record_start(
    tracked: TrackedRun,
    params: Params,
    provenance: Provenance,
    *,
    images: Mapping[str, int],
    digests: Mapping[str, str],
    device: str,
) -> None:
    """Before the first step: record the code, the params and the data, and describe the run.

    Args:
        images: the number of images per split, ``training`` first.
        digests: a hash of each split's content.
    """
    record_code(tracked, provenance)
    tracked.set_tags({"device": device})
    tracked.log_params(params.model_dump(mode="json", by_alias=True, include=SECTIONS))
    tracked.log_text(json.dumps(asdict(provenance), indent=2) + "\n", PROVENANCE)
    sources = [source["name"] for source in provenance.ingested.get("sources", [])] or ["images"]
    for split, rows in images.items():
        name = f"{'+'.join(sources)}-{split}"
        tracked.log_dataset(name=name, source=str(LATENTS), digest=digests[split], rows=rows, context=split)
    for path in (PARAMS, VALIDATION_REPORT):
        if path.exists():
            tracked.log_file(path)
    tracked.set_tags({NOTE: _description(params, provenance, images, sources)})


def record_code(tracked: TrackedRun, provenance: Provenance) -> None:
    """Record whose and which code a run is of, and how it differs from its commit, for ``git apply``."""
    tracked.set_tags(
        {
            "mlflow.source.git.commit": provenance.commit,
            "git.dirty": None if provenance.dirty is None else str(provenance.dirty).lower(),
            "git.branch": provenance.branch,
            "dvc.experiment": provenance.experiment,
            "mlflow.user": provenance.user,
        }
    )
    if provenance.dirty:
        tracked.log_text(Git(Path.cwd()).code_diff(), CODE_DIFF)


def origin(provenance: Provenance) -> list[str]:
    """What a run's description says of its code and its DVC experiment, in paragraphs."""
    said = []
    if provenance.commit:
        changes = f", with local changes (`{CODE_DIFF}`)" if provenance.dirty else ""
        said.append(f"Code: commit `{provenance.commit[:10]}` of branch `{provenance.branch}`{changes}.")
    if name := provenance.experiment:
        said.append(f"DVC experiment `{name}`; `dvc exp apply {name}` restores it.")
    return said


def record_model(tracked: TrackedRun, provenance: Provenance, folder: Path) -> None:
    """After the last step: record the model in ``folder``, and its hash with the provenance."""
    tracked.set_tags({HASH_TAG: provenance.model_sha256})
    tracked.log_file(folder / "config.json", "model")
    tracked.log_text(json.dumps(asdict(provenance), indent=2) + "\n", PROVENANCE)


def save_run_record(root: Path, provenance: Provenance) -> None:
    """Keep the provenance of a finished model on this machine, under the model's hash."""
    write_json(_run_record(root, provenance.model_sha256), asdict(provenance))


def read_run_record(root: Path, model_sha256: str, folder: Path | None = None) -> Provenance | None:
    """The provenance of a model that was trained on this machine, else that which its ``folder`` carries, or None."""
    own, carried = _run_record(root, model_sha256), folder and folder / PROVENANCE
    if own.exists():
        return Provenance.from_dict(read_json(own))
    found = Provenance.from_dict(read_json(carried)) if carried and carried.exists() else None
    return found if found and found.model_sha256 == model_sha256 else None  # it may be another model's


def _run_record(root: Path, model_sha256: str | None) -> Path:
    return root / ".state" / "runs" / f"{model_sha256}.json"


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _description(params: Params, provenance: Provenance, images: Mapping[str, int], sources: list[str]) -> str:
    training, *held_out = images.values()
    train, widths = params.train, "/".join(map(str, params.model.widths))
    described = (
        f"**{training:,} images of {' and '.join(sources)}** ({sum(held_out):,} held out), {train.steps:,} steps of "
        f"{train.batch_size} images, widths {widths}, learning rate {train.learning_rate:g}, seed {params.seed}."
    )
    lines = [described, *origin(provenance)]
    if base := provenance.base:
        lines.insert(1, f"Started from the model `{base['sha256'][:12]}` (`{base['reference']}`).")
    if (failed := provenance.failed_checks) is not None:
        lines.append(f"Validation failed: **{', '.join(failed)}**." if failed else "Validation: all checks passed.")
    return "\n\n".join(lines)
