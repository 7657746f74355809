"""The emoji of OpenMoji are rendered on white, and their captions tell them apart."""

import io
from collections import Counter

import emoji
import numpy as np
import pytest
from PIL import Image

from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.openmoji import SKIN_TONES, OpenMojiSource, render
from latentloom.ingestion.shards import iterate_images, read_manifest, read_metadata
from latentloom.params import IngestParams


@pytest.fixture(scope="module")
def captions():
    return OpenMojiSource(64).captions


def run(folder, limit):
    params = IngestParams(
        source="openmoji",
        path=None,
        image_size=64,
        limit=limit,
        val_fraction=0.1,
        max_pixels=2**20,
        max_aspect_ratio=1.0,
        near_duplicate_distance=None,
        max_reject_fraction=1.0,
    )
    return ingest(params, folder / "images", folder / "rejects.parquet", folder / "pairs.parquet", progress=False)


def test_there_are_1918_named_emoji_without_skin_tones(captions):
    assert OpenMojiSource(64).total == len(captions) == 1918
    assert not SKIN_TONES.intersection(chr(int(point, 16)) for key in captions for point in key.split("-"))


def test_names_come_first_and_read_as_text(captions):
    assert captions["1F34E"] == ["red apple", "apple"]
    assert captions["1F63B"][0] == "smiling cat with heart-eyes"
    assert captions["1F55B"][0] == "twelve o'clock"
    assert captions["1F1EB-1F1F7"] == ["flag of France", "France"]
    assert captions["1F3F4-E0067-E0062-E0073-E0063-E0074-E007F"][0] == "flag of Scotland"
    assert captions["1F44D"] == ["thumbs up", "thumbsup"]
    assert not any(mark in text for texts in captions.values() for text in texts for mark in "_:")


def test_every_emoji_has_its_name_among_its_captions(captions):
    named = {sequence.replace("\ufe0f", ""): entry["en"] for sequence, entry in emoji.EMOJI_DATA.items()}
    for key, texts in captions.items():
        sequence = "".join(chr(int(point, 16)) for point in key.split("-")).replace("\ufe0f", "")
        name = named[sequence].strip(":").replace("_", " ").replace("\u2019", "'")
        assert texts[0] in (name, f"flag of {name}")


def test_no_two_emoji_share_a_caption_in_any_case(captions):
    counts = Counter(text.casefold() for texts in captions.values() for text in texts)
    assert counts.most_common(1)[0][1] == 1
    assert captions["1F431"] == ["cat face"]
    assert captions["1F1EF-1F1F5"] == ["flag of Japan"]  # "Japan" might be the map of Japan
    assert "cat" in captions["1F408"]
    assert captions["1F1F9-1F1F7"] == ["flag of T\u00fcrkiye", "T\u00fcrkiye", "flag of Turkey"]
    assert captions["1F983"] == ["turkey"]


def test_renders_are_drawings_on_white(tmp_path):
    report = run(tmp_path, 8)
    pictures = np.stack([pixels for _, pixels in iterate_images(tmp_path / "images")])
    assert report.kept == len(pictures) == 8
    assert pictures.shape == (8, 64, 64, 3)
    for picture in pictures:
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
        assert 0.02 < (picture != 255).any(-1).mean() < 0.95
        assert picture.std() > 20


def test_an_apple_is_red_and_of_the_size_asked_for():
    apple = np.asarray(Image.open(io.BytesIO(render("1F34E", 96))).convert("RGB")).astype(int)
    assert apple.shape == (96, 96, 3)
    red, green, blue = apple[48, 48]
    assert red > 200 > 120 > max(green, blue)


def test_a_larger_limit_holds_all_of_a_smaller_one_in_the_same_order(tmp_path):
    run(tmp_path / "small", 6)
    run(tmp_path / "large", 12)
    small, large = (read_metadata(tmp_path / name / "images") for name in ("small", "large"))
    assert small["id"].tolist() == large["id"].tolist()[:6]
    assert small["captions"].tolist() == large["captions"].tolist()[:6]
    assert small["split"].tolist() == large["split"].tolist()[:6]


def test_the_subset_is_no_run_of_code_points(captions):
    first = list(captions)[:64]
    assert first != sorted(first)
    assert 3 < sum(key.startswith("1F1") for key in first) < 20
    assert len({key[:3] for key in first}) > 8


def test_the_manifest_carries_the_attribution(tmp_path):
    run(tmp_path, 2)
    manifest = read_manifest(tmp_path / "images")
    assert "OpenMoji" in manifest["attribution"]
    assert "https://openmoji.org" in manifest["attribution"]
    assert manifest["licence"] == "CC BY-SA 4.0"


def test_originals_are_of_the_rendered_size_and_keyed_by_code_points(tmp_path):
    run(tmp_path, 2)
    frame = read_metadata(tmp_path / "images")
    assert set(frame["width"]) == set(frame["height"]) == {64}
    assert set(frame["source"]) == {"openmoji"}
    assert all(chr(int(key.split("-")[0], 16)) for key in frame["key"])
