"""The ways in which `benchmarks/on_gpu.py` computes a step are the step that the training computes."""

import pytest
import torch
import train_step
from gpu import variants, weights
from tiny_models import save_tiny_unet
from torch import nn
from train_step import Settings

from latentloom.diffusion.blocks import GroupNorm, SkipConv2d
from latentloom.errors import UserError
from latentloom.model_files import load_model

SETTINGS = Settings((16, 32), 1, 8, None, torch.device("cpu"), False, rows=32)


@pytest.mark.parametrize("norm", [GroupNorm.in_precision_of_input, variants.norm_in_channels_last])
def test_other_group_norms_are_group_norms_with_gradients_and_memory_format(norm):
    torch.manual_seed(0)
    layer = GroupNorm(4, 12)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (3 + 2 * torch.randn(5, 12, 6, 6)).contiguous(memory_format=torch.channels_last).requires_grad_()
    flowing = torch.randn(5, 12, 6, 6)
    exact = layer.double()(x.double())
    expected = torch.autograd.grad(exact, [x, *layer.parameters()], flowing.double())
    layer.float()
    out = norm(layer, x)
    assert torch.allclose(out.double(), exact, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(torch.autograd.grad(out, [x, *layer.parameters()], flowing), expected, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-3, rtol=1e-3)


def test_what_a_context_sets_is_set_back():
    def settings():
        backends = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
        return backends, GroupNorm.forward, SkipConv2d.forward

    before = settings()
    for context in (
        variants.tf32(True),
        variants.cudnn_benchmark(),
        variants.plain_convolutions(),
        variants.norms(nn.GroupNorm.forward),
    ):
        with pytest.raises(ZeroDivisionError), context:
            _ = 1 / 0
    assert settings() == before


def test_the_step_on_inputs_that_stay_in_place_has_the_losses_of_the_training():
    static, contender = variants.StaticStep(SETTINGS), train_step.ours(SETTINGS)
    own = [static.compute()]
    places = [tensor.data_ptr() for tensor in static.batch]
    assert torch.allclose(own[0], contender.step().loss)
    own.append(static.run())
    assert places == [tensor.data_ptr() for tensor in static.batch]
    assert own[1] != own[0]


def test_weights_in_parts_become_the_model_again(tmp_path):
    model = save_tiny_unet(tmp_path / "model")
    parts = weights.split(model, tmp_path / "parts", part_bytes=100_000)
    assert len(parts) > 3
    assert all(path.stat().st_size <= 100_000 for path in parts)
    weights.join(tmp_path / "parts", tmp_path / "again")
    (network, config), (again, same) = load_model(model), load_model(tmp_path / "again")
    assert config.model_copy(update={"weights_sha256": same.weights_sha256}) == same
    for name, weight in network.state_dict().items():
        assert torch.equal(weight.half().float(), again.state_dict()[name]), name


def test_a_missing_part_of_the_weights_is_noticed(tmp_path):
    parts = weights.split(save_tiny_unet(tmp_path / "model"), tmp_path / "parts", part_bytes=100_000)
    parts[2].unlink()
    with pytest.raises(UserError, match=r"part-02"):
        weights.join(tmp_path / "parts", tmp_path / "again")


def test_plain_convolutions_are_the_same_function():
    network = train_step.our_network(SETTINGS)
    given = train_step.latents(2, SETTINGS.device), torch.rand(2), train_step.texts(2, SETTINGS.device)
    ours = network(*given)
    with variants.plain_convolutions():
        assert torch.allclose(network(*given), ours, atol=1e-5)
