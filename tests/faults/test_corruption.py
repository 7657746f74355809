"""A damaged or missing input ends a stage with the file's name and what to do, never with a traceback."""

import json

import pandas as pd
import pytest
from stages import end, start

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("encode_images", "data/images/00000.parquet"),
        ("encode_text", "data/images/manifest.json"),
        ("validate", "data/latents/index.parquet"),
        ("train", "data/latents/00000.safetensors"),
        ("train", "data/text/stats.json"),
        ("evaluate", "models/unet/model.safetensors"),
        ("evaluate", "models/unet/config.json"),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_file_is_named(project, stage, path, damage):
    target = project.folder / path
    content = target.read_bytes()
    target.unlink()
    if damage == "truncated":
        target.write_bytes(content[: len(content) // 2])
    process = start(project, stage)
    printed = end(project, process)
    assert process.exitcode == 1
    assert path in printed
    assert "dvc" in printed
    assert "Traceback" not in printed


def test_an_index_that_does_not_fit_fails_the_validation_and_leaves_its_report(project):
    path = project.folder / "data/text/index.parquet"
    index = pd.read_parquet(path)
    index.loc[[1, 3], "norm"] = 1e9
    index.to_parquet(path, index=False)
    process = start(project, "validate")
    printed = end(project, process)
    assert process.exitcode == 1
    assert "2 of" in printed
    for own_id in index["id"].iloc[[1, 3]]:
        assert own_id in printed
    assert json.loads((project.folder / "reports/validation.json").read_text())["success"] is False
    assert (project.folder / "reports/data_docs/index.html").exists()
