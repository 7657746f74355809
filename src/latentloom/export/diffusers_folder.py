"""A model as a folder that diffusers loads where this package is not installed.

model_index.json        the pipeline's class and parts
pipeline.py             the code that samples: `diffusers_pipeline`, with what it needs of the package
unet/                   the network: its config, its weights as they were trained, and its code
scheduler/              the schedule and the sampling settings
vae/, text_encoder/, tokenizer/
README.md, samples/     the model's card, and samples of this model
latentloom.json         the hash that names the model, and what it came from
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentloom.encoding.pretrained import library
from latentloom.errors import UserError
from latentloom.export.bundle import bundle
from latentloom.export.card import card
from latentloom.export.folders import Exported, new_folder
from latentloom.files import write_json, write_text
from latentloom.model_files import ModelConfig
from latentloom.registry.figures import Figures
from latentloom.registry.models import FoundModel

CODE = {  # by file, the module that it is made of
    "pipeline.py": "latentloom.export.diffusers_pipeline",
    "unet/latentloom_unet.py": "latentloom.export.diffusers_unet",
    "scheduler/latentloom_scheduler.py": "latentloom.export.diffusers_scheduler",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
IN_UNET = {"latent_shape", "latent_shapes", "widths", "block_depth", "emb_size", "text_dim", "token_dim"}
IN_UNET |= {"latent_mean", "latent_std"}
OF_THIS_MACHINE = ("_name_or_path", "name_or_path")  # keys by which the libraries write down where they read


def export_diffusers(
    found: FoundModel, folder: Path, root: Path, *, figures: Figures, prompts: Sequence[str] | None = None
) -> None:
    """Write the model as ``folder``; it is there only where diffusers generates the same pictures with it as we do.

    Args:
        found: the model.
        folder: a new or empty one.
        root: the project's, whose params say how to sample.
        figures: for the card.
        prompts: of the samples; None: the first of ``evaluate.prompts``.

    Raises:
        UserError: when the folder is not empty, there is no prompt, or a part of the model cannot be loaded.
    """
    with new_folder(folder) as made:
        exported = Exported.load(found, root, prompts)
        _save_parts(exported, made)
        for file, module in CODE.items():
            write_text(made / file, bundle(module))
        exported.save_origin(made)
        images = exported.save_samples(made)
        write_text(made / "README.md", card(exported, figures))
        _check(exported, made, images[0])


def load_pipeline(folder: Path) -> Any:
    """The pipeline of an exported folder, as anybody loads it; it runs the folder's code."""
    return library("diffusers").DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True, local_files_only=True
    )


def unet_config(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `diffusers_unet.LatentLoomUNet`."""
    return config.model_dump(mode="json", include=IN_UNET)


def _save_parts(exported: Exported, folder: Path) -> None:
    diffusers = library("diffusers")
    config, codec, encoder = exported.model.config, exported.model.codec, exported.model.text_encoder
    codec.vae.module.save_pretrained(folder / "vae")
    encoder.model.save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    for path in folder.glob("*/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and not content.keys().isdisjoint(OF_THIS_MACHINE):
            write_json(path, {key: value for key, value in content.items() if key not in OF_THIS_MACHINE})
    version = {"_diffusers_version": diffusers.__version__}
    (folder / "unet").mkdir()
    shutil.copyfile(exported.found.folder / "model.safetensors", folder / "unet" / WEIGHTS)
    write_json(folder / "unet" / "config.json", {"_class_name": "LatentLoomUNet", **version, **unet_config(config)})
    scheduler = {"schedule": config.schedule, "latent_bound": config.latent_bound}
    scheduler["sampling"] = asdict(exported.settings)
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": "LatentLoomScheduler", **version, **scheduler}
    )
    index = {
        "_class_name": ["pipeline", "LatentLoomPipeline"],
        **version,
        "vae": ["diffusers", codec.vae.class_name],
        "text_encoder": ["transformers", type(encoder.model).__name__],
        "tokenizer": ["transformers", type(encoder.tokenizer).__name__],
        "unet": ["latentloom_unet", "LatentLoomUNet"],
        "scheduler": ["latentloom_scheduler", "LatentLoomScheduler"],
        "pooling": encoder.pooling,
        "max_tokens": encoder.max_tokens,
        "vae_scale_factor": codec.vae.factor,
    }
    write_json(folder / "model_index.json", index)


def _check(exported: Exported, folder: Path, expected: np.ndarray) -> None:
    """Generate the first sample, uint8 (H, W, 3), once more from the folder."""
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    again = np.asarray(pipeline(exported.prompts[0]).images[0])
    if not np.array_equal(again, expected):
        raise UserError(
            "not exported: from the folder diffusers generates another picture than `latentloom sample` does. A part "
            "of the model is saved otherwise than it was loaded: the VAE "
            f"{exported.model.config.vae.reference} or the text encoder {exported.model.config.text_encoder.reference}"
        )
