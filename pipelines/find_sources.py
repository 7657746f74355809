"""Stage `find_sources`: what the params name outside of the project, as it is at the moment.

The sources' listing -> data/sources.json, which `ingest` depends on; the encoders' fingerprints -> data/encoders/, of
which each stage depends on the file of its name; the hash of the model that a training starts from -> data/init.json.
"""

from latentloom.encoding.named_encoders import find_encoders
from latentloom.file_hashes import FileHashes
from latentloom.files import write_json
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.layout import ENCODERS, INIT, SOURCES, project_root, state_folder
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    hashes = FileHashes(state_folder("file_hashes.db"))
    references = {
        "encode_images.vae": params.encode_images.vae,
        "encode_text.model": params.encode_text.model,
        "evaluate.features": params.evaluate.features,
        "evaluate.clip": params.evaluate.clip,
    }
    try:
        sources = fingerprint_sources(params.ingest.sources, SOURCES, hashes)
        write_json(SOURCES, sources)
        find_encoders(references, ENCODERS, hashes)
    finally:
        hashes.save()
    if params.train.init is None:
        write_json(INIT, None)
    else:
        from latentloom.registry.base import find_base  # torch and MLflow take seconds

        find_base(params, project_root())
    return ", ".join(f"{own['source']} of {own['files']} files" if "files" in own else own["source"] for own in sources)


if __name__ == "__main__":
    run_stage("find_sources", main)
