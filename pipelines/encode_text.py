"""Stage `encode_text`: every distinct caption -> its embedding, in data/text."""

from latentloom.devices import choose_device
from latentloom.encoding.cache import RowStore
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.pulled_shards import pulled_shards
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.files import write_json
from latentloom.layout import ENCODE_TEXT_REPORT, IMAGES, TEXT, state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    encoder = TextEncoder(params.encode_text.model, choose_device())
    store = RowStore(state_folder("text"), state_limit())
    store.adopt(pulled_shards(TEXT))
    counts = encode_captions(encoder, IMAGES, TEXT, store)
    write_json(
        ENCODE_TEXT_REPORT,
        {
            "captions": counts.rows,
            "dim": encoder.dim,
            "encoder": encoder.reference,
            "encoder_fingerprint": encoder.fingerprint,
        },
    )
    return f"{counts.rows} captions: encoded {counts.encoded}, reused {counts.reused}"


if __name__ == "__main__":
    run_stage("encode_text", main)
