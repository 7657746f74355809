"""Whatever a person calls a model by, its files are found, and are those of its hash."""

import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from dvc.repo import Repo

from latentloom.dvc_outs import out_hash
from latentloom.errors import UserError
from latentloom.files import write_json
from latentloom.model_files import model_hash
from latentloom.registry import registry
from latentloom.registry.models import find_model, look_up
from latentloom.tracking.evaluations import EVALUATED_TAG
from latentloom.tracking.provenance import PROVENANCE, Provenance
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import open_client


def test_a_folder_is_its_own_model_and_needs_no_store(tiny_unets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_model(str(tiny_unets[0]), tmp_path)
    assert (found.folder, found.sha256) == (tiny_unets[0], model_hash(tiny_unets[0]))
    assert (found.run_id, found.version) == (None, None)
    assert not list(tmp_path.iterdir())


def test_a_run_is_found_by_id_and_by_name(project_root, train, tiny_unets):
    shutil.copytree(tiny_unets[0], "models/unet")
    run_id = train(tiny_unets[0], name="gentle, isn't it")
    for reference in (run_id, f"runs:/{run_id}", "gentle, isn't it"):
        found = find_model(reference, project_root)
        assert (found.run_id, found.sha256) == (run_id, model_hash(tiny_unets[0]))
        assert found.folder == project_root / "models/unet"


def test_an_evaluation_stands_for_its_model_and_of_several_the_last_has_the_figures(project_root, train, tiny_unets):
    shutil.copytree(tiny_unets[0], "models/unet")
    run_id = train(tiny_unets[0], name="gentle")
    with new_run(project_root, name="mild") as mild:
        mild.set_tags({EVALUATED_TAG: model_hash(tiny_unets[0])})
    found = find_model("mild", project_root)
    assert (found.run_id, found.evaluation_id, found.sha256) == (run_id, mild.id, model_hash(tiny_unets[0]))
    assert find_model("gentle", project_root).evaluation_id == mild.id
    assert look_up("gentle, evaluated", project_root).evaluation.info.run_name == "gentle, evaluated"


def test_of_two_runs_of_a_name_the_one_with_a_model_is_taken(project_root, train, tiny_unets):
    shutil.copytree(tiny_unets[0], "models/unet")
    client = open_client(project_root)
    run_id = train(tiny_unets[0], name="twice")
    killed = client.create_run(client.get_run(run_id).info.experiment_id, run_name="twice").info.run_id
    assert find_model("twice", project_root).run_id == run_id
    with pytest.raises(UserError, match=r"has no model.*train again"):
        find_model(killed, project_root)


def test_a_name_of_several_models_is_rejected_with_their_ids(project_root, train, tiny_unets):
    ids = [train(folder, name="twice") for folder in tiny_unets[:2]]
    with pytest.raises(UserError, match="names 2 runs") as rejected:
        find_model("twice", project_root)
    assert all(run_id in str(rejected.value) for run_id in ids)


@pytest.mark.parametrize(
    ("reference", "advice"),
    [
        ("models/unet", "`dvc pull` or `dvc repro`"),
        ("champion", "`latentloom promote RUN --to champion`"),
        ("3", "`latentloom promote RUN --to champion`"),
        ("nobody", "make ui"),
        ("f" * 32, "make ui"),
        ("a%", "make ui"),
    ],
)
def test_a_name_of_nothing_is_rejected_with_what_to_do(project_root, train, tiny_unets, reference, advice):
    train(tiny_unets[0], name="a run")
    with pytest.raises(UserError, match=advice):
        find_model(reference, project_root)


@pytest.mark.slow
def test_a_registered_model_is_found_by_alias_and_number_where_nothing_else_has_it(project_root, train, tiny_unets):
    run_id = train(tiny_unets[0])
    registry.promote(find_model(str(tiny_unets[0]), project_root), "champion", project_root)
    for reference in (
        "champion",
        "1",
        run_id,
        "models:/latentloom@champion",
        "models:/latentloom/1",
        "latentloom@champion",
    ):
        shutil.rmtree(project_root / ".state" / "models", ignore_errors=True)
        found = find_model(reference, project_root)
        assert model_hash(found.folder) == found.sha256 == model_hash(tiny_unets[0])
        assert (found.run_id, found.version) == (run_id, "1")
        assert found.folder.is_relative_to(project_root / ".state" / "models")
        assert [path.name for path in found.folder.parent.iterdir()] == [found.sha256]


def test_a_damaged_copy_of_a_registered_model_is_not_used_but_fetched_again(project_root, train, tiny_unets):
    train(tiny_unets[0])
    registry.promote(find_model(str(tiny_unets[0]), project_root), "champion", project_root)
    weights = find_model("champion", project_root).folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = find_model("champion", project_root)
    assert model_hash(again.folder) == model_hash(tiny_unets[0])


def test_a_misspelt_name_is_answered_with_the_names_that_there_are(project_root, train, tiny_unets):
    with pytest.raises(UserError, match=r"shwcase \(did you mean showcase\?\); there is showcase; `make ui`"):
        find_model("shwcase", project_root)
    train(tiny_unets[0], name="gentle")
    with pytest.raises(UserError, match=r"gentel \(did you mean gentle\?\); there is showcase, gentle; `make ui`"):
        find_model("gentel", project_root)
    (project_root / "mlflow.db").unlink()
    with pytest.raises(UserError, match=r"shwcase \(did you mean showcase\?\); there is showcase; .* no MLflow store"):
        find_model("shwcase", project_root)


@pytest.fixture
def shipped(tiny_unets, tmp_path_factory, monkeypatch) -> Path:
    """A package whose own model is a small one, with its provenance in its folder."""
    folder = tmp_path_factory.mktemp("package") / "showcase"
    shutil.copytree(tiny_unets[1], folder)
    record = Provenance(commit="c" * 40, model_sha256=model_hash(folder))
    write_json(folder / PROVENANCE, asdict(record))
    monkeypatch.setattr("latentloom.registry.models.SHOWCASE_FOLDER", folder)
    return folder


def test_showcase_is_the_packages_own_model_and_needs_no_store_unless_a_folder_of_the_user_is_called_so(
    shipped, tiny_unets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = find_model("showcase", tmp_path)
    assert (found.folder, found.sha256) == (shipped, model_hash(tiny_unets[1]))
    assert found.provenance.commit == "c" * 40
    assert not list(tmp_path.iterdir())
    shutil.copytree(tiny_unets[0], "showcase")
    assert find_model("showcase", tmp_path).sha256 == model_hash(tiny_unets[0])


def test_a_provenance_beside_other_weights_than_its_own_is_not_believed(shipped, tiny_unets, tmp_path):
    shutil.copyfile(tiny_unets[0] / "model.safetensors", shipped / "model.safetensors")
    assert find_model(str(shipped), tmp_path).provenance is None


@pytest.fixture
def dvc_project(project_root) -> Path:
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    return project_root


def test_an_earlier_runs_model_comes_out_of_dvcs_cache(dvc_project, train, tiny_unets):
    shutil.copytree(tiny_unets[0], "models/unet")
    out = out_hash(Path("models/unet"))
    with Repo(str(dvc_project)) as repo:
        repo.add("models/unet")
    run_id = train(tiny_unets[0], provenance={"outs": {"models/unet": out}})
    shutil.rmtree("models/unet")
    shutil.copytree(tiny_unets[1], "models/unet")
    found = find_model(run_id, dvc_project)
    assert found.folder == dvc_project / ".state" / "models" / model_hash(tiny_unets[0])
    assert model_hash(found.folder) == model_hash(tiny_unets[0])


def test_a_model_whose_bytes_are_nowhere_names_its_lineage_which_knows_what_was_not_committed(
    dvc_project, train, tiny_unets
):
    run_id = train(tiny_unets[0], provenance={"outs": {"models/unet": "0" * 32 + ".dir"}, "commit": "c" * 40})
    with pytest.raises(UserError, match=f"`latentloom lineage {run_id}`"):
        find_model(run_id, dvc_project)
