"""Every Parquet file of a finished pipeline opens in pandas and in DuckDB, with the same rows."""

import duckdb
import pandas as pd
import pytest

pytestmark = pytest.mark.pipeline


def test_pandas_and_duckdb_open_every_table(finished):
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
            assert table[column].tolist() == pytest.approx(frame[column].tolist(), nan_ok=True), (name, column)
