"""What a network takes of its base: by name and shape, and only where the weights mean the same."""

import pytest
import torch
from tiny_models import save_tiny_unet

from latentloom.base_model import compare, take_weights
from latentloom.errors import UserError
from latentloom.model_files import EncoderReference, ModelConfig, load_model

OTHER = EncoderReference(reference="owner/other", class_name="Other", fingerprint="f" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_unet(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def base(folder) -> ModelConfig:
    return load_model(folder)[1]


def changed(config: ModelConfig, **values) -> ModelConfig:
    return config.model_copy(update=values)


@pytest.mark.parametrize(
    ("values", "new", "left"),
    [
        ({"latent_shape": (4, 16, 16)}, "none", None),
        ({"latent_shapes": ((4, 8, 8), (4, 16, 16))}, "size_projection", None),
        ({"token_dim": 384}, "token_whitening, token_projection", None),
        ({"block_depth": 2}, "downs.0.layers.1, downs.1.layers.1, ups.0.layers.1, ups.1.layers.1", None),
        ({"text_encoder": OTHER}, "text_whitening", None),
    ],
)
def test_what_the_base_lacks_starts_as_in_any_training_and_all_else_is_taken(folder, base, values, new, left):
    wanted = changed(base, **values)
    torch.manual_seed(5)
    network = wanted.build()
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    carried = take_weights(network, wanted, folder, "base", strict=False)
    source = load_model(folder)[0].state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, (source if name in carried.taken else fresh)[name], rtol=0, atol=0)
    assert f"start anew: {new}" in carried.lines()
    assert set(carried.taken) | set(carried.new) == set(fresh)
    assert carried.weights == sum(source[name].numel() for name in carried.taken)


def test_what_the_network_has_no_place_for_is_named_and_strict_rejects_both(base):
    several = changed(base, latent_shapes=((4, 8, 8), (4, 16, 16)))
    carried = compare(several, base, "base", strict=False)
    assert carried.lines()[1:] == ["start anew: none", "left behind: size_projection"]
    assert compare(base, base, "base", strict=True).new == ()
    for one, other in ((several, base), (base, several)):
        with pytest.raises(UserError, match=r"(?s)train\.init_strict = true asks:.* size_projection\n.*set"):
            compare(one, other, "base", strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (16, 48)}, "model.widths = [16, 48], and the base has [16, 32]: set model.widths: [16, 32]"),
        ({"widths": (16, 32, 32)}, "model.widths = [16, 32, 32], and the base has [16, 32]"),
        ({"emb_size": 24}, "model.emb_size = 24, and the base has 16: set model.emb_size: 16"),
        ({"schedule": "linear"}, "diffusion.schedule = linear, and the base has vp: set diffusion.schedule: vp"),
        ({"vae": OTHER}, "encode_images.vae = owner/other (ffffffffffff), and the base knows the latents of bundled ("),
        (
            {"text_dim": 512, "text_encoder": OTHER},
            "encode_text.model = owner/other (ffffffffffff), whose embeddings have 512 numbers, and the base reads "
            "those of bundled (e5e5cce28738), of 384: set encode_text.model: bundled",
        ),
    ],
)
def test_what_cannot_fit_is_named_with_what_to_set(base, values, message):
    with pytest.raises(UserError, match=r"^train\.init = base does not fit:\n") as rejected:
        compare(base, changed(base, **values), "base", strict=False)
    assert message in str(rejected.value)
    assert str(rejected.value).endswith("or set train.init: null")


def test_every_shape_that_differs_is_named(folder, base):
    wanted = changed(base, widths=(16, 48))
    own, other = wanted.build().state_dict(), load_model(folder)[0].state_dict()
    different = [name for name in own if name in other and own[name].shape != other[name].shape]
    with pytest.raises(UserError) as rejected:
        compare(base, wanted, "base", strict=False)
    lines = [line.partition(":")[0].strip() for line in str(rejected.value).splitlines()[1:-2]]
    assert lines == different
    assert "  middle.0.residual.conv1.weight: (32, 32, 3, 3) in the base, (48, 48, 3, 3) here" in str(rejected.value)


def test_another_text_encoder_size_or_spread_of_the_latents_is_remarked(base):
    assert compare(base, base, "base", strict=False).remarks == ()
    wanted = changed(base, text_encoder=OTHER, latent_std=(0.9, 0.9, 0.9, 1.8), latent_shape=(4, 16, 16))
    captions, size, latents = compare(base, wanted, "base", strict=False).remarks
    assert "it may have seen those that are held out now" in size
    assert "owner/other (ffffffffffff), and in the base by bundled (e5e5cce28738)" in captions
    assert "1.00 to 2.00 times the standard deviation" in latents
