"""What the page does: the command line's bytes, pictures on their way, the nearest images, pages of the data."""

import runpy
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_models import save_tiny_unet
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.errors import UserError
from latentloom.evaluation.metadata import read_metadata
from latentloom.ingestion.near_duplicates import SCHEMA as PAIRS
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shards import read_metadata as read_images
from latentloom.page import data
from latentloom.page.handlers import Studio, in_a_thread
from latentloom.params_file import load_params

ROOT = Path(__file__).parents[2]
OPTIONS = {"seed": 5, "count": 2, "steps": 2, "guidance": 3, "precision": "fp32", "negative": "", "threshold": 99}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_unet(tmp_path_factory.mktemp("models") / "unet")


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def studio(model, tmp_path, monkeypatch, warned) -> Studio:
    """In a folder that has nothing but a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    shutil.copytree(model, tmp_path / "models" / "unet")
    return Studio(tmp_path, warned.append)


def keyboard(*arguments: str) -> None:
    result = CliRunner().invoke(app, ["sample", *arguments])
    assert result.exit_code == 0, result.output


def test_pictures_appear_step_by_step_and_are_the_bytes_of_the_command_line(studio):
    assert studio.models == ["models/unet", "showcase"]
    *on_the_way, pictures = studio.draw("models/unet", "a red apple", OPTIONS)
    words = [[words for _, words in shown] for shown in on_the_way]
    assert words == [["step 1", "waiting"], ["step 2", "waiting"], ["step 2", "step 1"], ["step 2", "step 2"]]
    options = "--seed 5 --steps 2 --guidance 3 --precision fp32 --threshold 99"
    for number, ((path, words), name) in enumerate(zip(pictures, ("5-0", "5-1"), strict=True)):
        assert (Path(path).name, words) == (f"a-red-apple-{name}.png", f"sample {number}")
        keyboard("a red apple", *options.split(), "--first", str(number), "-o", "typed.png")
        assert Path(path).read_bytes() == Path("typed.png").read_bytes()
        assert np.array_equal(on_the_way[-1][number][0], np.asarray(Image.open(path)))
    assert studio.command_of(pictures[0][0], "models/unet").startswith("latentloom sample 'a red apple' --model models")
    assert "sample 0 of seed 5" in studio.lineage_of(pictures[0][0])
    (again,) = list(studio.draw("models/unet", "a red apple", OPTIONS | {"count": 1}))[-1]
    assert Path(again[0]).name == "a-red-apple-5-0-2.png"  # the first one stays


def test_a_picture_to_start_from_and_the_way_between_two_samples_are_the_command_lines(studio, warned):
    Image.new("RGB", (90, 70), "orange").save("mine.png")
    options = OPTIONS | {"count": 1, "negative": "a cat"}
    settings = "--seed 5 --steps 2 --guidance 3 --precision fp32 --threshold 99"
    typed = [*settings.split(), "--negative", "a cat"]
    ((path, _),) = list(studio.draw("models/unet", "", options, "mine.png", 0.4))[-1]
    keyboard("--image", "mine.png", "--strength", "0.4", *typed, "-o", "typed.png")
    assert Path(path).read_bytes() == Path("typed.png").read_bytes()
    strip, *animations = studio.between("models/unet", ["an apple", ""], options, pictures=3, to_seed=6)
    keyboard("an apple", "--between", "3", "--to-seed", "6", *typed, "-o", "typed.png")
    assert Path(strip).read_bytes() == Path("typed.png").read_bytes()
    assert [Path(path).suffix for path in animations] == [".webp", ".gif"]
    for wrong, message in (({"pictures": None}, "pictures = None"), ({"to_seed": 1.5}, "a whole number from 0")):
        with pytest.raises(UserError, match=message):
            studio.between("models/unet", ["an apple"], options, **{"pictures": 3, "to_seed": 6} | wrong)
    same = studio.between("models/unet", ["an apple", "a pear"], options, pictures=2, to_seed=5)
    assert read_metadata(Path(same[0])).to_seed is None
    assert warned == []
    studio.between("models/unet", ["an apple", "一只猫"], options, pictures=2, to_seed=5)
    assert ["does not know" in remark for remark in warned] == [True]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "the prompt is empty: say what to draw"),
        ({"options": {"count": 17}}, "count = 17: the page makes at most 16"),
        ({"options": {"steps": 4.5}}, "diffusion_steps = 4.5: must be a whole number"),
        ({"options": {"guidance_interval": (0.9, 0.1)}}, "guidance_interval"),
        ({"reference": "models/none"}, "models/none"),
        ({"upload": "params.txt", "strength": 0.5}, "params.txt cannot be used: begins with the bytes"),
        ({"upload": "mine.png", "strength": None}, "strength = None: must be a number, from 0 to 1"),  # an empty field
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(studio, changed, message):
    Path("params.txt").write_text("no picture")
    Image.new("RGB", (90, 70), "orange").save("mine.png")
    asked = {"reference": "models/unet", "prompt": "an apple", "options": {}} | changed
    with pytest.raises(UserError, match=message):
        next(studio.draw(**asked))
    assert not studio.folder.exists()


def test_two_models_are_compared_by_what_was_measured_of_them(studio):
    words = studio.verdict("models/unet", "showcase")
    assert "verdict: not known: models/unet and showcase has no held-out figures" in words
    assert studio.verdict("models/unet", " models/unet").startswith("models/unet and models/unet are the same model")


def test_who_stops_listening_stops_the_work():
    ended = threading.Event()

    def work(show):
        try:
            while True:
                show(1)
        finally:
            ended.set()

    shown = in_a_thread(work)
    assert next(shown) == 1
    shown.close()
    assert ended.wait(10)


def test_the_nearest_images_are_found_and_the_data_is_shown_a_page_at_a_time(studio, prepare_images, monkeypatch):
    with pytest.raises(UserError, match="there is no data here to compare with"):
        studio.nearest("models/unet", "mine.png")
    images = prepare_images(range(40), size=64, name="data/images")
    params = load_params(ROOT / "params.yaml")
    for stage in ("encode_images", "encode_text"):
        runpy.run_path(str(ROOT / "pipelines" / f"{stage}.py"))["main"](params)
    Image.fromarray(data.kept(images, "Picture 17", 1)[0].pixels).save("mine.png")
    found = studio.nearest("models/unet", "mine.png")
    assert len(found) == 6 and found[0][1] == "0.000 (train): picture 17; noise of kind 2"

    monkeypatch.setattr(data, "ROWS", 8)
    of_kind_1 = [f"{seed}.png" for seed in range(40) if seed % 3 == 1]
    assert [row.key for row in data.kept(images, " KIND 1 ", 1)] == of_kind_1[:8]
    assert [row.key for row in data.kept(images, "kind 1", 2)] == of_kind_1[8:]
    assert len(data.kept(images, "", 5)) == 8 and data.kept(images, "", 6) == []
    for page in (0, None):  # None: an empty field
        with pytest.raises(UserError, match=f"page = {page}"):
            data.kept(images, "", page)

    table = RejectTable()
    for key, reason in (("a.jpg", Reason.TRUNCATED), ("b.jpg", Reason.TOO_SMALL)):
        table.add(Reject("folder", key, reason, "said why"))
    table.write(Path("data/rejects.parquet"))
    assert [row["key"] for row in data.rejected(Path("data/rejects.parquet"), "SMALL", 1)] == ["b.jpg"]
    ids = read_images(images)["id"].tolist()
    pairs = {"image_id": [ids[3], ids[6]], "twin_id": [ids[5], ids[8]], "distance": [2, 7]}
    pq.write_table(pa.table(pairs, PAIRS), "data/near_duplicates.parquet")
    alike = data.alike(Path("data/near_duplicates.parquet"), images, "picture 8", 1)
    assert [(a.key, b.key, distance) for a, b, distance in alike] == [("6.png", "8.png", 7)]
    assert len(data.alike(Path("data/near_duplicates.parquet"), images, "", 1)) == 2
    with pytest.raises(UserError, match=r"none\.parquet does not exist: `make repro` makes it"):
        data.rejected(Path("none.parquet"), "", 1)
