"""``params.yaml`` as typed sections, one section a stage.

Nothing here has a default: the file is the whole truth about a run, so DVC, which compares the file, sees every change
that matters. An unknown key, a missing one or a wrong value is rejected before any work starts.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

from latentloom.diffusion.sampling_settings import SETTING_NAMES, SamplingSettings
from latentloom.sizes import Size, bucket_table


def _without_references(text: str) -> str:
    if "${" in text:
        raise ValueError("`dvc exp run -S` takes ${...} for a reference to another param and replaces it; leave it out")
    return text


def _counted_once(columns: Any) -> Any:
    """A column, or a list of them, as columns of which each caption counts once."""
    names = [columns] if isinstance(columns, str) else columns
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return dict.fromkeys(names, 1)
    if not isinstance(columns, dict):
        raise ValueError("must be a column's name, a list of names, or {name: how often its captions count, ...}")
    return columns


def _without_needless_counts(columns: dict[str, int]) -> str | list[str] | dict[str, int]:
    """As one writes it, and as runs have it."""
    if any(times > 1 for times in columns.values()):
        return columns
    return next(iter(columns)) if len(columns) == 1 else list(columns)


Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Steps = Annotated[StrictInt, Field(ge=2, le=1000)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Prompt = Annotated[StrictStr, Field(min_length=1), AfterValidator(_without_references)]
SourceName = Literal["openmoji", "folder", "webdataset", "parquet", "huggingface"]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Repeats = Annotated[StrictInt, Field(ge=1, le=100)]  # how often a caption of a column counts in training
CaptionColumns = Annotated[
    dict[StrictStr, Repeats], BeforeValidator(_counted_once), PlainSerializer(_without_needless_counts)
]
Compile = Literal[False, True, "cuda_graphs"]
Reference = Annotated[StrictStr, Field(min_length=1)]  # of a model
ImageSize = Annotated[StrictInt, Field(ge=32, le=1024, multiple_of=8)]
ONE, SEVERAL = "one", "several"  # which of its two forms a value has that may be a list; left out of messages
OneOrSeveral = Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceParams(Section):
    """One source of captioned images, as an entry of a list under ``ingest.source``."""

    source: SourceName
    path: StrictStr | None = None
    name: Annotated[StrictStr, Field(min_length=1)] | None = None
    weight: Positive = 1.0
    image_column: StrictStr | None = None  # of parquet and huggingface; null: the first known name that is there
    caption_column: CaptionColumns | None = None  # null: all of the usual names that are there
    captions: Literal["lines", "file", "file_name", "folder_name"] = "lines"  # of folder and webdataset
    key: Literal["first_dot", "last_dot"] = "first_dot"  # of webdataset: where the key in a member's name ends
    config: StrictStr | None = None  # of huggingface: which part of a data set on the hub, where it has several
    splits: Annotated[list[StrictStr], Field(min_length=1)] | None = None  # of huggingface; null: all

    @model_validator(mode="after")
    def _keys_go_with_source(self) -> "SourceParams":
        if self.source == "openmoji" and self.path:
            raise ValueError(
                f"source: openmoji takes no path, yet path is {self.path!r}; set source: folder, or path: null"
            )
        if self.source != "openmoji" and not self.path:
            raise ValueError(f"source: {self.source} needs path, {WHAT_A_PATH_HOLDS[self.source]}")
        if self.caption_column is not None and not any(self.caption_column):
            raise ValueError("caption_column names no column; null is for the usual names")
        for key, sources in KEYS_OF_SOURCES.items():
            if key in self.model_fields_set and self.source not in sources:
                raise ValueError(f"source: {self.source} takes no {key}, which is for {' and '.join(sources)}")
        return self

    @property
    def label(self) -> str:
        """What the source is called in tables and reports: its name, or else what it is."""
        return self.name or self.source


KEYS_OF_SOURCES = {
    "image_column": ["parquet", "huggingface"],
    "caption_column": ["folder", "webdataset", "parquet", "huggingface"],
    "captions": ["folder", "webdataset"],
    "key": ["webdataset"],
    "config": ["huggingface"],
    "splits": ["huggingface"],
}
WHAT_A_PATH_HOLDS = {
    "folder": "the folder that holds your images",
    "webdataset": "a tar file, a folder of them, or a pattern such as shards/*.tar",
    "parquet": "a Parquet file, a folder of them, or a pattern such as train-*.parquet",
    "huggingface": "a data set's id on the hub (owner/name or owner/name@revision), or a folder of save_to_disk",
}


def _ascending(sizes: list[int]) -> list[int]:
    if sizes != sorted(set(sizes)):
        raise ValueError("sizes are listed from the smallest to the largest, each once")
    return sizes


class IngestParams(Section):
    source: Annotated[
        Annotated[SourceName, Tag(ONE)] | Annotated[list[SourceParams], Field(min_length=1), Tag(SEVERAL)], OneOrSeveral
    ]
    path: StrictStr | None
    shape: Literal["square", "buckets"]
    image_size: Annotated[
        Annotated[ImageSize, Tag(ONE)]
        | Annotated[list[ImageSize], Field(min_length=1), AfterValidator(_ascending), Tag(SEVERAL)],
        OneOrSeveral,
    ]
    bucket_multiple: Annotated[StrictInt, Field(ge=8, le=1024, multiple_of=8)]
    max_bucket_ratio: Annotated[float, Field(ge=1.0, le=16.0)]
    limit: Count | None
    skin_tones: Annotated[StrictInt, Field(ge=0)] | None
    val_fraction: Fraction
    max_pixels: Count
    max_aspect_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    near_duplicate_distance: Annotated[StrictInt, Field(ge=0, le=64)] | None
    max_reject_fraction: Annotated[float, Field(ge=0.0, le=1.0)]

    @model_validator(mode="after")
    def _sources_are_whole(self) -> "IngestParams":
        if isinstance(self.source, list) and self.path:
            raise ValueError(
                f"each source of the list has a path of its own, yet path is {self.path!r}; set path: null"
            )
        names = [entry.label for entry in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}; give each a name of its own (name: ...)")
        return self

    @property
    def image_sizes(self) -> list[int]:
        """The base sizes, ascending."""
        return self.image_size if isinstance(self.image_size, list) else [self.image_size]

    @property
    def several_sizes(self) -> bool:
        """Whether images may be prepared at more than one size."""
        return self.shape == "buckets" or isinstance(self.image_size, list)

    @property
    def tables(self) -> list[tuple[Size, ...]]:
        """The sizes that images are prepared at: for each base size, ascending, its buckets, or its square alone."""
        if self.shape == "square":
            return [(Size(size, size),) for size in self.image_sizes]
        return [bucket_table(size, self.bucket_multiple, self.max_bucket_ratio) for size in self.image_sizes]

    @property
    def sources(self) -> list[SourceParams]:
        """The sources in their order, whichever way they were written."""
        if isinstance(self.source, str):
            return [SourceParams(source=self.source, path=self.path)]
        return self.source


class EncodeImagesParams(Section):
    vae: StrictStr
    precision: Literal["fp32", "bf16", "fp16"]
    flip: StrictBool


class EncodeTextParams(Section):
    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=4)] | None


def _ordered(bounds: list[float]) -> list[float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("must be [lowest, highest] with lowest < highest")
    return bounds


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_ordered)]


class ValidateParams(Section):
    on_failure: Literal["stop", "warn"]
    min_train_images: Count
    caption_length: Range
    latent_mean: Range
    latent_std: Range
    min_reconstruction_psnr: NonNegative
    max_cut_captions: Annotated[float, Field(ge=0.0, le=1.0)]
    max_same_embeddings: Annotated[float, Field(ge=0.0, le=1.0)]
    embedding_norm: Range
    val_fraction_tolerance: Fraction


class ModelParams(Section):
    widths: Annotated[list[Annotated[StrictInt, Field(ge=16, multiple_of=16)]], Field(min_length=1, max_length=6)]
    block_depth: Count
    emb_size: Annotated[StrictInt, Field(ge=8)]
    text: Literal["pooled", "tokens"]


class DiffusionParams(Section):
    schedule: Literal["vp", "linear"]
    noise_levels: Literal["cosine", "uniform", "half_normal", "logit_normal", "beta"]
    label_dropout: Fraction


class TrainParams(Section):
    init: Reference | None  # as people name models: docs/models.md
    init_strict: StrictBool
    steps: Count
    batch_size: Count
    gradient_accumulation: Count
    block_rows: Count | None
    optimizer: Literal["adamw", "muon"]
    learning_rate: Positive
    lr_schedule: Literal["cosine", "constant", "warmup_stable_decay"]
    warmup_steps: Annotated[StrictInt, Field(ge=0)]
    decay_steps: Count
    weight_decay: NonNegative
    gradient_clip: Positive
    loss: Literal["mae", "mse", "huber"]
    huber_delta: Positive
    ema_images: Positive
    keep: Literal["last", "best"]
    precision: Literal["auto", "fp32", "bf16"]
    reduce_precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _numbers_fit(self) -> "TrainParams":
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into gradient_accumulation "
                f"{self.gradient_accumulation} equal parts; make it a multiple"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} are more than steps {self.steps}, so the learning rate never gets "
                "to its full value; lower them"
            )
        if self.lr_schedule == "warmup_stable_decay" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit into steps "
                f"{self.steps}; lower them"
            )
        return self


class MonitorParams(Section):
    log_every: Count
    validate_every: Count
    validation_images: Count


class PreviewParams(Section):
    every: Count
    captions: Count
    prompts: list[Prompt]
    seed: Seed
    guidance: NonNegative
    steps: Steps


class MachineParams(Section):
    gradient_checkpointing: StrictBool
    compile: Compile
    checkpoint_every: Count
    checkpoints_kept: Count
    data_memory_share: Annotated[float, Field(ge=0.0, le=1.0)]


class SweepParams(Section):
    class_guidance: Annotated[list[NonNegative], Field(min_length=1)]
    diffusion_steps: Annotated[list[Steps], Field(min_length=1)]


def _size(text: str) -> str:
    Size.parse(text)
    return text


class EvaluateParams(Section):
    sampling: SamplingSettings  # its settings are keys of the section itself
    prompts: Annotated[list[Prompt], Field(min_length=1)] | None
    sizes: Annotated[list[Annotated[StrictStr, AfterValidator(_size)]], Field(min_length=1)] | None
    held_out_captions: Annotated[StrictInt, Field(ge=0)]
    training_captions: Count
    features: Reference | None
    clip: Reference | None
    samples: Count
    real_images: Literal["held_out", "training"]
    sweep: SweepParams | None

    @model_validator(mode="before")
    @classmethod
    def _gather_sampling(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        if missing := [name for name in SETTING_NAMES if name not in section]:
            raise ValueError(f"{missing[0]}: missing; every key of the section must be given")
        sampling = SamplingSettings(**{name: section[name] for name in SETTING_NAMES})
        return {key: value for key, value in section.items() if key not in SETTING_NAMES} | {"sampling": sampling}


class RegistryParams(Section):
    min_held_out_recall_at_1: Annotated[float, Field(ge=0.0, le=1.0)] | None
    max_copied_share: Annotated[float, Field(ge=0.0, le=1.0)] | None


class Params(Section):
    seed: Seed
    ingest: IngestParams
    encode_images: EncodeImagesParams
    encode_text: EncodeTextParams
    validate_: ValidateParams = Field(alias="validate")
    model: ModelParams
    diffusion: DiffusionParams
    train: TrainParams
    monitor: MonitorParams
    previews: PreviewParams
    machine: MachineParams
    evaluate: EvaluateParams
    registry: RegistryParams

    @model_validator(mode="after")
    def _sections_fit(self) -> "Params":
        """What two sections ask for can be had together; else it would show after hours of encoding."""
        ingest, limits = self.ingest, self.validate_
        _check_sizes(ingest, self.evaluate.sizes or [], self.model.widths, self.encode_images.vae)
        if limits.on_failure == "stop" and ingest.limit is not None and ingest.limit < limits.min_train_images:
            raise ValueError(
                f"ingest.limit = {ingest.limit}: validate.min_train_images asks for {limits.min_train_images} images "
                "in the split train alone; raise the limit, or lower validate.min_train_images"
            )
        if self.train.keep == "best" and ingest.val_fraction == 0:
            raise ValueError(
                "train.keep = best: with ingest.val_fraction = 0 nothing is held out to find the best by; raise "
                "ingest.val_fraction, or set train.keep to last"
            )
        return self


def _check_sizes(ingest: IngestParams, sampled: list[str], widths: list[int], vae: str) -> None:
    """Raise where latents cannot be halved as often as the network does; where the VAE is not at hand, that waits."""
    factor, halvings = downsampling(vae), len(widths) - 1
    sides = {f"ingest.image_size = {size}": size for size in ingest.image_sizes}
    if ingest.shape == "buckets":
        sides[f"ingest.bucket_multiple = {ingest.bucket_multiple}"] = ingest.bucket_multiple
    sides |= {f"evaluate.sizes: {side} in {size}": side for size in sampled for side in Size.parse(size)}
    for key, side in sides.items() if factor else ():
        multiple = factor * 2**halvings
        if side % multiple:
            raise ValueError(
                f"{key}: the VAE ({vae}) makes images smaller by {factor}, and a network of {len(widths)} "
                f"model.widths halves that {halvings} times, so it must be a multiple of {multiple}; set it to "
                f"{_nearest(side, multiple)}, or give "
                f"{'another number of model.widths' if halvings else 'another VAE'}"
            )
    for size in ingest.image_sizes if ingest.shape == "buckets" else ():
        if size % ingest.bucket_multiple:
            raise ValueError(
                f"ingest.image_size = {size}: with ingest.shape = buckets it must be a multiple of "
                f"ingest.bucket_multiple, {ingest.bucket_multiple}; set it to {_nearest(size, ingest.bucket_multiple)}"
            )


def _nearest(side: int, multiple: int) -> str:
    """The multiples below and above."""
    below = side // multiple * multiple
    return " or ".join(str(size) for size in (below, below + multiple) if size)


def downsampling(vae: str) -> int | None:
    """How many pixels become one of a latent, per side; None where the VAE's config is neither here nor as we know."""
    if vae == "bundled":
        return 8
    try:
        config = Path(vae).expanduser() / "config.json"
    except RuntimeError:  # nobody has that name
        return None
    if not config.is_file() and vae.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(vae, "config.json")
        except HFValidationError:
            return None
    try:
        described = json.loads(Path(config).read_text(encoding="utf-8"))
        channels = described.get("block_out_channels") or described["encoder_block_out_channels"]
        return 2 ** (len(channels) - 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads the VAE says what is wrong
        return None
