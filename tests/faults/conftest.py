"""A project that no fault has met: what each of its stages left, and how long it took."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from projects import STAGES, Project, new_project
from stages import SERVER, copy_project, finish, read_outs
from tiny_models import save_clip


@dataclass(frozen=True)
class Uninterrupted:
    """A finished project, and by stage: the files of its outs, and the seconds it ran."""

    project: Project
    outs: dict[str, dict[str, bytes]]
    seconds: dict[str, float]


@pytest.fixture(scope="session")
def uninterrupted(made_once) -> Uninterrupted:
    """All of OpenMoji at 32 pixels: more than one shard of everything, yet seconds of work."""
    warm_up = SERVER.Process(target=int)  # the server makes its imports before it answers for the first time
    warm_up.start()
    warm_up.join()
    folder, seconds = made_once("uninterrupted", _run_all)
    project = Project(folder / "project")
    return Uninterrupted(project, {stage: read_outs(project, stage) for stage in STAGES}, json.loads(seconds))


def _run_all(folder: Path) -> str:
    """Run the stages of a new project; the seconds of each, as JSON."""
    project = new_project(folder / "project")
    project.set_params(
        ingest__limit=None,
        ingest__image_size=32,
        encode_text__model=str(save_clip(folder / "clip", dim=384)),
        model__widths=[32, 64],
        train__steps=4,
        monitor__sample_count=2,
    )
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        finish(project, stage)
        seconds[stage] = time.monotonic() - started
    return json.dumps(seconds)


@pytest.fixture
def project(uninterrupted, tmp_path) -> Project:
    """A copy of the finished project, to be harmed."""
    return copy_project(uninterrupted.project, tmp_path / "project")
