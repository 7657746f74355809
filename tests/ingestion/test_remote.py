"""Sources at addresses: the same images as from the disk, whatever a network does, and credentials nowhere."""

import tarfile
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import seaweedfs

from latentloom.file_hashes import FileHashes
from latentloom.files import write_json
from latentloom.ingestion import preprocess, remote
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.ingestion.folder import FolderSource
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.pngs import encode
from latentloom.ingestion.prepared import PreparedStore, recipe
from latentloom.ingestion.sources import IngestError
from latentloom.params import SourceParams


@pytest.fixture
def bucket():
    """An address in memory."""
    address = f"memory://{uuid4().hex}"
    system = fsspec.filesystem("memory")
    yield address
    if system.exists(address):
        system.rm(address, recursive=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


def upload(folder, address: str) -> None:
    system, root = fsspec.core.url_to_fs(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def failing(monkeypatch, times: int, *parts: str) -> None:
    """Let the first so many reads of addresses with one of ``parts`` fail."""
    system, left = type(fsspec.filesystem("memory")), dict.fromkeys(parts, times)
    content = system.cat_file

    def cat_file(self, path, *arguments, **options):
        for part in parts:
            if part in path and left[part]:
                left[part] -= 1
                raise ConnectionError("the network is away")
        return content(self, path, *arguments, **options)

    monkeypatch.setattr(system, "cat_file", cat_file)


@pytest.fixture
def packed(corpus, picture, tmp_path):
    """Source -> a folder that has the same images in its form."""
    for number in range(4):
        corpus.add(f"a/{number}.png", f"picture {number}", picture(number))
    corpus.add("named.png", None, picture(7))
    corpus.add("unnamed", "by its bytes", encode(picture(8)))
    corpus.add("a/.hidden.png", "hidden", picture(9))
    corpus.write("metadata.csv", "file_name,text\nnamed.png,named\nmissing.png,none\n")
    for name in ("tars", "tables"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar.gz", "w:gz") as tar:
        tar.add(corpus.path / "a", "a")
    table = pa.table({"image": [encode(picture(own)) for own in range(4)], "text": ["a", "b", "c", "d"]})
    pq.write_table(table, tmp_path / "tables" / "a.parquet")
    return {"folder": corpus.path, "webdataset": tmp_path / "tars", "parquet": tmp_path / "tables"}


@pytest.mark.parametrize("source", ["folder", "webdataset", "parquet"])
def test_an_address_gives_what_the_disk_gives_though_requests_fail(
    source, packed, bucket, corpus, new_corpus, contents, monkeypatch, impatient
):
    upload(packed[source], bucket)
    corpus.ingest(source=source, path=str(packed[source]))
    other = new_corpus("other")
    failing(monkeypatch, 2, "1.png", "metadata", "0.txt", ".tar.gz", ".parquet")
    pattern = {"webdataset": "/*.tar.gz", "parquet": "/a.parquet"}.get(source, "")
    other.ingest(source=source, path=bucket + pattern)
    assert contents(other.images) == contents(corpus.images)
    assert other.rejects.read_bytes() == corpus.rejects.read_bytes()


def test_what_cannot_be_read_is_told_object_by_object(packed, bucket, corpus, monkeypatch, impatient):
    upload(packed["folder"], bucket)
    failing(monkeypatch, 99, "1.png", "2.txt")
    corpus.ingest(path=bucket)
    told = "ConnectionError: the network is away, 3 tries"
    assert corpus.details()["a/1.png"] == f"1.png: {told}"
    assert corpus.details()["a/2.png"] == f"2.txt: {told}"
    assert {"a/0.png", "a/3.png", "named.png", "unnamed"} == set(corpus.captions())


def test_an_address_that_cannot_be_listed_is_an_error_unless_it_was_listed_before(bucket, tmp_path, impatient, capsys):
    entries = [SourceParams(source="folder", path="unheardof://bucket")]
    with pytest.raises(IngestError, match="cannot be listed: Protocol not known"):
        fingerprint_sources(entries, tmp_path / "none.json")
    before = [{"source": "folder", "path": "unheardof://bucket", "files": 1}]
    write_json(tmp_path / "before.json", before)
    assert fingerprint_sources(entries, tmp_path / "before.json") == before
    assert "The data stays as it was" in capsys.readouterr().err
    with pytest.raises(IngestError, match="holds no file"):
        fingerprint_sources([SourceParams(source="folder", path=bucket)], tmp_path / "none.json")
    with pytest.raises(IngestError, match="holds a user or a password") as caught:
        FolderSource("s3://KEY:SECRET@bucket/images")
    assert "SECRET" not in str(caught.value)


@pytest.mark.service
def test_objects_of_an_s3_store_are_known_by_their_etags_and_decoded_once(
    packed, corpus, tmp_path, monkeypatch, contents
):
    (tmp_path / "store").mkdir()
    with seaweedfs(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        system = fsspec.filesystem("s3")
        system.mkdir("photos")
        decoded, prepare = [], preprocess.prepare_image
        monkeypatch.setattr(
            preprocess, "prepare_image", lambda *own, **names: decoded.append(1) or prepare(*own, **names)
        )
        for source, folder in packed.items():
            address, entries = f"s3://photos/{source}", [SourceParams(source=source, path=f"s3://photos/{source}")]
            upload(folder, address)

            def listed(entries=entries):
                with monkeypatch.context() as patch:
                    patch.setattr(remote, "read", None)
                    return fingerprint_sources(entries, tmp_path / "none.json")

            def run(**origin) -> int:
                decoded.clear()
                params = corpus.params(**origin)
                state = PreparedStore(tmp_path / "state", 2**30, recipe(params), FileHashes(tmp_path / "hashes").known)
                ingest(params, corpus.images, corpus.rejects, corpus.near_duplicates, progress=False, store=state)
                return len(decoded)

            before = listed()
            assert listed() == before
            corpus.ingest(source=source, path=str(folder))
            local = contents(corpus.images)
            assert [run(source=source, path=address) for _ in range(2)] == [{"folder": 6}.get(source, 4), 0]
            assert contents(corpus.images) == local
            assert store.secret not in repr(before) + corpus.rejects.read_bytes().decode("latin-1")
        system.pipe_file("photos/folder/a/1.png", (packed["folder"] / "a" / "2.png").read_bytes())
        assert run(path="s3://photos/folder") == 1
