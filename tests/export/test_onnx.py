"""A model exported to ONNX samples what ours does from the same noise, without torch; else it is not left."""

import ast
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_clip, save_tiny_unet, save_tiny_vae
from torch import nn
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import load_text_to_image
from latentloom.export.onnx_folder import Graph, export_onnx
from latentloom.model_files import model_hash
from latentloom.registry.figures import Figures
from latentloom.registry.models import FoundModel

PROMPT = "a red apple"
ROUNDING = 2  # of 255


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of token states and several shapes: it has all that a graph can get wrong."""
    folder = tmp_path_factory.mktemp("model")
    encoders = {"vae": str(save_tiny_vae(folder / "vae")), "text_encoder": str(save_clip(folder / "clip"))}
    return save_tiny_unet(folder / "unet", **encoders, tokens=True, max_tokens=9, shapes=((4, 8, 8), (4, 6, 12)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("exported") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentloom.export.folders.default_settings", lambda *_: SamplingSettings(4, 2.0))
        found = FoundModel(model, model_hash(model))
        export_onnx(found, made, made.parent, figures=Figures(), prompts=[PROMPT])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "size", "changes"),
    [
        (PROMPT, None, {}),
        ("a snowman on the moon, which is cut", "96x48", {"sampler": "dpmpp_2m", "threshold_percentile": None}),
        (PROMPT, "32x64", {"guidance_rescale": 0.6, "guidance_interval": (0.2, 0.9), "class_guidance": 5.0}),
    ],
)
def test_the_script_samples_what_we_do_from_the_same_noise(model, folder, prompt, size, changes):
    ours = load_text_to_image(model, device=torch.device("cpu"))
    settings = SamplingSettings(4, 2.0, precision="fp32").changed(**changes)
    if "threshold_percentile" in changes:
        settings = SampleRequest.of(settings, {"threshold": None}).settings
    expected = ours.generate([prompt], SampleRequest(settings, seed=3, size=size))[0, 0].astype(int)
    noise = ours.starting_noise("0", 3, ours.latent_shape(size)).numpy()
    script = runpy.run_path(str(folder / "sample.py"))
    found = script["Sampler"](folder).generate(prompt, noise, **changes)
    assert np.abs(found.astype(int) - expected).max() <= ROUNDING


@pytest.mark.slow
def test_the_folder_needs_no_torch_and_says_how_it_is_used(folder, tmp_path, monkeypatch, capsys):
    expected = {"README.md", "decoder.onnx", "latentloom.json", "network.onnx", "sample.py", "samples", "sampling.json"}
    assert {path.name for path in folder.iterdir()} == expected | {"text_encoder.onnx", "tokenizer.json"}
    tree = ast.parse((folder / "sample.py").read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others == {"PIL", "numpy", "onnxruntime", "tokenizers"}
    card = (folder / "README.md").read_text()
    assert "`x_t` (B, C, h, w), `noise_levels` (B,)" in card
    assert json.loads((folder / "latentloom.json").read_text()) == {"model_sha256": card.split("| model | `")[1][:64]}

    monkeypatch.setattr(sys, "argv", ["sample.py", PROMPT, "--size", "64x32", "-o", str(tmp_path / "a.png")])
    runpy.run_path(str(folder / "sample.py"), run_name="__main__")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 32)


class Baked(nn.Module):
    """Keeps the side that it was traced with, as Python's own functions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * math.log2(x.shape[1])


class Counting(nn.Module):
    """Gives something else each time."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Baked(), r"cannot run a\.onnx, at inputs of \(2, 8\): .*Expected: 4"),
        (Counting(), r"y of a\.onnx, at inputs of \(2, 4\), differs by \d from the model's"),
    ],
)
def test_a_graph_that_computes_something_else_is_said_where(module, said, tmp_path):
    inputs = [(torch.ones(2, side),) for side in (4, 8)]
    with pytest.raises(UserError, match=f"(?s){said}"):
        Graph("a", module, {"x": {1: torch.export.Dim("side")}}, ["y"], *inputs).save(tmp_path)


def test_without_the_extra_the_command_names_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", str(model), "out", "--to", "onnx", "--prompt", PROMPT])
    assert (result.exit_code, 'pip install "latentloom[onnx]"' in result.output) == (1, True)
    assert list(tmp_path.iterdir()) == []
