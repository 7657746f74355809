"""docs/experiments.md, from top to bottom: four experiments at once into a fresh store, MLflow's page in a browser, and
a run of a machine without MLflow."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright
from projects import ROOT, Project

from latentloom.diffusion.denoising_error import BINS, bin_name

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


QUEUE, STATUS, STOP = block("dvc exp run --queue"), block("dvc queue status"), block("dvc queue stop")
UI, BEST, TAKE = block("latentloom ui"), block("dvc exp show"), block("dvc exp apply")
BACK, ELSEWHERE = block("git checkout"), block("latentloom sync")
NAMES = [f"rate-{number}" for number in range(1, 5)]
RATES = ["0.0003", "0.0005", "0.002", "0.003"]
STEPS, SHOWN = [2, 4, 6, 8], [4, 8]  # of the tiny params: logged, and validated or drawn
VALIDATION = ["val/mae", *(f"val/mae_{bin_name(low, high)}" for low, high in BINS)]
PATIENCE = 600  # seconds until something counts as hanging


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
    shell(project, QUEUE)
    deadline = time.monotonic() + PATIENCE
    while len(done(project)) < len(NAMES):
        assert time.monotonic() < deadline, project.run("dvc", "queue", "status").stdout
        if not workers(project.folder):  # all of them tripped in starting, which the page tells of
            project.run("dvc", "queue", "start", "-j", "4")
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


def curve(project: Project, run: Run, metric: str) -> list[tuple[int, float]]:
    history = client(project).get_metric_history(run.info.run_id, metric)
    return [(point.step, round(point.value, 6)) for point in history]


def pictures(run: Run) -> dict[tuple[str, int], Path]:
    """The PNG files of a run's picture grids, by key and step."""
    folder = Path(urlparse(run.info.artifact_uri).path) / "images"
    found = (re.fullmatch(r"(\w+)\Wstep\W(\d+)\W.*\.png", path.name) for path in folder.iterdir())
    return {(name[1], int(name[2])): folder / name[0] for name in found if name}


def test_four_experiments_at_once_arrive_whole_in_the_right_experiment(overnight):
    assert sorted(found.name for found in client(overnight).search_experiments()) == ["Default", "latentloom"]
    runs = sorted(all_runs(overnight), key=lambda run: run.data.tags["dvc.experiment"])
    assert [run.data.tags["dvc.experiment"] for run in runs] == NAMES
    assert [run.info.run_name for run in runs] == NAMES
    assert [run.data.params["train.learning_rate"] for run in runs] == RATES
    for run, rate in zip(runs, RATES, strict=True):
        assert run.info.status == "FINISHED"
        assert [step for step, _ in curve(overnight, run, "train/mae")] == STEPS
        assert [step for step, _ in curve(overnight, run, "val/mae")] == SHOWN
        assert sorted(pictures(run)) == [("evaluation", 8), *(("samples", step) for step in SHOWN)]
        files = {found.path for found in client(overnight).list_artifacts(run.info.run_id)}
        assert files >= {"params.yaml", "dvc.lock", "validation.json", "samples.png", "model"}
        artifacts = Path(urlparse(run.info.artifact_uri).path)
        assert yaml.safe_load((artifacts / "params.yaml").read_text())["train"]["learning_rate"] == float(rate)
        assert artifacts.parent.parent == overnight.folder / "mlartifacts"
        assert 0 <= run.data.metrics["evaluate/caption_recall_at_1"] <= 1
        assert f"learning rate {float(rate):g}" in run.data.tags["mlflow.note.content"]
        assert len(run.inputs.dataset_inputs) == 2
    assert len({tuple(curve(overnight, run, "train/mae")) for run in runs}) == 4
    assert list((overnight.folder / ".state" / "tracking").iterdir()) == []
    assert len({run.info.run_id for run in runs}) == 4


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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [*UI.split(), "--port", str(port)]
    with open(overnight.folder.parent / "server.log", "w") as log:
        server = subprocess.Popen(
            command,
            cwd=overnight.folder,
            env=overnight.environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    said = server.stdout.readline().strip()
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(port):
            assert server.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        yield said.removeprefix("MLflow: ")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    """The address that `latentloom ui` printed, in a browser."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=sandbox)
        tab = browser.new_page(viewport={"width": 1600, "height": 2600})
        tab.set_default_timeout(PATIENCE * 1000 / 2)
        tab.goto(address)
        yield tab
        browser.close()


def card(page: Page, title: str) -> Locator:
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=title).first


def assert_drawn(project: Project, shown: Locator, key: str, step: int) -> tuple[str, float]:
    """The picture on the page is the one that was logged under ``key`` at ``step``; its run's id, and its contrast."""
    shown.evaluate("image => image.decode()")
    asked = parse_qs(urlparse(shown.get_attribute("src")).query)
    (run,) = [run for run in all_runs(project) if run.info.run_id == asked["run_uuid"][0]]
    assert f"{key}+step+{step}+" in asked["path"][0]
    pixels, logged = Image.open(io.BytesIO(shown.screenshot())), Image.open(pictures(run)[key, step])
    seen, expected = (
        np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), float) for image in (pixels, logged)
    )
    assert np.abs(seen - expected).mean() < 6
    return run.info.run_id, expected.std()


@needs_browser
def test_the_page_opens_on_the_newest_pictures_and_the_slider_goes_to_the_others(overnight, page):
    ids = {run.info.run_id for run in all_runs(overnight)}
    samples = card(page, "samples")
    for key, presses, step in (("samples", 0, 8), ("evaluation", 0, 8), ("samples", 1, 4)):
        slider = card(page, key).get_by_role("slider")
        for _ in range(presses):
            slider.press("ArrowLeft")
        images = card(page, key).locator(f"img[src*='%2B{step}%2B']")
        images.nth(3).wait_for()
        assert slider.get_attribute("aria-valuenow") == str(step)
        drawn = dict(assert_drawn(overnight, image, key, step) for image in images.all())
        assert set(drawn) == ids
        assert max(drawn.values()) > 5  # a model after 8 steps may draw white, which the page itself would pass for
    assert "learning_rate=" not in samples.inner_text()  # params would push the pictures out of sight


@needs_browser
@pytest.mark.parametrize(("number", "metrics"), [(0, ["train/mae"]), (1, VALIDATION)])
def test_an_error_has_one_panel_with_the_curves_of_all_runs(overnight, page, number, metrics):
    expected = {tuple(curve(overnight, run, metric)) for run in all_runs(overnight) for metric in metrics}
    assert len(expected) == 4 * len(metrics)
    drawn = """() => [...document.querySelectorAll('.js-plotly-plot')]
        .map(plot => plot.data.filter(line => line.type === 'scatter'))
        .filter(lines => lines.length)
        .map(lines => lines.map(line => Array.from(line.x, (step, place) => [step, line.y[place]])))"""
    deadline = time.monotonic() + 60
    while True:
        panels = [
            {tuple((int(step), round(value, 6)) for step, value in line) for line in panel}
            for panel in page.evaluate(drawn)
        ]
        if len(panels) > number and panels[number] == expected:
            break
        assert time.monotonic() < deadline, panels
        page.wait_for_timeout(500)


@needs_browser
def test_a_run_shows_its_description_and_its_data_sets_with_digest_and_schema(overnight, page, address):
    run = all_runs(overnight)[0]
    experiment = run.info.experiment_id
    page.goto(f"{address.split('#')[0]}#/experiments/{experiment}/runs/{run.info.run_id}?workflowType=machine_learning")
    page.get_by_text("images of openmoji").first.wait_for()
    (given,) = [each.dataset for each in run.inputs.dataset_inputs if each.dataset.name == "openmoji-training"]
    page.get_by_text(given.name).first.click()
    details = page.get_by_role("dialog")
    details.get_by_text("Path: data/latents").wait_for()
    shown = details.inner_text()
    assert f"Digest: {given.digest}" in shown
    assert re.search(r"caption\s+string", shown)


def test_the_best_is_found_taken_over_and_left_again(overnight):
    before = overnight.run("git", "rev-parse", "HEAD").stdout
    printed = shell(overnight, BEST)
    assert all(name in printed for name in NAMES)
    for change in (r"train\.learning_rate\s+0\.001\s+0\.002\b", r"reports/evaluate/metrics\.json\s+val_mae\s"):
        assert re.search(change, printed)
    shell(overnight, TAKE)
    params = yaml.safe_load((overnight.folder / "params.yaml").read_text())
    assert params["train"]["learning_rate"] == 0.002
    assert done(overnight) == ["rate-3"]
    assert overnight.repro() == []

    printed = shell(overnight, BACK)
    assert "Running stage 'train'" not in printed
    assert overnight.run("git", "rev-parse", "HEAD").stdout == before
    params = yaml.safe_load((overnight.folder / "params.yaml").read_text())
    assert params["train"]["learning_rate"] == 0.001
    assert len(all_runs(overnight)) == 4


def test_what_a_machine_without_mlflow_trained_is_delivered_later(overnight):
    box = overnight.folder.parent / "box" / "latentloom"
    ignored = shutil.ignore_patterns(".git", ".dvc", ".state", "mlflow.db*", "mlartifacts", "models", "__pycache__")
    shutil.copytree(overnight.folder, box, ignore=ignored)
    (box / "src" / "mlflow").mkdir()
    (box / "src" / "mlflow" / "__init__.py").write_text("raise ImportError('there is no MLflow here')")
    there, copy, here = ELSEWHERE.strip().splitlines()
    said = Project(box, cold=True).run("bash", "-euc", there).stderr
    assert said.count("MLflow could not be written to") == 1
    assert "there is no MLflow here" in said
    assert not (box / "mlflow.db").exists()

    before = {run.info.run_id for run in all_runs(overnight)}
    for _ in range(2):  # copied and delivered again, nothing is doubled
        shell(overnight, copy.replace("scp", "cp").replace("gpu-box:latentloom", str(box)))
        assert "delivered" in shell(overnight, here)
        (new,) = [run for run in all_runs(overnight) if run.info.run_id not in before]
        assert new.info.status == "FINISHED"
        assert [step for step, _ in curve(overnight, new, "train/mae")] == STEPS
        assert sorted(pictures(new)) == [("samples", step) for step in SHOWN]
