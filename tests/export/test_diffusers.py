"""An exported folder generates what we do, in diffusers' words and without this package."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_bert, save_clip, save_kl_vae, save_tiny_unet, save_tiny_vae
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.evaluation.image_generator import STRENGTH, StartImage
from latentloom.evaluation.metadata import read_metadata
from latentloom.evaluation.text_to_image import load_text_to_image
from latentloom.export import bundle as bundling
from latentloom.export.bundle import bundle
from latentloom.export.diffusers_folder import CODE, export_diffusers, load_pipeline
from latentloom.ingestion.one_picture import prepare_picture
from latentloom.model_files import model_hash
from latentloom.registry.figures import Figures
from latentloom.registry.models import FoundModel
from latentloom.sizes import Size

CPU = torch.device("cpu")
PROMPT = "a red apple"
OPTIONS = {  # that are called the same on both sides
    "first": 3,
    "sampler": "dpmpp_2m",
    "guidance_interval": [0.1, 0.9],
    "guidance_rescale": 0.5,
    "threshold": None,
    "precision": "fp32",
}
# By the model, and a name: what the pipeline is called with, and the prompts and the options of `latentloom sample`.
CASES = {
    "pooled": {
        "plain": ({"prompt": PROMPT, "seed": 5, "num_inference_steps": 3}, [PROMPT], {"seed": 5, "steps": 3}),
        "all options": (
            {
                "prompt": [PROMPT, "a snowman"],
                "num_images_per_prompt": 2,
                "num_inference_steps": 4,
                "guidance_scale": 2.5,
                "negative_prompt": "a tree",
                "height": 32,
                "width": 96,
                **OPTIONS,
            },
            [PROMPT, "a snowman"],
            {"count": 2, "steps": 4, "guidance": 2.5, "negative": "a tree", "size": "96x32", **OPTIONS},
        ),
        "from a picture": (
            {"prompt": ["", PROMPT], "image": "picture.png", "strength": 0.7, "num_inference_steps": 3},
            ["", PROMPT],
            {"steps": 3},
        ),
    },
    "tokens": {
        "from a picture": (
            {"prompt": PROMPT, "image": "picture.png", "num_inference_steps": 3, "seed": 2},
            [PROMPT],
            {"seed": 2, "steps": 3},
        ),
        "tokens": ({"prompt": PROMPT, "num_inference_steps": 3}, [PROMPT], {"steps": 3}),
        "another shape": (
            {"prompt": PROMPT * 9, "width": 96, "height": 48, "num_inference_steps": 3},
            [PROMPT * 9],
            {"size": "96x48", "steps": 3},
        ),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of pooled embeddings, and one of token states and several shapes with other encoders."""
    folder = tmp_path_factory.mktemp("models")
    first = {"vae": str(save_tiny_vae(folder / "tiny")), "text_encoder": str(save_bert(folder / "bert", pooling=CLS))}
    second = {"vae": str(save_kl_vae(folder / "kl")), "text_encoder": str(save_clip(folder / "clip"))}
    shapes = ((4, 8, 8), (4, 6, 12))
    return {
        "pooled": save_tiny_unet(folder / "pooled", **first),
        "tokens": save_tiny_unet(folder / "tokens", **second, tokens=True, max_tokens=9, shapes=shapes, seed=1),
    }


CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory) -> dict[str, Path]:
    """Both, exported."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr("latentloom.export.folders.default_settings", lambda *_: SamplingSettings(3, 2.0))
        for name, model in models.items():
            found = FoundModel(model, model_hash(model))
            figures = Figures({"held_out_recall_at_1": 0.5})
            export_diffusers(found, folder / name, folder, figures=figures, prompts=[PROMPT])
        yield {name: folder / name for name in models}


def test_without_the_package_the_same_request_gives_the_same_pixels(models, folders, tmp_path):
    draws = np.random.default_rng(0)
    Image.fromarray(draws.integers(0, 256, (100, 100, 4), np.uint8)).save(tmp_path / "picture.png")  # not opaque
    cases, output = tmp_path / "cases.json", tmp_path / "out.npz"
    cases.write_text(json.dumps({str(folders[model]): calls for model, calls in CASES.items()}))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    start = StartImage(*prepare_picture(tmp_path / "picture.png", Size(64, 64)), STRENGTH)
    script = Path(__file__).with_name("without_package.py")
    subprocess.run([sys.executable, "-I", script, cases, output], env=environment, cwd=tmp_path, check=True)
    with np.load(output) as found:
        for model, calls in CASES.items():
            ours = load_text_to_image(models[model], device=CPU)
            for name, (asked, prompts, options) in calls.items():
                picture = replace(start, strength=asked.get("strength", STRENGTH)) if "image" in asked else None
                expected = ours.generate(prompts, SampleRequest.of(SamplingSettings(3, 2.0), options), start=picture)
                np.testing.assert_array_equal(
                    found[f"{model}: {name}"], expected.reshape(-1, *expected.shape[2:]), err_msg=name
                )


def test_the_folder_has_safetensors_code_of_its_own_a_card_and_signed_samples(models, folders):
    folder = folders["pooled"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {*CODE, "README.md", "latentloom.json", "scheduler/scheduler_config.json", "samples/0.png"} <= files
    assert {Path(file).suffix for file in files} == {".json", ".md", ".png", ".py", ".safetensors"}
    assert str(folder.parents[1]) not in "".join((folder / file).read_text() for file in files if file.endswith("json"))
    weights = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert weights == (models["pooled"] / "model.safetensors").read_bytes()

    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-sa-4.0", "text-to-image")
    for part in ("held_out_recall_at_1", "Drawn by somebody", model_hash(models["pooled"]), "a local folder"):
        assert part in card.content
    assert read_metadata(folder / "samples/0.png").model_sha256 == model_hash(models["pooled"])


def test_a_pipeline_takes_a_generator_and_gives_the_forms_that_diffusers_knows(folders):
    pipeline = load_pipeline(folders["pooled"])
    pipeline.set_progress_bar_config(disable=True)

    def call(**more):
        return pipeline(**{"prompt": PROMPT, "num_inference_steps": 2, **more}).images

    first, again = (call(generator=torch.Generator().manual_seed(1), output_type="np") for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, call(generator=[torch.Generator().manual_seed(2)], output_type="np"))
    assert (first.shape, first.dtype) == ((1, 64, 64, 3), np.float32)
    assert 0 <= first.min() < first.max() <= 1
    as_tensor, latents = call(output_type="pt"), call(output_type="latent")
    assert (as_tensor.shape, latents.shape) == ((1, 3, 64, 64), (1, 4, 8, 8))
    assert isinstance(pipeline(PROMPT, num_inference_steps=2, return_dict=False)[0][0], Image.Image)
    for wrong, said in (
        ({"smapler": "ddim"}, "did you mean sampler"),
        ({"width": 60}, "the nearest is 64x64"),
        ({"num_inference_steps": 1}, "diffusion_steps = 1"),
        ({"output_type": "jpeg"}, "must be one of pil"),
        ({"prompt": []}, "give at least one"),
        ({"strength": 0.5}, "strength needs image"),
        ({"image": Image.new("L", (9, 9)), "strength": 2}, "must be a number, from 0 to 1"),
        ({"generator": torch.Generator(), "seed": 1}, "not both"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    ):
        with pytest.raises(ValueError, match=said):
            call(**wrong)


def test_a_pipeline_whose_code_was_replaced_by_another_versions_says_so(folders, tmp_path):
    """diffusers runs the code of each folder in the module of the last one."""
    pipeline = load_pipeline(folders["pooled"])
    sys.modules[type(pipeline).__module__].CODE = "another"
    with pytest.raises(RuntimeError, match="load this one again"):
        pipeline(PROMPT)


def test_a_folder_that_would_generate_something_else_is_not_left(models, tmp_path, monkeypatch):
    class Wrong:
        def set_progress_bar_config(self, disable):
            pass

        def __call__(self, prompt):
            return SimpleNamespace(images=[np.zeros((64, 64, 3), np.uint8)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentloom.export.diffusers_folder.load_pipeline", lambda folder: Wrong())
    model = str(models["pooled"])
    result = CliRunner().invoke(app, ["export", model, "out", "--to", "diffusers", "--prompt", PROMPT])
    assert (result.exit_code, "diffusers generates another picture" in result.output) == (1, True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for arguments, said in ((["--prompt", PROMPT], "out is there already, and is not empty"), ([], "give --prompt")):
        result = CliRunner().invoke(
            app, ["export", model, "out" if arguments else "new", "--to", "diffusers", *arguments]
        )
        assert (result.exit_code, said in result.output) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("module", CODE.values())
def test_bundled_code_is_whole_and_imports_nothing_of_the_package(module):
    tree = ast.parse(bundle(module))
    for node in ast.walk(tree):
        names = [own.name for own in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("latentloom") for name in names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from latentloom.a import one\none = 2\n", "one is that of a.py and that of root.py"),
        ("import latentloom.a\n", "imports names of modules"),
        ("from latentloom import a\n", "no module of one file"),
        ("def late():\n    from latentloom.a import one\n", "imports at its top"),
    ],
)
def test_code_that_cannot_go_into_one_file_is_named(text, said, tmp_path, monkeypatch):
    package = tmp_path / "latentloom"
    package.mkdir()
    (package / "a.py").write_text("one = 1\n")
    (package / "root.py").write_text(text)
    monkeypatch.setattr(bundling, "PACKAGE", package)
    with pytest.raises(ValueError, match=said):
        bundle("latentloom.root")
