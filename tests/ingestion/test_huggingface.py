"""Data sets of Hugging Face's library: folders of ``save_to_disk``, and ids on a hub whose two calls are replaced."""

import io
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from outcomes import outcomes
from PIL import Image

from latentloom.files import write_json
from latentloom.ingestion import remote
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.ingestion.huggingface import HuggingFaceSource
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.prepared import PreparedStore, recipe
from latentloom.ingestion.sources import IngestError
from latentloom.layout import SOURCES
from latentloom.params import SourceParams

ONE_COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40
FEATURES = datasets.Features(
    {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string")), "label": datasets.Value("int64")}
)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def data_set(images: list, captions: list) -> datasets.Dataset:
    rows = {"image": images, "captions": captions, "label": list(range(len(images)))}
    return datasets.Dataset.from_dict(rows, FEATURES)


def streamed(rows: list) -> Iterator[dict]:
    for row in rows:
        if isinstance(row, Exception):
            raise row
        yield row


@pytest.fixture
def saved(picture, tmp_path):
    """A folder of two splits: images embedded, by path, damaged and missing; captions several, one and none."""
    (tmp_path / "b.png").write_bytes(png(picture(1)))
    images = [{"bytes": png(picture(0)), "path": "a.png"}, str(tmp_path / "b.png"), {"bytes": b"GIF89a", "path": None}]
    train = data_set([*images, None, {"bytes": png(picture(2)), "path": None}], [["a", "b"], ["c"], ["d"], ["e"], None])
    test = data_set([{"bytes": png(picture(3)), "path": None}], [["f", None]])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows ``owner/name``: its ``commit``, the ``splits`` that it streams, and what was ``opened``."""
    there = SimpleNamespace(commit=ONE_COMMIT, splits={}, opened=[], error=None)

    def dataset_info(_, name, revision=None):
        if there.error:
            raise there.error
        assert name == "owner/name" and revision in (None, "v1")
        return SimpleNamespace(sha=there.commit)

    def load_dataset(name, config, *, revision, streaming):
        assert streaming
        there.opened.append((name, config, revision))
        if config == "none":
            raise ValueError("BuilderConfig 'none' not found. Available: ['default']")
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(streamed, FEATURES, {"rows": rows})
                for split, rows in there.splits.items()
            }
        )

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return there


def test_a_folder_of_save_to_disk_is_read_split_after_split(corpus, picture, saved):
    corpus.ingest(source="huggingface", path=str(saved))
    assert corpus.captions() == {"train:0": ["a", "b"], "train:1": ["c"], "test:0": ["f"]}
    assert all(np.array_equal(corpus.pixels()[key], picture(n)) for n, key in ((0, "train:0"), (1, "train:1")))
    assert corpus.reasons() == {"train:2": "unreadable", "train:3": "missing_file", "train:4": "no_caption"}


def test_splits_and_columns_are_chosen_by_name(saved):
    def keys(*named):
        return [item.key for item in outcomes(HuggingFaceSource(str(saved), *named))]

    assert keys("image", {"captions": 1}, None, ["test"]) == ["test:0"]
    assert keys(None, {"label": 2}, None, ["test", "train"])[:2] == ["test:0", "train:0"]
    assert HuggingFaceSource(str(saved)).total == 6
    assert [item.key for item in outcomes(HuggingFaceSource(str(saved / "test")))] == ["train:0"]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (("photo",), ["saved, train, has the columns image (struct", "label (int64)", "source: huggingface", "photo"]),
        ((None, {"alt": 1}), ["captions (list", "called alt holds captions"]),
        ((None, None, None, ["train", "dev"]), ["no split 'dev'; it has train, test"]),
        ((None, None, "small"), ["is a folder, which has no config 'small'"]),
    ],
)
def test_what_is_not_in_the_data_set_is_named_beside_what_is(saved, named, says):
    with pytest.raises(IngestError) as caught:
        HuggingFaceSource(str(saved), *named)
    for text in says:
        assert text in str(caught.value)


def test_a_folder_of_something_else_is_told_in_plain_words(tmp_path, saved):
    (arrow,) = (saved / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    for folder in (tmp_path, saved):
        with pytest.raises(IngestError, match=r"cannot be read as a data set of save_to_disk .*use source: folder"):
            HuggingFaceSource(str(folder))


def test_a_row_names_files_of_its_own_data_set_alone_never_of_this_machine(hub, monkeypatch):
    own, secret = f"hf://datasets/owner/name@{ONE_COMMIT}/a.zip", "/home/secret.png"
    good = [own, f"zip://cat.png::{own}"]
    bad = [
        secret,
        f"file://{secret}",
        f"file://{secret}::{own}",
        f"{own}::{secret}",
        f"zip://x::file://{secret}::{own}",
    ]
    bad += ["hf://datasets/owner/private/a.png", f"zip://x::hf://datasets/owner/name@{OTHER_COMMIT}/a.zip"]
    rows = [{"image": {"bytes": None, "path": path}, "captions": ["x"], "label": 0} for path in (*good, *bad)]
    hub.splits = {"train": rows}
    monkeypatch.setattr(remote, "read", str.encode)
    items = list(outcomes(HuggingFaceSource("owner/name")))
    assert [item.data for item in items] == [*map(str.encode, good), *[None] * len(bad)]
    assert all("without the bytes; embed them" in item.detail for item in items[2:])


def test_the_hubs_rows_are_streamed_at_the_commit_that_was_found(corpus, picture, hub, monkeypatch):
    address = f"hf://datasets/owner/name@{ONE_COMMIT}/a.png"
    monkeypatch.setattr(remote, "read", {address: png(picture(5))}.__getitem__)
    rows = [({"bytes": png(picture(4)), "path": None}, ["x"]), ({"bytes": None, "path": address}, ["y", "z"])]
    hub.splits = {"train": [{"image": image, "captions": texts, "label": 0} for image, texts in rows]}
    entry = SourceParams(source="huggingface", path="owner/name@v1")
    write_json(SOURCES, fingerprint_sources([entry], SOURCES))
    hub.commit = OTHER_COMMIT
    corpus.ingest(source=[{"source": "huggingface", "path": "owner/name@v1", "config": "small"}], path=None)
    assert corpus.captions() == {"train:0": ["x"], "train:1": ["y", "z"]}
    assert np.array_equal(corpus.pixels()["train:1"], picture(5))
    corpus.ingest(source="huggingface", path="owner/name")
    assert hub.opened == [("owner/name", "small", ONE_COMMIT), ("owner/name", None, OTHER_COMMIT)]


def test_the_hubs_fingerprint_is_its_commit_and_stays_where_the_hub_is_away(hub, tmp_path, capsys):
    entries, before = [SourceParams(source="huggingface", path="owner/name")], tmp_path / "before.json"
    found = fingerprint_sources(entries, before)
    assert found[0] | {"plugins": []} == {
        "source": "huggingface",
        "path": "owner/name",
        "fingerprint": ONE_COMMIT,
        "plugins": [],
    }
    write_json(before, found)
    hub.error = httpx.ConnectError("no route")
    assert fingerprint_sources(entries, before) == found
    assert (
        "cannot be asked for owner/name (ConnectError: no route). The data stays as it was" in capsys.readouterr().err
    )
    named = SourceParams(source="huggingface", path=f"owner/name@{OTHER_COMMIT}")
    assert fingerprint_sources([named], before)[0]["fingerprint"] == OTHER_COMMIT


def test_a_folders_fingerprint_is_that_of_its_files_and_stays_where_the_folder_is_not(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries, before = [SourceParams(source="huggingface", path="a/saved")], tmp_path / "before.json"
    (tmp_path / "a").mkdir()
    saved.rename("a/saved")
    found = fingerprint_sources(entries, before)
    assert found[0]["files"] == 7
    write_json(before, found)
    (tmp_path / "a/saved").rename(tmp_path / "elsewhere")  # and no hub is asked for a/saved
    assert fingerprint_sources(entries, before) == found


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        (
            "owner/name",
            RepositoryNotFoundError("404", response=answer(404)),
            "no data set owner/name on the Hugging Face",
        ),
        (
            "owner/name",
            GatedRepoError("403", response=answer(403)),
            "is gated; ask for access at https://huggingface.co",
        ),
        ("owner/name@v1", RevisionNotFoundError("404", response=answer(404)), "no commit, branch or tag 'v1'"),
        ("no/such/folder", None, "the path no/such/folder does not exist; give a data set's id on the hub"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_plain_words(hub, path, error, says):
    hub.error = error
    with pytest.raises(IngestError, match=says):
        HuggingFaceSource(path)


def test_a_config_that_is_not_there_is_named_with_those_that_are(hub):
    with pytest.raises(IngestError, match=r"BuilderConfig 'none' not found. Available: \['default'\]"):
        HuggingFaceSource("owner/name", config="none")


def test_a_stream_that_breaks_stops_the_stage_rather_than_losing_rows(hub, picture):
    row = {"image": {"bytes": png(picture(0)), "path": None}, "captions": ["x"], "label": 0}
    hub.splits = {"train": [row, httpx.ReadTimeout("too slow")]}
    samples = HuggingFaceSource("owner/name").samples()
    assert next(samples).key == "train:0"
    with pytest.raises(IngestError, match=r"owner/name, train, cannot be read from row 1 on \(ReadTimeout: too slow"):
        next(samples)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(IngestError, match=r'pip install "latentloom\[huggingface\]"'):
        HuggingFaceSource("owner/name")


def test_an_image_that_moved_to_another_row_is_not_decoded_again(corpus, picture, tmp_path, monkeypatch):
    images = [{"bytes": png(picture(number)), "path": None} for number in range(4)]
    params = corpus.params(source="huggingface", path=str(tmp_path / "saved"))

    def decoded(chosen: list[int]) -> int:
        data_set([images[number] for number in chosen], [["x"]] * len(chosen)).save_to_disk(tmp_path / "saved")
        count = []
        with monkeypatch.context() as patch:
            from latentloom.ingestion import preprocess

            prepare = preprocess.prepare_image
            patch.setattr(preprocess, "prepare_image", lambda *own, **more: count.append(1) or prepare(*own, **more))
            store = PreparedStore(tmp_path / "store", 2**30, recipe(params), {}.get)
            ingest(params, corpus.images, corpus.rejects, corpus.near_duplicates, progress=False, store=store)
        return len(count)

    assert [decoded([0, 1, 2]), decoded([3, 2, 0])] == [3, 1]
    assert all(np.array_equal(corpus.pixels()[f"train:{row}"], picture(n)) for row, n in enumerate([3, 2, 0]))
