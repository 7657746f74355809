"""A change reruns exactly the stages it must: DVC itself is asked, on a whole project with tiny data."""

import json
from pathlib import Path

import pytest
import yaml
from projects import Project, stages_run

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(first_run, tmp_path_factory) -> Project:
    finished, printed = first_run
    assert stages_run(printed) == ["ingest", "encode_images", "encode_text", "validate", "train", "evaluate"]
    return finished.copied(tmp_path_factory.mktemp("reruns") / "project")


def lock(project) -> dict:
    return yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]


def test_when_nothing_changed_nothing_runs(project):
    assert project.repro() == []


def test_guidance_reruns_the_evaluation_alone_and_going_back_computes_nothing(project):
    before = lock(project)
    project.set_params(evaluate__class_guidance=2.0)
    assert project.repro() == ["evaluate"]
    project.set_params(evaluate__class_guidance=3.0)
    assert project.repro() == []
    assert lock(project) == before


def test_learning_rate_retrains_and_going_back_is_served_from_the_run_cache(project):
    before = lock(project)
    run_before = (project.folder / "reports/train/run.json").read_text()
    project.set_params(train__learning_rate=0.002)
    assert project.repro() == ["train", "evaluate"]
    assert lock(project)["train"]["outs"] != before["train"]["outs"]
    project.set_params(train__learning_rate=0.001)
    assert project.repro() == []
    assert lock(project) == before
    assert (project.folder / "reports/train/run.json").read_text() == run_before


def test_image_size_reruns_everything(project):
    project.set_params(ingest__image_size=32)
    assert project.repro() == ["ingest", "encode_images", "encode_text", "validate", "train", "evaluate"]
    project.set_params(ingest__image_size=64)
    assert project.repro() == []


def test_another_text_encoder_reruns_what_reads_text(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    project.run(
        "python",
        "-c",
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); import tiny_models; tiny_models.save_clip({str(folder)!r})",
    )
    project.set_params(encode_text__model=str(folder))
    assert project.repro() == ["encode_text", "validate", "train", "evaluate"]
    config = json.loads((project.folder / "models/unet/config.json").read_text())
    assert config["text_dim"] == 24
    project.set_params(encode_text__model="bundled")
    assert project.repro() == []


def test_an_edit_to_the_evaluation_never_retrains(project):
    path = project.folder / "src/latentloom/evaluation/sheet.py"
    original = path.read_text()
    path.write_text(original + "\n# an edit\n")
    assert project.repro() == ["evaluate"]
    path.write_text(original)
    assert project.repro() == []


def test_how_the_machine_is_used_is_no_reason_to_rerun(project):
    project.set_params(machine__checkpoint_every=7, machine__checkpoints_kept=1, machine__data_memory_share=0.0)
    assert project.repro() == []


def test_device_and_tracking_address_are_no_reason_to_rerun(project):
    environment = project.environment | {"LATENTLOOM_DEVICE": "cpu", "MLFLOW_TRACKING_URI": "sqlite:///elsewhere.db"}
    result = project.run("env", *(f"{key}={value}" for key, value in environment.items()), "dvc", "status")
    assert result.stdout.split() == ["find_sources:", "always", "changed"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train__learning_rate", "fast", "train.learning_rate = 'fast'"),
        ("train__learning_rat", 0.1, "train.learning_rat = 0.1: unknown key (did you mean learning_rate?)"),
        ("ingest__source", "webdataset", "source: webdataset needs path"),
    ],
)
def test_a_wrong_param_is_refused_at_once_and_changes_nothing(project, name, value, expected):
    params = (project.folder / "params.yaml").read_text()
    before = lock(project)
    try:
        project.set_params(**{name: value})
        result = project.run("dvc", "repro", check=False)
        assert result.returncode != 0
        assert expected in result.stdout + result.stderr
        result = project.run("latentloom", "check", check=False)
        assert result.returncode == 1
        assert expected in result.stderr
    finally:
        (project.folder / "params.yaml").write_text(params)
    project.repro()
    assert lock(project) == before
