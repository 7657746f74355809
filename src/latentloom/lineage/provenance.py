"""What a model came from, written down when it is trained; `latentloom lineage` reads it back.

It goes into the MLflow run as ``provenance.json``, and into ``.state/runs/MODEL_SHA256.json`` on this machine, from
which `latentloom sample` takes what it writes into a PNG.
"""

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
    LATENTS,
    MODEL,
    NEAR_DUPLICATES,
    REJECTS,
    SOURCES,
    TEXT,
    VALIDATION_REPORT,
)
from latentloom.lineage.git import Git
from latentloom.params import Params
from latentloom.user import user_name

FORMAT_VERSION = 1
PACKAGES = Path("requirements.lock")
DATA = tuple(map(str, (LATENTS, TEXT, IMAGES, REJECTS, NEAR_DUPLICATES, VALIDATION_REPORT)))  # DVC's outs before train
INPUTS = {  # files that name the content of every row that the training reads
    "latents": LATENTS / "index.parquet",
    "latent statistics": LATENTS / "stats.json",
    "text": TEXT / "index.parquet",
    "captions": TEXT / "pairs.parquet",
    "validation": VALIDATION_REPORT,
}
ENCODERS = {"vae": (LATENTS / "stats.json", "vae"), "text_encoder": (TEXT / "stats.json", "encoder")}


@dataclass(frozen=True)
class Provenance:
    """What a training came from; None or empty where it is not known.

    Attributes:
        commit: what was checked out when the training began.
        dirty: whether files differed from it; the difference is in the run, as ``code.diff``.
        branch: of the commit.
        experiment: the name of the DVC experiment that ran the training.
        user: who trained.
        settings: of the training, as far as `latentloom lineage` shows them; all are in params.yaml of the commit.
        code_hash: of the modules that decide the weights, see `source_code.code_hash`.
        packages: the SHA-256 of requirements.lock.
        inputs: the SHA-256 of the files that name the data, by `INPUTS`' names.
        outs: DVC's hashes of the data, and of the finished model: path -> hash.
        sources: what the sources held, as `find_sources` listed it.
        ingested: what `ingest` counted.
        encoders: ``vae`` and ``text_encoder``, that made the caches: each one's reference and fingerprint.
        failed_checks: the names of the validation's checks that failed; None: there was no validation.
        model_sha256: names the finished model, see `model_files.model_hash`.
        mlflow_run_id: of the training, where MLflow answered.
        run_key: what names the training's run on this machine.
    """

    commit: str | None = None
    dirty: bool | None = None
    branch: str | None = None
    experiment: str | None = None
    user: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    code_hash: str | None = None
    packages: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    outs: Mapping[str, str] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    ingested: dict[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, dict[str, str]] = field(default_factory=dict)
    failed_checks: list[str] | None = None
    model_sha256: str | None = None
    mlflow_run_id: str | None = None
    run_key: str | None = None

    def with_model(
        self, folder: Path = MODEL, *, model_sha256: str, mlflow_run_id: str | None = None, run_key: str | None = None
    ) -> "Provenance":
        """This and the finished model in ``folder``, with DVC's hash of it."""
        return replace(
            self,
            outs={**self.outs, str(MODEL): out_hash(folder)},
            model_sha256=model_sha256,
            mlflow_run_id=mlflow_run_id,
            run_key=run_key,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"format_version": FORMAT_VERSION} | asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Provenance":
        """The reverse of `to_dict`; keys of a later version are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def collect(root: Path, params: Params, code_hash: str) -> Provenance:
    """What a training that begins now in ``root`` comes from."""
    git = Git(root)
    lock = root / DVC_LOCK
    outs = locked_outs(lock.read_bytes() if lock.exists() else None)
    checks = _read(root / VALIDATION_REPORT, {}).get("checks")
    return Provenance(
        commit=git.commit(),
        dirty=git.is_dirty(),
        branch=git.branch(),
        experiment=os.environ.get("DVC_EXP_NAME"),
        user=user_name(),
        settings={
            "seed": params.seed,
            "steps": params.train.steps,
            "learning rate": params.train.learning_rate,
        },
        code_hash=code_hash,
        packages=sha256_file(root / PACKAGES) if (root / PACKAGES).exists() else None,
        inputs={name: sha256_file(root / path) for name, path in INPUTS.items() if (root / path).exists()},
        outs={path: outs[path] for path in DATA if path in outs},
        sources=_read(root / SOURCES, []),
        ingested=_read(root / INGEST_REPORT, {}),
        encoders={name: own for name, (path, key) in ENCODERS.items() if (own := _read(root / path, {}).get(key))},
        failed_checks=None if checks is None else [name for name, check in checks.items() if not check["success"]],
    )


def code_diff(root: Path) -> str:
    """How code and params differ from the commit, new files included, for ``git apply``; often empty."""
    return Git(root).code_diff().decode("utf-8", "surrogateescape")  # each byte is kept, ends of lines too


def save_run_record(root: Path, provenance: Provenance) -> None:
    """Keep the provenance of a finished model on this machine, under the model's hash."""
    write_json(_run_record(root, provenance.model_sha256), provenance.to_dict())


def read_run_record(root: Path, model_sha256: str) -> Provenance | None:
    """The provenance of a model that was trained on this machine; None where there is none."""
    path = _run_record(root, model_sha256)
    return Provenance.from_dict(read_json(path)) if path.exists() else None


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _run_record(root: Path, model_sha256: str | None) -> Path:
    return root / ".state" / "runs" / f"{model_sha256}.json"
