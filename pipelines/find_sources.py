"""Stage `find_sources`: what the sources hold at the moment -> data/sources.json, which `ingest` depends on."""

from pathlib import Path

from latentloom.files import write_json
from latentloom.ingestion.listing import list_sources
from latentloom.params import Params
from latentloom.stage import run_stage

LISTING = Path("data/sources.json")


def main(params: Params) -> str:
    listings = list_sources(params.ingest.sources, LISTING)
    write_json(LISTING, listings)
    return ", ".join(
        f"{own['source']} of {own['files']} files" if "files" in own else own["source"] for own in listings
    )


if __name__ == "__main__":
    run_stage("find_sources", main)
