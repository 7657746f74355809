"""A stage that is killed leaves nothing half-written, and the rerun ends where an uninterrupted run does."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault


def start(project, stage: str) -> subprocess.Popen:
    environment = project.environment | {"PYTHONPATH": "src"}
    return subprocess.Popen(
        ["python", f"pipelines/{stage}.py"],
        cwd=project.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(project, stage: str) -> str:
    process = start(project, stage)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when(project, stage: str, moment, *, may_end_first: bool = False) -> None:
    process = start(project, stage)
    deadline = time.monotonic() + 120
    while not moment():
        if may_end_first and process.poll() == 0:
            break
        assert process.poll() is None, f"{stage} ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def projects(make_project):
    """Two projects with all of OpenMoji at 32 pixels: more than one shard, yet seconds of work."""

    def make(name):
        project = make_project(name)
        project.set_params(ingest__limit=None, ingest__image_size=32)
        return project

    return make("whole"), make("killed")


def test_a_killed_ingest_is_not_taken_for_finished_and_starts_over(projects):
    whole, killed = projects
    finish(whole, "ingest")
    images = killed.folder / "data/images"
    kill_when(killed, "ingest", lambda: (images / "00000.parquet").exists())
    assert not (images / "manifest.json").exists()
    refused = start(killed, "encode_images")
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "manifest.json does not exist: run `dvc repro`" in output
    finish(killed, "ingest")
    assert contents(images) == contents(whole.folder / "data/images")


@pytest.mark.parametrize(
    ("stage", "out", "state"), [("encode_images", "latents", "latents"), ("encode_text", "text", "text")]
)
def test_a_killed_encoder_loses_no_finished_shard(projects, stage, out, state):
    whole, killed = projects
    finish(whole, stage)
    store = killed.folder / ".state" / state
    kill_when(killed, stage, lambda: list(store.glob("[0-9a-f]*.safetensors")))
    output = finish(killed, stage)
    reused = int(output.split("reused ")[-1].split()[0])
    assert reused >= 1024
    assert contents(killed.folder / "data" / out) == contents(whole.folder / "data" / out)


def test_no_half_file_is_left_under_a_final_name_by_kills_at_many_moments(projects):
    whole, killed = projects
    expected = contents(whole.folder / "data/latents")
    for delay in (0.0, 0.01, 0.02, 0.04, 0.08, 0.16):
        for folder in (killed.folder / ".state/latents", killed.folder / "data/latents"):
            for path in folder.iterdir():
                path.unlink()
        started = []

        def moment(delay=delay, started=started) -> bool:
            if not started and list((killed.folder / ".state/latents").glob(".*.tmp")):
                started.append(time.monotonic())
            return bool(started) and time.monotonic() - started[0] >= delay

        kill_when(killed, "encode_images", moment, may_end_first=True)
        for path in (killed.folder / "data/latents").glob("*.safetensors"):
            assert path.read_bytes() == expected[path.name]
    finish(killed, "encode_images")
    assert contents(killed.folder / "data/latents") == expected
