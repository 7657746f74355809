"""Where the project's files lie: paths relative to the project's root, where stages run."""

import os
from pathlib import Path

from latentloom.errors import UserError

PARAMS = Path("params.yaml")
DVC_LOCK = Path("dvc.lock")

SOURCES = Path("data/sources.json")
ENCODERS = Path("data/encoders")  # a file for each stage whose params name encoders
INIT = Path("data/init.json")  # the model that `train` starts from
IMAGES = Path("data/images")
REJECTS = Path("data/rejects.parquet")
NEAR_DUPLICATES = Path("data/near_duplicates.parquet")
LATENTS = Path("data/latents")
TEXT = Path("data/text")
VALIDATED = Path("data/validated.json")

MODEL = Path("models/unet")

REPORTS = Path("reports")
INGEST_REPORT = REPORTS / "ingest.json"
ENCODE_IMAGES_REPORT = REPORTS / "encode_images.json"
ENCODE_TEXT_REPORT = REPORTS / "encode_text.json"
VALIDATION_REPORT = REPORTS / "validation.json"
DATA_DOCS = REPORTS / "data_docs"
TRAIN_METRICS = REPORTS / "train" / "metrics.json"
TRAIN_PLOTS = REPORTS / "train" / "plots"
EVALUATE_METRICS = REPORTS / "evaluate" / "metrics.json"
EVALUATE_PLOTS = REPORTS / "evaluate" / "plots"
SAMPLE_SHEET = REPORTS / "evaluate" / "samples.png"
EXTREMES_SHEET = REPORTS / "evaluate" / "extremes.png"

# What the commands write unless they are told where; git ignores both.
SAMPLES = Path("samples")
COMPARISONS = Path("comparisons")


def project_root() -> Path:
    """The project's root, which DVC names in ``DVC_ROOT`` when it runs an experiment in a temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def state_folder(name: str) -> Path:
    """Where a stage keeps what only saves work, for all experiments alike; it may be deleted at any time."""
    return project_root() / ".state" / name


def state_limit() -> int:
    """The bytes that each folder of `.state` may hold besides what the last run used: ``LATENTLOOM_STATE_GIB``, or 50.

    Raises:
        UserError: when it is not a number of GiB.
    """
    value = os.environ.get("LATENTLOOM_STATE_GIB") or "50"
    try:
        limit = int(float(value) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise UserError(f"LATENTLOOM_STATE_GIB={value} is not a number of GiB; try 50")
    return limit
