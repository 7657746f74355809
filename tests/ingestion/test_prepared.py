"""The store of prepared images: outs are those of a rebuild, whatever came before, and nothing is decoded twice."""

import io
import shutil
import tarfile
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentloom import file_hashes
from latentloom.file_hashes import FileHashes
from latentloom.ingestion import prepared, preprocess
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.pngs import encode
from latentloom.ingestion.prepared import PreparedStore, recipe
from latentloom.ingestion.shards import read_metadata


@pytest.fixture
def rerun(tmp_path, monkeypatch, contents):
    """Ingests a corpus as the stages do, and gives how many files were decoded; the outs are those of a rebuild."""
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -1)
    decoded = []
    prepare = preprocess.prepare_image
    monkeypatch.setattr(preprocess, "prepare_image", lambda *own, **names: decoded.append(1) or prepare(*own, **names))

    def run(corpus, limit=2**40, **changes) -> int:
        hashes = FileHashes(tmp_path / "file_hashes.db")
        for path in corpus.path.rglob("*"):
            if path.is_file():
                hashes(path)
        hashes.save()
        params = corpus.params(**changes)
        outs = corpus.images, corpus.rejects, corpus.near_duplicates
        store = PreparedStore(tmp_path / "state", limit, recipe(params), hashes.known)
        decoded.clear()
        report = ingest(params, *outs, progress=False, store=store)
        count = len(decoded)
        anew = tmp_path / "anew"
        shutil.rmtree(anew, ignore_errors=True)
        others = anew / "images", anew / corpus.rejects.name, anew / corpus.near_duplicates.name
        assert ingest(params, *others, progress=False) == report
        assert contents(corpus.out) == contents(anew)
        return count

    return run


def test_what_has_not_changed_is_not_decoded_again(corpus, rerun, shards_of):
    shards_of(2)
    for number in range(9):
        corpus.add(f"{number}.png", "a picture")
    corpus.add("copy.png", "a copy", (corpus.path / "3.png").read_bytes())
    corpus.add("broken.png", "none", b"broken")
    assert rerun(corpus) == 11
    assert rerun(corpus) == 0
    corpus.add("55.png", "new")
    corpus.write("4.txt", "another caption")
    (corpus.path / "3.png").rename(corpus.path / "z.png")  # so that its copy is kept
    assert rerun(corpus, val_fraction=0.1) == 1


def test_of_shards_whose_rows_have_not_changed_no_picture_is_read(corpus, rerun, shards_of, monkeypatch):
    shards_of(2)
    for number in range(30):
        corpus.add(f"{number:02d}.png", "a picture")
    rerun(corpus)
    read = []
    picture = PreparedStore.picture
    monkeypatch.setattr(PreparedStore, "picture", lambda store, known: read.append(known.id) or picture(store, known))
    rerun(corpus)
    assert not read
    corpus.write("00.txt", "another caption")
    corpus.add("zz.png", "behind the others")
    assert rerun(corpus) == 1
    ends = [len(pq.read_table(path)) for path in sorted(corpus.images.glob("*.parquet"))]
    assert len(ends) > 3
    assert 0 < len(read) <= ends[0] + ends[-2] + ends[-1]


def test_where_only_the_writer_of_shards_changed_pictures_are_written_anew_and_not_decoded(corpus, rerun, monkeypatch):
    for number in range(9):
        corpus.add(f"{number}.png", "a picture")
    rerun(corpus)
    (before,) = (path.stat().st_ino for path in corpus.images.glob("*.parquet"))
    monkeypatch.setattr(prepared, "WRITER", (prepared.sharding, prepared.shards))  # stands for other code
    assert rerun(corpus) == 0
    (after,) = (path.stat().st_ino for path in corpus.images.glob("*.parquet"))
    assert after != before
    assert rerun(corpus) == 0
    (again,) = (path.stat().st_ino for path in corpus.images.glob("*.parquet"))
    assert again == after


def test_shards_that_were_amended_are_linked_whole_and_amended_anew_only_where_that_differs(
    corpus, rerun, picture, shards_of, monkeypatch
):
    """Rows that followed a near duplicate into the training split, and rows that gained the captions of equal files."""
    shards_of(4)
    changes = {"source": "parquet", "near_duplicate_distance": 8}
    pictures = {number: encode(picture(number)) for number in range(16)}

    def write(name: str, rows: list[tuple[bytes, str]]) -> None:
        images, texts = zip(*rows, strict=True)
        pq.write_table(pa.table({"image": images, "text": texts}), corpus.path / f"{name}.parquet")

    def inodes() -> list[int]:
        return [path.stat().st_ino for path in sorted(corpus.images.glob("*.parquet"))]

    alike = [encode(nearly(picture(number))) for number in pictures]
    write("a", [(png, f"picture {number}") for number, png in pictures.items()])
    write("b", [(png, f"alike {number}") for number, png in enumerate(alike)])
    write("c", [(pictures[number], f"again {number}") for number in range(0, 16, 5)])
    rerun(corpus, **changes)
    moved = read_metadata(corpus.images)["split"].tolist()
    before = inodes()
    assert len(before) > 3
    with monkeypatch.context() as patched:
        patched.setattr(PreparedStore, "picture", lambda *_: pytest.fail("a picture was read"))
        for _ in range(2):
            assert rerun(corpus, **changes) == 0
            assert inodes() == before
    (corpus.path / "b.parquet").unlink()
    (corpus.path / "c.parquet").unlink()
    rerun(corpus, **changes)
    alone = read_metadata(corpus.images)["split"].tolist()
    assert "validation" in alone and alone != moved[: len(alone)]
    assert rerun(corpus, **changes) == 0


def nearly(pixels):
    """A near duplicate."""
    pixels[0, 0] ^= 1
    return pixels


NAMES = st.sampled_from([f"{folder}{number}.png" for folder in ("", "a/") for number in range(6)])
PICTURES = st.one_of(st.integers(0, 7), st.sampled_from([b"broken", b""]))  # few, so that some are equal
CHANGES = st.one_of(
    st.tuples(st.just("add"), NAMES, PICTURES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("caption"), NAMES, st.sampled_from(["one", "one\ntwo", "", b"\xff"])),
    st.tuples(
        st.just("params"),
        st.sampled_from(
            PARAMS := [
                {"val_fraction": 0.1},
                {"near_duplicate_distance": 8},
                {"image_size": 48},
                {"limit": 3},
                {"max_pixels": 1000},
            ]
        ),
    ),
    st.tuples(st.just("damage"), st.integers(0, 99), st.integers(0, 10**6)),
)


@pytest.mark.filterwarnings("ignore:.*is damaged")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories=st.lists(st.lists(CHANGES, min_size=1, max_size=6), min_size=2, max_size=3))
def test_after_any_history_the_outs_are_those_of_a_rebuild(tmp_path, new_corpus, rerun, shards_of, picture, histories):
    shards_of(2)
    corpus, params = new_corpus(uuid4().hex), {}
    corpus.add("kept.png", "a picture", picture(99, 16, 16))
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    for changes in [[], *histories]:
        for kind, *values in changes:
            if kind == "params":
                params = {} if params else values[0]
            elif kind == "damage":
                stored = sorted((tmp_path / "state").glob("*"))
                if stored:
                    path = stored[values[0] % len(stored)]
                    content = bytearray(path.read_bytes())
                    content[values[1] % len(content)] ^= 1
                    path.unlink()  # an out has the same content
                    path.write_bytes(content)
            elif kind == "add":
                content = values[1]
                if isinstance(content, int):  # two of them are near duplicates
                    content = nearly(picture(content // 2)) if content % 2 else picture(content // 2)
                corpus.add(values[0], "a picture", content)
            elif not (path := corpus.path / values[0]).exists():
                continue
            elif kind == "remove":
                path.unlink()
            elif kind == "rename":
                (corpus.path / values[1]).parent.mkdir(exist_ok=True)
                path.rename(corpus.path / values[1])
            else:
                corpus.write(str(Path(values[0]).with_suffix(".txt")), values[1])
        rerun(corpus, **params)


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_of_tars_and_tables_that_have_not_changed_only_captions_are_read(
    source, corpus, rerun, picture, tmp_path, monkeypatch
):
    def pack(name: str, numbers: range) -> None:
        table = pa.table({"image": [encode(picture(own)) for own in numbers], "text": list(map(str, numbers))})
        if source == "parquet":
            pq.write_table(table, corpus.path / f"{name}.parquet", row_group_size=2)
            return
        with tarfile.open(corpus.path / f"{name}.tar", "w") as tar:
            for number, image in zip(numbers, table["image"].to_pylist(), strict=True):
                for suffix, content in ((".png", image), (".txt", str(number).encode())):
                    header = tarfile.TarInfo(f"{number}{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))

    for name, numbers in {"a": range(4), "c": range(4, 9)}.items():
        pack(name, numbers)
    assert rerun(corpus, source=source) == 9
    assert rerun(corpus, source=source) == 0
    pack("b", range(7, 12))  # two of them again, which are copies now
    assert rerun(corpus, source=source) == 5
    (last,) = corpus.path.glob("c.*")
    last.rename(last.with_stem("a0"))
    assert rerun(corpus, source=source) == 0
