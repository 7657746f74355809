"""Tar files as WebDataset and img2dataset write them: samples stream out, and damage costs no more than it must."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outcomes import Outcome, outcomes
from webdataset.tariterators import group_by_keys

from latentloom.ingestion.pngs import encode
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.sources import IngestError
from latentloom.ingestion.webdataset import WebDatasetSource

JPEG = b"\xff\xd8\xff bytes of "


def pack(path: Path, members: Iterable[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def numbered(count: int) -> list[tuple[str, bytes]]:
    """Members of ``count`` whole samples of a few kilobytes."""
    random = np.random.default_rng(0)
    return [
        (f"{number:04}.{extension}", content)
        for number in range(count)
        for extension, content in (("jpg", JPEG + random.bytes(2000)), ("txt", b"caption %d" % number))
    ]


def read(path: Path | str, **options) -> list[Outcome]:
    return list(outcomes(WebDatasetSource(path, **options)))


def captions(path: Path | str, **options) -> dict[str, list[str]]:
    return {item.key: item.captions for item in read(path, **options) if not item.reason}


def rejects(path: Path | str) -> dict[str, Reason]:
    return {item.key: item.reason for item in read(path) if item.reason}


def test_what_img2dataset_writes_is_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for number in range(3):
            metadata = {"url": "https://example.org", "caption": f"picture {number}", "width": 9, "status": "success"}
            sample = {"__key__": f"{number:09}", "jpg": JPEG + bytes([number]), "txt": f"picture {number}"}
            tar.write(sample | {"json": json.dumps(metadata).encode()})
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset's own table")
    (tmp_path / "00000_stats.json").write_text("{}")
    samples = read(tmp_path)
    assert [sample.key for sample in samples] == [f"00000.tar/{number:09}" for number in range(3)]
    assert [sample.data for sample in samples] == [JPEG + bytes([number]) for number in range(3)]
    assert [set(sample.captions) for sample in samples] == [{f"picture {number}"} for number in range(3)]


def test_captions_come_from_the_text_file_then_from_json(tmp_path):
    record = {"caption": "four", "text": "three", "captions": ["five", None, "one"], "label": "no caption"}
    tar = pack(
        tmp_path / "a.tar",
        [
            ("both.json", json.dumps(record)),
            ("both.jpg", JPEG),
            ("both.txt", "\ufeffone\r\ntwo\n"),
            ("text.png", JPEG),
            ("text.txt", ""),
            ("json.webp", JPEG),
            ("json.json", b'{"caption": "coffee"}'),
            ("latin.webp", JPEG),
            ("latin.json", b'{"caption": "caf\xe9"}'),
            ("none.JPG", JPEG),
        ],
    )
    assert captions(tar) == {
        "a.tar/both": ["one", "two", "three", "four", "five"],
        "a.tar/json": ["coffee"],
        "a.tar/none": [],
    }
    assert rejects(tar) == {
        "a.tar/text": Reason.EMPTY_CAPTION,
        "a.tar/latin": Reason.CAPTION_NOT_UTF8,
    }


def test_keys_and_captions_arrive_in_the_shards(tmp_path, corpus, picture):
    corpus.add("a.png")
    data = (corpus.path / "a.png").read_bytes()
    pack(tmp_path / "00000.tar", [("sub/a.png", data), ("sub/a.txt", "one\none\n"), ("sub/a.json", '{"text": "two"}')])
    corpus.ingest(source="webdataset", path=str(tmp_path / "00000.tar"))
    assert corpus.captions() == {"00000.tar/sub/a": ["one", "two"]}
    assert np.array_equal(corpus.pixels()["00000.tar/sub/a"], picture(1))


def test_a_path_is_a_tar_or_a_folder_of_them_or_a_pattern(tmp_path):
    pair = [("a.jpg", JPEG), ("a.txt", "x")]
    for name, mode in (("b/1.tar", "w"), ("0.tar.gz", "w:gz"), ("2.tgz", "w:gz"), ("3.TAR", "w"), (".hidden.tar", "w")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pack(tmp_path / name, pair, mode)
    pack(tmp_path / "shard", pair)
    assert list(captions(tmp_path)) == ["0.tar.gz/a", "2.tgz/a", "3.TAR/a", "b/1.tar/a"]
    assert list(captions(tmp_path / "*.t*")) == ["0.tar.gz/a", "2.tgz/a"]
    assert list(captions(tmp_path / "*" / "1.tar")) == ["b/1.tar/a"]
    assert list(captions(tmp_path / "shard")) == ["shard/a"]


DOTTED = [(f"IMG.000{number}.{kind}", JPEG if kind == "png" else "x") for number in (1, 2) for kind in ("png", "txt")]


def test_names_with_dots_are_explained_file_by_file_or_end_at_their_last_dot(tmp_path):
    tar = pack(tmp_path / "a.tar", [*DOTTED, ("IMG.0003.txt", "of no image")])
    items = read(tar)
    assert [(item.key, item.reason) for item in items] == [
        (f"a.tar/IMG.{name}", Reason.MISSING_FILE) for name in ("0001.png", "0002.png", "0003.txt")
    ]
    assert "so its key is IMG" in items[0].detail
    assert "If IMG.0001 is its name, add `key: last_dot`" in items[0].detail
    assert captions(tar, key="last_dot") == {"a.tar/IMG.0001": ["x"], "a.tar/IMG.0002": ["x"]}
    assert [item.key for item in read(tar, key="last_dot") if item.reason] == ["a.tar/IMG.0003"]


def test_a_tar_that_is_not_sorted_by_name_is_told_how_to_be_packed(tmp_path):
    tar = pack(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.txt", "of a"), ("b.txt", "of b")])
    assert [(item.key, item.captions, item.reason) for item in read(tar)] == [
        ("a.tar/a", [], None),
        ("a.tar/b", [], None),
        ("a.tar/a", None, Reason.DUPLICATE_KEY),
        ("a.tar/b", None, Reason.DUPLICATE_KEY),
    ]
    assert "tar --sort=name" in read(tar)[2].detail


def test_fields_whose_names_have_dots_are_explained_one_by_one(tmp_path):
    tar = pack(tmp_path / "a.tar", [("s0.input.jpg", JPEG), ("s0.outputs.txt", "of s0")])
    assert rejects(tar) == dict.fromkeys(["a.tar/s0.input.jpg", "a.tar/s0.outputs.txt"], Reason.MISSING_FILE)
    assert all("so its key is s0" in item.detail for item in read(tar))


@pytest.mark.parametrize("image", [[], [("b.jpg", JPEG)]])
def test_every_picture_and_caption_of_one_key_is_accounted_for(tmp_path, image):
    tar = pack(tmp_path / "a.tar", [("b.left.jpg", JPEG), *image, ("b.right.jpg", JPEG), ("b.txt", "x")])
    assert rejects(tar) == dict.fromkeys(
        ["a.tar/b.left.jpg", "a.tar/b.right.jpg", *([] if image else ["a.tar/b"])], Reason.MISSING_FILE
    )
    assert captions(tar) == ({"a.tar/b": ["x"]} if image else {})


def test_caption_files_are_those_of_folders(tmp_path):
    files = [("a.jpg", JPEG), ("a.TXT", "one"), ("a.caption", "two"), ("a.json", '{"prompt": "three", "alt": "four"}')]
    files += [("b.jpg", JPEG), ("b.jpg.txt", "called after the whole name")]
    tar = pack(
        tmp_path / "a.tar",
        [*files, ("metadata.csv", "file_name,text"), ("._captions.csv", ""), ("b.img", JPEG), ("b.npy", "x")],
    )
    assert rejects(tar) == {"a.tar/metadata.csv": Reason.BAD_ROW, "a.tar/b.img": Reason.UNSUPPORTED_FORMAT}
    assert captions(tar) == {"a.tar/a": ["one", "two", "three"], "a.tar/b": ["called after the whole name"]}
    assert captions(tar, caption_columns={"alt": 1})["a.tar/a"] == ["one", "two", "four"]
    assert captions(tar, key="last_dot") == captions(tar)


def test_captions_may_be_whole_files_or_names(tmp_path):
    tar = pack(tmp_path / "a.tar", [("my_cats/red_cat (2).jpg", JPEG), ("my_cats/red_cat (2).txt", "one\ntwo")])
    for value, expected in {"file": "one two", "file_name": "red cat", "folder_name": "my cats"}.items():
        source = WebDatasetSource(tar, captions=value)
        assert [item.captions for item in outcomes(source)] == [[expected]]
        assert [notice.partition(",")[0] for notice in source.notices()] == (
            [] if value == "file" else ["1 caption files are not read"]
        )


def test_what_programs_leave_beside_pictures_is_no_picture(tmp_path):
    names = ("._cat.jpg", "x/._cat.txt", "@eaDir/cat.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/cat.jpg")
    left = [*((name, JPEG) for name in names), ("Thumbs.db", b"\xd0\xcf\x11\xe0")]
    tar = pack(tmp_path / "a.tar", [("cat.jpg", JPEG), ("cat.txt", "x"), *left])
    assert [(item.key, item.captions) for item in read(tar)] == [("a.tar/cat", ["x"])]


def zstd(path: Path, data: bytes) -> Path:
    with pa.output_stream(path, compression="zstd") as file:
        file.write(data)
    return path


def compressed(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar that is compressed as its name says."""
    plain = pack(path.with_name("plain"), members).read_bytes()
    path.with_name("plain").unlink()
    compress = {".bz2": bz2.compress, ".xz": lzma.compress, ".gz": gzip.compress, ".tar": bytes}
    if path.suffix == ".zst":
        return zstd(path, plain)
    path.write_bytes(compress[path.suffix](plain))
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"])
def test_a_tar_that_follows_another_in_one_file_is_read_however_they_are_compressed(tmp_path, name):
    first = compressed(tmp_path / name, [("a.jpg", JPEG), ("a.txt", "one")]).read_bytes()
    second = compressed(tmp_path / name, [("b.jpg", JPEG + bytes(50_000)), ("b.txt", "two")]).read_bytes()
    (tmp_path / name).write_bytes(first + second)
    assert captions(tmp_path) == {f"{name}/a": ["one"], f"{name}/b": ["two"]}
    assert not rejects(tmp_path)
    (tmp_path / name).write_bytes(first + second[: len(second) // 2])
    assert captions(tmp_path)[f"{name}/a"] == ["one"]
    assert rejects(tmp_path)[name] in (Reason.TRUNCATED, Reason.UNREADABLE)


def test_what_follows_a_tar_and_is_none_is_told(tmp_path):
    tar = pack(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", "one")])
    tar.write_bytes(tar.read_bytes() + b"PK, an archive of another kind" * 100)
    assert captions(tar) == {"a.tar/a": ["one"]}
    assert rejects(tar) == {"a.tar": Reason.UNREADABLE}


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_what_lies_loose_beside_tars_or_tables_is_a_reject(corpus, source, picture):
    """Nothing reads it there; what img2dataset leaves beside its tars is no image and no caption."""
    loose = ("a.jpg", "more/b.PNG", "more/b.txt", "captions.csv")
    for name in (*loose, "00000_stats.json", "notes.md", "._c.jpg", "_SUCCESS"):
        corpus.write(name, "x")
    png = encode(picture(1))
    if source == "webdataset":
        pack(corpus.path / "00000.tar", [("c.png", png), ("c.txt", "a cat")])
        corpus.write("00000.parquet", "what img2dataset writes")
    else:
        pq.write_table(pa.table({"image": [png], "text": ["a cat"]}), corpus.path / "0.parquet")
    report = corpus.ingest(source=source)
    assert corpus.reasons() == dict.fromkeys(loose, "missing_file")
    assert (report.found, report.kept) == (len(loose) + 1, 1)
    assert all("as a source of its own (source: folder)" in detail for detail in corpus.details().values())
    own_path = str(next(corpus.path.glob("0*.tar" if source == "webdataset" else "0*.parquet")))
    assert corpus.ingest(source=source, path=own_path).rejected == 0


def test_archives_of_other_kinds_among_the_tars_are_rejects(tmp_path):
    pack(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", "one")])
    for name in ("b.zip", "c.7z", "d.tar.lz4"):
        (tmp_path / name).write_bytes(b"PK\3\4" * 500)
    assert rejects(tmp_path) == dict.fromkeys(("b.zip", "c.7z", "d.tar.lz4"), Reason.UNREADABLE)


def test_without_a_tar_the_error_names_the_path(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for path, what in (
        (tmp_path, "holds no file"),
        (tmp_path / "*.tar", "holds no file"),
        (tmp_path / "x", "not exist"),
    ):
        with pytest.raises(IngestError, match=what) as caught:
            WebDatasetSource(path)
        assert str(path) in str(caught.value)
        assert ".tar" in str(caught.value)


parts = st.text("ab.", min_size=1, max_size=4)
names = st.lists(parts, min_size=1, max_size=2).map("/".join).filter(lambda name: not name.startswith("/"))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(names, st.sampled_from([".jpg", ".txt", ".json", ".npy"])).map("".join), unique=True))
def test_members_are_grouped_as_webdataset_groups_them(tmp_path, members):
    members = [name for name in members if not {".", ".."}.intersection(name.split("/"))]
    tar = pack(tmp_path / "a.tar", [(name, f'{{"text": "{name}"}}') for name in members])
    visible = [name for name in members if not any(part.startswith(".") for part in name.split("/"))]
    of_interest = [name for name in visible if name.endswith((".jpg", ".txt", ".json"))]
    expected: dict[str, tuple[str | None, ...]] = {}
    for group in group_by_keys({"fname": name, "data": name, "__url__": ""} for name in of_interest):
        if "jpg" in group:  # the reader knows no keys that come twice: the first is the one to be kept
            expected.setdefault(group["__key__"], (group["jpg"], group.get("txt"), group.get("json")))
    found = {}
    rejected = set()
    for item in read(tar):
        key = item.key.removeprefix("a.tar/")
        if not item.reason:
            texts = [text for text in item.captions if text.startswith("{")]
            of_json = [text for text in item.captions if not text.startswith("{")]
            text = json.loads(texts[0])["text"] if texts else None
            found[key] = (json.loads(item.data)["text"], text, of_json[0] if of_json else None)
        elif item.reason is Reason.DUPLICATE_KEY:
            rejected.add(key)
    assert found == {key: value for key, value in expected.items() if key in found or key not in rejected}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_cut_off_anywhere_gives_the_whole_samples_before_and_one_reject(tmp_path, mode):
    whole = pack(tmp_path / "a.tar", numbered(12), mode).read_bytes()
    pack(tmp_path / "b.tar", [("z.jpg", JPEG), ("z.txt", "of the next tar")])
    everything = captions(tmp_path)
    assert len(everything) == 13
    counts = []
    for length in np.linspace(1, len(whole) - 1, 60).astype(int):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        found = {key: texts for key, texts in captions(tmp_path).items() if texts}  # one may have lost its text file
        assert list(found.items()) == [*list(everything.items())[: len(found) - 1], ("b.tar/z", ["of the next tar"])]
        damage = rejects(tmp_path)
        if len(found) < 13:
            assert set(damage) == {"a.tar"}
            assert damage["a.tar"] in (Reason.TRUNCATED, Reason.UNREADABLE)
        counts.append(len(found))
    assert counts == sorted(counts)
    assert len(set(counts)) == 13


def test_a_damaged_header_is_not_taken_for_the_end_of_the_tar(tmp_path):
    tar = pack(tmp_path / "a.tar", numbered(4))
    data = bytearray(tar.read_bytes())
    data[data.index(b"0002.jpg")] ^= 255
    tar.write_bytes(data)
    items = read(tar)
    assert [item.key for item in items] == ["a.tar/0000", "a.tar/0001", "a.tar"]
    assert items[-1].reason is Reason.UNREADABLE
    assert "after the member 0001.txt" in items[-1].detail


def test_a_tar_without_its_end_mark_is_reported_and_its_last_sample_kept(tmp_path):
    tar = pack(tmp_path / "a.tar", [("a.jpg", bytes(512)), ("a.txt", b"x" * 512)])
    whole = tar.read_bytes()
    tar.write_bytes(whole[: 4 * 512])
    assert captions(tar) == {"a.tar/a": ["x" * 512]}
    assert rejects(tar) == {"a.tar": Reason.TRUNCATED}
    tar.write_bytes(whole + bytes(100))
    assert rejects(tar) == {}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_flipped_bytes_never_crash_nor_hang_the_reader(tmp_path, mode):
    data = pack(tmp_path / "a.tar", numbered(3), mode).read_bytes()
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        headers = random.integers(0, 512, 8) + random.choice([0, 3072, 4096]) if mode == "w" else None
        places = random.integers(0, len(data), 8) if headers is None else headers
        damaged[places] = random.integers(0, 256, 8)
        (tmp_path / "a.tar").write_bytes(damaged.tobytes())
        for item in read(tmp_path / "a.tar"):
            assert item.data is not None or item.detail


def test_a_negative_size_ends_the_tar_rather_than_leading_in_a_circle(tmp_path):
    tar = pack(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", "x"), ("b.jpg", JPEG)])
    data = bytearray(tar.read_bytes())
    at = data.index(b"b.jpg")
    data[at + 124 : at + 136] = (-1024).to_bytes(12, "big", signed=True)  # base 256, as GNU tar writes large numbers
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    tar.write_bytes(data)
    assert captions(tar) == {"a.tar/a": ["x"]}
    assert rejects(tar) == {"a.tar": Reason.UNREADABLE}


def test_a_member_of_too_many_bytes_is_rejected_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("latentloom.ingestion.webdataset.MAX_BYTES", 1000)
    tar = pack(tmp_path / "a.tar", [("a.jpg", bytes(1001)), ("b.jpg", JPEG), ("b.txt", "small")])
    assert rejects(tar) == {"a.tar/a.jpg": Reason.TOO_MANY_BYTES}
    assert captions(tar) == {"a.tar/b": ["small"]}


def test_names_that_are_not_utf8_are_read(tmp_path):
    tar = pack(tmp_path / "a.tar", [("caf\udce9.jpg", JPEG), ("caf\udce9.txt", "coffee")])
    assert captions(tar) == {"a.tar/caf\udce9": ["coffee"]}


def test_memory_is_flat_in_the_number_of_samples(tmp_path):
    def peak(count: int) -> int:
        image = bytes(100_000)
        tar = pack(
            tmp_path / f"{count}.tar",
            (
                (f"{number:06}.{kind}", image if kind == "jpg" else "x")
                for number in range(count)
                for kind in ("jpg", "txt")
            ),
        )
        tracemalloc.start()
        try:
            assert sum(1 for _ in WebDatasetSource(tar).samples()) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(400) < 200_000  # of which an image is a half
