"""The files of a VAE training: its checkpoint, and the folder that diffusers loads.

A checkpoint is one safetensors file: both sets of weights, the optimizers' moments, and the step. Its name has a
fingerprint of the recipe, so that no training resumes from another one's.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import save_file

from bundled_vae.training import Recipe, TrainingState
from latentloom.files import atomic_path


def checkpoint_path(cache: Path, recipe: Recipe) -> Path:
    """Where the checkpoint of a training by `recipe` lies in the folder `cache`."""
    fingerprint = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"checkpoint-{fingerprint}.safetensors"


def save_checkpoint(state: TrainingState, path: Path) -> None:
    """Write all that `resume` needs, atomically."""
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    for number, optimizer in enumerate(state.optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{parameter}.{name}": value for name, value in moments.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={"step": str(state.step)})


def resume(state: TrainingState, path: Path) -> bool:
    """Bring a fresh `state` to the step of the checkpoint at `path`; False, and nothing done, where there is none."""
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        state.step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for part in ("network", "average"):
        prefix = f"{part}."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        getattr(state, part).load_state_dict(weights)
    for number, optimizer in enumerate(state.optimizers):
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, parameter, moment = name.split(".")
                moments.setdefault(int(parameter), {})[moment] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return True


def save_vae(vae: AutoencoderTiny, folder: Path) -> AutoencoderTiny:
    """Write `config.json` and the weights in fp16 to `folder`, each made under a temporary name.

    Returns the VAE that a reader of the folder gets: those weights, run in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        vae.half().save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)
            path.replace(folder / path.name)
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()
