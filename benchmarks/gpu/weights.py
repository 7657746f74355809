"""A model in files that a limit on their size lets through: weights in fp16, in parts; and back into a model's folder.

PYTHONPATH=src python benchmarks/gpu/weights.py PARTS models/unet
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from latentloom.errors import UserError
from latentloom.model_files import ModelConfig, load_model, save_model

PART_BYTES = 63 * 2**18  # 15.75 MiB
NAME = "unet.fp16.safetensors"


def split(model: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write the model in ``model`` into ``folder``, in parts that `join` knows in what order; gives their paths."""
    tensors = {name: weight.half() for name, weight in load_file(model / "model.safetensors").items()}
    content = save(tensors, metadata={"config": (model / "config.json").read_text(encoding="utf-8")})
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(content), part_bytes)
    paths = [folder / _name(number, len(starts)) for number in range(len(starts))]
    for path, start in zip(paths, starts, strict=True):
        path.write_bytes(content[start : start + part_bytes])
    return paths


def _name(number: int, count: int) -> str:
    return f"{NAME}.part-{number:02d}-of-{count:02d}"


def join(folder: Path, model: Path) -> None:
    """Make a model's folder from the parts in ``folder``; its weights are fp32 again, rounded to fp16.

    Raises:
        UserError: when a part is missing, naming it.
    """
    found = {path.name: path for path in folder.glob(f"{NAME}.part-*")}
    count = max((int(name[-2:]) for name in found), default=1)
    names = [_name(number, count) for number in range(count)]
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{folder} lacks {', '.join(missing)}; copy all parts into one folder")
    model.mkdir(parents=True, exist_ok=True)
    whole = model / NAME
    whole.write_bytes(b"".join(found[name].read_bytes() for name in names))
    try:
        with safe_open(whole, "pt") as file:
            config = ModelConfig.model_validate_json(file.metadata()["config"])
            tensors = {name: file.get_tensor(name).to(torch.float32) for name in file.keys()}  # noqa: SIM118
    finally:
        whole.unlink()
    save_model(model, tensors, config)
    load_model(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, help="the folder of the parts")
    parser.add_argument("model", type=Path, help="the model's folder, which is made")
    arguments = parser.parse_args()
    join(arguments.parts, arguments.model)
    print(f"{arguments.model} is whole")


if __name__ == "__main__":
    main()
