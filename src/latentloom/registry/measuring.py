"""A registered model measured again, on the data set of this folder, just as another model was measured.

The text encoder is the model's own. Its samples are compared with the cached latents, as the stage `evaluate` compares
those of the present model: in their standardised units, so samples are brought there through the VAE's own units.
"""

from dataclasses import replace
from pathlib import Path

from latentloom.devices import choose_device
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.encoding.dataset import load_caches, row_shapes
from latentloom.errors import UserError
from latentloom.evaluation.held_out import measure
from latentloom.evaluation.text_to_image import load_text_to_image
from latentloom.layout import LATENTS, TEXT
from latentloom.model_files import read_config
from latentloom.registry.figures import Figures


def measure_again(
    model: Path, like: Figures, sampling: SamplingSettings, root: Path, *, memory_share: float = 1.0
) -> Figures:
    """The recall and the copies of ``model``, measured as ``like`` was; the validation error is not.

    Args:
        like: says of how many captions and from which seed; ``sampling``, with which settings.
        root: the project whose caches are the data.
        memory_share: of the device's free memory that the caches may take.

    Raises:
        UserError: when the caches are missing, hold other data than ``like`` was measured on, latents of another VAE
            than the model's, or of a shape that it was not trained on; or when ``like`` has no samples.
    """
    if not like.samples or like.seed is None:
        raise UserError(
            "no held-out caption was sampled: raise evaluate.held_out_captions and run `dvc repro evaluate`"
        )
    device = choose_device()
    caches = load_caches(root / LATENTS, root / TEXT, device=device, memory_share=memory_share)
    here, config = caches.digests["validation"], read_config(model)
    if here != like.data:
        raise UserError(
            f"{LATENTS} and {TEXT} hold other data ({here}) than it was measured on ({like.data}): check out its "
            "commit and run `dvc checkout`"
        )
    if caches.latent_statistics["vae"]["fingerprint"] != config.vae.fingerprint:
        raise UserError(f"{LATENTS} holds latents of another VAE than its own, {config.vae.reference}")
    held_out = caches.validation.take(like.samples)
    if others := set(held_out.shapes) - set(config.trained_shapes):
        shapes = "; ".join(map(str, sorted(others)))
        raise UserError(f"{LATENTS} holds latents of shapes that it was not trained on: {shapes}")
    loaded = load_text_to_image(model, device=device)
    embeddings = loaded.embed(held_out.primary_texts())
    samples = loaded.latents(embeddings, held_out.names(), sampling, seed=int(like.seed), shapes=row_shapes(held_out))
    samples = [held_out.codec.standardise(loaded.codec.destandardise(sample[None]))[0] for sample in samples]
    return replace(like, values=measure(samples, held_out, caches).figures, noise=None, run_id=None)
