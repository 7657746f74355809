"""Every check, in one place: what must hold, what goes wrong downstream when it does not, and what to do.

Each expectation looks at one scalar column of one table of ``tables``. Its comment says what breaks later; its
requirement and its advice are what the person at the keyboard reads. A null is passed over: wherever a value cannot be
judged because another check already failed for that row, the table holds a null, so that one fault is told once.
"""

import math
from dataclasses import dataclass

from great_expectations import expectations as gxe
from great_expectations.expectations import Expectation

from latentloom.ingestion.rejects import Reason
from latentloom.params import ValidateParams

NOISE_BOUND = 4.0  # standard deviations of a fair draw
REASONS = [*(reason.value for reason in Reason), "latent_not_finite"]
MOST_REFUSED = 0.01  # of all latents


@dataclass(frozen=True)
class Expected:
    """What the params, the encoders and the indexes say about a cache, for its statistics to agree with."""

    vae_fingerprint: str
    text_fingerprint: str
    val_fraction: float
    found: int  # samples, summed over the sources
    latents: int
    train_images: int
    refused_latents: int
    captions: int
    latent_shape: str  # "4x16x16"
    channels: int
    embedding_dim: int


def share_bounds(val_fraction: float, images: int, tolerance: float) -> tuple[float, float]:
    """How far the validation share may lie from ``val_fraction``: within the tolerance, or within the noise.

    A split by hash gives each image to validation with probability f, so the share of n images has the standard
    deviation sqrt(f(1 - f) / n). In a set so small that four of those exceed the tolerance, they are the bound:
    0.3 for 16 images at f = 0.1, and 0.075 (less than the shipped tolerance of 0.1) for 256.
    """
    noise = NOISE_BOUND * math.sqrt(val_fraction * (1.0 - val_fraction) / max(images, 1))
    bound = max(tolerance, noise)
    return max(0.0, val_fraction - bound), min(1.0, val_fraction + bound)


def refused_bound(latents: int) -> float:
    """The largest share of refused latents that says nothing against the VAE.

    A latent is refused when it is not finite in fp32 either, which a sound VAE makes of no sound picture. One odd
    picture may always be refused; more than one in a hundred and it is the VAE, or how images reach it.
    """
    return max(MOST_REFUSED, 1.0 / max(latents, 1))


def expectations(limits: ValidateParams, expected: Expected) -> dict[str, list[Expectation]]:
    """The suites by table, each in the order in which its checks are reported."""
    return {
        "sources": sources(),
        "images": images(),
        "rejects": rejects(),
        "near_duplicates": near_duplicates(),
        "latents": latents(limits, expected),
        "captions": captions(limits, expected),
        "pairs": pairs(),
        "channels": channels(),
        "dataset": dataset(limits, expected),
    }


def check(name: str, requirement: str, advice: str, ids: str = "id") -> dict:
    """The words of a check; ``ids`` is the column whose values name the offending rows."""
    return {"description": requirement, "notes": advice, "meta": {"name": name, "ids": ids}}


INGEST = "run `dvc repro -f ingest`"
REENCODE_IMAGES = "run `dvc repro -f encode_images`"
REENCODE_TEXT = "run `dvc repro -f encode_text`"


def sources() -> list[Expectation]:
    return [
        # A sample neither kept nor refused was lost: the set is smaller than its source, and nobody can say why.
        gxe.ExpectColumnValuesToBeInSet(
            column="unaccounted",
            value_set=[0],
            **check(
                "samples_accounted_for",
                "no sample of a source is unaccounted for: found - kept - refused = 0",
                f"data/images and data/rejects.parquet were not written together: {INGEST}; if it persists, ingest "
                "loses samples of this source: compare data/images and data/rejects.parquet with it by key",
            ),
        ),
    ]


def images() -> list[Expectation]:
    return [
        # An image without a latent is never drawn: the model trains on fewer pictures than were kept, silently.
        gxe.ExpectColumnValuesToBeInSet(
            column="encoded",
            value_set=[True],
            **check(
                "images_encoded",
                "every kept image has a latent, or is in data/latents/rejects.parquet",
                f"the latents are those of an earlier ingest: {REENCODE_IMAGES}",
            ),
        ),
    ]


def rejects() -> list[Expectation]:
    return [
        # Reports count by reason: one that is not in the vocabulary is counted and explained nowhere.
        gxe.ExpectColumnValuesToBeInSet(
            column="reason",
            value_set=REASONS,
            **check(
                "reject_reasons_known",
                "every reason of a refusal is one of the fixed vocabulary",
                f"the rejects were written by another version of the code: {INGEST}, and then {REENCODE_IMAGES}",
                ids="key",
            ),
        ),
    ]


def near_duplicates() -> list[Expectation]:
    return [
        # A held-out image whose near twin is trained on is half learnt by heart: val/mae looks better than it is.
        gxe.ExpectColumnValuesToBeInSet(
            column="apart",
            value_set=[False],
            **check(
                "near_duplicates_in_one_split",
                "no validation image has a near duplicate in the split train",
                f"the splits were not drawn by the ingest that found these twins: {INGEST}, which keeps twins together",
                ids="held_out",
            ),
        ),
    ]


def latents(limits: ValidateParams, expected: Expected) -> list[Expectation]:
    mean_low, mean_high = limits.latent_mean
    std_low, std_high = limits.latent_std
    return [
        # An image that is there twice is trained on twice as often as the others, and joins to each caption twice.
        gxe.ExpectColumnValuesToBeUnique(
            column="id",
            **check(
                "image_ids_unique",
                "every image has one row",
                f"the index was written twice over: delete data/latents and {REENCODE_IMAGES}",
            ),
        ),
        # Two images under one key: a cache hit would serve one image's latent for the other.
        gxe.ExpectColumnValuesToBeUnique(
            column="key",
            **check(
                "latent_keys_unique",
                "every latent has a cache key of its own",
                f"the cache cannot tell these images apart: delete data/latents and {REENCODE_IMAGES}",
            ),
        ),
        # Training reads the shard by this name, and stops in the middle when it is not there.
        gxe.ExpectColumnValuesToBeInSet(
            column="shard_exists",
            value_set=[True],
            **check(
                "latent_shards_exist",
                "the shard of every latent lies beside the index",
                "files are missing from data/latents: run `dvc checkout data/latents`, "
                f"or, where that cannot find them, {REENCODE_IMAGES}",
            ),
        ),
        # With encode_images.flip, training opens this one too when it draws a mirrored image, and stops without it.
        gxe.ExpectColumnValuesToBeInSet(
            column="flipped_shard_exists",
            value_set=[True],
            **check(
                "flipped_shards_exist",
                "where stats.json says flip, the shard of every mirrored image's latent lies in data/latents/flipped",
                "files are missing from data/latents/flipped: run `dvc checkout data/latents`, "
                f"or, where that cannot find them, {REENCODE_IMAGES}",
            ),
        ),
        # A row of any other split is read by nobody, silently: the training set is smaller than it looks.
        gxe.ExpectColumnValuesToBeInSet(
            column="split",
            value_set=["train", "validation"],
            **check(
                "splits_known",
                "every image is in the split train or validation",
                "run `dvc repro -f ingest`, which draws the splits",
            ),
        ),
        # An image in both splits is learnt by heart and then graded on: val/mae looks better than it is.
        gxe.ExpectColumnValuesToBeInSet(
            column="splits",
            value_set=[1],
            **check(
                "splits_disjoint",
                "no image is in two splits",
                "val/mae would be graded on training images: run `dvc repro -f ingest`, which draws the splits",
            ),
        ),
        # A latent of an image that is gone: training goes on with pictures that were taken out of the source.
        gxe.ExpectColumnValuesToBeInSet(
            column="image_exists",
            value_set=[True],
            **check(
                "latent_images_exist",
                "every latent is that of a kept image",
                f"the latents are those of an earlier ingest: {REENCODE_IMAGES}",
            ),
        ),
        # ingest keeps twins out of validation: by splits of before that, training is graded on what it has seen.
        gxe.ExpectColumnValuesToBeInSet(
            column="split_as_ingested",
            value_set=[True],
            **check(
                "splits_as_ingested",
                "every latent is in the split that ingest drew for its image",
                f"the latents are those of an earlier ingest: {REENCODE_IMAGES}",
            ),
        ),
        # Images are drawn in proportion to their weights: one that is no positive number breaks the draw of all.
        gxe.ExpectColumnValuesToBeInSet(
            column="weight_usable",
            value_set=[True],
            **check(
                "weights_positive",
                "every image's weight is a finite number above 0",
                f"set the weight of these images' source in ingest.source to a number above 0, and {REENCODE_IMAGES}",
            ),
        ),
        # An image without a caption cannot be drawn as a training pair: the data loader has nothing to pick from.
        gxe.ExpectColumnValuesToBeBetween(
            column="captions",
            min_value=1,
            **check(
                "images_captioned",
                "every image has at least one caption",
                "the two caches come from different ingests, or the source lost captions: run `dvc repro`; "
                f"if it persists, {REENCODE_TEXT}",
            ),
        ),
        # The primary caption labels grids and held-out samples: with none or two, the picture has no right label.
        gxe.ExpectColumnValuesToBeInSet(
            column="primary_captions",
            value_set=[1],
            **check(
                "primary_caption_single",
                "every captioned image has exactly one caption at position 0",
                f"the pairs were numbered wrongly: {REENCODE_TEXT}",
            ),
        ),
        # One NaN in a latent makes the loss NaN, and then every weight.
        gxe.ExpectColumnValuesToBeInSet(
            column="finite",
            value_set=[True],
            **check(
                "latents_finite",
                "every latent, and its statistics, are free of NaN and infinity",
                "look at these images; a VAE whose fp16 overflows is the usual cause: choose another "
                "encode_images.vae, or remove the images from the source",
            ),
        ),
        # Far-off latents blow up the loss and stretch the per-channel scaling that every other image shares.
        gxe.ExpectColumnValuesToBeBetween(
            column="mean",
            min_value=mean_low,
            max_value=mean_high,
            **check(
                "latent_mean_in_range",
                f"the mean of every image's latent lies in [{mean_low}, {mean_high}]",
                "look at these images: remove them from the source when they are broken, or, when the VAE's latents "
                "simply lie elsewhere, set validate.latent_mean",
            ),
        ),
        # A latent without variation is a blank picture: the model learns to answer its captions with nothing.
        gxe.ExpectColumnValuesToBeBetween(
            column="std",
            min_value=std_low,
            max_value=std_high,
            **check(
                "latent_std_in_range",
                f"the std of every image's latent lies in [{std_low}, {std_high}]",
                "look at these images: blank ones give almost no variation. Remove them from the source, or, when the "
                "VAE's latents simply vary that much, set validate.latent_std",
            ),
        ),
        # A batch is one tensor: a single latent of another shape stops the training that stacks it.
        gxe.ExpectColumnValuesToBeInSet(
            column="shape",
            value_set=[expected.latent_shape],
            **check(
                "latent_shape_constant",
                f"every latent is {expected.latent_shape}, as stats.json says",
                "images of several sizes, or latents of several VAEs, are mixed: delete data/latents and "
                + REENCODE_IMAGES,
            ),
        ),
    ]


def captions(limits: ValidateParams, expected: Expected) -> list[Expectation]:
    shortest, longest = limits.caption_length
    norm_low, norm_high = limits.embedding_norm
    return [
        # A caption that is there twice joins to its images twice, and they are drawn twice as often.
        gxe.ExpectColumnValuesToBeUnique(
            column="id",
            **check(
                "caption_ids_unique",
                "every distinct caption has one row",
                f"the index was written twice over: delete data/text and {REENCODE_TEXT}",
            ),
        ),
        # Two captions under one key: a cache hit would serve one caption's embedding for the other.
        gxe.ExpectColumnValuesToBeUnique(
            column="key",
            **check(
                "embedding_keys_unique",
                "every embedding has a cache key of its own",
                f"the cache cannot tell these captions apart: delete data/text and {REENCODE_TEXT}",
            ),
        ),
        # Training reads the shard by this name, and stops in the middle when it is not there.
        gxe.ExpectColumnValuesToBeInSet(
            column="shard_exists",
            value_set=[True],
            **check(
                "embedding_shards_exist",
                "the shard of every embedding lies beside the index",
                "files are missing from data/text: run `dvc checkout data/text`, "
                f"or, where that cannot find them, {REENCODE_TEXT}",
            ),
        ),
        # A blank caption teaches that no words mean this picture, which is what guidance subtracts.
        gxe.ExpectColumnValuesToBeInSet(
            column="blank",
            value_set=[False],
            **check(
                "captions_present",
                "no caption is missing or blank",
                "give the images of these captions words in the source, or remove them there",
            ),
        ),
        # Past the text encoder's context the words are cut off unread; a stray letter describes nothing.
        gxe.ExpectColumnValuesToBeBetween(
            column="length",
            min_value=shortest,
            max_value=longest,
            **check(
                "caption_length_in_range",
                f"every caption is {shortest:g} to {longest:g} characters long",
                "shorten or complete these captions in the source, or set validate.caption_length",
            ),
        ),
        # A caption of no image is work for nothing, and a sign that the join between the caches is off.
        gxe.ExpectColumnValuesToBeBetween(
            column="images",
            min_value=1,
            **check(
                "captions_used",
                "every caption belongs to at least one image",
                f"the pairs and the index were not written together: {REENCODE_TEXT}",
            ),
        ),
        # One NaN in an embedding makes the loss NaN, and then every weight.
        gxe.ExpectColumnValuesToBeInSet(
            column="finite",
            value_set=[True],
            **check(
                "embeddings_finite",
                "every embedding, and its statistics, are free of NaN and infinity",
                "read these captions; a text encoder whose fp16 overflows is the usual cause: choose another "
                "encode_text.model, or change the captions",
            ),
        ),
        # A zero embedding looks to the network like no caption at all; a huge one drowns the image in attention.
        gxe.ExpectColumnValuesToBeBetween(
            column="norm",
            min_value=norm_low,
            max_value=norm_high,
            **check(
                "embedding_norm_in_range",
                f"the norm of every embedding lies in [{norm_low}, {norm_high}]",
                "read these captions: change them in the source, or, when the encoder's embeddings simply have that "
                "norm, set validate.embedding_norm",
            ),
        ),
        # The network's first text layer has one width: a row of another cannot go through it.
        gxe.ExpectColumnValuesToBeInSet(
            column="dim",
            value_set=[expected.embedding_dim],
            **check(
                "embedding_dim_constant",
                f"every embedding has {expected.embedding_dim} numbers, as stats.json says",
                f"embeddings of several encoders are mixed: delete data/text and {REENCODE_TEXT}",
            ),
        ),
    ]


def pairs() -> list[Expectation]:
    return [
        # The loader looks the image up by this id, and fails or skips it.
        gxe.ExpectColumnValuesToBeInSet(
            column="image_exists",
            value_set=[True],
            **check(
                "pair_images_exist",
                "the image of every pair has a latent, or is in data/latents/rejects.parquet",
                "the two caches come from different ingests: run `dvc repro`; if it persists, "
                "`dvc repro -f encode_images encode_text`",
                ids="image_id",
            ),
        ),
        # The loader looks the caption up by this id, and fails or trains the image as if it had none.
        gxe.ExpectColumnValuesToBeInSet(
            column="caption_exists",
            value_set=[True],
            **check(
                "pair_captions_exist",
                "the caption of every pair has an embedding",
                f"the pairs and the index were not written together: {REENCODE_TEXT}",
                ids="caption_id",
            ),
        ),
        # Captions are drawn at random from an image's pairs: one listed twice is drawn twice as often.
        gxe.ExpectCompoundColumnsToBeUnique(
            column_list=["image_id", "caption_id"],
            **check(
                "pairs_unique",
                "no image has the same caption twice",
                f"the pairs were written twice over: {REENCODE_TEXT}",
                ids="image_id",
            ),
        ),
    ]


def channels() -> list[Expectation]:
    return [
        # Every latent is scaled by these numbers: one NaN here makes all of them NaN.
        gxe.ExpectColumnValuesToBeInSet(
            column="finite",
            value_set=[True],
            **check(
                "channel_statistics_finite",
                "every channel's mean and std over the training latents are numbers",
                f"see latents_finite first; when it passes, {REENCODE_IMAGES}",
            ),
        ),
        # Scaling divides by the std: a dead channel turns into infinity, and a VAE that has one was not trained well.
        gxe.ExpectColumnValuesToBeBetween(
            column="std",
            min_value=0.0,
            strict_min=True,
            **check(
                "channel_std_positive",
                "every channel's std over the training latents is above 0",
                "all the training images give this channel one value: check that they are not all the same picture, "
                "or choose another encode_images.vae",
            ),
        ),
    ]


def dataset(limits: ValidateParams, expected: Expected) -> list[Expectation]:
    low, high = share_bounds(expected.val_fraction, expected.latents, limits.val_fraction_tolerance)
    most_refused = refused_bound(expected.latents + expected.refused_latents)
    return [
        # With a handful of images every batch is the same few, and the curves say nothing about the model.
        gxe.ExpectColumnValuesToBeBetween(
            column="train_images",
            min_value=limits.min_train_images,
            **check(
                "enough_train_images",
                f"at least {limits.min_train_images} images are in the split train",
                "add images to the source or raise ingest.limit (data/rejects.parquet says what ingest refused, "
                "and why), or set validate.min_train_images",
            ),
        ),
        # Too small a share makes val/mae noise; too large a one leaves little to learn from.
        gxe.ExpectColumnValuesToBeBetween(
            column="validation_share",
            min_value=low,
            max_value=high,
            **check(
                "validation_share_near_fraction",
                f"the share of validation images lies in [{low:.4f}, {high:.4f}], around ingest.val_fraction = "
                f"{expected.val_fraction}",
                "the splits were drawn for another ingest.val_fraction: run `dvc repro -f ingest`, or set "
                "validate.val_fraction_tolerance",
            ),
        ),
        # A VAE that gives NaN for many pictures is poor for the others too, and what it refuses is no fair sample.
        gxe.ExpectColumnValuesToBeBetween(
            column="refused_latents",
            max_value=most_refused,
            **check(
                "few_latents_refused",
                f"the share of images whose latent is not finite is at most {most_refused:.4g}",
                "data/latents/rejects.parquet names them: when they are sound pictures, the VAE is at fault: choose "
                "another encode_images.vae, or encode_images.precision: fp32",
            ),
        ),
        # Latents of another VAE train well and decode to noise: nothing before the first sample would tell.
        gxe.ExpectColumnValuesToBeInSet(
            column="vae_fingerprint",
            value_set=[expected.vae_fingerprint],
            **check(
                "vae_fingerprint_expected",
                f"the latents were made by the VAE that encode_images.vae names ({expected.vae_fingerprint})",
                f"the VAE's weights changed after the latents were made: {REENCODE_IMAGES}",
            ),
        ),
        # Prompts are embedded by the encoder in params: the network would be asked in a language it never heard.
        gxe.ExpectColumnValuesToBeInSet(
            column="text_fingerprint",
            value_set=[expected.text_fingerprint],
            **check(
                "text_fingerprint_expected",
                f"the embeddings were made by the encoder that encode_text.model names ({expected.text_fingerprint})",
                f"the encoder's weights changed after the embeddings were made: {REENCODE_TEXT}",
            ),
        ),
        # Two counts in one manifest that disagree: neither can be held against what was kept and refused.
        gxe.ExpectColumnValuesToBeInSet(
            column="found_in_manifest",
            value_set=[expected.found],
            **check(
                "found_counted",
                f"data/images/manifest.json counts the {expected.found} samples of its sources",
                f"the manifest was changed by hand, or by another version of the code: {INGEST}",
            ),
        ),
        # Statistics of other rows than these scale the latents wrongly: they were not written together.
        gxe.ExpectColumnValuesToBeInSet(
            column="latent_rows_in_stats",
            value_set=[expected.latents],
            **check(
                "latent_rows_counted",
                f"data/latents/stats.json counts the {expected.latents} rows of the index",
                f"the statistics and the index were not written together: {REENCODE_IMAGES}",
            ),
        ),
        # The scaling is taken over the training images alone: another count means validation leaked into it.
        gxe.ExpectColumnValuesToBeInSet(
            column="train_rows_in_stats",
            value_set=[expected.train_images],
            **check(
                "train_rows_counted",
                f"data/latents/stats.json counts the {expected.train_images} training rows of the index",
                f"the statistics and the index were not written together: {REENCODE_IMAGES}",
            ),
        ),
        # Refused latents that nobody counted, or counted ones that nobody can name, are images lost on the way.
        gxe.ExpectColumnValuesToBeInSet(
            column="refused_rows_in_stats",
            value_set=[expected.refused_latents],
            **check(
                "refused_latents_counted",
                f"data/latents/stats.json counts the {expected.refused_latents} rows of data/latents/rejects.parquet",
                f"the statistics and the rejects were not written together: {REENCODE_IMAGES}",
            ),
        ),
        # A channel without its mean or std cannot be scaled.
        gxe.ExpectColumnValuesToBeInSet(
            column="channels_in_stats",
            value_set=[f"{expected.channels} and {expected.channels}"],
            **check(
                "channel_statistics_complete",
                f"data/latents/stats.json has {expected.channels} means and {expected.channels} stds, one a channel",
                f"the statistics belong to another VAE: {REENCODE_IMAGES}",
            ),
        ),
        # As for the latents: the text cache's statistics describe other rows than these.
        gxe.ExpectColumnValuesToBeInSet(
            column="caption_rows_in_stats",
            value_set=[expected.captions],
            **check(
                "caption_rows_counted",
                f"data/text/stats.json counts the {expected.captions} rows of the index",
                f"the statistics and the index were not written together: {REENCODE_TEXT}",
            ),
        ),
    ]
