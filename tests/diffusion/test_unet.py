"""The UNet: the shapes and sizes of the design, gradients everywhere, precision, and clear errors."""

import copy
import math

import pytest
import torch

from latentloom.diffusion import UNet, get_network


def tiny() -> UNet:
    torch.manual_seed(0)
    return UNet(4, (16, 32), 1, 16, 24)


def inputs(batch: int = 3, size: int = 8, text_dim: int = 24):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, size, size, generator=generator)
    return x_t, torch.rand(batch, generator=generator), torch.randn(batch, text_dim, generator=generator)


@pytest.fixture(scope="module")
def full_size() -> UNet:
    torch.manual_seed(0)
    return get_network(16, 2, 256, 4)


def test_the_full_size_network_has_the_shapes_and_the_size_of_the_design(full_size):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: seen.setdefault(name, out))
        for name, module in full_size.named_modules()
        if name in ("noise_embedding", "text_projection", "text_tokens", "middle.1")
        or (name.startswith(("downs.", "ups.")) and name.count(".") == 1)
    ]
    with torch.no_grad():
        x0_hat = full_size(torch.randn(2, 4, 16, 16), torch.rand(2, 1), torch.randn(2, 512))
    for hook in hooks:
        hook.remove()
    assert x0_hat.shape == (2, 4, 16, 16) and x0_hat.dtype == torch.float32
    assert seen["noise_embedding"].shape == (2, 32)
    assert seen["text_projection"].shape == (2, 256)
    assert seen["text_tokens"].shape == (2, 8, 256)
    skips = [skip.shape for level in range(3) for skip in seen[f"downs.{level}"][1]]
    assert skips == [(2, 128, 16, 16)] * 2 + [(2, 256, 8, 8)] * 2 + [(2, 512, 4, 4)] * 2
    assert seen["middle.1"].shape == (2, 512, 4, 4)
    assert [seen[f"ups.{i}"].shape[1:] for i in range(3)] == [(512, 4, 4), (256, 8, 8), (128, 16, 16)]
    assert 40e6 < sum(parameter.numel() for parameter in full_size.parameters()) < 60e6


def test_the_full_size_networks_gradient_reaches_every_parameter(full_size):
    """Zero-initialised layers hide what lies before them until they move, so all weights are moved first."""
    network = full_size
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-2)
    x_t, levels, text = inputs(2, 16, 512)
    (network(x_t, levels, text) - x_t).abs().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    network.zero_grad(set_to_none=True)
    assert silent == []


def test_one_optimizer_step_from_scratch_opens_the_way_to_every_parameter():
    network, (x_t, levels, text) = tiny(), inputs()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x_t, levels, text) - x_t).abs().mean().backward()
        silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        optimizer.step()
    assert silent == []


def test_the_same_seed_and_inputs_give_the_same_bytes():
    def weights_after_two_steps():
        network, (x_t, levels, text) = tiny(), inputs()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            (network(x_t, levels, text) - x_t).abs().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    assert torch.equal(weights_after_two_steps(), weights_after_two_steps())


def test_noise_levels_of_any_shape_mean_the_same_and_memory_format_does_not_matter():
    network, (x_t, levels, text) = tiny(), inputs()
    expected = network(x_t, levels, text)
    for shape in [(3, 1), (3, 1, 1, 1)]:
        torch.testing.assert_close(network(x_t, levels.reshape(shape), text), expected, rtol=0, atol=0)
    same = torch.full((3,), 0.3)
    torch.testing.assert_close(network(x_t, torch.tensor(0.3), text), network(x_t, same, text))
    torch.testing.assert_close(
        network(x_t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), levels, text), expected
    )


def test_a_texts_norm_does_not_matter_and_no_text_is_finite():
    network, (x_t, levels, text) = tiny(), inputs()
    torch.testing.assert_close(network(x_t, levels, 100 * text), network(x_t, levels, text))
    no_text = network(x_t, levels, torch.zeros_like(text))
    assert no_text.isfinite().all() and not torch.equal(no_text, network(x_t, levels, text))


def test_autocast_predicts_in_float32_close_to_full_precision():
    network, (x_t, levels, text) = tiny(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x_t, levels, text)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, network(x_t, levels, text), rtol=0, atol=0.02)


@pytest.mark.slow
def test_the_network_is_one_graph_with_no_breaks():
    network, arguments = tiny(), inputs()
    whole = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*arguments), network(*arguments))
    network.gradient_checkpointing = True
    torch.testing.assert_close(whole(*arguments), network(*arguments))


def gradients(network, dtype=None):
    """The gradients, and the bytes that the forward pass kept for them beside the weights."""
    x_t, levels, text = inputs()
    own, kept = {parameter.data_ptr() for parameter in network.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        loss = (network(x_t, levels, text) - x_t).abs().mean()
    kept = sum(kept.values())  # before the backward pass, which computes and keeps some of it once more
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}, kept


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_map_in_the_network_is_in_channels_last_memory_forward_and_backward(dtype):
    network = get_network(16, 1, 32, 4, widths=(16, 32), text_dim=12).to(memory_format=torch.channels_last)
    maps = []

    def keep(module, given, out):
        if out.ndim == 4:
            maps.append((type(module).__name__, out))
            if out.requires_grad and module is not network.head:  # whose gradient is as the loss leaves it
                out.register_hook(lambda gradient: maps.append((f"gradient of {type(module).__name__}", gradient)))

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = network(torch.randn(2, 4, 16, 16), torch.rand(2), torch.randn(2, 12))
    out.square().mean().backward()
    copied = [name for name, value in maps if not value.is_contiguous(memory_format=torch.channels_last)]
    assert len(maps) > 60
    assert copied == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradient_checkpointing_gives_the_same_gradients_bit_for_bit_from_less_memory(dtype):
    network = UNet(4, (16, 32), 2, 16, 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():  # past the zeros that hide what lies before them
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    assert not network.gradient_checkpointing
    expected, memory = gradients(network, dtype)
    network.gradient_checkpointing = True
    found, less_memory = gradients(network, dtype)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert less_memory < memory / 2


def test_gradient_checkpointing_is_for_training_alone():
    network, arguments = tiny(), inputs()
    expected = network(*arguments)
    network.gradient_checkpointing = True
    runs = []
    hook = network.middle[0].residual.register_forward_hook(lambda *_: runs.append(1))
    for training, with_grad, times in [(True, True, 2), (False, True, 1), (True, False, 1)]:
        runs.clear()
        network.train(training)
        with torch.set_grad_enabled(with_grad):
            predicted = network(*arguments)
        if with_grad:
            predicted.mean().backward()
        assert len(runs) == times
        assert torch.equal(predicted, expected)
    hook.remove()


def test_one_level_and_latents_that_are_not_square_work():
    assert UNet(8, (16,), 1, 16, 24)(torch.randn(2, 8, 5, 7), torch.rand(2), torch.randn(2, 24)).shape == (
        2,
        8,
        5,
        7,
    )


def test_height_and_width_are_treated_alike_whatever_they_are():
    """With every kernel transposed, the whole network gives the transposed prediction of a transposed latent."""
    torch.manual_seed(0)
    network = UNet(4, (16, 32, 64), 1, 16, 24)
    with torch.no_grad():  # attention starts by adding nothing
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    transposed = copy.deepcopy(network)
    with torch.no_grad():
        for weight in transposed.parameters():
            if weight.ndim == 4:
                weight.copy_(weight.mT.clone())
    _, levels, text = inputs()
    for height, width in ((4, 20), (12, 8), (28, 4)):  # odd multiples of 4, the least that this network takes
        x_t = torch.randn(3, 4, height, width)
        torch.testing.assert_close(
            transposed(x_t.mT, levels, text), network(x_t, levels, text).mT, rtol=1e-4, atol=1e-5
        )


def test_the_size_condition_tells_sizes_apart_and_changes_nothing_at_first():
    torch.manual_seed(0)
    plain = UNet(4, (16, 32), 1, 16, 24)
    torch.manual_seed(0)
    told = UNet(4, (16, 32), 1, 16, 24, size_condition=True)
    assert told.state_dict().keys() - plain.state_dict().keys() == {"size_projection.weight"}
    _, levels, text = inputs()
    x_t = torch.randn(3, 4, 12, 16)
    assert torch.equal(told(x_t, levels, text), plain(x_t, levels, text))
    (told(x_t, levels, text) - x_t).abs().mean().backward()
    assert told.size_projection.weight.grad.any()
    sizes = [(8, 8), (8, 16), (16, 8), (16, 16), (10, 8), (12, 12)]
    features = torch.stack([told.size_embedding(*size) for size in sizes])
    assert torch.pdist(features).min() > 0.3
    logs = torch.tensor([math.log2(8), math.log2(16)])
    angles = 2 * math.pi * torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2]) * logs[:, None]
    torch.testing.assert_close(features[1], torch.cat([angles.flatten().sin(), angles.flatten().cos()]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: get_network(10, 2, 256, 4), "latent_image_size 10 cannot be halved 2 times.*multiple of 4"),
        (lambda: get_network(16, 0, 256, 4), "no size below 1.*block_depth=0"),
        (lambda: get_network(16, 1, 256, 4, widths=()), "widths"),
    ],
)
def test_an_impossible_network_is_rejected(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("x_t", "levels", "text", "message"),
    [
        ((2, 8, 8, 4), (2,), (2, 24), r"x_t must be \(B, 4, H, W\), not \(2, 8, 8, 4\)"),
        ((2, 4, 9, 8), (2,), (2, 24), "multiples of 2, not 9x8"),
        ((2, 4, 8, 8), (3,), (2, 24), "3 noise levels for 2 samples"),
        ((2, 4, 8, 8), (2,), (2, 512), r"text_embeddings must be \(2, 24\)"),
        ((2, 4, 8, 8), (2,), (1, 24), r"text_embeddings must be \(2, 24\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_named(x_t, levels, text, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(x_t), torch.zeros(levels), torch.zeros(text))
