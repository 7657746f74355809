"""A folder that is there whole or not at all, and the model that it is made of."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.metadata import save_image
from latentloom.evaluation.text_to_image import TextToImage, default_settings, load_text_to_image
from latentloom.files import read_json, user_path, write_json
from latentloom.layout import PARAMS
from latentloom.params_file import load_params
from latentloom.registry.compare import figures_known
from latentloom.registry.figures import Figures
from latentloom.registry.models import FoundModel

FIGURES = "metrics.json"  # of a model that is passed on
ORIGIN = "latentloom.json"
SAMPLES = "samples"
MOST_SAMPLES = 4  # where the prompts are those of the params


@dataclass(frozen=True)
class Exported:
    """A model that is to be exported, loaded on the CPU, and what samples it."""

    found: FoundModel
    model: TextToImage
    request: SampleRequest
    prompts: Sequence[str]

    @classmethod
    def load(cls, found: FoundModel, root: Path, prompts: Sequence[str] | None) -> "Exported":
        """Load a model; ``prompts`` None: the first of ``evaluate.prompts``.

        Raises:
            UserError: when there is no prompt, or the model or one of its encoders cannot be loaded.
        """
        params = root / PARAMS
        if not prompts and params.exists():
            prompts = (load_params(params).evaluate.prompts or [])[:MOST_SAMPLES]
        if not prompts:
            raise UserError('the folder has samples, and params.yaml names no prompts for them: give --prompt "..."')
        settings = default_settings(found.folder, params)
        provenance = found.provenance and found.provenance.in_images()
        model = load_text_to_image(found.folder, provenance=provenance, device=torch.device("cpu"))
        return cls(found, model, SampleRequest(settings), prompts)

    @property
    def settings(self) -> SamplingSettings:
        """Of samples for which nothing else is asked."""
        return self.request.settings

    @property
    def base(self) -> Mapping[str, str | None] | None:
        """The model that its training started from, see `Provenance.base`."""
        return self.found.provenance and self.found.provenance.base

    def save_origin(self, folder: Path) -> None:
        """Write down the hash that names the model, and what it came from, as far as samples name it."""
        provenance = self.found.provenance
        origin = {"model_sha256": self.found.sha256, **(provenance.in_images() if provenance else {})}
        write_json(folder / ORIGIN, origin)

    def save_samples(self, folder: Path) -> np.ndarray:
        """Write a sample of each prompt into ``folder``, as `latentloom sample` does; uint8 (P, H, W, 3)."""
        images = self.model.generate(self.prompts, self.request)[:, 0]
        for number, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            save_image(folder / SAMPLES / f"{number}.png", image, self.model.metadata([prompt], self.request))
        return images


def shown_figures(found: FoundModel, root: Path) -> Figures:
    """The figures for a model's card: those that MLflow has, else those that its folder carries."""
    carried = found.folder / FIGURES
    if known := figures_known(found, root):
        return known[0]
    return Figures(read_json(carried)["figures"]) if carried.exists() else Figures()


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, which gets that name when the block ends without an error.

    Raises:
        UserError: when there is such a folder already that is not empty, or it cannot be made.
    """
    folder = user_path(folder)
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} is there already, and is not empty: name a new folder, or remove that one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    with temporary as parent:
        made = Path(parent) / folder.name
        made.mkdir()
        yield made
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
