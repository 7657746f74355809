"""What a run came from: the code's commit, the experiment's name, the hashes of its inputs."""

import os
import subprocess
from pathlib import Path

from latentloom.files import sha256_file

WRITTEN_BY_THE_PIPELINE = (":!dvc.lock", ":!reports")


def git_tags(root: Path) -> dict[str, str | None]:
    """The commit, and whether files other than the pipeline's own results differ from it; None where git cannot say."""
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN_BY_THE_PIPELINE)
    return {
        "mlflow.source.git.commit": commit,
        "git.dirty": None if status is None else str(bool(status)).lower(),
        "git.branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
    }


def dvc_tags() -> dict[str, str | None]:
    """The DVC experiment that runs this stage, where one does."""
    return {"dvc.experiment": os.environ.get("DVC_EXP_NAME"), "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV")}


def input_tags(inputs: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of each input file, as ``input.NAME``."""
    return {f"input.{name}": sha256_file(path) for name, path in inputs.items()}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
