"""Promotions: what is rejected, what moves when, and what is left when something breaks off."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path
from urllib.parse import urlparse

import pytest
from tiny_models import save_clip, save_tiny_unet, save_tiny_vae
from tracked_runs import share
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import load_text_to_image, stored_settings
from latentloom.model_files import model_hash, read_config
from latentloom.registry import packing, registry
from latentloom.registry.models import find_model
from latentloom.tracking.provenance import user_name
from latentloom.tracking.store import open_client

ROOT = Path(__file__).parents[2]


@pytest.fixture
def promote(project_root):
    """``promote(folder, "champion")``, as at the keyboard; the version."""

    def call(folder: Path, alias: str = "champion", **more) -> str:
        return registry.promote(find_model(str(folder), project_root), alias, project_root, **more)[0]

    return call


def aliases(root) -> dict[str, str]:
    return registry.current(root)


def versions(root) -> list[str]:
    return sorted(str(found.version) for found in open_client(root).search_model_versions("name = 'latentloom'"))


def test_a_promoted_model_is_a_version_with_all_that_sampling_needs(project_root, train, promote, tiny_unets, tmp_path):
    import mlflow.artifacts

    run_id = train(tiny_unets[0])
    assert promote(tiny_unets[0]) == "1"
    made = open_client(project_root).get_model_version_by_alias("latentloom", "champion")
    config = read_config(tiny_unets[0])
    assert made.run_id == run_id
    assert made.tags["model.sha256"] == model_hash(tiny_unets[0])
    assert (made.tags["vae"], made.tags["vae.fingerprint"]) == ("bundled", config.vae.fingerprint)
    assert made.tags["text_encoder.fingerprint"] == config.text_encoder.fingerprint
    assert (made.tags["licence"], made.tags["attribution"]) == ("CC BY-SA 4.0", "Drawn by somebody")

    store = f"sqlite:///{project_root / 'mlflow.db'}"
    logged = Path(mlflow.artifacts.download_artifacts(made.source, dst_path=str(tmp_path / "x"), tracking_uri=store))
    assert model_hash(logged / "artifacts/model") == model_hash(tiny_unets[0])
    assert stored_settings(logged / "artifacts/model").class_guidance == 2.5  # what its figures were measured with
    assert (logged / "code/latentloom/evaluation/text_to_image.py").read_bytes() == (
        ROOT / "src/latentloom/evaluation/text_to_image.py"
    ).read_bytes()
    assert not [path for path in logged.rglob("*") if path.suffix in (".pkl", ".pickle", ".pyc")]
    assert f"torch=={version('torch').partition('+')[0]}\n" in (logged / "requirements.txt").read_text()


def test_the_signature_takes_prompts_and_gives_png_bytes_with_the_stored_settings_as_defaults(
    project_root, train, promote, tiny_unets
):
    from mlflow.models import get_model_info

    train(tiny_unets[0])
    promote(tiny_unets[0])
    made = open_client(project_root).get_model_version_by_alias("latentloom", "champion")
    signature = get_model_info(Path(urlparse(made.source).path)).signature
    assert signature.inputs.input_names() == ["prompt"]
    assert [str(kind) for kind in signature.outputs.input_types()][-1] == "DataType.binary"
    assert {param.name: param.default for param in signature.params} == {
        "seed": 0,
        "count": 1,
        "first": 0,
        "size": None,
        "negative": None,
        "steps": 4,
        "guidance": 2.5,
        "sampler": "ddim",
        "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0,
        "threshold": 99.5,
        "precision": "fp32",
    }


@pytest.mark.slow
def test_the_required_packages_are_enough_to_sample_the_same_bytes_with_other_threads_and_no_mlflow(
    project_root, tiny_unets
):
    required = closure({line.partition("==")[0] for line in packing.requirements()} | {"typer"})  # of the command
    hidden = [
        name
        for name, owners in packages_distributions().items()
        if not {canonical(owner) for owner in owners} & required and name != "latentloom"
    ]
    assert {"dvc", "great_expectations"} <= set(hidden)
    sample = ["sample", "a red apple", "--model", str(tiny_unets[0]), "--steps", "2", "--precision", "fp32", "-o"]
    code = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name.partition(".")[0] in {hidden!r} else super().find_spec(name, *arguments)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
sys.modules["mlflow"] = None
from latentloom.cli import app
app({[*sample, "there.png"]!r}, standalone_mode=False)
del sys.modules["mlflow"]
import latentloom.registry.served_model
"""
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2", "LATENTLOOM_DEVICE": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert CliRunner().invoke(app, [*sample, "here.png"]).exit_code == 0
    assert Path("there.png").read_bytes() == Path("here.png").read_bytes()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: set[str]) -> set[str]:
    """Distributions and all that they need, by their own metadata, without extras."""
    found: set[str] = set()
    todo = {canonical(name) for name in names}
    while todo:
        name = todo.pop()
        found.add(name)
        try:
            needs = distribution(name).requires or []
        except ImportError:
            continue
        plain = {canonical(re.match(r"[\w.-]+", need)[0]) for need in needs if "extra ==" not in need}
        todo |= plain - found
    return found


def test_encoders_that_are_only_a_folder_here_go_with_the_model(project_root, train, promote, tmp_path):
    vae, clip = save_tiny_vae(tmp_path / "vae"), save_clip(tmp_path / "clip")
    mine = save_tiny_unet(tmp_path / "mine", vae=str(vae), text_encoder=str(clip), tokens=True, max_tokens=20)
    train(mine)
    promote(mine)
    save_tiny_vae(vae, seed=1)
    with pytest.raises(UserError, match=r"vae holds another vae now than the one that .*mine was trained with"):
        packing.save_served_model(tmp_path / "served/pyfunc", mine, SamplingSettings(), {})
    for folder in (vae, clip, mine):
        shutil.rmtree(folder)
    loaded = load_text_to_image(find_model("champion", project_root).folder)
    assert loaded.codec.vae.fingerprint == read_config(find_model("champion", project_root).folder).vae.fingerprint
    assert loaded.text_encoder.max_tokens == 20
    assert loaded.generate(["a cat", "a"], SampleRequest(SamplingSettings(2, 3.0))).shape == (2, 1, 64, 64, 3)


def test_the_same_model_promoted_twice_is_one_version_and_one_move(project_root, train, promote, tiny_unets):
    train(tiny_unets[0])
    assert promote(tiny_unets[0], "candidate") == promote(tiny_unets[0], "candidate") == promote(tiny_unets[0]) == "1"
    assert versions(project_root) == ["1"]
    assert aliases(project_root) == {"candidate": "1", "champion": "1"}
    assert [(move.alias, move.version) for move, _ in registry.history(project_root)] == [
        ("candidate", "1"),
        ("champion", "1"),
    ]


@pytest.mark.slow
def test_a_worse_model_is_rejected_unless_someone_says_why(project_root, train, promote, tiny_unets):
    train(tiny_unets[0], recall=0.9)
    train(tiny_unets[1], recall=0.5)
    promote(tiny_unets[0])
    for alias in ("champion", "candidate"):
        with pytest.raises(UserError, match=r"0\.5.*, worse than the champion's 0\.9(.|\n)*--force --why"):
            promote(tiny_unets[1], alias)
    assert (aliases(project_root), versions(project_root)) == ({"champion": "1"}, ["1"])
    assert promote(tiny_unets[1], force=True, why="the hands: right") == "2"
    assert aliases(project_root) == {"champion": "2"}
    move, _ = registry.history(project_root)[-1]
    assert (move.kind, move.version, move.previous, move.why) == ("force", "2", "1", "the hands: right")


@pytest.mark.slow
def test_a_model_that_chance_may_have_made_look_worse_becomes_the_champion(project_root, train, promote, tiny_unets):
    train(tiny_unets[0], recall=0.8)
    train(tiny_unets[1], recall=0.75)
    assert [promote(folder) for folder in tiny_unets[:2]] == ["1", "2"]


def test_a_first_champion_must_be_within_the_limits_of_the_params(project_root, train, promote, tiny_unets):
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    train(tiny_unets[0], copied=0.6)
    with pytest.raises(UserError, match=r"copied_share is 0\.6 .* above 0\.2"):
        promote(tiny_unets[0])
    assert promote(tiny_unets[0], force=True, why="a start") == "1"


@pytest.mark.slow
def test_a_champion_of_other_data_is_measured_again_and_where_it_cannot_be_the_message_says_what_differs(
    project_root, train, promote, tiny_unets, monkeypatch
):
    train(tiny_unets[0], recall=0.9)
    promote(tiny_unets[0])
    train(tiny_unets[1], recall=0.5, data="e" * 16)
    with pytest.raises(UserError, match=r"data \(e{16} against d{16}\).* cannot be measured again"):
        promote(tiny_unets[1])  # there are no caches here to measure on

    def measured(model, like, sampling, root, **more):
        assert (model_hash(model), sampling.class_guidance) == (model_hash(tiny_unets[0]), 2.5)
        return replace(like, values=share("held_out_recall_at_1", 0.4, like.samples), noise=None, run_id=None)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "measure_again", measured)
        assert promote(tiny_unets[1]) == "2"
    tags = open_client(project_root).get_model_version("latentloom", "1").tags
    assert (tags["held_out_recall_at_1"], tags["remeasured.held_out_recall_at_1"]) == ("0.9", "0.4")
    registry.demote("champion", project_root)
    assert promote(tiny_unets[1]) == "2"  # by what was measured before


def test_the_page_of_a_version_shows_its_figures_its_picture_and_who_promoted_it(
    project_root, train, promote, tiny_unets
):
    train(tiny_unets[0], name="gentle", recall=0.75)
    promote(tiny_unets[0], why="sharper\noutlines")
    made = open_client(project_root).get_model_version("latentloom", "1")
    assert f"promoted to champion instead of none, by {user_name()}: sharper outlines\n" in made.description
    assert "| `held_out_recall_at_1` | 0.75 (0.66 to 0.82) |" in made.description
    (evaluation,) = re.findall(r"\]\(get-artifact\?path=samples\.png&run_uuid=(\w+)\)", made.description)
    assert open_client(project_root).get_run(evaluation).info.run_name == "gentle, evaluated"
    assert "run [gentle](#/experiments/" in made.description
    assert made.tags["held_out_recall_at_1"] == "0.75"


def test_a_model_of_data_that_failed_its_validation_is_rejected(project_root, train, promote, tiny_unets):
    train(tiny_unets[0], failed_checks=("latents are finite",))
    with pytest.raises(UserError, match="validation of its data failed: latents are finite"):
        promote(tiny_unets[0])
    assert aliases(project_root) == {}


def test_a_model_whose_validation_is_not_known_is_rejected(project_root, train, promote, tiny_unets):
    train(tiny_unets[0], failed_checks=None)
    with pytest.raises(UserError, match="is not known"):
        promote(tiny_unets[0])


def test_a_model_that_this_store_never_saw_trained_is_not_promoted(project_root, promote, tiny_unets):
    with pytest.raises(UserError, match="latentloom sync"):
        promote(tiny_unets[0])


@pytest.mark.slow
def test_taken_back_the_champion_before_is_champion_again_until_there_is_none(project_root, train, promote, tiny_unets):
    for number, folder in enumerate(tiny_unets):
        train(folder, recall=0.5 + 0.1 * number)
        promote(folder)
    assert registry.demote("champion", project_root, why="too yellow") == ("3", "2")
    assert registry.demote("champion", project_root) == ("2", "1")
    promote(tiny_unets[2])
    assert registry.demote("champion", project_root) == ("3", "1")
    assert registry.demote("champion", project_root) == ("1", None)
    assert aliases(project_root) == {}
    with pytest.raises(UserError, match="there is no champion"):
        registry.demote("champion", project_root)
    assert [(move.kind, move.previous, move.version) for move, _ in registry.history(project_root)] == [
        ("promote", None, "1"),
        ("promote", "1", "2"),
        ("promote", "2", "3"),
        ("demote", "3", "2"),
        ("demote", "2", "1"),
        ("promote", "1", "3"),
        ("demote", "3", "1"),
        ("demote", "1", None),
    ]


@pytest.mark.slow
def test_demotions_that_follow_each_other_come_to_an_end(project_root, train, promote, tiny_unets):
    for folder in tiny_unets[:2]:
        train(folder)
    for folder in (tiny_unets[0], tiny_unets[1], tiny_unets[0]):
        promote(folder)
    assert registry.demote("champion", project_root, why="too yellow") == ("1", "2")
    assert registry.history(project_root)[-1][0].why == "too yellow"
    assert registry.demote("champion", project_root) == ("2", None)


@pytest.mark.slow
def test_a_champion_that_was_moved_in_mlflows_own_pages_is_taken_back_to_the_one_before(
    project_root, train, promote, tiny_unets
):
    for number, folder in enumerate(tiny_unets[:2]):
        train(folder, recall=0.5 + 0.1 * number)
    promote(tiny_unets[0])
    promote(tiny_unets[1], "candidate")
    open_client(project_root).set_registered_model_alias("latentloom", "champion", "2")
    assert registry.demote("champion", project_root) == ("2", "1")


@pytest.mark.slow
def test_a_version_that_was_deleted_is_skipped(project_root, train, promote, tiny_unets):
    for number, folder in enumerate(tiny_unets):
        train(folder, recall=0.5 + 0.1 * number)
        promote(folder)
    open_client(project_root).delete_model_version("latentloom", "2")
    assert registry.demote("champion", project_root) == ("3", "1")


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["log_artifacts", "create_model_version", "set_registered_model_alias"])
def test_a_promotion_that_breaks_off_moves_nothing_and_can_be_repeated(
    project_root, train, promote, tiny_unets, monkeypatch, breaks
):
    from mlflow.tracking import MlflowClient

    for number, folder in enumerate(tiny_unets[:2]):
        train(folder, recall=0.5 + 0.1 * number)
    promote(tiny_unets[0])

    def broken(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, breaks, broken)
        with pytest.raises(KeyboardInterrupt):
            promote(tiny_unets[1])
    assert aliases(project_root) == {"champion": "1"}
    assert len(registry.history(project_root)) == 1
    assert promote(tiny_unets[1]) == "2"
    assert find_model("champion", project_root).sha256 == model_hash(tiny_unets[1])


@pytest.fixture
def invoke(project_root):
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.mark.slow
def test_at_the_keyboard(invoke, train, tiny_unets):
    train(tiny_unets[0], name="gentle", recall=0.75)
    bold = train(tiny_unets[1], name="bold", recall=0.5)
    for folder in tiny_unets[:2]:  # where DVC would have kept them
        shutil.copytree(folder, Path(".state/models") / model_hash(folder))
    assert invoke("history") == (0, invoke("history")[1])
    assert "now: nothing" in invoke("history")[1]
    assert invoke("promote", "gentle", "--to", "champion") == (0, "version 1 of latentloom is the champion\n")
    assert invoke("promote", "gentle", "--to", "champion") == (0, "version 1 of latentloom is the champion already\n")
    status, output = invoke("promote", bold, "--to", "champion")
    assert status == 1
    assert "worse than the champion's 0.75" in output
    assert invoke("promote", bold, "--to", "champion", "--force")[0] == 1
    assert invoke("promote", bold, "--to", "champion", "--force", "--why", "sharper")[0] == 0
    status, output = invoke("history")
    lines = output.splitlines()
    assert re.search(r"Z +force +champion +1 +2 .* 0\.5 .* sharper", lines[2])
    assert lines[-1] == "now: champion is version 2"
    assert invoke("demote", "--from", "champion") == (
        0,
        "version 2 of latentloom is no longer the champion; version 1 is\n",
    )
    assert re.search(r"Z +demote +champion +2 +1 .* 0\.75", invoke("history")[1].splitlines()[3])
    assert invoke("sample", "a red apple", "--model", "champion", "--steps", "2", "-o", "out.png") == (0, "out.png\n")


def test_a_server_that_is_away_is_one_message_without_a_traceback(invoke, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, output = invoke("history")
    assert status == 1
    assert "127.0.0.1" in output
