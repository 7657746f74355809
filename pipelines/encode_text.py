"""Stage `encode_text`: every distinct caption -> its embedding, and what else `model.text` wants, in data/text."""

from latentloom.devices import choose_device
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.named_encoders import pinned_reference
from latentloom.encoding.pulled_shards import pulled_shards
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.files import write_json
from latentloom.layout import ENCODE_TEXT_REPORT, IMAGES, TEXT, state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    reference = pinned_reference("encode_text.model", params.encode_text.model)
    encoder = TextEncoder(reference, choose_device(), params.encode_text.max_tokens)
    store = RowStore(state_folder("text"), state_limit())
    store.adopt(pulled_shards(TEXT))
    counts = encode_captions(encoder, IMAGES, TEXT, store, tokens=params.model.text == "tokens")
    write_json(
        ENCODE_TEXT_REPORT,
        {
            "captions": counts.rows,
            "cut": counts.cut,
            "dim": encoder.dim,
            "encoder": encoder.reference,
            "encoder_fingerprint": encoder.fingerprint,
            "max_tokens": encoder.max_tokens,
            "token_dim": encoder.token_dim if params.model.text == "tokens" else None,
        },
    )
    cut = f"; {counts.cut} cut at {encoder.max_tokens} tokens" if counts.cut else ""
    return f"{counts.rows} captions: encoded {counts.encoded}, reused {counts.reused}{cut}"


if __name__ == "__main__":
    run_stage("encode_text", main)
