"""The registered model as MLflow runs it: prompts in, PNG bytes out. MLflow executes this file, from its own copy.

The files beside it in the registered model: `artifacts/model` (the model folder, with its sampling settings) and
`code/latentloom` (this package, as it was when the model was promoted).
"""

import json
from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext


class ServedModel(PythonModel):
    """Generates the same images that `latentloom sample` does with the same prompt, seed and settings."""

    def load_context(self, context: PythonModelContext) -> None:
        from latentloom.evaluation.text_to_image import load_text_to_image, stored_settings

        folder = Path(context.artifacts["model"])
        self.model = load_text_to_image(folder, provenance=json.loads(context.model_config["provenance"]))
        self.settings = stored_settings(folder)

    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        """One row per sample: its prompt, its number, and the image as PNG with its metadata.

        Args:
            context: not used.
            model_input: prompts, as MLflow gives them for the signature: a table with the column ``prompt``.
            params: ``seed``, ``count``, ``steps`` and ``guidance``.

        Raises:
            MlflowException: when a param cannot be used, naming it; the server answers with status 400.
        """
        from latentloom.evaluation.metadata import encode_png

        params = params or {}
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        seed, count = int(params.get("seed", 0)), int(params.get("count", 1))
        try:
            if count < 1:
                raise ValueError(f"count = {count}: at least 1")
            settings = self.settings.changed(diffusion_steps=params.get("steps"), class_guidance=params.get("guidance"))
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        images = self.model.generate(prompts, settings, seed=seed, count=count)
        rows = []
        for prompt, samples in zip(prompts, images, strict=True):
            for number, image in enumerate(samples):
                metadata = self.model.metadata([prompt], settings, seed=seed, first=number)
                rows.append({"prompt": prompt, "number": number, "png": encode_png(image, metadata)})
        return pd.DataFrame(rows, columns=["prompt", "number", "png"])


mlflow.models.set_model(ServedModel())
