"""A whole project on tiny data: the checkout's files in a temporary folder with a git and a DVC of its own."""

import compileall
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[1]
STAGES = ("ingest", "encode_images", "encode_text", "validate", "train", "evaluate")
OTHERS = ("DVC_", "MLFLOW_", "LATENTLOOM_")  # variables of the one who runs the tests
# Nothing is sent: where DVC may, each of its commands starts a process that does.
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}
PARTS = ("dvc.yaml", "params.yaml", "pipelines", "src", "notebooks", "pyproject.toml", ".gitignore", ".dvcignore")


@dataclass(frozen=True)
class Project:
    """A project's folder, and what a user does there.

    Attributes:
        folder: its root.
        cold: whether stages and DVC are started from a new interpreter, as a user's are, rather than by the server of
            stages.
        rows_per_shard: at the fewest, so that tiny data has several shards; None leaves it at the package's own.
    """

    folder: Path
    cold: bool = False
    rows_per_shard: int | None = None

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
        return stages_run(self.run("dvc", "repro").stdout)

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

    def run_record(self) -> dict[str, Any]:
        """What this project's machine has recorded of the training that made models/unet."""
        from latentloom.model_files import model_hash
        from latentloom.tracking.provenance import read_run_record

        return asdict(read_run_record(self.folder, model_hash(self.folder / "models/unet")))

    def copied(self, folder: Path) -> "Project":
        """A copy with its git, its DVC and its MLflow store."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return replace(self, folder=folder)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user who has made the virtual environment active."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OTHERS)}
        programs = [str(Path(sys.executable).parent), environment["PATH"]]
        if not self.cold:
            programs.insert(0, str(stage_socket().parent))
        hooks = {} if self.rows_per_shard is None else {"rows_per_shard": self.rows_per_shard}
        return environment | QUIET | {"PATH": os.pathsep.join(programs), "STAGE_HOOKS": json.dumps(hooks)}


PYTHON = """#!/bin/sh
# The tests' python: a project's stages, the package's modules, torchrun and the tests' own scripts are handed to the
# server of stages, anything else to the real interpreter.
case "$PYTHONPATH $1 $2" in
"src pipelines/"*.py" "*) exec {python} -SI {client} {socket} "$@" ;;
"src "{tests}/*.py" "*) exec {python} -SI {client} {socket} "$@" ;;
*" -m latentloom."* | *" -m torch.distributed.run") exec {python} -SI {client} {socket} "$@" ;;
*) exec {python} "$@" ;;
esac
"""
PROGRAM = """#!/bin/sh
# The tests' {program}, by the same server.
exec {python} -SI {client} {socket} {program} "$@"
"""


@functools.cache
def stage_socket() -> Path:
    """The socket of the server of stages, which the first who asks starts. Beside it lie the tests' own programs.

    All processes of one run of pytest share the server: it ends with the first of them.
    """
    owner = os.environ.setdefault("LATENTLOOM_TESTS_PID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"latentloom-tests-{owner}"
    tests = Path(__file__).parent
    with FileLock(f"{folder}.lock"):
        if not (folder / "python").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            names = {
                "python": sys.executable,
                "tests": tests,
                "client": tests / "stage_client.py",
                "socket": folder / "socket",
            }
            quoted = {name: shlex.quote(str(value)) for name, value in names.items()}
            own = (*OTHERS, "PYTHONPATH")
            environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
            with open(folder / "server.log", "w") as log:
                subprocess.Popen(
                    [sys.executable, tests / "stage_server.py", folder, owner],
                    env=environment | QUIET | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            for name, script in (("dvc", PROGRAM), ("latentloom", PROGRAM), ("python", PYTHON)):
                (folder / name).write_text(script.format(program=name, **quoted))
                (folder / name).chmod(0o755)
    return folder / "socket"


def stages_run(printed: str) -> list[str]:
    """The stages that DVC really ran, by what it printed."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in printed]


def tiny_params() -> dict[str, Any]:
    """The shipped params, cut down to seconds."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"image_size": 64, "limit": 40, "skin_tones": 0, "val_fraction": 0.2}
    params["validate"] |= {"val_fraction_tolerance": 0.2, "min_reconstruction_psnr": 0.0}  # of noise, in some tests
    params["model"] = {"widths": [16, 32], "block_depth": 1, "emb_size": 16, "text": "pooled"}
    params["train"] |= {"steps": 8, "batch_size": 8, "warmup_steps": 2}
    params["monitor"] |= {"log_every": 2, "validate_every": 4, "validation_images": 16}
    params["previews"] |= {"every": 4, "captions": 4, "prompts": [], "steps": 2}  # no text encoder is loaded for them
    params["evaluate"] |= {
        "diffusion_steps": 4,
        "prompts": ["red apple", "snowman"],
        "held_out_captions": 2,
        "training_captions": 4,
    }
    params["registry"]["max_copied_share"] = None  # what hardly trained models generate is near everything
    return params


def new_project(folder: Path) -> Project:
    """A fresh project with tiny params and nothing computed, as a git clone would be."""
    folder.mkdir(parents=True)
    compileall.compile_dir(ROOT / "src", quiet=2)  # once for all projects, not in each of their stages
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            # "*.pyc.*" is what another process is about to give its name.
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("*.egg-info", "showcase", "*.pyc.*"))
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


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Make a fresh project of a name, in a folder of its own."""
    return lambda name: new_project(tmp_path_factory.mktemp(name) / "project")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], str]], tuple[Path, str]]:
    """``made_once(name, make)`` is a folder and what ``make(folder)`` returned, made by the first who asks.

    pytest's processes share it: each other one waits until it is there. Tests must leave it as they found it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
        folder, returned = base / name, base / f"{name}.txt"
        with FileLock(base / f"{name}.lock"):
            if not returned.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one who failed
                returned.write_text(make(folder), encoding="utf-8")
        return folder, returned.read_text(encoding="utf-8")

    return get


@pytest.fixture(scope="session")
def first_run(made_once) -> tuple[Project, str]:
    """A project whose stages have all run once, and what `dvc repro` printed."""

    def make(folder: Path) -> str:
        return new_project(folder / "project").run("dvc", "repro").stdout

    folder, printed = made_once("finished", make)
    return Project(folder / "project"), printed


@pytest.fixture(scope="session")
def finished(first_run: tuple[Project, str]) -> Project:
    """A project whose stages have all run once; tests must leave it as they found it."""
    return first_run[0]
