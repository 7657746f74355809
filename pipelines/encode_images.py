"""Stage `encode_images`: every prepared image -> its VAE latent, in data/latents."""

from pathlib import Path

from latentloom.devices import choose_device
from latentloom.encoding.latents import encode_images
from latentloom.encoding.pulled import adopt_pulled
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import load_vae
from latentloom.files import write_json
from latentloom.layout import state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    settings = params.encode_images
    vae = load_vae(settings.vae, choose_device(), settings.precision)
    store = RowStore(state_folder("latents"), state_limit())
    adopt_pulled(store, "data/latents")
    counts = encode_images(vae, Path("data/images"), Path("data/latents"), store, flip=settings.flip)
    write_json(
        "reports/encode_images.json",
        {
            "latents": counts.rows,
            "encoded": counts.encoded,
            "reused": counts.reused,
            "rejected": counts.rejected,
            "vae": vae.reference,
            "vae_fingerprint": vae.fingerprint,
        },
    )
    refused = f", rejected {counts.rejected} (see data/latents/rejects.parquet)" if counts.rejected else ""
    return f"{counts.rows} latents: encoded {counts.encoded}, reused {counts.reused}{refused}"


if __name__ == "__main__":
    run_stage("encode_images", main)
