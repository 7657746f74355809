"""The emoji of OpenMoji are rendered on white, their captions tell them apart, and families of skin tones are whole."""

import io
import re
from collections import Counter

import emoji
import numpy as np
import pytest
from PIL import Image, ImageColor

from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.openmoji import SKIN_TONES, OpenMojiSource, render
from latentloom.ingestion.shards import iterate_images, read_manifest, read_metadata
from latentloom.params import IngestParams


@pytest.fixture(scope="module")
def captions():
    return OpenMojiSource(64).captions


@pytest.fixture(scope="module")
def everything():
    return OpenMojiSource(64, skin_tones=None).captions


# As OpenMoji's style guide has them: https://openmoji.org/styleguide
FILL = {
    "light": "#fadcbc",
    "medium-light": "#debb90",
    "medium": "#c19a65",
    "medium-dark": "#a57939",
    "dark": "#6a462f",
}
CODE = dict(zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), FILL, strict=True))
WITHOUT_TONE = {  # drawn in yellow, so equal to the picture without tones, and rejected after it
    "people with bunny ears",
    "people wrestling",
}


def tones_of(key: str) -> list[str]:
    """Those of the picture's people in order, each once."""
    return list(dict.fromkeys(CODE[point] for point in key.split("-") if point in CODE))


def name_without_tones(caption: str) -> str:
    return re.sub(r",? ?[a-z-]+ skin tone.*", "", caption)


def pixels(key: str, size: int = 64) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(render(key, size))).convert("RGB"))


def mean_column(picture: np.ndarray, colour: str) -> float:
    """Where the pixels of a colour lie, from 0 to 1; NaN if there are hardly any."""
    near = (abs(picture.astype(int) - ImageColor.getrgb(colour)) <= 6).all(-1)
    return np.nonzero(near)[1].mean() / picture.shape[1] if near.sum() > 4 else np.nan


def run(folder, limit, skin_tones=0):
    params = IngestParams(
        source="openmoji",
        path=None,
        shape="square",
        image_size=64,
        bucket_multiple=32,
        max_bucket_ratio=2.0,
        limit=limit,
        skin_tones=skin_tones,
        val_fraction=0.1,
        max_pixels=2**20,
        max_aspect_ratio=1.0,
        near_duplicate_distance=None,
        max_reject_fraction=1.0,
    )
    return ingest(params, folder / "images", folder / "rejects.parquet", folder / "pairs.parquet", progress=False)


def test_there_are_1918_named_emoji_without_skin_tones(captions):
    assert OpenMojiSource(64).total == len(captions) == 1918
    assert not SKIN_TONES.keys() & {chr(int(point, 16)) for key in captions for point in key.split("-")}


def test_with_skin_tones_there_are_3953_and_the_yellow_ones_are_called_as_without(captions, everything):
    assert len(everything) == 3953
    assert {key: everything[key] for key in captions} == captions
    assert not any("skin tone" in text for texts in captions.values() for text in texts)


def test_a_tone_is_named_in_every_caption_of_a_picture_that_has_it(captions, everything):
    assert everything["1F469-1F3FE-200D-1F680"] == ["woman astronaut, medium-dark skin tone"]
    assert everything["1F44D-1F3FF"] == ["thumbs up, dark skin tone"]
    assert everything["1F469-1F3FC-200D-1F9B0"][0] == "woman red hair, medium-light skin tone"
    assert everything["1F3FD"] == ["medium skin tone"]
    for key in everything.keys() - captions.keys():
        for caption in everything[key]:
            assert re.findall(r"([a-z-]+) skin tone", caption) == tones_of(key)
            assert caption == " ".join(caption.split())
            assert not set("_:") & set(caption)


def test_of_two_tones_it_is_said_which_is_on_the_left_and_it_is(everything):
    assert everything["1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF"][0] == (
        "woman and man holding hands, light skin tone on the left, dark skin tone on the right"
    )
    assert everything["1F91D-1F3FB"] == ["handshake, light skin tone"]
    two_tones = [key for key in everything if len(tones_of(key)) == 2]
    assert len(two_tones) == 19 * 20
    for key in two_tones[::7]:
        left, right = re.fullmatch(
            r".*, (\S+) skin tone on the left, (\S+) skin tone on the right", everything[key][0]
        ).groups()
        columns = [mean_column(pixels(key), FILL[tone]) for tone in (left, right)]
        if name_without_tones(everything[key][0]) in WITHOUT_TONE:
            assert np.isnan(columns).all()
        else:
            assert columns[0] + 0.1 < columns[1]


def test_pictures_have_the_tone_that_their_caption_names(everything):
    one_tone = [key for key in everything if len(tones_of(key)) == 1]
    for key in one_tone[::23]:
        (tone,) = tones_of(key)
        assert not np.isnan(mean_column(pixels(key), FILL[tone])), everything[key]


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


def test_no_two_emoji_share_a_caption_in_any_case(captions, everything):
    counts = Counter(text.casefold() for texts in everything.values() for text in texts)
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


def test_chosen_families_come_first_and_whole_with_the_yellow_picture_before_its_tones(captions):
    chosen = OpenMojiSource(64, skin_tones=40).captions
    keys = list(chosen)
    for start in range(0, 240, 6):
        family = keys[start : start + 6]
        assert {name_without_tones(chosen[key][0]) for key in family} == {chosen[family[0]][0]}
        assert [tones_of(key) for key in family] == [[], *([tone] for tone in FILL)]
    assert keys[240:] == [key for key in captions if key not in keys[:240]]


def test_those_of_two_people_come_after_those_of_one(everything):
    two_tones = [place for place, key in enumerate(everything) if len(tones_of(key)) == 2]
    assert min(two_tones) > 311 * 6
    assert OpenMojiSource(64, skin_tones=312).total < OpenMojiSource(64, skin_tones=313).total - 20


@pytest.mark.parametrize(("limit", "images"), [(5, 6), (6, 6), (11, 6), (12, 12), (24, 24)])
def test_a_family_that_would_go_beyond_the_limit_is_left_out_and_all_that_follows(limit, images):
    source = OpenMojiSource(64, skin_tones=10, limit=limit)
    assert source.total == images
    assert list(source.captions) == list(OpenMojiSource(64, skin_tones=10).captions)[:images]


def test_others_fill_up_to_the_limit_once_all_families_are_in(tmp_path):
    assert run(tmp_path / "full", 16, skin_tones=2).kept == 16
    assert run(tmp_path / "not full", 11, skin_tones=2).kept == 6
    keys = [read_metadata(tmp_path / name / "images")["key"].tolist() for name in ("not full", "full")]
    assert keys[1][:6] == keys[0]
    assert sum(map(len, map(tones_of, keys[1]))) == 10


def test_the_subset_is_no_run_of_code_points(captions):
    first = list(captions)[:64]
    assert first != sorted(first)
    assert 3 < sum(key.startswith("1F1") for key in first) < 20
    assert len({key[:3] for key in first}) > 8


def test_the_manifest_carries_the_attribution_and_originals_are_of_the_rendered_size_keyed_by_code_points(tmp_path):
    run(tmp_path, 2)
    manifest = read_manifest(tmp_path / "images")
    assert "OpenMoji" in manifest["attribution"]
    assert "https://openmoji.org" in manifest["attribution"]
    assert manifest["licence"] == "CC BY-SA 4.0"
    frame = read_metadata(tmp_path / "images")
    assert set(frame["width"]) == set(frame["height"]) == {64}
    assert set(frame["source"]) == {"openmoji"}
    assert all(chr(int(key.split("-")[0], 16)) for key in frame["key"])
