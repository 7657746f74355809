"""docs/versioning.md, run from top to bottom on a small project, with a git remote and an S3 server; and what the page
claims. The page is one story: each fixture is a step of it, asks for those before, and notes what a later step
changes, so that the tests run alone and in any order.
"""

import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest
import yaml
from PIL import Image
from projects import ROOT, Project
from servers import seaweedfs

from latentloom.model_files import model_hash

pytestmark = [pytest.mark.pipeline, pytest.mark.service]

PAGE = (ROOT / "docs" / "versioning.md").read_text(encoding="utf-8")
TASKS = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
NOTHING_TO_DO = ["find_sources:", "always", "changed"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with seaweedfs(tmp_path_factory.mktemp("s3")) as store, pytest.MonkeyPatch.context() as patch:
        for key in KEYS:
            patch.setenv(key, store.environment[key])
        boto3.client("s3", endpoint_url=store.endpoint, region_name="us-east-1").create_bucket(Bucket="your-bucket")
        yield store


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory) -> Project:
    """A copy of the finished project that knows nothing of the first one, and has an empty git remote."""
    project = finished.copied(tmp_path_factory.mktemp("versions") / "project")
    bare = project.folder.parent / "loom.git"
    project.run("git", "init", "-q", "--bare", "-b", "main", str(bare))
    project.run("git", "remote", "add", "origin", str(bare))
    return project


@pytest.fixture(scope="module")
def run(project, store):
    """``run(blocks, folder)`` does what a reader does who copies blocks of the page into a shell; what they printed."""
    addresses = {
        "git@example.org:you/loom.git": str(project.folder.parent / "loom.git"),
        "https://s3.example.org": store.endpoint,
        "/home/you/latentloom-dvc-remote": str(project.folder.parent / "latentloom-dvc-remote"),
        "your-id": store.environment[KEYS[0]],
        "your-secret": store.secret,
    }

    def run(blocks, folder=project.folder):
        script = "\n".join(blocks)
        for shown, real in addresses.items():
            script = script.replace(shown, real)
        return replace(project, folder=folder).run("bash", "-euo", "pipefail", "-c", script).stdout

    return run


def blocks_of(task):
    """The shell blocks under a heading of the page."""
    (text,) = [text for heading, text in TASKS if heading == task]
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def outs(project):
    """All that DVC keeps of a project: path -> bytes."""
    listed = [project.folder / out["path"] for stage in lock(project)["stages"].values() for out in stage["outs"]]
    files = [path for out in listed for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()]
    assert len(files) > 15
    return {str(path.relative_to(project.folder)): path.read_bytes() for path in files}


def lock(project):
    return yaml.safe_load((project.folder / "dvc.lock").read_text())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def kept(project, run) -> dict[str, bytes]:
    """The project has been pushed; its outs."""
    run(blocks_of("I want to keep what I have now"))
    return outs(project)


@pytest.fixture(scope="module")
def second(project, kept, run) -> tuple[Project, str]:
    """A clone that pulled everything from the default remote, and what that printed."""
    printed = run(blocks_of("I want it all in another clone"), project.folder.parent)
    return replace(project, folder=project.folder.parent / "second"), printed


@pytest.fixture(scope="module")
def enlarged(second) -> tuple[Project, str]:
    """A copy of that clone with four more images, encoded; and what that printed."""
    folder = second[0].folder.parent / "enlarged"
    clone = replace(second[0], folder=shutil.copytree(second[0].folder, folder, symlinks=True))
    clone.set_params(ingest__limit=44)
    return clone, clone.run("dvc", "repro", "encode_images", "encode_text").stdout


@pytest.fixture(scope="module")
def third(project, second, run) -> tuple[Project, str, dict[str, bytes]]:
    """A clone that pulled everything from S3, what that printed, and its outs."""
    configure, push, clone_again = blocks_of("I want data and models in S3")
    run([configure, push])
    printed = run([clone_again], project.folder.parent)
    clone = replace(project, folder=project.folder.parent / "third")
    return clone, printed, outs(clone)


@dataclass(frozen=True)
class Tried:
    """What the experiment of the page printed and gave, and the figures and weights before it."""

    printed: str
    columns: list[str]
    compared: str
    before: dict[str, float]
    after: dict[str, float]
    first: bytes
    gentle: bytes


@pytest.fixture(scope="module")
def tried(project, third, run) -> Tried:
    """The experiment of the page is done and compared, and `main` is checked out again."""
    try_it, compare = blocks_of("I want to try something and see whether it is better")
    before, first = figures(project), weights(project.folder / "models/unet")
    printed = run([try_it])
    (dropped,) = re.findall(r"--drop '(.*)'", try_it)
    table = project.run("dvc", "exp", "show", "--csv", "--only-changed", "--drop", dropped).stdout
    columns = next(csv.reader(io.StringIO(table)))
    after, gentle = figures(project), weights(project.folder / "models/unet")
    tried = Tried(printed, columns, run([compare]), before, after, first, gentle)
    go_to_main(project)
    return tried


@pytest.fixture(scope="module")
def taken_over(project, tried, run) -> str:
    """The experiment is in the workspace, on a branch, and with a colleague; the branch's `dvc.lock`."""
    take_over, branch, give, _ = blocks_of("I want to take one of the experiments over")
    run([take_over])
    assert weights(project.folder / "models/unet") == tried.gentle != tried.first
    assert project.run("git", "status", "--porcelain").stdout == ""
    run([branch, give])
    return project.run("git", "show", "lower-rate:dvc.lock").stdout


def test_a_pushed_project_is_in_its_default_remote_with_no_set_up(project, kept):
    oid = hashlib.md5(kept["models/unet/model.safetensors"]).hexdigest()
    remote = project.folder.parent / "latentloom-dvc-remote"
    assert (remote / "files" / "md5" / oid[:2] / oid[2:]).is_file()


def test_a_second_clone_pulls_everything_and_has_nothing_to_do(kept, second):
    clone, output = second
    assert "Running stage 'find_sources'" in output
    assert output.count("Running stage") == 1
    assert outs(clone) == kept
    assert clone.run("git", "status", "--porcelain").stdout == ""
    assert [path.name for path in (clone.folder / ".state").iterdir()] == ["file_hashes.db"]  # of the encoders


def test_in_a_clone_that_pulled_only_what_is_added_is_encoded(enlarged):
    _, output = enlarged
    assert "44 latents: encoded 4, reused 40" in output
    assert "reused 0" not in output


def test_a_clone_pulls_everything_from_s3_and_no_file_of_the_project_holds_the_keys(project, store, kept, third):
    clone, output, pulled = third
    for folder in (".dvc", ".git"):
        for path in (project.folder / folder).rglob("*"):
            assert not path.is_file() or store.secret.encode() not in path.read_bytes(), path
    assert clone.run("dvc", "remote", "list").stdout.split()[-3:] == ["store", "s3://your-bucket/loom", "(default)"]
    assert output.count("Running stage") == 1
    assert pulled == kept


def test_an_experiment_is_compared_in_tables_with_few_columns_and_few_digits(tried):
    before, after = tried.before, tried.after
    table = tried.printed.partition("Experiment results have been applied to your workspace.")[2]
    assert "gentle" in table
    assert "train.learning_rate" in table  # which has 80 columns
    assert set(tried.columns) == {"Experiment", "val_mae", "held_out_recall_at_1", "train.learning_rate"} & {
        "Experiment",
        "train.learning_rate",
        *(name for name in before if before[name] != after[name]),
    }

    printed = tried.compared
    assert re.search(r"train.learning_rate +0.004 +0.0005", printed)
    for name in ("train_mae", "val_mae"):
        assert re.search(rf"{name} +{before[name]} +{after[name]} ", printed)
    assert all(len(str(value)) <= 6 for value in after.values())  # the network has less than a million weights


def figures(project):
    """All that DVC counts as a metric, by name."""
    shown = json.loads(project.run("dvc", "metrics", "show", "--json").stdout)
    return {name: value for file in shown[""]["data"].values() for name, value in file["data"].items()}


def go_to_main(project):
    project.run("git", "checkout", "-q", "-f", "main")
    project.run("dvc", "checkout", "-q", "-f")


def test_an_experiment_is_one_training_and_its_evaluation_in_the_projects_own_store(project, tried):
    evaluation, run = runs_of(project, "gentle")
    assert run.data.params["train.learning_rate"] == "0.0005"
    assert evaluation.data.tags["mlflow.parentRunId"] == run.info.run_id


def runs_of(project, experiment):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (own,) = [found for found in client.search_experiments() if found.name == "latentloom"]
    return client.search_runs([own.experiment_id], f"tags.`dvc.experiment` = '{experiment}'")


CURVES = {  # name in dvc.yaml -> title, file in reports/, columns
    "Training error": ("Mean absolute error on training images", "train/plots/train.csv", "step", "train_mae"),
    "Validation error": ("Mean absolute error on held-out images", "train/plots/validation.csv", "step", "val_mae"),
    "Error by noise level": ("by noise level", "evaluate/plots/mae_by_noise.csv", "noise_level", "val_mae"),
    "Learning rate": ("Learning rate", "train/plots/train.csv", "step", "train_learning_rate"),
}


def test_each_curve_has_a_title_and_the_points_of_both_revisions(project, tried):
    drawn = json.loads(project.run("dvc", "plots", "diff", "main", "gentle", "--json", "--split").stdout)["data"]
    for name, (title, file, x, y) in CURVES.items():
        (curve,) = drawn[name]
        assert title in curve["anchor_definitions"]["<DVC_METRIC_TITLE>"]
        points = curve["anchor_definitions"]["<DVC_METRIC_DATA>"]
        assert {point["rev"] for point in points} == {"main", "gentle"}
        ours = [(point[x], point[y]) for point in points if point["rev"] == "main"]
        rows = list(csv.DictReader((project.folder / "reports" / file).read_text().splitlines()))
        assert ours == [(row[x], row[y]) for row in rows]
        assert len(rows) >= 2


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine: apt-get install chromium")
def test_the_page_has_each_curve_once_and_the_sheets_side_by_side(project, tried, tmp_path):
    page = project.folder / "dvc_plots" / "index.html"
    look = """
        const sheets = [...document.images].map(({x, y, width, naturalWidth}) => ({x, y, width, naturalWidth}));
        const shown = [...document.querySelectorAll("body > *")].filter(part => part.checkVisibility());
        document.title = JSON.stringify({sheets, shown: shown.map(part => part.id).filter(Boolean)});
    """
    page.write_text(page.read_text() + f"<script>onload = () => {{{look}}}</script>")
    drawn = browse(page, tmp_path, "--dump-dom", "--window-size=1400,1000")
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", drawn)[1]))
    curves = [name.replace(" ", "_") for name in CURVES]
    explained = ["offline"]  # this browser finds no address, so the curves are missing and the page says why
    sheets = [
        "reports_evaluate_extremes_png",
        "reports_evaluate_plots_noise_curves_png",
        "reports_evaluate_samples_png",
    ]
    assert sorted(found["shown"]) == sorted([*curves, *sheets, *explained])
    for left, right in zip(found["sheets"][::2], found["sheets"][1::2], strict=True):
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] < right["x"]
        assert right["x"] + right["width"] < 1400
    assert left["naturalWidth"] > 1000


def browse(page, folder, *options):
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [BROWSER, "--headless", "--disable-gpu", *root, "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_an_experiment_is_taken_over_made_a_branch_and_given_to_a_colleague(project, tried, taken_over, third, run):
    assert taken_over == (project.folder / "dvc.lock").read_text()
    clone, *_ = third
    assert weights(clone.folder / "models/unet") == tried.first
    run(blocks_of("I want to take one of the experiments over")[3:], clone.folder)
    assert weights(clone.folder / "models/unet") == tried.gentle


def test_yesterdays_model_comes_back_whole_or_beside_todays(project, tried, taken_over, run):
    back, forth, beside = blocks_of("I want yesterday's model back")
    run([back])
    assert weights(project.folder / "models/unet") == tried.first
    assert project.run("dvc", "status").stdout.split() == NOTHING_TO_DO
    run([forth])
    assert weights(project.folder / "models/unet") == tried.gentle
    run([beside])
    yesterday = project.folder.parent / "yesterday"
    assert weights(yesterday) == tried.first
    with Image.open(f"{yesterday}.png") as picture:
        assert picture.text["model_sha256"] == model_hash(yesterday)


def test_what_changed_between_two_versions_is_listed(project, taken_over, run):
    (compare,) = blocks_of("I want to know what changed between two versions")
    printed = run([compare])
    assert re.search(r"Modified:.*models/unet/model.safetensors", printed, re.DOTALL)
    assert "data/images" not in printed.partition("Path ")[0]
    assert re.search(r"train.learning_rate +0.004 +0.0005", printed)
    assert re.search(r"reports/train/metrics.json +train_mae ", printed)


def test_a_file_that_was_deleted_or_replaced_comes_back(project, tried, taken_over, run):
    model, latents = project.folder / "models/unet/model.safetensors", project.folder / "data/latents"
    model.unlink()
    model.write_bytes(b"broken")
    shutil.rmtree(latents)
    (restore,) = blocks_of("I deleted or broke a file of data or model")
    printed = run([restore])
    for path in ("models/unet", "data/latents"):
        assert path in printed
    assert weights(model.parent) == tried.gentle
    assert latents.exists()
    assert project.run("dvc", "status").stdout.split() == NOTHING_TO_DO


def test_a_named_version_of_the_model_can_be_had_without_the_project(project, tried, taken_over, run, tmp_path):
    name, get, get_from_folder = blocks_of("I want to give a model a name that outlives me")
    printed = run([name])
    assert re.search(r"unet +│ v1.0.0 +│ v1.0.0", printed)
    pushed = project.run("git", "ls-remote", "--tags", "origin").stdout
    assert [line.rpartition("/")[2] for line in pushed.splitlines()][::2] == ["unet#prod#1", "unet@v1.0.0"]
    run([get], tmp_path)
    project.run("dvc", "push", "-q", "-r", "local")
    run([get_from_folder], tmp_path)
    for folder in ("unet", "in-production", "from-a-folder"):
        assert weights(tmp_path / folder) == tried.gentle
        assert model_hash(tmp_path / folder) == model_hash(project.folder / "models/unet")


def test_only_what_no_commit_names_is_removed_when_the_disk_is_full(enlarged, run):
    clone, _ = enlarged  # in which 44 images were never committed
    uncommitted = (out["md5"] for out in lock(clone)["stages"]["ingest"]["outs"] if out["path"] == "data/images")
    directory = next(uncommitted)
    go_to_main(clone)
    cached = clone.folder / ".dvc/cache/files/md5" / directory[:2] / directory[2:]
    assert cached.exists()
    run(blocks_of("The disk is full"), clone.folder)
    assert not cached.exists()
    clone.run("dvc", "status")
    shutil.rmtree(clone.folder / "data/images")
    clone.run("dvc", "checkout", "data/images")
    assert clone.run("dvc", "status").stdout.split() == NOTHING_TO_DO


def test_every_task_of_the_page_is_run_here():
    own = Path(__file__).read_text(encoding="utf-8")
    assert [heading for heading, text in TASKS if "```sh" in text and f'blocks_of("{heading}")' not in own] == []
    assert sum(len(blocks_of(heading)) for heading, _ in TASKS) == PAGE.count("```sh")


def test_an_experiment_in_a_folder_of_its_own_as_from_the_queue_reuses_what_this_machine_encoded(
    project, kept, tmp_path
):
    project = project.copied(tmp_path / "project")
    before = figures(project)
    printed = project.run("dvc", "exp", "run", "--temp", "-S", "encode_images.flip=true", "encode_images").stdout
    assert "80 latents: encoded 40, reused 40" in printed
    assert figures(project) == before
