"""Stage `ingest`: sources of captioned images -> data/images, data/rejects.parquet, data/near_duplicates.parquet."""

from latentloom.file_hashes import FileHashes
from latentloom.files import write_json
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.prepared import PreparedStore, recipe
from latentloom.layout import IMAGES, INGEST_REPORT, NEAR_DUPLICATES, REJECTS, state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    hashes = FileHashes(state_folder("file_hashes.db"))
    store = PreparedStore(state_folder("images"), state_limit(), recipe(params.ingest), hashes.known)
    report = ingest(params.ingest, IMAGES, REJECTS, NEAR_DUPLICATES, store=store)
    write_json(INGEST_REPORT, report.to_dict())
    if report.size_table:
        print(report.size_table)
    return str(report)


if __name__ == "__main__":
    run_stage("ingest", main)
