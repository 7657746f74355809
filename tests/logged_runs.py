"""What tests of tracking log, as a training does, and what the store then has of it."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from mlflow.tracking import MlflowClient

from latentloom.tracking.runs import TrackedRun, new_run
from latentloom.tracking.store import tracking_uri

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)
AWAY = "http://somebody:secret@127.0.0.1:9"  # where no server answers


def log_training(run: TrackedRun, steps: Iterable[int]) -> None:
    run.log_params({"train": {"steps": 8}})
    for split in ("training", "validation"):
        run.log_dataset(name=f"mine-{split}", source="data/latents", digest=f"{split:.8}", rows=7, context=split)
    for step in steps:
        run.log_metrics({"train/mae": 1.0 / step, "train/learning_rate": 0.1}, step)
        if step % 2 == 0:
            run.log_metrics({"val/mae": 2.0 / step}, step)
            run.log_image(IMAGE, "samples", step)


def killed_training(root: Path, steps: Iterable[int], **tags: str) -> str:
    """Log ``steps`` in a process that is then killed; the run's key."""

    def until_killed():
        with new_run(root, name="first") as run:
            run.set_tags(tags)
            log_training(run, steps)
            (root / "key").write_text(run.key)
            os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=until_killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return (root / "key").read_text()


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri(root))


def logged_steps(root: Path, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in client(root).get_metric_history(run_id, key)]


def logged_images(root: Path, run_id: str) -> list[int]:
    """The steps of the images."""
    paths = [artifact.path for artifact in client(root).list_artifacts(run_id, "images")]
    return sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in paths if path.endswith(".png"))


def artifacts(root: Path, run_id: str) -> Path:
    return Path(urlparse(client(root).get_run(run_id).info.artifact_uri).path)


def stored(client: MlflowClient, run_id: str, files: Path) -> dict:
    """All that a store has of a run, as far as it is the same for two runs that logged the same.

    Args:
        client: of the store.
        run_id: the run's.
        files: the folder of its artifacts.
    """
    run = client.get_run(run_id)
    own = ("latentloom.key", "mlflow.runName")
    return {
        "status": run.info.status,
        "metrics": {
            key: [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in own},
        "data sets": Counter((given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs),
        "files": Counter(
            (re.sub(r"timestamp.*(?=\.png|compressed|\.webp)", "", str(path.relative_to(files))), path.read_bytes())
            for path in files.rglob("*")
            if path.is_file()
        ),
    }


def all_stored(root: Path, run_id: str) -> dict:
    """`stored`, of the project's own store."""
    return stored(client(root), run_id, artifacts(root, run_id))


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
