"""What is read of a pretrained model's folder: the whole of it or nothing, and what decides the fingerprint."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from latentloom.encoding import pretrained
from latentloom.encoding.pretrained import fingerprint, has_fingerprint
from latentloom.encoding.references import text_folder
from latentloom.encoding.text_encoder import TextEncoder, load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.errors import UserError

VAE, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"


def rewrite(path, change):
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    tensors.pop(None, None)
    save_file(tensors, path, {"format": "pt"})


def without(part):
    return lambda path: rewrite(path, lambda name, tensor: (None if part in name else name, tensor))


def prefixed(path):
    rewrite(path, lambda name, tensor: (f"other.{name}", tensor))


def narrower(path):
    rewrite(path, lambda name, tensor: (name, tensor[:3].clone() if "projection" in name else tensor))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:900])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 300000\n")


def damaged_config(path):
    (path.parent / "config.json").write_text('{"_class_name": ')


def no_tokenizer(path):
    for own in path.parent.glob("tokenizer*"):
        own.unlink()


@pytest.mark.parametrize(
    ("save", "change", "message"),
    [
        (
            "clip",
            without("text_projection"),
            "lacks 1 weights of CLIPTextModelWithProjection.* first: text_projection.w",
        ),
        ("clip", without("layers.1."), r"lacks 16 weights of .*, the first: text_model\.encoder\.layers\.1\."),
        ("clip", prefixed, r"lacks 37 weights of .* \(it holds others, such as other\.text_"),
        ("clip", narrower, r"lacks 1 weights of .*, or has them in other shapes, the first: text_projection\.weight"),
        ("bert", without("embeddings.word"), r"lacks 1 weights of AutoModel.*: embeddings\.word_embeddings\.weight"),
        ("bert", cut_off, r"^encode_text\.model: .*bert cannot be loaded \("),
        ("t5", pointer, r"model\.safetensors only stands for the weights: run `git lfs pull`"),
        ("bert", damaged_config, r"bert/config\.json cannot be read .*: put the model's own file back"),
        ("clip", no_tokenizer, r"^encode_text\.model: .*clip has no tokenizer \(tokenizer\.json, "),
        ("kl_vae", without("quant_conv.weight"), r"lacks 2 weights of AutoencoderKL.*, the first: post_quant_conv"),
        ("kl_vae", prefixed, r"^encode_images\.vae: .* lacks \d+ weights of AutoencoderKL.* such as other\."),
        ("tiny_vae", pointer, "git lfs pull"),
        ("tiny_vae", damaged_config, r"config\.json cannot be read .*: put the model's own file back"),
    ],
)
def test_a_model_that_is_not_whole_is_rejected_naming_what_is_wrong(save, change, message, tmp_path):
    """transformers and diffusers go on with random weights in the place of those that are missing."""
    folder = getattr(tiny_models, f"save_{save}")(tmp_path / save)
    change(folder / (VAE if "vae" in save else TEXT))
    with pytest.raises(UserError, match=message) as caught:
        (load_vae if "vae" in save else load_text_encoder)(str(folder))
    assert len(str(caught.value)) < 700


def test_a_pooling_layer_may_be_missing_since_nothing_is_read_of_it(tmp_path):
    folder = tiny_models.save_bert(tmp_path)
    before = TextEncoder(str(folder)).encode(["a cat"])
    without("pooler.")(folder / TEXT)
    np.testing.assert_array_equal(TextEncoder(str(folder)).encode(["a cat"]), before)


def test_a_folder_with_the_variant_in_half_precision_alone_is_read(tmp_path):
    vae, text = tiny_models.save_tiny_vae(tmp_path / "vae"), tiny_models.save_bert(tmp_path / "bert")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = load_vae(str(vae)).encode(pixels)["mean"], TextEncoder(str(text)).encode(["a cat"])
    for folder, name in ((vae, VAE), (text, TEXT)):
        rewrite(folder / name, lambda key, tensor: (key, tensor.half()))
        (folder / name).rename(folder / name.replace(".", ".fp16."))
    loaded = load_vae(str(vae))
    assert next(loaded.module.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded.encode(pixels)["mean"], expected[0], atol=0.02, rtol=0.02)
    np.testing.assert_allclose(TextEncoder(str(text)).encode(["a cat"]), expected[1], atol=0.01)


@pytest.mark.parametrize("save", ["tiny_vae", "bert"])
def test_weights_that_are_not_read_do_not_change_the_fingerprint(save, tmp_path):
    folder = getattr(tiny_models, f"save_{save}")(tmp_path / save)
    before, plain = fingerprint(folder), folder / (VAE if "vae" in save else TEXT)
    for name in ("model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin", "a.bin"):
        shutil.copyfile(plain, folder / name)
    assert fingerprint(folder) == before
    plain.rename(folder / "mine.safetensors")
    for own in folder.glob("*model*.*"):
        own.unlink()
    with pytest.raises(UserError, match=r"holds no weights \(.*a\.bin, mine\.safetensors is not read: rename it"):
        fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "settings", "counts"),
    [
        ("tokenizer_config.json", {"do_lower_case": False}, True),
        ("tokenizer_config.json", {"truncation_side": "left"}, True),
        ("special_tokens_map.json", {"cls_token": "[UNK]"}, True),
        ("added_tokens.json", {"<cat>": 42}, True),
        ("tokenizer_config.json", {"name_or_path": "elsewhere", "tokenizer_file": None}, False),
    ],
)
def test_what_decides_the_tokens_of_a_caption_is_part_of_the_fingerprint(name, settings, counts, tmp_path):
    folder = tiny_models.save_bert(tmp_path)
    before, without_settings = fingerprint(folder), fingerprint(folder, tokenizer_settings=False)
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))
    assert (fingerprint(folder) != before) == counts
    assert has_fingerprint(folder, before) != counts
    assert has_fingerprint(folder, without_settings), "by which models of the version before name it"


def test_settings_that_say_what_an_uncased_bert_does_anyway_change_no_fingerprint(tmp_path):
    """So the bundled encoder, and every cache of it, keep theirs."""
    bundled = text_folder("bundled")
    assert fingerprint(bundled) == fingerprint(bundled, tokenizer_settings=False)
    folder = shutil.copytree(bundled, tmp_path / "own")
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    assert fingerprint(folder) != fingerprint(bundled)


def test_weights_in_several_files_are_one_model_and_each_is_named_when_it_is_missing(tmp_path):
    from transformers import BertModel

    whole = tiny_models.save_bert(tmp_path / "whole")
    parts = shutil.copytree(whole, tmp_path / "parts")
    (parts / TEXT).unlink()
    BertModel.from_pretrained(whole).save_pretrained(parts, max_shard_size="10KB")
    first, *others = sorted(parts.glob("model-*.safetensors"))
    assert others
    assert fingerprint(parts) != fingerprint(whole)
    expected = TextEncoder(str(whole)).encode(["a cat"])
    np.testing.assert_array_equal(TextEncoder(str(parts)).encode(["a cat"]), expected)
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name}, which model\.safetensors\.index\.json names, is missing"):
        TextEncoder(str(parts))


def test_without_docstrings_the_library_is_not_imported_and_that_is_said(monkeypatch):
    """transformers writes its own docstrings as it is imported, and fails where Python keeps none."""
    monkeypatch.setattr(pretrained, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(UserError, match="transformers cannot be imported with PYTHONOPTIMIZE=2"):
        pretrained.library("transformers")


def test_a_whole_pipeline_is_told_from_a_model(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        UserError, match=r"has no config\.json; it is a whole pipeline .* give the path to that, such as"
    ):
        load_vae(str(tmp_path))
