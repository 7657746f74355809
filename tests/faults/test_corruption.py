"""A damaged or missing input ends a stage with the file's name and what to do, never with a traceback."""

import shutil
from dataclasses import replace

import pytest

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
def test_the_file_is_named(finished, tmp_path, stage, path, damage):
    copy = replace(finished, folder=tmp_path / "project")
    shutil.copytree(
        finished.folder, copy.folder, ignore=shutil.ignore_patterns(".git", ".dvc", "cache", "mlartifacts", ".state")
    )
    target = copy.folder / path
    content = target.read_bytes()
    target.unlink()
    if damage == "truncated":
        target.write_bytes(content[: len(content) // 2])
    result = copy.run("env", "PYTHONPATH=src", "python", f"pipelines/{stage}.py", check=False)
    assert result.returncode == 1
    assert path in result.stderr
    assert "dvc" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_index_that_does_not_fit_fails_the_validation_and_leaves_its_report(finished, tmp_path):
    import json

    import pandas as pd

    copy = replace(finished, folder=tmp_path / "project")
    shutil.copytree(
        finished.folder, copy.folder, ignore=shutil.ignore_patterns(".git", ".dvc", "cache", "mlartifacts", ".state")
    )
    path = copy.folder / "data/text/index.parquet"
    index = pd.read_parquet(path)
    path.unlink()
    index.loc[[1, 3], "norm"] = 1e9
    index.to_parquet(path, index=False)
    result = copy.run("env", "PYTHONPATH=src", "python", "pipelines/validate.py", check=False)
    assert result.returncode == 1
    assert "2 of" in result.stderr
    for own_id in index["id"].iloc[[1, 3]]:
        assert own_id in result.stderr
    assert json.loads((copy.folder / "reports/validation.json").read_text())["success"] is False
    assert (copy.folder / "reports/data_docs/index.html").exists()
