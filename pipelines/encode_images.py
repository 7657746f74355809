"""Stage `encode_images`: every prepared image -> its VAE latent, in data/latents."""

from latentloom.devices import choose_device
from latentloom.encoding.latents import encode_images
from latentloom.encoding.named_encoders import pinned_reference
from latentloom.encoding.pulled_shards import pulled_shards
from latentloom.encoding.reconstruction import reconstruct
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import Vae
from latentloom.files import write_json
from latentloom.layout import ENCODE_IMAGES_REPORT, IMAGES, LATENTS, state_folder, state_limit
from latentloom.params import Params
from latentloom.stage import run_stage


def main(params: Params) -> str:
    settings = params.encode_images
    vae = Vae(pinned_reference("encode_images.vae", settings.vae), choose_device(), settings.precision)
    store = RowStore(state_folder("latents"), state_limit())
    store.adopt(pulled_shards(LATENTS))
    counts = encode_images(vae, IMAGES, LATENTS, store, flip=settings.flip)
    psnr = reconstruct(vae, IMAGES, LATENTS, store)
    write_json(
        ENCODE_IMAGES_REPORT,
        {
            "latents": counts.rows,
            "rejected": counts.rejected,
            "reconstruction_psnr": round(psnr, 2),
            "vae": vae.reference,
            "vae_fingerprint": vae.fingerprint,
        },
    )
    rejected = f", rejected {counts.rejected} (see {LATENTS}/rejects.parquet)" if counts.rejected else ""
    decoded = f"; decoded again, images come back at {psnr:.1f} dB"
    return f"{counts.rows} latents: encoded {counts.encoded}, reused {counts.reused}{rejected}{decoded}"


if __name__ == "__main__":
    run_stage("encode_images", main)
