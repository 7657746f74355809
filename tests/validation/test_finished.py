"""A pipeline that has run: its tables open elsewhere, and the first page agrees with the stages' own reports."""

import json
import re

import duckdb
import pandas as pd
import pytest

pytestmark = pytest.mark.pipeline


def test_pandas_and_duckdb_open_every_table_with_the_same_rows(finished):
    data = finished.folder / "data"
    paths = {str(path.relative_to(data)): path for path in sorted(data.rglob("*.parquet"))}
    assert {
        "images/00000.parquet",
        "latents/index.parquet",
        "latents/rejects.parquet",
        "near_duplicates.parquet",
        "rejects.parquet",
        "text/index.parquet",
        "text/pairs.parquet",
    } <= paths.keys()
    for name, path in paths.items():
        frame = pd.read_parquet(path)
        table = duckdb.sql(f"SELECT * FROM '{path}'").df()
        assert list(table.columns) == list(frame.columns), name
        assert len(table) == len(frame), name
        for column in frame.select_dtypes(["number", "bool", "string"]):
            assert table[column].tolist() == frame[column].tolist(), (name, column)


def test_the_first_page_says_what_the_stages_reported(finished):
    html = (finished.folder / "reports/data_docs/index.html").read_text()
    words = " ".join(re.sub(r"<[^>]*>", " ", html).split())
    ingested = json.loads((finished.folder / "reports/ingest.json").read_text())
    counts = {name: ingested[name] for name in ("found", "kept", "train", "validation")}
    for name, count in counts.items():
        assert f"{name} {count} " in words
    assert f"rejected {ingested['rejected']} train" in words
    assert f"latents {ingested['kept']} latents rejected 0" in words
    assert f"{ingested['near_duplicates']} pair" in words
