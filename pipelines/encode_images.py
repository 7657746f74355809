"""Stage `encode_images`: every prepared image -> its VAE latent, in data/latents."""

from pathlib import Path

from latentloom.devices import choose_device
from latentloom.encoding.latents import encode_images
from latentloom.encoding.vae import load_vae
from latentloom.files import write_json
from latentloom.params import Params
from latentloom.stage import run_stage, state_folder


def main(params: Params) -> str:
    vae = load_vae(params.encode_images.vae, choose_device())
    counts = encode_images(vae, Path("data/images"), Path("data/latents"), state_folder("latents"))
    write_json(
        "reports/encode_images.json", {"images": counts.rows, "vae": vae.reference, "vae_fingerprint": vae.fingerprint}
    )
    return f"{counts.rows} images: encoded {counts.encoded}, reused {counts.reused}"


if __name__ == "__main__":
    run_stage("encode_images", main)
