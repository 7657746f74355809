"""The stage script in a folder of its own: what it writes, says and ends with when a check fails."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from projects import stage_socket

from latentloom.encoding.pretrained import fingerprint
from latentloom.encoding.references import text_folder, vae_folder

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_stage(make_caches, tmp_path):
    """Run the stage on caches with ``faulty`` latents of a mean out of range; gives the result and the report."""

    for part in ("pipelines", "src"):
        (tmp_path / part).symlink_to(ROOT / part)

    def run(on_failure: str, faulty: int) -> tuple[subprocess.CompletedProcess[str], dict]:
        caches = make_caches("data")
        caches.set_stats("latents", vae={"fingerprint": fingerprint(vae_folder("bundled"))})
        caches.set_stats("text", encoder={"fingerprint": fingerprint(text_folder("bundled"))})
        if faulty:
            caches.set("latents", list(range(faulty)), mean=np.float32(99.0))
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["validate"]["on_failure"] = on_failure
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        result = subprocess.run(
            [stage_socket().parent / "python", "pipelines/validate.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": "src", "PATH": "", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return result, json.loads((tmp_path / "reports/validation.json").read_text())

    return run


def test_a_failure_stops_the_pipeline_or_warns_in_the_same_words(run_stage, tmp_path):
    stopped, report = run_stage("stop", faulty=7)
    assert stopped.returncode == 1 and stopped.stdout == ""
    assert report["success"] is False
    for words in ("latent_mean_in_range: 7 of 40 latents", "first 5 of them", "what to do: ", "data_docs/index.html"):
        assert words in stopped.stderr
    page = (tmp_path / "reports/data_docs/index.html").read_text()
    assert "1 of 20 checks failed" in page

    (tmp_path / "data").rename(tmp_path / "before")
    warned, same = run_stage("warn", faulty=7)
    assert warned.returncode == 0
    assert warned.stderr == stopped.stderr
    assert same == report
    assert (tmp_path / "reports/data_docs/index.html").read_text() == page
    assert warned.stdout.startswith("validate: 1 of 20 checks failed on 40 images and 40 captions")


def test_sound_data_passes_in_one_line(run_stage):
    passed, report = run_stage("stop", faulty=0)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert passed.stdout.startswith("validate: 20 checks passed on 40 images and 40 captions (")
    assert passed.stdout.count("\n") == 1
    assert report["success"] is True
