"""A project that no fault has met, and what each of its stages left."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from projects import STAGES, Project, new_project
from stages import copy_project, finish, read_outs
from tiny_models import save_clip


@dataclass(frozen=True)
class Uninterrupted:
    """A finished project, and by stage the files of its outs."""

    project: Project
    outs: dict[str, dict[str, bytes]]


@pytest.fixture(scope="session")
def uninterrupted(made_once) -> Uninterrupted:
    """Tiny data in several shards of everything: what ``start`` makes shards of is a few rows each."""
    folder, _ = made_once("uninterrupted", _run_all)
    project = Project(folder / "project")
    return Uninterrupted(project, {stage: read_outs(project, stage) for stage in STAGES})


def _run_all(folder: Path) -> str:
    """Run the stages of a new project."""
    project = new_project(folder / "project")
    project.set_params(
        ingest__limit=40,
        ingest__image_size=32,
        encode_text__model=str(save_clip(folder / "clip", dim=384)),
        model__widths=[16, 32],
        train__steps=4,
        previews__captions=2,
    )
    return "".join(finish(project, stage) for stage in STAGES)


@pytest.fixture
def project(uninterrupted, tmp_path) -> Project:
    """A copy of the finished project, to be harmed."""
    return copy_project(uninterrupted.project, tmp_path / "project")
