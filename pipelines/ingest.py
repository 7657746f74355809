"""Stage `ingest`: sources of captioned images -> data/images, data/rejects.parquet, data/near_duplicates.parquet."""

from latentloom.files import write_json
from latentloom.ingestion.ingest import ingest
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    report = ingest(params.ingest, "data/images", "data/rejects.parquet", "data/near_duplicates.parquet")
    write_json("reports/ingest.json", report.to_dict())
    return str(report)


if __name__ == "__main__":
    run_stage("ingest", main)
