"""What several test folders share: prepared images on disk, as the ingest stage leaves them."""

import gc
import math
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from projects import QUIET, finished, first_run, made_once, make_project  # noqa: F401 (fixtures)

os.environ.update(QUIET | os.environ)
os.environ.setdefault("LATENTLOOM_TESTS_PID", str(os.getpid()))  # of pytest itself: its processes inherit it


# Files of tests that share no more than the projects that are made once for all processes.
SPREAD = {f"tests/faults/test_{name}.py" for name in ("corruption", "every_write", "full_disk", "kills")}
# The files that take longest, the longest first: begun last, one of them would run when all else has ended.
# At the end of the list are the longest of the fast tier.
LONGEST = (
    "tests/pipeline/test_versions.py",
    "tests/pipeline/test_team_server.py",
    "tests/pipeline/test_experiments.py",
    "tests/faults/test_resume.py",
    "tests/faults/test_every_write.py",
    "tests/pipeline/test_lineage.py",
    "tests/faults/test_processes.py",
    "tests/pipeline/test_notebooks.py",
    "tests/pipeline/test_fresh_clone.py",
    "tests/pipeline/test_caches.py",
    "tests/faults/test_tracking_server.py",
    "tests/registry/test_serving.py",
    "tests/pipeline/test_reruns.py",
    "tests/registry/test_registry.py",
    "tests/training/test_run.py",
    "tests/training/test_loop.py",
    "tests/lineage/test_lineage.py",
    "tests/validation/test_validate.py",
    "tests/evaluation/test_text_to_image.py",
)
MARKED = ("service", "pipeline", "fault")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that short tests fill the gaps at the end."""

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        if file in LONGEST:
            return LONGEST.index(file)
        return len(LONGEST) + (not any(map(item.get_closest_marker, MARKED)))

    places: dict[Path, float] = {}  # of a file, that of the first of its tests, so that they stay together
    for item in items:
        places[item.path] = min(places.get(item.path, math.inf), place(item))
    items.sort(key=lambda item: places[item.path])  # stable: a file's tests stay in their order


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among what the tests import, neither now nor later: that takes a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist loadfile``, a file's tests run in one process, since they share what the file's fixtures make.

    Those of `SPREAD` are handed out one by one. (xdist 3.8's own groups have no effect with pytest 9.2.)
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file in SPREAD else file

    return Files(config, log)


@pytest.fixture
def prepare_images(tmp_path: Path) -> Callable[..., Path]:
    """``prepare_images(seeds, size=32)`` writes images as the ingest stage does; a fourth go to validation."""
    from latentloom.ingestion.images import image_id
    from latentloom.ingestion.pngs import encode
    from latentloom.ingestion.shard_writer import ImageRow, SourceCount, write_manifest, write_shards

    def prepare(seeds: Sequence[int], size: int = 32, name: str = "images") -> Path:
        def row(seed: int) -> ImageRow:
            pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
            captions = [f"picture {seed}", f"noise of kind {seed % 3}"]
            split = "validation" if seed % 4 == 3 else "train"
            return ImageRow(image_id(pixels), encode(pixels), captions, split, "folder", f"{seed}.png", size, size)

        folder, rows = tmp_path / name, [row(seed) for seed in seeds]
        train = sum(row.split == "train" for row in rows)
        count = SourceCount("folder", "folder", 1.0, "made by a test", "CC0", found=len(rows), kept=len(rows))
        write_manifest(folder, size, train, [count], write_shards(rows, folder))
        return folder

    return prepare
