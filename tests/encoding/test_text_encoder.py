"""The text encoders of each family, against transformers called directly, without padding or batches."""

import json

import numpy as np
import pytest
import tiny_models
import torch
import transformers

from latentloom.encoding.pretrained import fingerprint
from latentloom.encoding.text_encoder import TextEncoder, load_text_encoder
from latentloom.errors import UserError

CAPTIONS = ["a red apple", "a", "", "é and more", "a cat on a sofa"]
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def direct(folder, model_class, caption, max_tokens=None):
    """What transformers makes of one caption alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, model_class).from_pretrained(folder).eval()
    ids = tokenizer(caption, truncation=max_tokens is not None, max_length=max_tokens, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])


def assert_states_are(encoder, expected):
    encoded = encoder.encode_tokens(CAPTIONS)
    assert len(encoded.states) == len(CAPTIONS)
    for own, output in zip(encoded.states, expected, strict=True):
        np.testing.assert_allclose(own, output.last_hidden_state[0].numpy(), atol=1e-5)
        assert own.shape[1] == encoder.token_dim
    return encoded.pooled


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_clip_gives_its_last_hidden_states_and_its_projected_embedding(tmp_path):
    folder = tiny_models.save_clip(tmp_path)
    expected = [direct(folder, "CLIPTextModelWithProjection", caption) for caption in CAPTIONS]
    encoder = TextEncoder(str(folder))
    pooled = assert_states_are(encoder, expected)
    np.testing.assert_allclose(pooled, [output.text_embeds[0].numpy() for output in expected], atol=1e-5)
    assert (encoder.dim, encoder.token_dim) == (24, 16)


def test_of_a_t5_the_encoder_alone_is_used_and_its_states_are_averaged(tmp_path):
    folder = tiny_models.save_t5(tmp_path)
    expected = [direct(folder, "T5EncoderModel", caption) for caption in CAPTIONS]
    encoder = TextEncoder(str(folder))
    pooled = assert_states_are(encoder, expected)
    means = [unit(output.last_hidden_state[0].mean(0).numpy()) for output in expected]
    np.testing.assert_allclose(pooled, means, atol=1e-5)
    assert encoder.class_name == "T5EncoderModel" == type(encoder.model).__name__


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "roberta", "xlm-roberta"])
def test_the_like_of_bert_give_token_states_and_their_mean(model_type, tmp_path):
    folder = tiny_models.save_bert(tmp_path, model_type=model_type)
    expected = [direct(folder, "AutoModel", caption) for caption in CAPTIONS]
    pooled = assert_states_are(TextEncoder(str(folder)), expected)
    means = [unit(output.last_hidden_state[0].mean(0).numpy()) for output in expected]
    np.testing.assert_allclose(pooled, means, atol=1e-5)


@pytest.mark.parametrize("pooling", [CLS, {"pooling_mode": "cls"}])
def test_a_sentence_encoder_that_pools_by_its_first_token_gives_that(pooling, tmp_path):
    folder = tiny_models.save_bert(tmp_path, pooling=pooling)
    firsts = [unit(direct(folder, "AutoModel", caption).last_hidden_state[0, 0].numpy()) for caption in CAPTIONS]
    np.testing.assert_allclose(TextEncoder(str(folder)).encode(CAPTIONS), firsts, atol=1e-5)


@pytest.mark.parametrize("pooling", [MEAN, CLS])
def test_sentence_transformers_gives_the_same(pooling, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    folder = tiny_models.save_bert(tmp_path, pooling=pooling)
    mode = "cls" if pooling is CLS else "mean"
    reference = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16, mode), Normalize()], device="cpu")
    np.testing.assert_allclose(TextEncoder(str(folder)).encode(CAPTIONS), reference.encode(CAPTIONS), atol=1e-5)


def test_pooling_that_is_neither_mean_nor_first_token_is_rejected_naming_the_file(tmp_path):
    for name, pooling, named in [
        ("max", {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ("two", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
        ("none", {"pooling_mode_mean_tokens": False}, "of nothing"),
    ]:
        folder = tiny_models.save_bert(tmp_path / name, pooling=pooling)
        with pytest.raises(UserError, match=rf"1_Pooling/config.json asks for the pooling {named}; .* cls, mean"):
            TextEncoder(str(folder))


def test_the_pooling_is_part_of_the_fingerprint_and_mean_is_what_a_folder_does_that_says_nothing(tmp_path):
    plain, mean, cls = (
        fingerprint(tiny_models.save_bert(tmp_path / name, pooling=pooling))
        for name, pooling in [("plain", None), ("mean", MEAN), ("cls", CLS)]
    )
    assert plain == mean != cls


@pytest.mark.parametrize(("model_type", "readable"), [("bert", 40), ("roberta", 38), ("mpnet", 38)])
def test_a_caption_is_cut_at_the_last_position_that_the_model_has(model_type, readable, tmp_path):
    """RoBERTa's first position is the one after that of the padding, so it reads that many tokens less."""
    folder = tiny_models.save_bert(tmp_path, model_type=model_type, positions=40)
    encoder = load_text_encoder(str(folder))
    assert encoder.max_tokens == readable
    (states,) = encoder.encode_tokens(["long " * 100]).states
    expected = direct(folder, "AutoModel", "long " * 100, max_tokens=readable).last_hidden_state[0]
    assert len(states) == readable
    np.testing.assert_allclose(states, expected, atol=1e-5)


def test_fewer_tokens_may_be_read_than_the_model_can_but_not_more(tmp_path):
    folder = tiny_models.save_bert(tmp_path)
    encoder = TextEncoder(str(folder), max_tokens=6)
    encoded = encoder.encode_tokens(["a red apple", "a"])
    assert [len(states) for states in encoded.states] == [6, 3]
    expected = direct(folder, "AutoModel", "a red apple", max_tokens=6).last_hidden_state[0]
    np.testing.assert_allclose(encoded.states[0], expected, atol=1e-5)
    np.testing.assert_allclose(encoded.pooled[0], unit(expected.mean(0).numpy()), atol=1e-5)
    with pytest.raises(UserError, match=r"encode_text\.max_tokens = 41: .* reads at most 40"):
        _ = TextEncoder(str(folder), max_tokens=41).max_tokens


def test_tokens_are_counted_before_the_cut(tmp_path):
    encoder = TextEncoder(str(tiny_models.save_bert(tmp_path)), max_tokens=6)
    assert encoder.count_tokens(["a red apple", "a", "", "x" * 100]).tolist() == [13, 3, 2, 102]


@pytest.mark.parametrize("reference", ["bundled", "clip", "t5", "bert"])
def test_tokens_are_counted_as_transformers_does(reference, tmp_path):
    save = {"clip": tiny_models.save_clip, "t5": tiny_models.save_t5, "bert": tiny_models.save_bert}
    encoder = TextEncoder(str(save[reference](tmp_path)) if reference in save else reference)
    captions = [*CAPTIONS, "Ünïcödé ﷺ 猫 🧑\u200d🚀", "word " * 1000]
    expected = [len(encoder.tokenizer(caption, verbose=False)["input_ids"]) for caption in captions]
    assert encoder.count_tokens(captions).tolist() == expected


def test_states_do_not_depend_on_the_neighbours(tmp_path):
    encoder = TextEncoder(str(tiny_models.save_bert(tmp_path)))
    captions = [f"{'very ' * (i % 6)}{i}" for i in range(20)]
    together = encoder.encode_tokens(captions).states
    for number in (0, 7, 17):
        (alone,) = encoder.encode_tokens([captions[number]]).states
        assert np.array_equal(together[number], alone)


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_gives_the_same_bytes(tmp_path):
    encoder, asked = TextEncoder(str(tiny_models.save_bert(tmp_path))), []
    captions = [f"{'very ' * (i % 6)}{i}" for i in range(20)]
    whole = encoder.encode_tokens(captions)

    def little(module, arguments, inputs):
        asked.append(len(inputs["input_ids"]))
        if asked[-1] > 3:
            raise MemoryError

    encoder.model.register_forward_pre_hook(little, with_kwargs=True)
    halves = encoder.encode_tokens(captions)
    assert asked[:3] == [8, 4, 2]
    assert set(asked[3:]) == {2}  # what did not fit is not tried again
    assert np.array_equal(halves.pooled, whole.pooled)
    assert all(np.array_equal(own, other) for own, other in zip(halves.states, whole.states, strict=True))


def test_a_model_of_no_known_family_is_rejected_before_anything_is_loaded(tmp_path):
    for config, named in [({"model_type": "gpt2"}, "is of the type 'gpt2'"), ({}, "without a model_type")]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"encode_text\.model: .* {named}, .* allowed are .*bert.*clip.*t5"):
            TextEncoder(str(tmp_path))
