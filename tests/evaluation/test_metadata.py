"""What is written into a PNG comes back; images of the first version are read as well."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentloom.diffusion import SamplingSettings
from latentloom.errors import UserError
from latentloom.evaluation.metadata import ImageMetadata, encode_png, read_metadata, save_image

METADATA = ImageMetadata(
    prompts=("a red apple", "une pomme, « rouge » ✓"),
    seed=7,
    first=2,
    count=3,
    sampling=SamplingSettings(
        diffusion_steps=20,
        class_guidance=0.1 + 0.2,
        sampler="dpmpp_2m",
        guidance_interval=(0.2, 0.7),
        guidance_rescale=0.5,
        precision="bf16",
    ),
    model_sha256="a" * 64,
    vae="c" * 64,
    text_encoder="d" * 64,
    code="e" * 64,
    provenance={"mlflow_run_id": "b" * 32, "commit": "f" * 40, "dirty": False, "outs": {"data/text": "0" * 32}},
)
PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)


def save_with_chunk(path, chunk):
    chunks = PngInfo()
    chunks.add_text("latentloom", chunk)
    Image.fromarray(PIXELS).save(path, pnginfo=chunks)


def test_an_image_comes_back_with_its_pixels_and_metadata(tmp_path):
    save_image(tmp_path / "a.png", PIXELS, METADATA)
    assert read_metadata(tmp_path / "a.png") == METADATA
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == PIXELS).all()


def test_any_png_reader_finds_prompt_seed_model_and_run(tmp_path):
    save_image(tmp_path / "a.png", PIXELS, METADATA)
    with Image.open(tmp_path / "a.png") as image:
        text = dict(image.text)
    assert text["prompt"] == "\n".join(METADATA.prompts)
    assert (text["seed"], text["model_sha256"], text["mlflow_run_id"]) == ("7", "a" * 64, "b" * 32)
    assert json.loads(text["latentloom"])["sampling"]["guidance_interval"] == [0.2, 0.7]


def test_a_prompt_in_any_script_is_in_a_chunk_for_unicode():
    png = encode_png(PIXELS, replace(METADATA, prompts=("テスト",)))
    assert b"iTXtprompt\0\0\0\0\0" + "テスト".encode() in png
    assert b"tEXtprompt" not in png
    json_chunk = png.partition(b"tEXtlatentloom\0")[2].partition(b"IDAT")[0]
    assert b'"\\u30c6\\u30b9\\u30c8"' in json_chunk


def test_an_image_of_a_model_without_a_run_names_none(tmp_path):
    save_image(tmp_path / "a.png", PIXELS, replace(METADATA, provenance=None))
    with Image.open(tmp_path / "a.png") as image:
        assert "mlflow_run_id" not in image.text
    assert read_metadata(tmp_path / "a.png").mlflow_run_id is None


def test_a_file_that_is_not_one_of_our_images_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(PIXELS).save(tmp_path / "bare.png")
    save_image(tmp_path / "whole.png", PIXELS, METADATA)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    chunk = asdict(METADATA) | {"sampling": asdict(METADATA.sampling) | {"precision": "fp8"}}
    save_with_chunk(tmp_path / "changed.png", json.dumps(chunk))
    save_with_chunk(tmp_path / "broken.png", "{")
    for name, reason in (
        ("text", "cannot be read: cannot identify image file"),
        ("bare", "does not say"),
        ("cut", "cannot be read"),
        ("changed", r"for ImageMetadata\nsampling\n.*precision = 'fp8'"),
        ("broken", "text chunk 'latentloom' cannot be read"),
        ("absent", "No such file"),
    ):
        with pytest.raises(UserError, match=rf"(?s){name}\.png.* {reason}"):
            read_metadata(tmp_path / f"{name}.png")
