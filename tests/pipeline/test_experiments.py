"""docs/experiments.md, from top to bottom: experiments at the same time into a fresh store, MLflow's page in a browser,
and a run of a machine without MLflow. Of the page's four experiments, two are run here."""

import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urljoin, urlparse

import numpy as np
import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from projects import ROOT, Project
from servers import free_port, serving

pytestmark = [pytest.mark.pipeline, pytest.mark.service]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="there is no chromium on this machine: apt-get install chromium"
)
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def block(command: str) -> str:
    """The page's block with a line that begins with ``command``."""
    (found,) = [block for block in BLOCKS if re.search(rf"^{re.escape(command)}", block, re.MULTILINE)]
    return found


def with_two(block: str) -> str:
    """A block of the page for two of its experiments, `rate-2` and `rate-3`, which are numbered anew."""
    shorter = {
        "=0.0003,0.0005,0.002,0.003": "=0.0005,0.002",
        "rate-1 rate-2 rate-4": "rate-1",
        "rate-3": "rate-2",
        "-j 4": "-j 2",
    }
    for long, short in shorter.items():
        block = block.replace(long, short)
    return block


QUEUE, STATUS, STOP = block("dvc exp run --queue"), block("dvc queue status"), block("dvc queue stop")
UI, BEST, TAKE = block("latentloom ui"), block("dvc exp show"), block("dvc exp apply")
BACK, ELSEWHERE = block("git checkout"), block("latentloom sync")
NAMES = ["rate-1", "rate-2"]
RATES = ["0.0005", "0.002"]
STEPS, SHOWN = [2, 4, 6, 8], [4, 8]  # of the tiny params: logged, and validated or drawn
PATIENCE, PAGE_PATIENCE = 600, 120  # seconds until the queue, or a page, counts as hanging


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory) -> Iterator[Project]:
    """A copy of a finished project with a git and a DVC of its own, and no store yet."""
    ignored = shutil.ignore_patterns("mlflow.db*", "mlartifacts", "__pycache__")
    folder = tmp_path_factory.mktemp("experiments") / "project"
    shutil.copytree(finished.folder, folder, ignore=ignored)
    yield Project(folder)
    for worker in workers(folder):
        worker.kill()


@pytest.fixture(scope="module")
def overnight(project: Project) -> Project:
    """The project when all that the page queues is done and the workers have left."""
    shell(project, with_two(QUEUE))
    deadline = time.monotonic() + PATIENCE
    while len(done(project)) < len(NAMES):
        assert time.monotonic() < deadline, project.run("dvc", "queue", "status").stdout
        if not workers(project.folder):  # all of them failed to start, which the page mentions
            project.run("dvc", "queue", "start", "-j", "2")
        time.sleep(1)
    while workers(project.folder):
        assert time.monotonic() < deadline, "the workers are still there though the queue is empty"
        shell(project, STOP)
        time.sleep(2)
    return project


def shell(project: Project, block: str) -> str:
    """Run a block of the page; what it printed."""
    return project.run("bash", "-euo", "pipefail", "-c", block).stdout


def done(project: Project) -> list[str]:
    """The experiments that are finished; asked of git, as asking DVC's workers disturbs them."""
    references = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout
    return sorted(set(re.findall(r"/(rate-\d)$", references, re.MULTILINE)))


def workers(folder: Path) -> list[psutil.Process]:
    """DVC's workers of a project."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = process.info["cmdline"] or []
        if "queue-worker" in command and process.info["cwd"] == str(folder):
            found.append(process)
    return found


def client(project: Project) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")


def all_runs(project: Project) -> list[Run]:
    experiment = client(project).get_experiment_by_name("latentloom")
    return client(project).search_runs([experiment.experiment_id])


def evaluations(project: Project) -> list[Run]:
    return [run for run in all_runs(project) if "mlflow.parentRunId" in run.data.tags]


def trainings(project: Project) -> list[Run]:
    return [run for run in all_runs(project) if "mlflow.parentRunId" not in run.data.tags]


def curve(project: Project, run: Run, metric: str) -> list[tuple[int, float]]:
    history = client(project).get_metric_history(run.info.run_id, metric)
    return [(point.step, round(point.value, 6)) for point in history]


def pictures(run: Run) -> dict[tuple[str, int], Path]:
    """The PNG files of a run's picture grids, by key and step."""
    folder = Path(urlparse(run.info.artifact_uri).path) / "images"
    found = (re.fullmatch(r"(\w+)\Wstep\W(\d+)\W.*\.png", path.name) for path in folder.iterdir())
    return {(name[1], int(name[2])): folder / name[0] for name in found if name}


def test_experiments_at_the_same_time_arrive_whole_in_the_right_experiment(overnight):
    assert sorted(found.name for found in client(overnight).search_experiments()) == ["Default", "latentloom"]
    runs, evaluated = (
        sorted(found, key=lambda run: run.data.tags["dvc.experiment"])
        for found in (trainings(overnight), evaluations(overnight))
    )
    assert [run.data.tags["dvc.experiment"] for run in runs] == NAMES
    assert [run.info.run_name for run in runs] == NAMES
    assert [run.data.params["train.learning_rate"] for run in runs] == RATES
    assert [run.data.tags["mlflow.parentRunId"] for run in evaluated] == [run.info.run_id for run in runs]
    assert [run.info.run_name for run in evaluated] == NAMES
    for run in evaluated:
        assert sorted(pictures(run)) == [("evaluation", 0), ("extremes", 0), ("noise_curves", 0)]
        files = {found.path for found in client(overnight).list_artifacts(run.info.run_id)}
        assert files >= {"dvc.lock", "params.yaml", "sampling.json", "samples.png"}
        assert 0 <= run.data.metrics["evaluate/memorisation_recall"] <= 1
    for run, rate in zip(runs, RATES, strict=True):
        assert run.info.status == "FINISHED"
        assert [step for step, _ in curve(overnight, run, "train/mae")] == STEPS
        assert [step for step, _ in curve(overnight, run, "val/mae")] == SHOWN
        assert sorted(pictures(run)) == [("final_samples", 0), *(("samples", step) for step in SHOWN)]
        files = {found.path for found in client(overnight).list_artifacts(run.info.run_id)}
        assert files >= {"provenance.json", "previews.json", "model"}
        artifacts = Path(urlparse(run.info.artifact_uri).path)
        assert re.search(rf"^\+ +learning_rate: {rate}$", (artifacts / "code.diff").read_text(), re.MULTILINE)
        assert artifacts.parent.parent == overnight.folder / "mlartifacts"
        assert f"learning rate {float(rate):g}" in run.data.tags["mlflow.note.content"]
        assert len(run.inputs.dataset_inputs) == 2
    assert len({tuple(curve(overnight, run, "train/mae")) for run in runs}) == len(NAMES)
    assert list((overnight.folder / ".state" / "tracking").iterdir()) == []
    assert len({run.info.run_id for run in runs}) == len(NAMES)


def test_every_block_of_the_page_is_run_by_a_test():
    assert sorted(BLOCKS) == sorted([QUEUE, STATUS, STOP, UI, BEST, TAKE, BACK, ELSEWHERE])


def test_the_queue_says_what_became_of_each(overnight):
    printed = shell(overnight, STATUS)
    for name in NAMES:
        assert re.search(rf"{name}\s.*Success", printed)
    assert "0 active, 0 idle" in printed
    assert "train: 8 steps on " in printed
    assert overnight.run("git", "status", "--porcelain").stdout == ""


@pytest.fixture(scope="module")
def address(overnight: Project) -> Iterator[str]:
    """Where `latentloom ui` serves MLflow's page, as it says itself."""
    port = free_port()
    command = ["bash", "-c", f"cd {overnight.folder} && exec {UI.strip()} --port {port}"]
    with serving(command, port, overnight.folder.parent, PYTHONPATH=str(overnight.folder / "src")) as server:
        yield re.search("MLflow: (.*)", server.log)[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def charts(browser: Browser, address: str) -> Iterator[Page]:
    """The address that `latentloom ui` printed, in a browser; so high that each panel is in sight, and so loaded."""
    with browser.new_page(viewport={"width": 1600, "height": 4600}) as page:
        page.set_default_timeout(PAGE_PATIENCE * 1000)
        page.goto(address)
        yield page


def card(page: Page, title: str) -> Locator:
    """The panel with that title among the charts of all runs."""
    heading = page.get_by_role("heading", name=title, exact=True)
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has=heading)


@needs_browser
def test_the_page_opens_on_the_curves_of_all_runs(overnight, charts):
    lines = """card => [...card.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data)
        .map(line => Array.from(line.x, (step, place) => [step, line.y[place]]))"""
    for metric in ("train/mae", "val/mae"):
        expected = {tuple(curve(overnight, run, metric)) for run in trainings(overnight)}
        panel, deadline = card(charts, metric), time.monotonic() + PAGE_PATIENCE
        while (shown := {tuple((x, round(y, 6)) for x, y in line) for line in panel.evaluate(lines)}) != expected:
            assert time.monotonic() < deadline, shown
            charts.wait_for_timeout(200)


@needs_browser
def test_the_page_shows_the_samples_of_all_runs_and_its_slider_goes_through_their_steps(overnight, charts):
    runs = {run.info.run_id: run for run in trainings(overnight)}
    samples = card(charts, "samples")
    for step in SHOWN:
        samples.get_by_role("slider").press("ArrowRight")
        shown = samples.locator(f"img[src*='samples%2Bstep%2B{step}%2B']")
        shown.nth(len(runs) - 1).wait_for()
        seen = set()
        for image in shown.all():
            image.evaluate("image => image.decode()")
            source = image.get_attribute("src")
            (run_id,) = parse_qs(urlparse(source).query)["run_uuid"]
            drawn = Image.open(io.BytesIO(charts.request.get(urljoin(charts.url, source)).body())).convert("RGB")
            logged = Image.open(pictures(runs[run_id])["samples", step]).resize(drawn.size)
            assert np.abs(np.asarray(drawn, float) - np.asarray(logged, float)).mean() < 6
            seen.add(run_id)
        assert seen == set(runs)


@needs_browser
def test_a_run_shows_its_description_and_its_data_sets_with_their_digests(overnight, browser, address):
    run = trainings(overnight)[0]
    experiment = run.info.experiment_id
    (given,) = [each.dataset for each in run.inputs.dataset_inputs if each.dataset.name == "openmoji-training"]
    with browser.new_page() as page:
        page.set_default_timeout(PAGE_PATIENCE * 1000)
        server = address.partition("#")[0]
        page.goto(f"{server}#/experiments/{experiment}/runs/{run.info.run_id}?workflowType=machine_learning")
        page.get_by_text("images of openmoji").first.wait_for()
        page.get_by_text(given.name).first.click()
        details = page.get_by_role("dialog")
        details.get_by_text(f"Digest: {given.digest}").wait_for()
        details.get_by_text("Path: data/latents").wait_for()


@pytest.fixture
def morning(overnight: Project, tmp_path: Path) -> Project:
    """A copy of the project after the night, to change."""
    return overnight.copied(tmp_path / "project")


def test_the_best_is_found_taken_over_and_left_again(morning):
    before = morning.run("git", "rev-parse", "HEAD").stdout
    printed = shell(morning, with_two(BEST))
    assert all(name in printed for name in NAMES)
    for change in (r"train\.learning_rate\s+0\.004\s+0\.002\b", r"reports/evaluate/metrics\.json\s+val_mae\s"):
        assert re.search(change, printed)
    shell(morning, with_two(TAKE))
    params = yaml.safe_load((morning.folder / "params.yaml").read_text())
    assert params["train"]["learning_rate"] == 0.002
    assert done(morning) == ["rate-2"]
    assert morning.repro() == []

    printed = shell(morning, BACK)
    assert "Running stage 'train'" not in printed
    assert morning.run("git", "rev-parse", "HEAD").stdout == before
    params = yaml.safe_load((morning.folder / "params.yaml").read_text())
    assert params["train"]["learning_rate"] == 0.004
    assert len(trainings(morning)) == len(NAMES)


def test_a_machine_without_mlflow_and_dvc_trains_the_same_bytes_which_are_delivered_later(morning):
    box = morning.folder.parent / "latentloom"
    ignored = shutil.ignore_patterns(".git", ".dvc", ".state", "mlflow.db*", "mlartifacts", "models", "__pycache__")
    shutil.copytree(morning.folder, box, ignore=ignored)
    for package in ("mlflow", "dvc", "great_expectations"):
        (box / "src" / package).mkdir()
        (box / "src" / package / "__init__.py").write_text(f"raise ImportError('there is no {package} here')")
    there, copy, here = ELSEWHERE.strip().splitlines()
    said = Project(box, cold=True).run("bash", "-euc", there).stderr
    assert said.count("MLflow could not be written to") == 1
    assert "there is no mlflow here" in said
    assert not (box / "mlflow.db").exists()
    trained = Path("models/unet/model.safetensors")
    assert (box / trained).read_bytes() == (morning.folder / trained).read_bytes()

    before = {run.info.run_id for run in all_runs(morning)}
    for _ in range(2):  # copied and delivered again, nothing is doubled
        shell(morning, copy.replace("scp", "cp").replace("gpu-box:latentloom", str(box)))
        assert "delivered" in shell(morning, here)
        (new,) = [run for run in all_runs(morning) if run.info.run_id not in before]
        assert new.info.status == "FINISHED"
        assert [step for step, _ in curve(morning, new, "train/mae")] == STEPS
        assert sorted(pictures(new)) == [("final_samples", 0), *(("samples", step) for step in SHOWN)]
