"""Stage `find_sources`: what the sources hold at the moment -> data/sources.json, which `ingest` depends on."""

from latentloom.files import write_json
from latentloom.ingestion.source_files import fingerprint_sources
from latentloom.layout import SOURCES
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    sources = fingerprint_sources(params.ingest.sources, SOURCES)
    write_json(SOURCES, sources)
    return ", ".join(f"{own['source']} of {own['files']} files" if "files" in own else own["source"] for own in sources)


if __name__ == "__main__":
    run_stage("find_sources", main)
