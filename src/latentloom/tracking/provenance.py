"""Bridges the stage `train` to `training_run` until `lineage.provenance` collects what a training comes from."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latentloom.files import read_json, sha256_file
from latentloom.model_files import model_hash
from latentloom.params import Params
from latentloom.tracking import training_run
from latentloom.tracking.runs import TrackedRun

if TYPE_CHECKING:
    from latentloom.encoding.dataset import Caches
    from latentloom.training.run import TrainingResult

WRITTEN_BY_THE_PIPELINE = (":!dvc.lock", ":!reports")
CODE = ("src", "pipelines", "params.yaml", "dvc.yaml", "requirements.lock", "pyproject.toml")
LATENTS, TEXT, VALIDATION = Path("data/latents"), Path("data/text"), Path("reports/validation.json")
SOURCES, INGESTED = Path("data/sources.json"), Path("reports/ingest.json")
DECIDING = {  # files that name the content of every row of the caches
    "latents": LATENTS / "index.parquet",
    "latent statistics": LATENTS / "stats.json",
    "text": TEXT / "index.parquet",
    "captions": TEXT / "pairs.parquet",
}
CODE_DIFF, COMMIT, MODEL_HASH = "code.diff", "mlflow.source.git.commit", "model.sha256"


def record_start(tracked: TrackedRun, params: Params, caches: "Caches", device: str) -> None:
    """`training_run.record_start` with what the current folder says."""
    splits = {"training": caches.train, "validation": caches.validation}
    training_run.record_start(
        tracked,
        params.model_dump(by_alias=True),
        _provenance(),
        images={split: len(data) for split, data in splits.items()},
        digest={split: data.digest() for split, data in splits.items()},
        device=device,
        code_diff=code_diff(Path.cwd()),
    )


def record_model(tracked: TrackedRun, params: Params, caches: "Caches", folder: Path, result: "TrainingResult") -> None:
    """`training_run.record_model` with the model in ``folder``."""
    training_run.record_model(
        tracked,
        metrics=result.metrics,
        val_mae=result.val_mae,
        model_folder=folder,
        model_sha256=model_hash(folder),
        provenance=_provenance(),
    )


def _provenance() -> dict[str, Any]:
    code, inputs = git_tags(Path.cwd()), DECIDING | {"validation": VALIDATION}
    checks = read_json(VALIDATION)["checks"] if VALIDATION.exists() else None
    return {
        "commit": code[COMMIT],
        "dirty": None if code["git.dirty"] is None else code["git.dirty"] == "true",
        "branch": code["git.branch"],
        "experiment": os.environ.get("DVC_EXP_NAME"),
        "inputs": {name: sha256_file(path) for name, path in inputs.items() if path.exists()},
        "outs": out_tags(Path("dvc.lock")),
        "ingested": read_json(INGESTED) if INGESTED.exists() else {},
        "failed_checks": None if checks is None else [name for name, check in checks.items() if not check["success"]],
    }


def git_tags(root: Path) -> dict[str, str | None]:
    """The commit, and whether files other than the pipeline's own results differ from it; None where git cannot say."""
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN_BY_THE_PIPELINE)
    commit, branch = _git(root, "rev-parse", "HEAD"), _git(root, "rev-parse", "--abbrev-ref", "HEAD")
    return {
        COMMIT: commit and commit.strip(),
        "git.dirty": None if status is None else str(bool(status)).lower(),
        "git.branch": branch and branch.strip(),
    }


def code_diff(root: Path) -> str:
    """What of the code and the params is not as in the commit, new files included, for ``git apply``; often empty."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}  # the user's own stays as it is
        paths = [path for path in CODE if (root / path).exists()]
        if _git(root, "read-tree", "HEAD", **index) is None or _git(root, "add", "-A", "--", *paths, **index) is None:
            return ""
        diff = _git(root, "diff", "--cached", "--binary", "HEAD", "--", *paths, **index)
    return diff or ""


def dvc_tags() -> dict[str, str | None]:
    """The DVC experiment that runs this stage, where one does."""
    return {"dvc.experiment": os.environ.get("DVC_EXP_NAME"), "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV")}


def input_tags(inputs: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of each input file that is there, as ``input.NAME``."""
    return {f"input.{name}": sha256_file(path) for name, path in inputs.items() if path.exists()}


def out_tags(lock: Path) -> dict[str, str]:
    """DVC's hashes of the data that the training reads, as ``dvc.PATH``; nothing where DVC made none of it."""
    if not lock.exists():
        return {}
    stages = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return {f"dvc.{out['path']}": out["md5"] for out in outs if out["path"].startswith("data/") and "md5" in out}


def _git(root: Path, *arguments: str, **environment: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, check=True, env=os.environ | environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.decode("utf-8", "surrogateescape")  # a diff must keep every byte, ends of lines too
