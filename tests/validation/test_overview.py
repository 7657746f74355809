"""What the first page shows is what the data holds, counted here another way; its pictures are the data's own."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latentloom.validation.overview import ASPECTS, histogram


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Page(HTMLParser):
    """The page's words, its tables' rows as text by cell, and its pictures' addresses with their alternative texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[tuple[str, str]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            given = dict(attributes)
            self.pictures.append((given["src"], given["alt"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.words = " ".join([*self.words.split(), *data.split()])
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def png(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(address: str) -> Image.Image:
    form, _, data = address.partition(",")
    assert form == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def page(caches) -> Page:
    caches.validate(docs=True)
    return Page((caches.root / "docs/index.html").read_text())


def test_the_counts_are_those_of_the_files(caches, page):
    assert (
        "found 49 kept 41 rejected 8 train 37 validation 4 latents 40 latents rejected 1 captions 40 captions cut 0 "
        "pairs 81" in page.words
    )
    assert ["photos", "39", "31", "8", "29", "2", "1", "the photos of a test", "CC0"] in page.rows
    assert ["drawings", "10", "10", "0", "8", "2", "2", "the drawings of a test", "CC0"] in page.rows


def test_every_reason_is_counted_with_an_example(page):
    reasons = [row for row in page.rows if row and row[0] in ("truncated", "no_caption", "latent_not_finite")]
    assert reasons == [
        ["truncated", "", "5", "broken/0.jpg: the file ends after 0 bytes"],
        ["no_caption", "", "3", "broken/5.jpg: there is no text beside it"],
        ["latent_not_finite", "", "1", "too bright.png: 7 of 1024 numbers are not finite in fp32"],
    ]


def test_the_contact_sheet_shows_each_image_above_its_own_caption(caches, page):
    """In the order of their ids read backwards; each has the colour that its image was made of."""
    by_id = {digest(f"image {n}"): (caches.colour(n), f"caption number {n}") for n in range(40)}
    by_id[digest("rejected latent")] = (caches.colour(40), "caption number 40")
    shown = []
    for source, caption in page.pictures[:41]:
        with opened(source) as picture:
            shown.append((picture.getpixel((0, 0)), caption))
    assert shown == [by_id[image_id] for image_id in sorted(by_id, key=lambda own: own[::-1])]


def test_no_more_images_are_shown_than_one_looks_at(make_caches):
    caches = make_caches("larger", images=80)
    caches.validate(docs=True)
    page = Page((caches.root / "docs/index.html").read_text())
    assert "48 of 81" in page.words
    captions = [caption for _, caption in page.pictures[:48]]
    ids = {digest(f"image {n}"): f"caption number {n}" for n in range(80)}
    ids[digest("rejected latent")] = "caption number 80"
    assert captions == [ids[image_id] for image_id in sorted(ids, key=lambda own: own[::-1])[:48]]


def test_the_contact_sheet_is_no_sample_of_one_split(make_caches):
    """The split is chosen by how an id begins: sampled by that too, all of validation would come first."""
    caches = make_caches("larger", images=80)
    frame = caches.read("latents").sort_values("id", ignore_index=True)
    held_out = frame["id"].iloc[:8].tolist()
    for table in ("images", "latents"):
        ids = caches.read(table)["id"]
        caches.set(table, list(ids.index), split="train")
        caches.set(table, list(ids.index[ids.isin(held_out)]), split="validation")
    caches.validate(docs=True)
    framed = (caches.root / "docs/index.html").read_text().count('class="tile held-out"')
    assert 0 < framed < 8


def test_rejected_images_are_shown_where_there_is_a_picture_and_named_where_there_is_none(caches, page):
    of_rejected = {}
    for source, caption in page.pictures[41:]:
        with opened(source) as picture:
            of_rejected[caption] = picture.getpixel((0, 0))
    assert of_rejected == {
        **{f"broken/{n}.jpg": caches.preview for n in (5, 6, 7)},
        "too bright.png": caches.colour(40),
        "caption number 0": caches.colour(0),
        "caption number 1": caches.colour(1),
        "caption number 2": caches.colour(2),
        "decoded from its latent": caches.decoded,
    }
    html = (caches.root / "docs/index.html").read_text()
    assert html.count('<div class="no-picture">truncated</div>') == 5


def test_near_duplicates_are_counted_and_shown(caches):
    pair = caches.read("near_duplicates")
    caches.write("near_duplicates", pd.concat([pair, pair.assign(twin_id=digest("rejected latent"), distance=1)]))
    caches.validate(docs=True)
    page = Page((caches.root / "docs/index.html").read_text())
    assert "2 pairs of kept images look alike" in page.words
    assert page.words.index("1 bit apart") < page.words.index("3 bits apart")
    shown = [caption for _, caption in page.pictures[-6:-2]]
    assert shown == [f"caption number {n}" for n in (0, 40, 0, 1)]


def test_of_the_images_that_were_decoded_the_worst_are_shown_beside_the_original(caches, page):
    assert "21.0 dB" in page.words and "31.0 dB" not in page.words
    (before, _), (after, _) = page.pictures[-2:]
    with opened(before) as original, opened(after) as decoded:
        assert (original.getpixel((0, 0)), decoded.getpixel((0, 0))) == (caches.colour(2), caches.decoded)


def test_data_is_never_markup(caches):
    captions = caches.read("images")["captions"]
    captions[0] = ['"><script>alert(1)</script>']
    caches.write("images", caches.read("images").assign(captions=captions))
    caches.set("rejects", [0], key="<b>.jpg", detail="<i>broken</i>")
    caches.validate(docs=True)
    html = (caches.root / "docs/index.html").read_text()
    assert not re.search(r"<script|<b>|<i>", html)
    page = Page(html)
    assert any(caption == '"><script>alert(1)</script>' for _, caption in page.pictures)


def test_values_are_counted_from_each_edge_to_the_next_and_empty_ends_are_left_out():
    edges = {"none": 0, "few": 10, "some": 100, "many": 200, "more": 1000}
    values = np.concatenate([np.random.default_rng(0).integers(10, 100, 30), [200, 999, np.nan]])
    assert list(histogram(pd.Series(values), edges).items()) == [("few", 30), ("some", 0), ("many", 2)]
    assert histogram(pd.Series([], dtype=float), edges) == {}


def test_lengths_and_sizes_are_counted_in_ranges(page):
    bars = {row[0]: row[2] for row in page.rows if len(row) == 4}
    shares = {row[0]: row[3] for row in page.rows if len(row) == 4}
    assert bars["10–19"] == "40"  # "caption number 0" has 16 characters
    assert shares["10–19"] == "100.0\xa0%"
    sides = [min(100 + 20 * n, 1000 - 20 * n) for n in range(41)]
    count = sum(256 <= side < 384 for side in sides)
    assert bars["256–383"] == str(count)
    assert shares["256–383"] == f"{100 * count / 41:.1f}\xa0%"


def test_images_of_several_sizes_are_counted_by_size_and_shown_in_their_ratio(caches, page):
    assert "as prepared" not in page.words
    caches.set_manifest(image_size=[48], sizes=[[32, 64, 4], [48, 48, 37]])
    images = caches.read("images")
    images["image"] = [{"bytes": png((250, 0, 0), (32, 64)), "path": "a.png"}] * len(images)
    caches.write("images", images)
    report = caches.validate(docs=True)
    assert report.success
    assert report.notices == (
        "sizes of fewer than 16 images (validate.min_train_images): 32x64 (4); the model learns little of them. A "
        "lower ingest.max_bucket_ratio or a larger ingest.bucket_multiple makes fewer sizes",
    )
    page = Page((caches.root / "docs/index.html").read_text())
    assert ["32x64", "", "4", "9.8\xa0%"] in page.rows
    assert opened(page.pictures[0][0]).size == (32, 64)


def test_aspects_fall_where_a_person_would_put_them():
    shapes = {
        (100, 400): "tall, over 3:1",
        (400, 100): "wide, over 3:1",
        (100, 100): "square, within 5:4",
        (110, 100): "square, within 5:4",
        (1600, 900): "wide, 3:2 to 2:1",
        (900, 1600): "tall, 3:2 to 2:1",
        (4, 3): "wide, 5:4 to 3:2",
    }
    for (width, height), label in shapes.items():
        assert histogram(pd.Series([width / height]), ASPECTS) == {label: 1}


def test_thumbnails_of_large_images_are_small(caches):
    """A prepared image may have 1,024 pixels a side."""
    frame = caches.read("images")
    buffer = io.BytesIO()
    Image.new("RGB", (1024, 1024), (1, 2, 3)).save(buffer, "PNG")
    frame["image"] = [{"bytes": buffer.getvalue(), "path": "large.png"}] * len(frame)
    caches.write("images", frame)
    caches.validate(docs=True)
    page = Page((caches.root / "docs/index.html").read_text())
    with opened(page.pictures[0][0]) as picture:
        assert picture.size == (160, 160)
