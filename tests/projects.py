"""A whole project on tiny data: the checkout's files in a temporary folder with a git and a DVC of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = ("ingest", "encode_images", "encode_text", "validate", "train", "evaluate")
PARTS = ("dvc.yaml", "params.yaml", "pipelines", "src", "notebooks", "pyproject.toml", ".gitignore", ".dvcignore")


@dataclass(frozen=True)
class Project:
    """A project's folder, and what a user does there."""

    folder: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a user would, in the project's environment; fail with its output."""
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        if check and result.returncode:
            pytest.fail(
                f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
            )
        return result

    def repro(self) -> list[str]:
        """``dvc repro``; the stages that DVC really ran, not those it skipped or took from its run cache.

        Apart from `find_sources`, which always runs.
        """
        output = self.run("dvc", "repro").stdout
        return [stage for stage in STAGES if f"Running stage '{stage}'" in output]

    def set_params(self, **values: Any) -> None:
        """Change params by dotted names, with ``__`` for the dot."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for name, value in values.items():
            *sections, key = name.split("__")
            section = params
            for part in sections:
                section = section[part]
            section[key] = value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user who has made the virtual environment active."""
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "LATENTLOOM_"))
        }
        scripts = str(Path(sys.executable).parent)
        return environment | {
            "PATH": os.pathsep.join([scripts, environment["PATH"]]),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }


def tiny_params() -> dict[str, Any]:
    """The shipped params, cut down to seconds."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"image_size": 64, "limit": 40, "val_fraction": 0.2}
    params["validate"]["val_fraction_tolerance"] = 0.2
    params["model"] = {"widths": [16, 32], "block_depth": 1, "emb_size": 16}
    params["train"] |= {
        "steps": 8,
        "batch_size": 8,
        "warmup_steps": 2,
        "log_every": 2,
        "validate_every": 4,
        "sample_every": 4,
    }
    params["train"] |= {"sample_count": 4}
    params["evaluate"] |= {
        "diffusion_steps": 4,
        "prompts": ["red apple", "snowman"],
        "held_out_captions": 2,
        "recall_captions": 4,
    }
    return params


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Make a fresh project with tiny params and nothing computed, as a git clone would be."""

    def make(name: str) -> Project:
        folder = tmp_path_factory.mktemp(name) / "project"
        folder.mkdir()
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy2(source, folder / part)
        for part in (".gitignore", "config", "plots/page.html"):
            copy = folder / ".dvc" / part
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / ".dvc" / part, copy)
        (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(), sort_keys=False))
        project = Project(folder)
        project.run("git", "init", "-q", "-b", "main")
        project.run("git", "config", "user.email", "test@example.org")
        project.run("git", "config", "user.name", "Test")
        project.run("git", "add", "-A")
        project.run("git", "commit", "-q", "-m", "A project")
        return project

    return make


@pytest.fixture(scope="session")
def first_run(make_project: Callable[[str], Project]) -> tuple[Project, str]:
    """A project whose stages have all run once, and what `dvc repro` printed."""
    project = make_project("finished")
    return project, project.run("dvc", "repro").stdout


@pytest.fixture(scope="session")
def finished(first_run: tuple[Project, str]) -> Project:
    """A project whose stages have all run once; tests must leave it as they found it."""
    return first_run[0]
