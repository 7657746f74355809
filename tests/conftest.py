"""What several test folders share: prepared images on disk, as the ingest stage leaves them."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from projects import finished, first_run, made_once, make_project  # noqa: F401 (fixtures)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("LATENTLOOM_TESTS_PID", str(os.getpid()))  # of pytest itself: its processes inherit it


# Files of tests that share no more than the projects that are made once for all processes.
SPREAD = {f"tests/faults/test_{name}.py" for name in ("corruption", "every_write", "full_disk", "kills")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that short tests fill the gaps at the end."""
    kinds: dict[str, list[Path]] = {"service": [], "pipeline": [], "fault": []}
    for item in items:
        for kind, files in kinds.items():
            if item.get_closest_marker(kind) and item.path not in files:
                files.append(item.path)
    # In turns, since the first of each kind makes a project that the others of its kind wait for.
    turns = {path: turn for files in kinds.values() for turn, path in enumerate(files)}
    items.sort(key=lambda item: turns.get(item.path, math.inf))  # stable: a file's tests stay in their order


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
    from latentloom.ingestion.shards import ImageRow, SourceCount, encode, write_manifest, write_shards

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
