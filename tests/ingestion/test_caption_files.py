"""Caption files find their images as people name them, are read as people write them, and none is lost in silence."""

import json

import numpy as np
import pytest
from outcomes import outcomes
from PIL import Image

from latentloom.ingestion.caption_files import CaptionFiles, ImageNames, LineCounts, pair
from latentloom.ingestion.folder import FolderSource
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.sources import IngestError


@pytest.mark.parametrize(
    ("images", "files", "of_image", "alone"),
    [
        (["cat.png"], ["cat.txt"], {"cat.png": ["cat.txt"]}, []),
        (["cat.png"], ["cat.TXT", "cat.caption"], {"cat.png": ["cat.TXT", "cat.caption"]}, []),
        (["cat.png"], ["cat.png.txt"], {"cat.png": ["cat.png.txt"]}, []),
        (["Cat.png"], ["cat.txt"], {"Cat.png": ["cat.txt"]}, []),
        (["caf\u00e9.png"], ["cafe\u0301.json"], {"caf\u00e9.png": ["cafe\u0301.json"]}, []),
        (["cat.png", "cat.webp"], ["cat.txt"], {"cat.png": ["cat.txt"], "cat.webp": ["cat.txt"]}, []),
        (["a.png", "A.png"], ["a.txt", "A.txt"], {"a.png": ["a.txt"], "A.png": ["A.txt"]}, []),
        (["ab.png", "AB.png"], ["Ab.txt"], {}, ["Ab.txt"]),
        (["x/cat.png", "y/cat.png"], ["x/cat.txt"], {"x/cat.png": ["x/cat.txt"]}, []),
        (["cat.png"], ["x/cat.txt", "dog.txt"], {}, ["x/cat.txt", "dog.txt"]),
        (["cat.v2.png", "cat.png"], ["cat.v2.txt"], {"cat.v2.png": ["cat.v2.txt"]}, []),
    ],
)
def test_a_caption_file_belongs_to_the_image_that_people_see_it_is_called_after(images, files, of_image, alone):
    paired, left = pair(ImageNames(images), files)
    assert dict(paired) == of_image
    assert sorted(left) == sorted(alone)


@pytest.mark.parametrize("suffix", ["caption", "TXT", "Captions", "cap", "text", "prompt", "JSON", "png.txt"])
def test_caption_files_are_known_by_many_suffixes_in_any_case(corpus, suffix):
    corpus.add("cat.png")
    corpus.write(f"cat.{suffix}", '{"prompt": "a cat"}' if suffix == "JSON" else "a cat")
    assert corpus.ingest().found == 1
    assert corpus.captions() == {"cat.png": ["a cat"]}


def test_an_image_with_two_text_files_has_the_captions_of_both_and_that_is_said(corpus, capsys):
    corpus.add("cat.png", "a cat")
    corpus.write("cat.caption", "a cat on a sofa")
    corpus.write("cat.json", '{"caption": "a sofa"}')
    corpus.ingest()
    assert corpus.captions() == {"cat.png": ["a cat", "a cat on a sofa", "a sofa"]}
    assert "1 files, such as cat.txt: not the only text file of its image" in capsys.readouterr().err


def test_what_may_hold_captions_and_is_not_read_is_a_reject(corpus):
    corpus.add("cat.png", "a cat")
    for name in ("dog.txt", "sub/cat.txt", "captions.json", "captions.csv", "labels.xlsx"):
        corpus.write(name, "a caption")
    report = corpus.ingest()
    assert corpus.reasons() == {
        **dict.fromkeys(("dog.txt", "sub/cat.txt", "captions.json"), "missing_file"),
        **dict.fromkeys(("captions.csv", "labels.xlsx"), "bad_row"),
    }
    assert "no image beside it has its name" in corpus.details()["dog.txt"]
    assert "only metadata.csv, metadata.jsonl, metadata.parquet are read" in corpus.details()["captions.csv"]
    assert (report.found, report.kept, report.rejected) == (6, 1, 5)


def test_caption_files_beside_images_that_metadata_names_are_not_read_and_that_is_said(corpus, capsys):
    corpus.add("a.png", "of the text file")
    corpus.add("b.png", "of the text file")
    corpus.write("metadata.csv", "file_name,text\na.png,of metadata\nb.png,NaN\n")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["of metadata"], "b.png": ["of the text file"]}
    assert "1 files, such as a.txt: not read, since metadata" in capsys.readouterr().err


def test_a_file_beside_an_image_that_has_another_suffix_is_named(corpus):
    corpus.add("cat.png")
    corpus.write("Cat.tags", "cat, sofa")
    (found,) = outcomes(FolderSource(corpus.path))
    assert found.reason is Reason.NO_CAPTION
    assert "Cat.tags beside it does not end in .txt, .caption" in found.detail


SENTENCES = "A cat sits on a red sofa.\nSoft light falls through the window.\nBehind it stands a lamp."
ALTERNATIVES = "A cat sits on a red sofa.\nA red sofa with a sleeping cat.\na cat, indoors"


def test_a_whole_text_file_is_one_caption_where_params_say_so(corpus, capsys):
    corpus.add("cat.png", SENTENCES)
    corpus.ingest(source=[{"source": "folder", "path": str(corpus.path), "captions": "file"}], path=None)
    assert corpus.captions() == {"cat.png": [SENTENCES.replace("\n", " ")]}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "is_said"), [(SENTENCES, True), (ALTERNATIVES, False), ("one line", False), ("", False)]
)
def test_lines_that_do_not_look_like_alternatives_are_pointed_out(text, is_said):
    lines = LineCounts()
    for _ in range(3):
        lines = lines.plus(CaptionFiles().read("cat", [(".txt", text.encode())]).lines)
    assert bool(lines.notices()) == is_said
    assert not is_said or "6 of 6 lines have no word in common" in lines.notices()[0]


@pytest.mark.parametrize(
    ("name", "of_file", "of_folder"),
    [
        ("cats/red_cat.png", "red cat", "cats"),
        ("big_cats/lion (3).png", "lion", "big cats"),
        ("10_ohwx cat/a-cat_002.png", "a-cat", "ohwx cat"),
        ("pets/2024/001.png", "001", "2024"),
        ("cats/area 51.v2.png", "area 51.v2", "cats"),
    ],
)
def test_captions_may_be_the_names_of_images_or_of_their_folders(corpus, name, of_file, of_folder):
    corpus.add(name, "of a text file, which is not read")
    for captions, expected in (("file_name", of_file), ("folder_name", of_folder)):
        (found,) = outcomes(FolderSource(corpus.path, captions))
        assert found.captions == [expected]


def test_an_image_in_no_sub_folder_has_no_folders_name_for_its_caption(corpus, capsys):
    corpus.add("a.png")
    corpus.add("cats/b.png", "not read")
    corpus.ingest(source=[{"source": "folder", "path": str(corpus.path), "captions": "folder_name"}], path=None)
    assert corpus.captions() == {"cats/b.png": ["cats"]}
    assert corpus.reasons() == {"a.png": "no_caption"}
    assert "1 files, such as cats/b.txt: not read, since captions are the names" in capsys.readouterr().err


def test_json_without_a_caption_counts_only_where_nothing_else_gives_one(corpus):
    for name in ("labels", "list", "other", "null"):
        corpus.add(f"{name}.png")
        corpus.add(f"{name} and text.png", "a text")
    contents = {
        "labels": {"shapes": []},
        "list": ["a", "b"],
        "other": {"alt": "by another name"},
        "null": {"text": None},
    }
    for name, content in contents.items():
        corpus.write(f"{name}.json", json.dumps(content))
        corpus.write(f"{name} and text.json", json.dumps(content))
    corpus.ingest()
    assert corpus.captions() == {f"{name} and text.png": ["a text"] for name in sorted(contents)}
    assert corpus.reasons() == {
        "labels.png": "no_caption",
        "list.png": "bad_row",
        "null.png": "no_caption",
        "other.png": "no_caption",
    }
    assert "'alt'; name the right one: ingest.source: [{source:" in corpus.details()["other.png"]


def test_a_caption_column_may_be_named_for_metadata_and_json(corpus):
    corpus.add("a.png")
    corpus.add("b.png")
    corpus.write("metadata.csv", "file_name,text,alt,Long\na.png,not this,an apple,a red apple on a plate\n")
    corpus.write("b.json", '{"text": "not this", "Long": "a long one", "alt": "short"}')
    entry = {"source": "folder", "path": str(corpus.path)}
    corpus.ingest(source=[entry | {"caption_column": "alt"}], path=None)
    assert corpus.captions() == {"a.png": ["an apple"], "b.png": ["short"]}
    corpus.ingest(source=[entry | {"caption_column": ["Long", "alt"]}], path=None)
    assert corpus.captions() == {"a.png": ["a red apple on a plate", "an apple"], "b.png": ["a long one", "short"]}
    report = corpus.ingest(source=[entry | {"caption_column": {"Long": 3, "alt": 1}}], path=None)
    assert corpus.captions()["a.png"] == ["a red apple on a plate"] * 3 + ["an apple"]
    assert corpus.captions()["b.png"] == ["a long one"] * 3 + ["short"]
    assert report.captions == 4
    with pytest.raises(IngestError, match=r"'alt', 'Long'; it needs file_name and alt, lnog"):
        corpus.ingest(source=[entry | {"caption_column": ["alt", "lnog"]}], path=None)


@pytest.mark.parametrize("column", ["prompt", "TEXT", "description", "txt"])
def test_metadata_and_json_know_the_same_names_as_tables(corpus, column):
    corpus.add("a.png")
    corpus.add("b.png")
    corpus.write("metadata.csv", f"file_name,{column}\na.png,an apple\n")
    corpus.write("b.json", json.dumps({column: "a bird"}))
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["an apple"], "b.png": ["a bird"]}


def test_several_columns_of_usual_names_are_all_taken_and_that_is_said(corpus, capsys):
    corpus.add("a.png")
    corpus.write("metadata.csv", "file_name,description,text\na.png,taken in May,an apple\n")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["an apple", "taken in May"]}
    assert "captions of metadata.csv are those of all of its columns text, description" in capsys.readouterr().err


def test_rows_that_an_open_quote_has_swallowed_are_no_caption(corpus):
    for name in "abcd":
        corpus.add(f"{name}.png")
    corpus.write("metadata.csv", 'file_name,text\na.png,"a cat\u201d\nb.png,a dog\nc.png,a bird"\nd.png,a fish\n')
    corpus.write("swapped/metadata.csv", 'text,file_name\n"a cat\u201d,../a.png\na dog",../b.png\n')
    corpus.ingest()
    assert corpus.captions() == {"d.png": ["a fish"]}
    swallowed = corpus.details()["metadata.csv:4"]
    assert "a quote" in swallowed
    assert corpus.reasons() == {
        **dict.fromkeys(("metadata.csv:4", "swapped/metadata.csv:3"), "bad_row"),
        **dict.fromkeys(("a.png", "b.png", "c.png"), "no_caption"),
    }


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("NaN", None),
        ("null", None),
        ("None", None),
        ('"[""a cat"", ""a sofa""]"', ["a cat", "a sofa"]),
        ('"[\'a cat\', ""a cat\'s sofa""]"', ["a cat", "a cat's sofa"]),
        ("[a cat]", ["[a cat]"]),
        ("nancy", ["nancy"]),
    ],
)
def test_csv_cells_that_other_programs_write_for_nulls_and_lists_mean_these(corpus, cell, captions):
    corpus.add("a.png")
    corpus.add("b.png", "another")
    corpus.write("metadata.csv", f"file_name,text\na.png,{cell}\n")
    corpus.ingest()
    assert corpus.captions().get("a.png") == captions
    assert captions or corpus.reasons() == {"a.png": "no_caption"}


def test_a_list_that_numpy_wrote_as_text_is_rejected_rather_than_learnt(corpus):
    corpus.add("a.png")
    corpus.write("metadata.csv", f'file_name,text\na.png,"{np.array(["a cat", "a sofa"])}"\n')
    (found,) = outcomes(FolderSource(corpus.path))
    assert found.reason is Reason.CAPTION_NOT_TEXT
    assert "a list that cannot be read" in found.detail


@pytest.mark.parametrize(
    ("images", "named", "found"),
    [
        (["cat.JPG"], "cat.jpg", "cat.JPG"),
        (["Sub/cat.jpg"], "sub\\CAT.jpg", "Sub/cat.jpg"),
        (["cat.png"], "cat", "cat.png"),
        (["cat.JPG", "Cat.jpg"], "cat.jpg", None),
        (["cat.png"], "cat.jpg", None),
    ],
)
def test_metadata_finds_a_file_that_people_see_is_meant_and_else_names_it(corpus, images, named, found):
    for image in images:
        corpus.add(image, picture=Image.new("RGB", (40, 40)))
    corpus.write("metadata.csv", f"file_name,text\n{named},a cat\n")
    met = {item.key: item for item in outcomes(FolderSource(corpus.path))}
    if found:
        assert {key: item.captions for key, item in met.items()} == {found: ["a cat"]}
    else:
        assert met.keys() == {named, *images}
        assert f"did you mean {' or '.join(sorted(images))}?" in met[named].detail
