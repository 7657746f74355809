"""Each check fails for its own fault, alone, with the right count and ids; and what is written can be acted on."""

import hashlib
import json
import logging
import re
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentloom.errors import UserError
from latentloom.files import read_json
from latentloom.validation.report import ValidationReport


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def failing(report: ValidationReport) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Each failing check, with how many rows break it and the ids it names."""
    return {check.name: (check.offending, check.ids) for check in report.failures}


def test_valid_caches_pass_every_check(caches):
    report = caches.validate()
    assert report.success and report.failures == ()
    assert report.rows == {
        "images": 41,
        "near_duplicates": 1,
        "latents": 40,
        "captions": 40,
        "channels": 4,
        "dataset": 1,
    }
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names) == 20


def test_an_image_that_was_not_encoded(caches):
    frame = caches.read("latents")
    caches.write("latents", frame.drop(index=[3]))
    lost = (digest("image 3"),)
    assert failing(caches.validate()) == {"images_encoded": (1, lost)}


def test_an_image_whose_latent_was_rejected_is_no_failure_nor_are_its_pairs(caches):
    """One is so from the start; here is another, among the first forty."""
    frame, rejects = caches.read("latents"), caches.read("latent_rejects")
    rejected = rejects.assign(id=digest("image 3"))
    caches.write("latents", frame.drop(index=[3]))
    caches.write("latent_rejects", pd.concat([rejects, rejected]))
    # Two of 41 are more than one in a hundred: that alone is wrong.
    report = caches.validate()
    assert failing(report) == {"few_latents_rejected": (1, ())}
    assert report.failures[0].observed == (round(2 / 41, 7),)


def test_a_latent_of_an_image_that_is_gone(caches):
    gone = digest("gone")
    caches.set("latents", [3], id=gone)
    pairs = caches.read("pairs").replace(digest("image 3"), gone)
    caches.write("pairs", pairs)
    assert failing(caches.validate()) == {
        "images_encoded": (1, (digest("image 3"),)),
        "splits_as_ingested": (1, (gone,)),
    }


def test_a_latent_in_another_split_than_ingest_chose(caches):
    ids = caches.set("latents", [3], split="validation")
    assert failing(caches.validate()) == {"splits_as_ingested": (1, tuple(ids))}


@pytest.mark.parametrize(("image", "near_duplicate"), [(9, 0), (0, 9)])
def test_a_validation_image_with_a_near_duplicate_in_train(caches, image, near_duplicate):
    """The validation image is the one named, whichever of the two comes first."""
    pair = caches.read("near_duplicates")
    apart = pair.assign(image_id=digest(f"image {image}"), twin_id=digest(f"image {near_duplicate}"))
    both_held_out = pair.assign(image_id=digest("image 19"), twin_id=digest("image 29"))
    caches.write("near_duplicates", pd.concat([pair, both_held_out, apart]))
    assert failing(caches.validate()) == {"near_duplicates_in_one_split": (1, (digest("image 9"),))}


def test_an_unknown_split(caches):
    ids = caches.set("latents", [2], split="test")
    assert failing(caches.validate()) == {"splits_as_ingested": (1, tuple(ids))}


def test_observed_text_is_escaped(caches):
    caches.set_stats("latents", vae={"fingerprint": "<i>vae</i>"})
    report = caches.validate(docs=True)
    assert failing(report) == {"vae_fingerprint_expected": (1, ())}
    assert report.failures[0].observed == ("<i>vae</i>",)
    page = (caches.root / "docs/index.html").read_text()
    assert "<i>vae" not in page
    assert page.count("&lt;i&gt;vae") >= 2


def test_an_image_without_captions(caches):
    pairs = caches.read("pairs")
    caches.write("pairs", pairs[pairs["image_id"] != digest("image 5")])
    assert failing(caches.validate()) == {"images_captioned": (1, (digest("image 5"),))}


def test_a_latent_marked_as_not_finite(caches):
    ids = caches.set("latents", [1, 8], finite=False)
    assert failing(caches.validate()) == {"latents_finite": (2, tuple(ids))}


def test_a_latent_whose_statistics_are_nan_is_not_finite_even_when_the_index_says_so(caches):
    ids = caches.set("latents", [1], mean=np.nan, std=np.nan, abs_max=np.nan)
    assert failing(caches.validate()) == {"latents_finite": (1, tuple(ids))}


def test_latents_out_of_range(caches):
    ids = caches.set("latents", [1, 2], mean=np.float32(123.4)) + caches.set("latents", [3], std=np.float32(0.01))
    report = caches.validate()
    assert failing(report) == {"latent_mean_in_range": (2, tuple(ids[:2])), "latent_std_in_range": (1, (ids[2],))}
    assert [check.observed for check in report.failures] == [(123.4, 123.4), (0.01,)]


def test_captions_too_short_or_too_long(caches):
    ids = caches.set("captions", [1], text=" x ") + caches.set("captions", [2], text="é" * 301)
    ids += caches.set("captions", [4], text=" \n")
    caches.set("captions", [3], text="é" * 300)
    report = caches.validate()
    assert failing(report) == {"caption_length_in_range": (3, tuple(ids))}
    assert report.failures[0].observed == (1, 301, 0)


def test_captions_that_are_cut_are_counted_and_may_be_a_few(caches):
    """Of 40, two are within the limit of 0.05 and three are not; a caption of exactly as many tokens is whole."""
    caches.set("captions", [1], tokens=77)
    ids = caches.set("captions", [4, 5], tokens=78)
    report = caches.validate(docs=True)
    assert report.success
    assert "captions cut</dt><dd>2<" in (caches.root / "docs/index.html").read_text()
    ids += caches.set("captions", [9], tokens=1000)
    report = caches.validate()
    assert failing(report) == {"captions_read_whole": (3, tuple(ids))}
    assert report.failures[0].observed == (78, 78, 1000)
    assert caches.validate(caches.limits.model_copy(update={"max_cut_captions": 0.1})).success


def test_captions_of_other_words_with_one_embedding(caches):
    """As of a script that the encoder does not know. Case, accents and spaces alone make no other words."""
    same = {"mean": np.float32(0.7)}
    ids = caches.set("captions", [1], text="Réunion  island", **same)
    ids += caches.set("captions", [2], text="reunion Island", **same)
    caches.set("captions", [3], text="a page of text", tokens=90, **same)
    assert caches.validate().success
    ids += caches.set("captions", [9], text="一只猫", **same)
    report = caches.validate()
    assert failing(report) == {"captions_told_apart": (3, tuple(ids))}
    assert "choose a multilingual encode_text.model" in report.failures[0].advice
    assert caches.validate(caches.limits.model_copy(update={"max_same_embeddings": 0.1})).success


def test_a_vae_that_smears_the_images(caches):
    caches.set("reconstructions", [1], psnr=np.float32(24.0))
    report = caches.validate()
    assert failing(report) == {"vae_reconstructs_images": (1, ())}
    assert report.failures[0].observed == (22.5,)
    assert caches.validate(caches.limits.model_copy(update={"min_reconstruction_psnr": 22.0})).success


def test_embeddings_that_are_not_finite(caches):
    """By the index's own word, or by statistics that no finite embedding has."""
    faults = [(9, {"finite": False}), (10, {"norm": np.nan}), (11, {"mean": -np.inf})]
    ids = [caches.set("captions", [row], **values)[0] for row, values in faults]
    assert failing(caches.validate()) == {"embeddings_finite": (3, tuple(ids))}


def test_an_embedding_without_length(caches):
    ids = caches.set("captions", [9], norm=np.float32(0.0))
    assert failing(caches.validate()) == {"embedding_norm_in_range": (1, tuple(ids))}


def test_a_dead_channel(caches):
    caches.set_stats("latents", std=[1.0, 1.0, 0.0, 1.0])
    assert failing(caches.validate()) == {"channel_std_positive": (1, ("channel 2",))}


def test_encoders_that_are_not_those_in_params(caches):
    report = caches.validate(expected_vae_fingerprint="vae-2", expected_text_fingerprint="text-2")
    assert failing(report) == {"vae_fingerprint_expected": (1, ()), "text_fingerprint_expected": (1, ())}
    assert [check.observed for check in report.failures] == [("vae-1",), ("text-1",)]


def test_too_few_training_images(caches):
    report = caches.validate(caches.limits.model_copy(update={"min_train_images": 37}))
    assert failing(report) == {"enough_train_images": (1, ())}
    assert report.failures[0].observed == (36,)


def test_a_validation_share_far_from_the_fraction(caches):
    """4 of 40 images: four standard deviations of a fair draw at 0.6 are 0.31, so 0.1 is too far off."""
    report = caches.validate(val_fraction=0.6)
    assert failing(report) == {"validation_share_near_fraction": (1, ())}
    assert report.failures[0].observed == (0.1,)


def test_a_validation_share_within_the_noise_of_a_small_set_passes(caches):
    """At 0.3 they are 0.29, well beyond the tolerance of 0.1."""
    assert caches.validate(val_fraction=0.3).success


def without_held_out_images(caches):
    """All images in train, as ingest and the latents have it."""
    for table in ("images", "latents"):
        caches.set(table, list(caches.read(table).index), split="train")


def test_an_empty_validation_split_of_many_images_fails(make_caches):
    """0.9 ** 88 is 9.4e-5: so many images do not all miss the split by chance."""
    for images, failures in ((87, {}), (88, {"validation_split_not_empty": (1, ())})):
        caches = make_caches(f"{images} images", images=images)
        without_held_out_images(caches)
        report = caches.validate(docs=True)
        assert failing(report) == failures
        assert report.notices == (
            f"no held-out image: of {images} images, ingest.val_fraction = 0.1 chose none, or none but near duplicates "
            "of training images (reports/ingest.json counts those moved to train); "
            "training can neither measure val/mae nor keep the best model",
        )
        assert report.notices[0] in (caches.root / "docs/index.html").read_text()


def test_an_empty_validation_split_that_the_params_ask_for_is_a_notice(make_caches):
    caches = make_caches("data", images=200)
    without_held_out_images(caches)
    report = caches.validate(val_fraction=0.0)
    assert report.success
    (notice,) = report.notices
    assert notice.startswith("no held-out image: ingest.val_fraction is 0; ")
    assert json.loads(report.to_json())["notices"] == [notice]


def test_there_is_no_notice_where_images_are_held_out(caches):
    assert caches.validate().notices == ()


def test_empty_caches_fail_for_want_of_images_rather_than_crash(caches):
    for table in ("rejects", "near_duplicates", "latents", "latent_rejects", "reconstructions", "captions", "pairs"):
        caches.write(table, caches.read(table).iloc[:0])
    caches.set_manifest(found=0, sources=[], shards=[])
    assert failing(caches.validate(docs=True)) == {"enough_train_images": (1, ())}
    assert "No image was kept" in (caches.root / "docs/index.html").read_text()


def test_the_same_input_gives_the_same_bytes(make_caches):
    written = []
    for name in ("first", "second"):
        caches = make_caches(name)
        caches.set("latents", [1, 2], mean=np.float32(99.0))
        report = caches.validate(docs=True)
        docs = caches.root / "docs"
        pages = {str(file.relative_to(docs)): file.read_bytes() for file in docs.rglob("*.*")}
        written.append((report.to_json(), report.explain(), pages))
    assert written[0] == written[1]


def test_a_failure_says_what_how_many_which_and_what_to_do(caches, capfd, caplog):
    ids = caches.set("latents", list(range(7)), mean=np.float32(99.0))
    text = caches.validate().explain()
    assert "1 of 20 checks failed" in text
    assert "latent_mean_in_range: 7 of 40 latents" in text
    assert "lies in [-10.0, 10.0]" in text
    assert "found: 99.0" in text
    assert [line.strip() for line in text.splitlines() if re.fullmatch(r"\s+[0-9a-f]{64}", line)] == ids[:5]
    assert "why: far-off latents blow up the loss" in text
    assert "what to do: look at these images" in text
    assert capfd.readouterr() == ("", ""), "Great Expectations printed something"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_page_says_of_every_check_what_was_observed_how_many_failed_and_which(caches):
    faulty = caches.set("latents", [1], mean=np.float32(99.0))
    cut = caches.set("captions", [4, 5], tokens=78)  # so few may be
    report = caches.validate(docs=True)
    page = (caches.root / "docs/index.html").read_text()
    rows = dict(re.findall(r'<tr id="check-(\w+)">(.*?)</tr>', page, re.DOTALL))
    told = {name: " ".join(re.sub("<[^>]*>", " ", row).split()) for name, row in rows.items()}
    assert list(told) == [check.name for check in report.checks]
    assert told["latent_mean_in_range"].endswith(
        f"mean : -0.5 to 99.0 1 of 40 not as required, for example: {faulty[0]}: 99.0 failed"
    )
    assert told["captions_read_whole"].endswith(
        f"tokens : 6 to 78 2 of 40 not as required, for example: {cut[0]}: 78 {cut[1]}: 78 passed"
    )
    assert told["splits_as_ingested"].endswith("split_as_ingested : True passed")
    assert told["channel_std_positive"].endswith("std : 0.9 to 1.1 passed")
    assert told["vae_fingerprint_expected"].endswith("vae_fingerprint : vae-1 passed")
    assert report.failures[0].advice.split(":")[0] in page


def test_no_socket_is_opened(caches, monkeypatch):
    def refused(*arguments, **more):
        raise AssertionError("a socket was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refused)
    assert caches.validate(docs=True).success


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(caches):
    caches.set("latents", [1], mean=np.float32(99.0))
    caches.validate(docs=True)
    (page,) = (caches.root / "docs").iterdir()
    html = page.read_text()
    links = re.findall(r'href="([^"]*)"', html)
    assert "#check-latent_mean_in_range" in links and len(links) >= 8
    assert {link.removeprefix("#") for link in links} <= set(re.findall(r'id="([^"]*)"', html))
    assert not re.search(r"https?://|<script|<link|\{\{|\{%", html)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', html))


FILES = [
    "images/manifest.json",
    "rejects.parquet",
    "near_duplicates.parquet",
    "latents/index.parquet",
    "latents/rejects.parquet",
    "latents/reconstructions.parquet",
    "latents/stats.json",
    "text/index.parquet",
    "text/pairs.parquet",
    "text/stats.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_what_to_do(caches, name):
    (caches.root / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} does not exist: run `dvc repro`"):
        caches.validate()


@pytest.mark.parametrize("name", [*FILES, "images/00000.parquet"])
def test_a_damaged_file_is_named_with_what_to_do(caches, name):
    path = caches.root / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{re.escape(name)} .*\n?.*run `dvc repro`"):
        caches.validate()


def test_a_table_without_a_column_that_it_must_hold_is_named(caches):
    caches.write("pairs", caches.read("pairs").drop(columns="image_id"))
    with pytest.raises(UserError, match=r"pairs\.parquet cannot be used \(.*image_id"):
        caches.validate()


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("images/00000.parquet", "id"),
        ("latents/index.parquet", "id"),
        ("text/pairs.parquet", "image_id"),
        ("near_duplicates.parquet", "twin_id"),
    ],
)
def test_an_id_that_has_not_64_characters_is_named_with_file_and_column(caches, name, column):
    path = caches.root / name
    table = pq.read_table(path)
    first, *others = table[column].to_pylist()
    ids = pa.array([first[:-1], *others])
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, ids), path)
    with pytest.raises(UserError, match=rf"{re.escape(name)} .*\({column}: ids have 64 hexadecimal digits\)"):
        caches.validate()


def test_the_report_as_json_is_keyed_by_check(caches, tmp_path: Path):
    caches.set("latents", [1], std=np.float32(np.inf))
    (tmp_path / "report.json").write_text(caches.validate().to_json())
    document = read_json(tmp_path / "report.json")
    assert document["success"] is False
    assert document["rows"]["captions"] == 40
    check = document["checks"]["latent_std_in_range"]
    assert check["offending"] == 1 and check["observed"] == ["inf"] and check["table"] == "latents"
