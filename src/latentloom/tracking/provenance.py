"""What a run came from, and what it was: the code, the params, the inputs by hash, the model; written into the run.

These are the links that `latentloom lineage` follows back.
"""

import getpass
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from latentloom.files import read_json, sha256_file
from latentloom.lineage.dvc_objects import directory_oid
from latentloom.model_files import model_hash
from latentloom.params import Params
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
# MLflow repeats a run's params above each picture, so it gets those that decide the model; params.yaml is an artifact.
NOT_COMPARED = {
    "evaluate": True,
    "machine": True,
    "monitor": True,
    "validate_": True,
    "ingest": {"max_pixels", "max_aspect_ratio", "near_duplicate_distance", "max_reject_fraction"},
    "train": {
        "gradient_accumulation",  # the same model, within rounding
    },
}
CODE_DIFF, COMMIT, MODEL_HASH = "code.diff", "mlflow.source.git.commit", "model.sha256"


def record_start(tracked: TrackedRun, params: Params, caches: "Caches", device: str) -> None:
    """Before the first step: the code, the params, the data sets, and a description, of the current folder."""
    tags = git_tags(Path.cwd()) | dvc_tags() | {"device": device, "mlflow.user": getpass.getuser()}
    tracked.set_tags(tags | input_tags(DECIDING | {"validation": VALIDATION}) | out_tags(Path("dvc.lock")))
    tracked.log_params(params.model_dump(by_alias=True, exclude=NOT_COMPARED))
    for path in (Path("params.yaml"), Path("dvc.lock"), VALIDATION, SOURCES, INGESTED):
        if path.exists():
            tracked.log_file(path)
    if diff := code_diff(Path.cwd()):
        tracked.log_text(diff, CODE_DIFF)
    sources = "+".join(entry.label for entry in params.ingest.sources)
    for context, data in (("training", caches.train), ("validation", caches.validation)):
        given = {"name": f"{sources}-{context}", "source": str(LATENTS), "digest": data.digest(), "context": context}
        tracked.log_dataset(data.table(), **given)
    tracked.describe(_description(params, caches, tags))


def record_model(tracked: TrackedRun, params: Params, caches: "Caches", folder: Path, result: "TrainingResult") -> None:
    """After the last step: the model's names and its config, and the figures in the description."""
    tracked.set_tags({MODEL_HASH: model_hash(folder), f"dvc.{folder}": directory_oid(folder)})
    tracked.log_file(folder / "config.json", "model")
    figures = {"train MAE": result.metrics["train_mae"], "validation MAE": result.val_mae}
    told = ", ".join(f"{name} **{value:.3f}**" for name, value in figures.items() if value is not None)
    tags = git_tags(Path.cwd()) | dvc_tags()
    tracked.describe(_description(params, caches, tags) + f"\n\nAt the end: {told}. Model `{model_hash(folder)[:12]}`.")


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


def _description(params: Params, caches: "Caches", tags: dict[str, str | None]) -> str:
    sources = " and ".join(entry.label for entry in params.ingest.sources)
    widths = "/".join(map(str, params.model.widths))
    lines = [
        f"**{len(caches.train):,} images of {sources}** ({len(caches.validation):,} held out), "
        f"{params.train.steps:,} steps of {params.train.batch_size} images, widths {widths}, "
        f"learning rate {params.train.learning_rate:g}, seed {params.seed}."
    ]
    if commit := tags[COMMIT]:
        changed = f", with local changes (`{CODE_DIFF}`)" if tags["git.dirty"] == "true" else ""
        lines.append(f"Code: commit `{commit[:10]}` of `{tags['git.branch']}`{changed}.")
    if name := tags["dvc.experiment"]:
        lines.append(f"DVC experiment `{name}`: `dvc exp apply {name}` brings it back.")
    if VALIDATION.exists():
        failed = [name for name, check in read_json(VALIDATION)["checks"].items() if not check["success"]]
        lines.append(f"Validation failed: **{', '.join(failed)}**." if failed else "Validation: all checks passed.")
    return "\n\n".join(lines)


def _git(root: Path, *arguments: str, **environment: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, check=True, env=os.environ | environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.decode("utf-8", "surrogateescape")  # a diff must keep every byte, ends of lines too
