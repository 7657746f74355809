"""What docs/data.md shows is true: its params load, its worked examples run, and it leaves out no reason."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from latentloom.ingestion.captions import CAPTION_COLUMNS
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.shards import read_metadata
from latentloom.ingestion.table_columns import IMAGE_COLUMNS
from latentloom.params import Params
from latentloom.params_file import load_params

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str, begins: str) -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if block.startswith(begins)]


def with_params(snippet: str, folder: Path, **more: object) -> Params:
    """The shipped params, with those of a snippet in their place."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in yaml.safe_load(snippet).items():
        params[section] |= values | more
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params), encoding="utf-8")
    return load_params(path)


@pytest.mark.parametrize("snippet", blocks("yaml", "ingest:"))
def test_the_params_shown_can_be_loaded(snippet, tmp_path):
    shown = yaml.safe_load(snippet)["ingest"]
    loaded = with_params(snippet, tmp_path).ingest.model_dump(exclude_unset=True)
    assert {key: loaded[key] for key in shown} == shown


def test_every_block_of_params_is_among_those_tested():
    assert len(blocks("yaml", "ingest:")) == PAGE.count("```yaml") >= 6


def test_the_table_of_reasons_is_that_of_the_code():
    table = PAGE.partition("| reason |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [reason.value for reason in Reason]


def test_the_names_of_columns_are_those_of_the_code():
    for what, names in (("images", IMAGE_COLUMNS), ("captions", CAPTION_COLUMNS)):
        assert f"- {what}: {', '.join(f'`{name}`' for name in names)}\n" in PAGE


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Path:
    """The folder that the page shows, as the current one."""
    random = np.random.default_rng(0)
    (tmp_path / "pets" / "dogs").mkdir(parents=True)
    for name in ("cat.jpg", "dogs/one.png", "dogs/two.webp"):
        Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / "pets" / name)
    (tmp_path / "pets" / "cat.txt").write_text("a cat on a sofa\n")
    rows = re.search(r"metadata\.csv +(file_name,text\n.*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / "pets" / "dogs" / "metadata.csv").write_text(re.sub(r"^ +", "", rows, flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def captions(snippet: str, folder: Path) -> dict[str, list[str]]:
    params = with_params(snippet, folder, max_reject_fraction=1.0).ingest
    out = folder / "out"
    ingest(params, out / "images", out / "rejects.parquet", out / "near_duplicates.parquet", progress=False)
    frame = read_metadata(folder / "out" / "images")
    return dict(zip(frame["key"], frame["captions"], strict=True))


def test_the_folder_shown_gives_the_captions_shown(pets):
    (snippet,) = blocks("yaml", "ingest:\n  source: folder\n  path: pets")
    assert captions(snippet, pets) == {
        "cat.jpg": ["a cat on a sofa"],
        "dogs/one.png": ["a dog in the snow", "a brown dog"],
        "dogs/two.webp": ["a dog, asleep"],
    }


def test_the_command_shown_packs_a_folder_into_a_tar(pets):
    (command,) = blocks("sh", "mkdir shards")
    subprocess.run(command, shell=True, check=True)
    (snippet,) = blocks("yaml", "ingest:\n  source: webdataset")
    assert captions(snippet, pets) == {"00000.tar/cat": ["a cat on a sofa"]}


def test_the_code_shown_writes_a_table_that_is_read(pets):
    (code,) = blocks("python", "import pandas as pd\nfrom pathlib")
    exec(code, {})
    (snippet,) = blocks("yaml", "ingest:\n  source: parquet")
    assert captions(snippet, pets) == {
        "pets.parquet:0": ["a cat on a sofa", "a sleepy cat"],
        "pets.parquet:1": ["a dog in the snow"],
    }


def test_the_code_shown_embeds_the_bytes_of_pictures_into_a_table(pets):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": [str(pets / "pets" / "cat.jpg")], "text": ["a cat"]}, features)
    (code,) = blocks("python", "from datasets.table")
    exec(code, {"dataset": dataset})
    (snippet,) = blocks("yaml", "ingest:\n  source: parquet")
    assert captions(snippet, pets) == {"pets.parquet:0": ["a cat"]}
