"""From an image back to the bytes that made it: the commands that are printed give the same bytes again."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from projects import ROOT, Project
from typer.testing import CliRunner

from latentloom.cli import app

pytestmark = pytest.mark.pipeline

PAGE = (ROOT / "docs" / "lineage.md").read_text(encoding="utf-8")
LINKS = ["run", "evaluation", "params", "code", "latents", "text", "images", "rejects", "near duplicates", "validation"]
LINKS += ["source", "VAE", "text encoder"]


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Project:
    """A copy of the finished project, as the current folder; its results are not committed yet."""
    project = finished.copied(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return project


def keyboard(*words: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def printed_commands(output: str) -> str:
    """What the user would copy: all that stands below the heading."""
    return output.partition("To bring this state back:\n")[2]


def restored(project: Project, commands: str) -> Path:
    """Run commands as the user does, from anywhere; the folder that they went to."""
    script = f"set -e\n{commands}\npwd"
    result = subprocess.run(
        ["bash", "-c", script], cwd="/", env=project.environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{commands}\n{result.stdout}\n{result.stderr}"
    return Path(result.stdout.splitlines()[-1])


def shown(begins: str) -> list[str]:
    """The commands of the page that begin so, in its order."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if line.startswith(begins)]


def test_every_command_of_the_page_does_what_it_says_with_nothing_left_but_git_and_the_remote(project):
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "A model")
    keyboard("promote", "models/unet", "--to", "champion")
    (record,) = Path(".state/runs").iterdir()
    run_id = json.loads(record.read_text())["mlflow_run_id"]
    sampled, *asked, as_json = [shlex.split(line, comments=True)[1:] for line in shown("latentloom")]
    keyboard(*sampled)
    outputs = [keyboard(*(run_id if word == "RUN" else word for word in words)) for words in asked]
    assert len(outputs) == 4
    assert all(names(output) == ["model", *LINKS] for output in outputs[1:])
    assert names(outputs[0]) == ["picture", "model", *LINKS]
    assert names("picture" + PAGE.partition("```\npicture")[2].partition("```")[0]) == names(outputs[0])

    image = Path("samples/apple.png").read_bytes()
    project.run("dvc", "push", "-q")
    for folder in (".dvc/cache", "models/unet", "data/images", "data/latents", "data/text", "mlartifacts", ".state"):
        shutil.rmtree(folder)
    Path("mlflow.db").unlink()
    found = {link["link"]: link["place"] for link in json.loads(keyboard(*as_json[:3]))["links"]}
    assert {found[link] for link in ("model", "latents", "text", "images", "validation")} == {"in the remote"}
    assert found["run"] == "not known"
    commands = [" ".join(["latentloom", *as_json]), *shown("python"), *shown("sh -e")]
    clone = restored(project, f"cd {project.folder}\n" + "\n".join(commands) + "\ncd $(dirname ../*/again.png)")
    assert clone != project.folder
    assert (clone / "again.png").read_bytes() == image
    assert (clone / "data/latents/index.parquet").exists()


def names(output: str) -> list[str]:
    """What the lines of an output are about."""
    return [re.split("  +", line)[0] for line in output.partition("\n\n")[0].splitlines() if line]


def test_of_a_model_that_nobody_committed_the_data_and_the_changes_of_code_and_params_come_back(project):
    code = Path("src/latentloom/evaluation/image_generator.py")
    original = code.read_text()
    inverted = original.replace("return np.stack(", "return 255 - np.stack(")
    assert inverted != original
    code.write_text(inverted)
    project.set_params(train__steps=6)
    project.run("dvc", "repro", "train")
    own_code = {**project.environment, "PYTHONPATH": "src"}
    sample = ("sample", "a red apple", "-o")
    subprocess.run(["python", "-m", "latentloom.cli", *sample, "apple.png"], env=own_code, check=True)
    project.run("git", "checkout", "-q", "src", "params.yaml")
    keyboard(*sample, "present-code.png")
    assert Path("present-code.png").read_bytes() != Path("apple.png").read_bytes()
    shutil.rmtree("models/unet")  # DVC has it

    clone = restored(project, printed_commands(keyboard("lineage", "apple.png")))
    assert (clone / "again.png").read_bytes() == Path("apple.png").read_bytes()
    assert (clone / "src/latentloom/evaluation/image_generator.py").read_text() == inverted
    assert "steps: 6" in (clone / "params.yaml").read_text()
    for path in ("data/images/00000.parquet", "data/latents/00000.safetensors", "data/validated.json"):
        assert (clone / path).read_bytes() == Path(path).read_bytes()
