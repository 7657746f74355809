"""The checks, as expectations: what must hold, what breaks downstream when it does not, and what to do.

Each looks at one column of one table of ``tables``. They are those that data, params or the encoders can break; that
our own writers count and name rows correctly is for unit tests. NaN is skipped by all but the checks for it, so that
one fault is reported once.

To import Great Expectations takes seconds, so this module is imported after the files have been read.
"""

import math
from typing import Any

from great_expectations import expectations as gxe
from great_expectations.expectations import Expectation

from latentloom.params import ValidateParams
from latentloom.validation.tables import Data

NOISE_BOUND = 4.0  # standard deviations of the share that a fair split gives
UNLIKELY = 1e-4  # an event rarer than this is taken for a fault, not for chance
MOST_REJECTED = 0.01  # of all latents


def check(
    name: str, table: str, column: str, *, requirement: str, protects: str, advice: str, **allowed: Any
) -> Expectation:
    """The expectation that a column's values are in ``value_set``, or between ``min_value`` and ``max_value``.

    With ``mostly``, that at least this fraction of them is.
    """
    in_set = "value_set" in allowed
    expectation = gxe.ExpectColumnValuesToBeInSet if in_set else gxe.ExpectColumnValuesToBeBetween
    meta = {"name": name, "table": table, "protects": protects}
    return expectation(column=column, description=requirement, notes=advice, meta=meta, **allowed)


def share_bounds(val_fraction: float, images: int, tolerance: float) -> tuple[float, float]:
    """How far the validation share may lie from ``val_fraction``: within the tolerance, or within the noise.

    A split by hash gives each image to validation with probability f, so the share of n images has the standard
    deviation sqrt(f(1 - f) / n). Four of those are 0.3 for 16 images at f = 0.1, and 0.075 for 256.
    """
    noise = NOISE_BOUND * math.sqrt(val_fraction * (1.0 - val_fraction) / max(images, 1))
    bound = max(tolerance, noise)
    return max(0.0, val_fraction - bound), min(1.0, val_fraction + bound)


def fewest_validation_images(val_fraction: float, images: int) -> int:
    """1, or 0 where a fair split of so few images may well leave the validation split empty.

    All of n images miss the split with probability (1 - f)^n: at f = 0.1, one in 10,000 for 88 images.
    """
    return int((1.0 - val_fraction) ** images < UNLIKELY)


def rejected_bound(latents: int) -> float:
    """The largest share of rejected latents that says nothing against the VAE.

    A latent is rejected when it is not finite in fp32 either, which a sound VAE makes of no sound picture. One odd
    picture may always be rejected; more than one in a hundred and it is the VAE, or how images reach it.
    """
    return max(MOST_REJECTED, 1.0 / max(latents, 1))


REINGEST = "run `dvc repro -f ingest`"
REENCODE_IMAGES = "run `dvc repro -f encode_images`"
REENCODE_TEXT = "run `dvc repro -f encode_text`"
OTHER_INGEST = f"the latents are those of an earlier ingest: {REENCODE_IMAGES}"


def checks(
    limits: ValidateParams, data: Data, *, val_fraction: float, vae_fingerprint: str, text_fingerprint: str
) -> list[Expectation]:
    """All checks, in the order in which they are reported; the keywords are what params ask for."""
    latents, max_tokens = len(data.tables["latents"]), data.max_tokens
    mean_low, mean_high = limits.latent_mean
    std_low, std_high = limits.latent_std
    shortest, longest = limits.caption_length
    norm_low, norm_high = limits.embedding_norm
    share_low, share_high = share_bounds(val_fraction, latents, limits.val_fraction_tolerance)
    fewest_held_out = fewest_validation_images(val_fraction, latents)
    most_rejected = rejected_bound(latents + len(data.latents_rejected))
    # fmt: off
    return [
        check("images_encoded", "images", "encoded", value_set=[True],
            requirement="every kept image has a latent, or is in data/latents/rejects.parquet",
            protects="an image without a latent never reaches training, silently",
            advice=OTHER_INGEST,
        ),
        check("near_duplicates_in_one_split", "near_duplicates", "apart", value_set=[False],
            requirement="no validation image has a near duplicate in the split train",
            protects="a held-out image that the model has nearly seen makes val/mae look better than it is",
            advice=f"the splits are older than this list: {REINGEST}, which keeps near duplicates in one split",
        ),
        check("splits_as_ingested", "latents", "split_as_ingested", value_set=[True],
            requirement="every latent is that of a kept image, in the split that ingest gave it",
            protects="by other splits, training images are graded as if they were held out; a latent of an image that "
            "is gone trains the model on what was taken out of the source",
            advice=OTHER_INGEST,
        ),
        check("images_captioned", "latents", "captions", min_value=1,
            requirement="every image has at least one caption",
            protects="an image without a caption is no training pair",
            advice="the two caches come from different ingests, or the source lost captions: run `dvc repro`; "
            f"if it persists, {REENCODE_TEXT}",
        ),
        check("latents_finite", "latents", "finite", value_set=[True],
            requirement="every latent, and its statistics, are free of NaN and infinity",
            protects="one NaN in a latent makes the loss NaN, and then every weight",
            advice="look at these images; a VAE whose fp16 overflows is the usual cause: choose another "
            "encode_images.vae, or remove the images from the source",
        ),
        check("latent_mean_in_range", "latents", "mean", min_value=mean_low, max_value=mean_high,
            requirement=f"the mean of every image's latent lies in [{mean_low}, {mean_high}]",
            protects="far-off latents blow up the loss and stretch the scaling that every other image shares",
            advice="look at these images: remove them from the source when they are broken, or, when the VAE's latents "
            "simply lie elsewhere, set validate.latent_mean",
        ),
        check("latent_std_in_range", "latents", "std", min_value=std_low, max_value=std_high,
            requirement=f"the std of every image's latent lies in [{std_low}, {std_high}]",
            protects="a latent without variation is a blank picture: the model learns to answer its captions with that",
            advice="look at these images: blank ones give almost no variation. Remove them from the source, or, when "
            "the VAE's latents simply vary that much, set validate.latent_std",
        ),
        check("caption_length_in_range", "captions", "length", min_value=shortest, max_value=longest,
            requirement=f"every caption is {shortest:g} to {longest:g} characters long",
            protects="a stray letter describes nothing, and of a page of text the network learns little",
            advice="shorten or complete these captions in the source, or set validate.caption_length",
        ),
        check("captions_read_whole", "captions", "tokens", max_value=max_tokens,
            mostly=1.0 - limits.max_cut_captions,
            requirement=f"at most {limits.max_cut_captions:.4g} of the captions have more than the {max_tokens} tokens "
            "that the text encoder reads",
            protects="what is cut is never read: captions that differ only there are one caption to the network",
            advice="put what matters first, shorten these captions in the source, raise encode_text.max_tokens, choose "
            "an encode_text.model that reads more, or set validate.max_cut_captions",
        ),
        check("captions_told_apart", "captions", "told_apart", value_set=[True],
            mostly=1.0 - limits.max_same_embeddings,
            requirement=f"at most {limits.max_same_embeddings:.4g} of the captions have the embedding that a caption "
            "of other words has",
            protects="to the network they are one caption: it learns the average of their pictures",
            advice="read these captions: the text encoder knows neither their words nor their script. The bundled one "
            "reads English: choose a multilingual encode_text.model, such as "
            "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2, or set validate.max_same_embeddings",
        ),
        check("embeddings_finite", "captions", "finite", value_set=[True],
            requirement="every embedding, and its statistics, are free of NaN and infinity",
            protects="one NaN in an embedding makes the loss NaN, and then every weight",
            advice="read these captions; a text encoder whose fp16 overflows is the usual cause: choose another "
            "encode_text.model, or change the captions",
        ),
        check("embedding_norm_in_range", "captions", "norm", min_value=norm_low, max_value=norm_high,
            requirement=f"the norm of every embedding lies in [{norm_low}, {norm_high}]",
            protects="a zero embedding looks like no caption at all; a huge one drowns the image in attention",
            advice="read these captions: change them in the source, or, when the encoder's embeddings simply have "
            "that norm, set validate.embedding_norm",
        ),
        check("channel_std_positive", "channels", "std", min_value=0.0, strict_min=True,
            requirement="every channel's std over the training latents is above 0",
            protects="scaling divides by the std: a dead channel turns into infinity",
            advice="all the training images give this channel one value: check that they are not all the same picture, "
            "or choose another encode_images.vae",
        ),
        check("enough_train_images", "dataset", "train_images", min_value=limits.min_train_images,
            requirement=f"at least {limits.min_train_images} images are in the split train",
            protects="with a handful of images every batch is the same few, and the curves say nothing",
            advice="add images to the source or raise ingest.limit (data/rejects.parquet says what ingest rejected, "
            "and why), or set validate.min_train_images",
        ),
        check("validation_split_not_empty", "dataset", "validation_images", min_value=fewest_held_out,
            requirement=f"at least {fewest_held_out} of {latents} images is in the split validation "
            f"(ingest.val_fraction = {val_fraction})",
            protects="without held-out images nothing tells a model that generalises from one that memorises",
            advice="if near duplicates moved every held-out image to train, lower ingest.near_duplicate_distance; else "
            "raise ingest.val_fraction, or set it to 0 to train without validation",
        ),
        check("validation_share_near_fraction", "dataset", "validation_share",
            min_value=share_low, max_value=share_high,
            requirement=f"the share of validation images lies in [{share_low:.4f}, {share_high:.4f}], around "
            f"ingest.val_fraction = {val_fraction}",
            protects="too small a share makes val/mae noise; too large a one leaves little to learn from",
            advice=f"the splits were made for another ingest.val_fraction: {REINGEST}, or set "
            "validate.val_fraction_tolerance",
        ),
        check("few_latents_rejected", "dataset", "rejected_latents", max_value=most_rejected,
            requirement=f"the share of images whose latent is not finite is at most {most_rejected:.4g}",
            protects="a VAE that gives NaN for many pictures is poor for the others too",
            advice="data/latents/rejects.parquet names them: when they are sound pictures, the VAE is at fault: choose "
            "another encode_images.vae, or encode_images.precision: fp32",
        ),
        check("vae_reconstructs_images", "dataset", "reconstruction_psnr", min_value=limits.min_reconstruction_psnr,
            requirement="images that the VAE decodes from their latents have a PSNR of at least "
            f"{limits.min_reconstruction_psnr:g} dB on average",
            protects="what the VAE smears, no model that is trained on its latents can generate sharp",
            advice="look at the decoded images on the first page. The bundled VAE was trained on emoji: for photos "
            "choose another encode_images.vae, such as stabilityai/sd-vae-ft-mse, or a larger ingest.image_size; or, "
            "when they look good, set validate.min_reconstruction_psnr",
        ),
        check("vae_fingerprint_expected", "dataset", "vae_fingerprint", value_set=[vae_fingerprint],
            requirement=f"the latents were made by the VAE that encode_images.vae names ({vae_fingerprint})",
            protects="latents of another VAE train well and decode to noise, which only the first sample shows",
            advice=f"the VAE's weights changed after the latents were made: {REENCODE_IMAGES}",
        ),
        check("text_fingerprint_expected", "dataset", "text_fingerprint", value_set=[text_fingerprint],
            requirement="the embeddings were made by the encoder that encode_text.model names "
            f"({text_fingerprint})",
            protects="prompts would be embedded by another encoder than the one the network was trained with",
            advice=f"the encoder's weights changed after the embeddings were made: {REENCODE_TEXT}",
        ),
    ]
    # fmt: on
