"""A user's own folder: captions find their images however people write them down, and what does not fit is reported."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentloom.ingestion.metadata import NULLS, read_metadata_rows
from latentloom.ingestion.shards import read_metadata
from latentloom.ingestion.sources import IngestError

ROOT = Path(__file__).parents[2]


def test_sidecars_caption_images_in_any_depth(corpus):
    corpus.add("a.png", "a red apple")
    corpus.add("fruit/tropical/mango.v2.png", "a mango\n\n  two\tmangoes \n")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["a red apple"], "fruit/tropical/mango.v2.png": ["a mango", "two mangoes"]}


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "png", "webp", "gif", "bmp", "tiff", "TIF", "ppm"])
def test_extensions_are_known_in_either_case(corpus, extension):
    corpus.add(f"a.{extension}", "a picture")
    assert corpus.ingest().kept == 1


def test_windows_newlines_and_byte_order_marks_are_no_part_of_a_caption(corpus):
    corpus.add("a.png", b"\xef\xbb\xbfone\r\ntwo\r\n")
    corpus.add("sub/b.png")
    corpus.write("sub/metadata.csv", b"\xef\xbb\xbffile_name,text\r\nb.png,three\r\n")
    corpus.add("json/c.png")
    corpus.write("json/metadata.jsonl", b'\xef\xbb\xbf{"file_name": "c.png", "text": "four"}\r\n\r\n')
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["one", "two"], "json/c.png": ["four"], "sub/b.png": ["three"]}


@pytest.mark.parametrize("column", ["text", "caption", "captions"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_files_caption_images_below_them(corpus, kind, column):
    corpus.add("set/a.png")
    corpus.add("set/deep/b.png")
    frame = pd.DataFrame(
        {"file_name": ["a.png", "deep/b.png"], "licence": ["x", "y"], column: ["first, with comma", "second"]}
    )
    path = corpus.path / f"set/metadata.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    corpus.ingest()
    assert corpus.captions() == {"set/a.png": ["first, with comma"], "set/deep/b.png": ["second"]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_may_hold_lists_of_captions(corpus, kind):
    corpus.add("a.png")
    corpus.add("b.png")
    frame = pd.DataFrame({"file_name": ["a.png", "b.png"], "captions": [["one", "two"], None]})
    if kind == "jsonl":
        frame.to_json(corpus.path / "metadata.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(corpus.path / "metadata.parquet")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["one", "two"]}
    assert corpus.reasons() == {"b.png": "no_caption"}


def test_several_columns_rows_and_files_add_up_in_order(corpus):
    corpus.add("sub/a.png")
    corpus.write("metadata.csv", "file_name,caption,text\nsub/a.png,second,first\nsub/a.png,third,first\n")
    corpus.write("sub/metadata.jsonl", '{"file_name": "a.png", "text": "fourth"}\n')
    corpus.ingest()
    assert corpus.captions() == {"sub/a.png": ["first", "second", "third", "fourth"]}


def test_metadata_comes_before_a_sidecar_which_serves_the_images_without(corpus):
    corpus.add("a.png", "from the sidecar")
    corpus.add("b.png", "from its sidecar")
    corpus.write("metadata.csv", "file_name,text\na.png,from metadata\n")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["from metadata"], "b.png": ["from its sidecar"]}


def test_a_caption_may_span_lines_in_csv(corpus):
    corpus.add("a.png")
    corpus.write("metadata.csv", 'file_name,text\na.png,"a quote: ""hi""\nand a line"\n')
    corpus.ingest()
    assert corpus.captions() == {"a.png": ['a quote: "hi" and a line']}


def test_accents_and_backslashes_find_their_files_however_they_are_written(corpus):
    corpus.add("cafe\u0301.png")
    corpus.add("sub/b.png")
    corpus.write("metadata.csv", "file_name,text\ncaf\u00e9.png,coffee\nsub\\b.png,a b\n")
    corpus.ingest()
    assert sorted(corpus.captions().values()) == [["a b"], ["coffee"]]


def test_an_image_that_metadata_names_needs_no_known_extension(corpus):
    picture = corpus.add("a.png")
    picture.rename(corpus.path / "a")
    corpus.write("metadata.csv", "file_name,text\na,no extension\n")
    corpus.ingest()
    assert corpus.captions() == {"a": ["no extension"]}


def test_metadata_rows_that_name_no_file_of_the_folder_are_rejected(corpus):
    corpus.add("sub/a.png")
    (corpus.path.parent / "secret.png").write_bytes((corpus.path / "sub/a.png").read_bytes())
    names = [
        "a.png",
        "gone.png",
        "../a.png",
        "../../secret.png",
        str(corpus.path.parent / "secret.png"),
        "..",
        ".",
        "x" * 5000,
    ]
    rows = [{"file_name": name, "text": "a caption"} for name in names]
    corpus.write("sub/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    corpus.ingest()
    assert corpus.captions() == {"sub/a.png": ["a caption"]}
    assert corpus.reasons() == {
        "../secret.png": "outside_folder",
        str(corpus.path.parent / "secret.png"): "outside_folder",
        "sub/gone.png": "missing_file",
        "a.png": "missing_file",
        "sub": "missing_file",
        ".": "missing_file",
        f"sub/{'x' * 5000}": "missing_file",
    }


def test_rows_that_cannot_be_read_are_rejected_by_line(corpus):
    corpus.add("a.png")
    corpus.add("csv/b.png")
    corpus.write(
        "metadata.jsonl",
        '{"file_name": "a.png", "text": "fine"}\nnot json\n[1]\n{"text": "whose?"}\n{"file_name": 3}\n',
    )
    corpus.write("csv/metadata.csv", "file_name,text\nb.png,fine\nb.png,a dog, running\n,whose?\nb.png\n")
    corpus.ingest()
    assert set(corpus.captions()) == {"a.png", "csv/b.png"}
    rejected = [f"metadata.jsonl:{line}" for line in (2, 3, 4, 5)] + [f"csv/metadata.csv:{line}" for line in (3, 4)]
    assert corpus.reasons() == dict.fromkeys(rejected, "bad_row")
    assert "quotes" in corpus.details()["csv/metadata.csv:3"]


def test_captions_that_are_no_valid_text_are_rejected(corpus):
    for name in ("latin", "surrogate", "nested", "null", "number"):
        corpus.add(f"{name}.png")
    corpus.write("metadata.csv", b"file_name,text\nlatin.png,caf\xe9\n")
    corpus.write(
        "metadata.jsonl",
        '{"file_name": "surrogate.png", "text": "\\ud800"}\n{"file_name": "nested.png", "text": {"en": "x"}}\n'
        '{"file_name": "null.png", "text": NaN}\n{"file_name": "number.png", "text": 7}\n',
    )
    corpus.ingest()
    assert corpus.captions() == {"number.png": ["7"]}
    assert corpus.reasons() == {
        "latin.png": "caption_not_utf8",
        "surrogate.png": "caption_not_utf8",
        "nested.png": "caption_not_text",
        "null.png": "no_caption",
    }


def test_names_that_are_not_utf8_are_kept_with_escapes(corpus):
    picture = corpus.add("a.png")
    try:
        picture.rename(corpus.path / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    corpus.add("b\udcff.png")
    corpus.write("caf\udce9.txt", "coffee")
    corpus.ingest()
    assert corpus.captions() == {"caf\\udce9.png": ["coffee"]}
    assert corpus.reasons() == {"b\\udcff.png": "no_caption"}


@pytest.mark.slow
def test_names_and_captions_are_the_same_in_a_locale_without_them(corpus, tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["ingest"] |= {"source": "folder", "path": str(corpus.path), "limit": None}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    corpus.add("\u732b.png", "\u30bd\u30d5\u30a1\u306e\u4e0a\u306e\u732b")
    corpus.add("\u72ac/b.png")
    corpus.write("\u72ac/metadata.csv", "file_name,text\nb.png,\u96ea\u306e\u4e2d\u306e\u72ac\n")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "pipelines/ingest.py")]
    subprocess.run(command, env=ascii_only, cwd=tmp_path, check=True, capture_output=True)
    frame = read_metadata(tmp_path / "data/images")
    assert dict(zip(frame["key"], frame["captions"], strict=True)) == {
        "\u72ac/b.png": ["\u96ea\u306e\u4e2d\u306e\u72ac"],
        "\u732b.png": ["\u30bd\u30d5\u30a1\u306e\u4e0a\u306e\u732b"],
    }


def test_hidden_files_other_files_and_what_systems_leave_are_skipped(corpus):
    corpus.add("a.png", "a picture")
    corpus.write("._a.png", b"\0\5\26\7")
    corpus.write(".thumbnails/a.png", b"junk")
    corpus.write("notes.md", "not an image")
    corpus.write("Thumbs.db", b"junk")
    for folder in ("@eaDir/a.png", "sub/__MACOSX", "#recycle", "$RECYCLE.BIN"):
        corpus.add(f"{folder}/SYNOPHOTO_THUMB_M.png", "a thumbnail")
    report = corpus.ingest()
    assert (report.found, report.kept) == (1, 1)


def test_what_is_an_image_by_name_or_content_is_never_passed_over(corpus):
    for name in ("a.jpg_large", "b.tga", "c.png.1", "hash", "d.jpx", "e.PNG~"):
        corpus.add("x.png").rename(corpus.path / name)
        corpus.write(f"{name.rpartition('.')[0] or name}.txt", "a picture")
    for name in ("f.psd", "g.svg", "h.jxl", "i.heic", "j.cr2"):
        corpus.write(name, "nothing of the sort")
        corpus.write(f"{name[0]}.txt", "a picture")
    corpus.write("README", "BM is no bitmap")
    corpus.write("latents.npz", b"PK")
    report = corpus.ingest()
    assert sorted(corpus.captions()) == ["a.jpg_large", "b.tga", "c.png.1", "d.jpx", "e.PNG~", "hash"]
    assert set(corpus.reasons()) == {"f.psd", "g.svg", "h.jxl", "i.heic", "j.cr2"}
    assert report.found == report.kept + report.rejected == 11


def test_a_link_to_nowhere_is_told_also_where_it_stood_for_a_folder(corpus):
    corpus.add("a.png", "a picture")
    for name in ("exams of 2023", "b.png", "loop.jpg"):
        (corpus.path / name).symlink_to("loop.jpg" if name == "loop.jpg" else "/not mounted/there")
    corpus.ingest()
    assert corpus.reasons() == dict.fromkeys(["b.png", "exams of 2023", "loop.jpg"], "missing_file")
    assert set(corpus.details().values()) == {"it is a link to what is not there"}


ODD_NAMES = (
    *("train.png", "metadata.png", "one/same.png", "two/same.png", "a[1].png", "a1.png", "100%20.png", "100 .png"),
    *("what?*.png", "a;b&c$HOME`.png", "dot..png", "-rf.png", "~.png", "#1.png", "a+b=c.png", "tab\tname.png"),
    *("back\\slash.png", "quote'\".png", "https:..example.png", "CON.png"),
)


def test_names_mean_themselves_whatever_a_glob_a_url_or_a_shell_would_read(corpus):
    rows = []
    for name in ODD_NAMES:
        corpus.add(name, f"text of {name}" if "/" in name else None)
        if "/" not in name:
            rows.append(json.dumps({"file_name": name, "text": f"row of {name}"}))
    corpus.write("metadata.jsonl", "\n".join(rows))
    corpus.ingest()
    expected = {name: [" ".join(f"{'text' if '/' in name else 'row'} of {name}".split())] for name in ODD_NAMES}
    assert corpus.captions() == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "filename,text\na.png,x\n"),
        ("metadata.csv", "file_name,label\na.png,x\n"),
        ("metadata.csv", "file_name;text\na.png;x\n"),
        ("metadata.csv", ""),
        ("metadata.jsonl", '{"file_name": "a.png", "label": "x"}\n'),
        ("metadata.jsonl", '{"image": "a.png", "text": "x"}\n'),
    ],
)
def test_metadata_without_the_columns_is_an_error_that_names_file_and_columns(corpus, name, content):
    corpus.add("a.png")
    path = corpus.write(name, content)
    with pytest.raises(IngestError) as caught:
        corpus.ingest()
    message = str(caught.value)
    assert str(path) in message
    assert "file_name and one of text, caption, captions" in message
    columns = json.loads(content) if name.endswith("jsonl") else content.partition("\n")[0].split(",")
    assert all(column in message for column in columns)


def test_a_parquet_row_that_is_not_utf8_costs_no_other_and_bytes_are_text(corpus):
    for name in ("a.png", "b.png", "sub/c.png"):
        corpus.add(name)
    texts = pa.array([b"fine", b"caf\xe9"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": texts}), corpus.path / "metadata.parquet")
    pd.DataFrame({"file_name": ["c.png"], "text": [b"of bytes"]}).to_parquet(corpus.path / "sub/metadata.parquet")
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["fine"], "sub/c.png": ["of bytes"]}
    assert corpus.reasons() == {"b.png": "no_caption", "metadata.parquet:2": "bad_row"}


def test_parquet_without_the_columns_is_an_error(corpus):
    corpus.add("a.png")
    pd.DataFrame({"file_name": ["a.png"], "label": [1]}).to_parquet(corpus.path / "metadata.parquet")
    with pytest.raises(IngestError, match="has the columns 'file_name', 'label'; it needs file_name and one of"):
        corpus.ingest()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.parquet", b"not parquet", "cannot be read (Parquet magic bytes"),
        ("metadata.csv", b"\xff\xfef\0i\0", "UTF-16"),
        ("metadata.csv", b"file_name,text,text\na.png,x,y\n", "two columns 'text'"),
        (
            "metadata.csv",
            b'file_name,text\na.png,fine\nb.png,"a 5"" tall cat\nc.png,lost\n',
            "after line 2 (unexpected",
        ),
        ("metadata.csv", 'file_name,text\na.png,"a cat\u201d\nb.png,"lost"\n'.encode(), "',' expected after"),
        ("metadata.csv", b"file_name,text\na.png,fine\na.png," + b"x" * 200_000, "cannot be read after line 2 ("),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000, "cannot be read (field larger than field limit"),
    ],
)
def test_a_metadata_file_that_cannot_be_read_is_an_error_that_names_it(corpus, name, content, says):
    corpus.add("a.png")
    path = corpus.write(name, content)
    with pytest.raises(IngestError) as caught:
        corpus.ingest()
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_folder_or_one_without_images_is_an_error_that_says_what_to_do(corpus):
    with pytest.raises(IngestError, match="holds no images; looked for"):
        corpus.ingest()
    corpus.write("notes.txt", "no image here")
    with pytest.raises(IngestError, match="holds no images; looked for"):
        corpus.ingest()
    with pytest.raises(IngestError, match="is not a folder"):
        corpus.ingest(path=str(corpus.path / "notes.txt"))
    with pytest.raises(IngestError, match="does not exist"):
        corpus.ingest(path=str(corpus.path / "nowhere"))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(cells.filter(str.strip), cells), min_size=1, max_size=8))
def test_any_csv_that_python_writes_is_read_back(tmp_path, rows):
    path = tmp_path / "metadata.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    read = [(row["file_name"].strip(), (row["text"] or "").strip()) for _, row in read_metadata_rows(path)]
    captions = [text.strip() for _, text in rows]
    said = ["" if caption.lower() in NULLS else caption for caption in captions]
    assert read == [(name.strip(), caption) for (name, _), caption in zip(rows, said, strict=True)]


def test_a_metadata_file_that_cannot_be_read_is_named(corpus):
    corpus.add("a.png", "a picture")
    (corpus.path / "metadata.csv").symlink_to("nowhere.csv")
    with pytest.raises(IngestError, match=r"metadata\.csv cannot be read \(No such file or directory\)"):
        corpus.ingest()
