"""Stage `encode_text`: every distinct caption -> its embedding, in data/text."""

from pathlib import Path

from latentloom.devices import choose_device
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.pulled import adopt_pulled
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.files import write_json
from latentloom.layout import state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    encoder = load_text_encoder(params.encode_text.model, choose_device())
    store = RowStore(state_folder("text"), state_limit())
    adopt_pulled(store, "data/text")
    counts = encode_captions(encoder, Path("data/images"), Path("data/text"), store)
    write_json(
        "reports/encode_text.json",
        {
            "captions": counts.rows,
            "encoded": counts.encoded,
            "reused": counts.reused,
            "dim": encoder.dim,
            "encoder": encoder.reference,
            "encoder_fingerprint": encoder.fingerprint,
        },
    )
    return f"{counts.rows} captions: encoded {counts.encoded}, reused {counts.reused}"


if __name__ == "__main__":
    run_stage("encode_text", main)
