"""The registered model as MLflow runs it: prompts in, PNG bytes out. MLflow executes this file, from its own copy.

The files beside it in the registered model: `artifacts/model` (the model folder, with its sampling settings) and
`code/latentloom` (this package, as it was when the model was promoted).
"""

import json
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from latentloom.diffusion.sampling_settings import OPTION_NAMES, SampleRequest


class ServedModel(PythonModel):
    """Generates the same images that `latentloom sample` does with the same prompt, seed and settings."""

    def load_context(self, context: PythonModelContext) -> None:
        from latentloom.evaluation.text_to_image import load_text_to_image, stored_settings

        take_requests_whole()
        folder = Path(context.artifacts["model"])
        self.model = load_text_to_image(folder, provenance=json.loads(context.model_config["provenance"]))
        self.settings = stored_settings(folder)

    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        """One row per sample: its prompt, its number, and the image as PNG with its metadata.

        Args:
            context: not used.
            model_input: prompts, as MLflow gives them for the signature: a table with the column ``prompt``.
            params: options of `SampleRequest`.

        Raises:
            MlflowException: when a param is not known or cannot be used, naming it; the server answers with status 400.
        """
        from latentloom.evaluation.metadata import encode_png

        prompts, given = list(model_input["prompt"]), params or {}
        if others := [prompt for prompt in prompts if not isinstance(prompt, str)]:  # of a dict instead of a table
            raise MlflowException.invalid_parameter_value(f"prompt = {others[0]!r}: must be text, one prompt a row")
        options = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        try:
            request = SampleRequest.of(self.settings, options)
            for warning in self.model.remarks(prompts, request):
                warnings.warn(warning, stacklevel=2)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        images = self.model.generate(prompts, request)
        samples = self.model.one_by_one(prompts, request, images)
        rows = [(prompt, number, encode_png(image, metadata)) for prompt, number, image, metadata in samples]
        return pd.DataFrame(rows, columns=["prompt", "number", "png"])


def take_requests_whole() -> None:
    """Have MLflow pass on all params to `predict`, which checks them, and reject columns other than the prompt.

    MLflow drops what the signature lacks, with a line in the server's log: who asks for `smapler`, or gives the seed
    beside the prompt, would get status 200 and another picture. It has no hook for it.
    """
    validate = mlflow.pyfunc._validate_prediction_input
    validate = getattr(validate, "__wrapped__", validate)  # of a model that was loaded before

    @wraps(validate)
    def unless_ours(data, params, input_schema, params_schema, flavor=None):
        if params_schema is None or {param.name for param in params_schema.params} != set(OPTION_NAMES):
            return validate(data, params, input_schema, params_schema, flavor)
        columns = getattr(data, "columns", data if isinstance(data, dict) else ())
        if others := [str(column) for column in columns if column != "prompt"]:
            raise MlflowException.invalid_parameter_value(
                f"{', '.join(others)}: the one column is prompt; {', '.join(OPTION_NAMES)} are params"
            )
        if not isinstance(params, dict | None):
            raise MlflowException.invalid_parameter_value(f"params = {params!r}: must be an object of names and values")
        return validate(data, None, input_schema, None, flavor)[0], params

    mlflow.pyfunc._validate_prediction_input = unless_ours


mlflow.models.set_model(ServedModel())
