"""What a user sees of the caches: only what is new is encoded and stored, and the stages say so."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from projects import Project, stages_run
from tiny_models import save_tiny_vae

from latentloom.files import read_json

pytestmark = pytest.mark.pipeline


def add_pictures(folder: Path, seeds: range, caption: str = "noise number") -> None:
    """Noise of 32 by 32 pixels with a caption each, named by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:06d}.png")
        (folder / f"{seed:06d}.txt").write_text(f"{caption} {seed}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def encoded(make_project) -> Project:
    """A project of 60 pictures in several shards whose caches are made; tests must leave it as they found it."""
    project = replace(make_project("caches"), rows_per_shard=6)
    add_pictures(project.folder / "pictures/b", range(60))
    project.set_params(ingest__source="folder", ingest__path="pictures", ingest__image_size=32, ingest__limit=None)
    project.run("dvc", "repro", "encode_images", "encode_text")
    return project


@pytest.fixture
def project(encoded, tmp_path) -> Project:
    """A copy of it, in which DVC's cache and the store have their files in common as well."""
    subprocess.run(["cp", "-a", encoded.folder, tmp_path / "project"], check=True)
    return replace(encoded, folder=tmp_path / "project")


def shards(project) -> dict[str, bytes]:
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("images", "latents", "text")
        for path in sorted((project.folder / "data" / name).glob("0*"))
    }


def test_added_images_alone_are_encoded_and_shards_beyond_them_stay(project):
    before = set(shards(project).values())
    add_pictures(project.folder / "pictures/a", range(2000, 2012))  # a folder that sorts before the other
    output = project.run("dvc", "repro", "encode_images", "encode_text").stdout
    assert "72 latents: encoded 12, reused 60" in output
    assert "72 captions: encoded 12, reused 60" in output
    assert read_json(project.folder / "reports/encode_images.json")["latents"] == 72
    assert read_json(project.folder / "reports/encode_text.json")["captions"] == 72
    after = shards(project)
    assert len(before & set(after.values())) >= 3  # of images, of latents and of text, those after the change
    state = {path.stat().st_ino for path in (project.folder / ".state/latents").iterdir()}
    assert all(path.stat().st_ino in state for path in (project.folder / "data/latents").glob("0*"))


def test_flip_encodes_the_mirrored_images_alone(project):
    project.set_params(encode_images__flip=True)
    output = project.run("dvc", "repro", "encode_images").stdout
    assert "120 latents: encoded 60, reused 60" in output


def test_another_precision_is_another_cache_and_going_back_encodes_nothing(project):
    project.set_params(encode_images__precision="bf16")
    assert "encoded 60, reused 0" in project.run("dvc", "repro", "encode_images").stdout
    project.set_params(encode_images__precision="fp32")
    shutil.rmtree(project.folder / ".dvc/cache/runs")  # so that the stage itself is asked, not DVC's run cache
    assert "encoded 0, reused 60" in project.run("dvc", "repro", "encode_images").stdout


def test_other_weights_in_the_folder_of_a_local_vae_are_noticed(project):
    folder = save_tiny_vae(project.folder / "my_vae")
    project.set_params(encode_images__vae="my_vae")
    assert "encoded 60, reused 0" in project.run("dvc", "repro", "encode_images").stdout
    before = shards(project)
    save_tiny_vae(folder, seed=1)
    printed = project.run("dvc", "repro", "encode_images", "encode_text").stdout
    assert "encoded 60, reused 0" in printed
    assert stages_run(printed) == ["encode_images"]
    assert shards(project) != before
    fingerprint = read_json(project.folder / "data/encoders/encode_images.json")["vae"]["fingerprint"]
    assert read_json(project.folder / "data/latents/stats.json")["vae"]["fingerprint"] == fingerprint


def test_deleting_the_store_costs_time_and_nothing_else(project):
    before = shards(project)
    shutil.rmtree(project.folder / ".state")
    output = project.run("dvc", "repro", "-f", "-s", "encode_images").stdout
    assert "encoded 0, reused 60" in output  # out of DVC's cache
    assert shards(project) == before
    shutil.rmtree(project.folder / ".state")
    shutil.rmtree(project.folder / ".dvc/cache")
    output = project.run("dvc", "repro", "-f", "-s", "encode_images").stdout
    assert "encoded 60, reused 0" in output
    assert shards(project) == before


def test_sources_of_a_list_are_trained_on_by_their_weights_with_nothing_held_out(make_project, tmp_path_factory):
    project = make_project("sources")
    pictures = tmp_path_factory.mktemp("pictures")
    add_pictures(pictures / "many", range(60))
    add_pictures(pictures / "few", range(100, 112), caption="夜の雑音、その")
    sources = [
        {"source": "folder", "path": str(pictures / "many"), "name": "many"},
        {"source": "folder", "path": str(pictures / "few"), "name": "few", "weight": 4},
    ]
    project.set_params(ingest__source=sources, ingest__image_size=32, ingest__limit=None)
    project.set_params(encode_images__flip=True, ingest__val_fraction=0.0)
    project.run("dvc", "repro")
    index = pd.read_parquet(project.folder / "data/latents/index.parquet")
    assert index.groupby("source")["weight"].agg(["size", "unique"]).to_dict("index") == {
        "few": {"size": 12, "unique": [4.0]},
        "many": {"size": 60, "unique": [1.0]},
    }
    report = read_json(project.folder / "reports/ingest.json")
    assert [(own["name"], own["kept"]) for own in report["sources"]] == [("many", 60), ("few", 12)]
    assert "夜の雑音、その 100" in set(pd.read_parquet(project.folder / "data/text/index.parquet")["text"])
    figures = read_json(project.folder / "reports/evaluate/metrics.json")
    assert "memorisation_recall" in figures and "val_mae" not in figures
