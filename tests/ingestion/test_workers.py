"""An ingestion is the same for any number of workers."""

import pytest

from latentloom.errors import UserError


def test_an_ingestion_gives_the_same_bytes_whatever_the_number_of_workers(
    corpus, picture, contents, shards_of, monkeypatch, tmp_path
):
    shards_of(5, typical=4)
    for number in range(60):
        kind = number % 6
        name = f"{number:02}.png"
        if kind == 0:
            corpus.add(name, None)
        elif kind == 1:
            corpus.add(name, "a copy", picture(number // 12))
        elif kind == 2:
            corpus.add(name, "small", picture(number, 5, 5))
        else:
            corpus.add(name, "a picture", picture(1000 + number, 40, 50))
    made = []
    for workers in ("1", "2", "4"):
        monkeypatch.setenv("LATENTLOOM_WORKERS", workers)
        corpus.out = tmp_path / f"of {workers}"
        report = corpus.ingest(near_duplicate_distance=8)
        made.append((report, contents(corpus.out)))
    assert made[0][0].rejected > 20
    assert made[0] == made[1] == made[2]


def test_a_wrong_engine_is_told_before_anything_is_written(corpus, contents, monkeypatch):
    corpus.add("a.png", "a picture")
    corpus.ingest()
    before = contents(corpus.out)
    monkeypatch.setenv("LATENTLOOM_ENGINE", "rya")
    with pytest.raises(UserError, match="LATENTLOOM_ENGINE=rya: must be local or ray"):
        corpus.ingest()
    assert contents(corpus.out) == before
