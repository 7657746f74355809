"""The loop learns, repeats itself exactly, averages its weights, and stops when it diverges."""

import math

import pytest
import torch

from latentloom.diffusion import get_network
from latentloom.training.loop import TrainingDivergedError, ema_decay_at, learning_rate_at, train


def network(seed: int = 0):
    torch.manual_seed(seed)
    return get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12)


def run(data, params, diffusion, *, net=None, seed=0):
    return list(train(net or network(), data, params=params, diffusion=diffusion, seed=seed))


def test_the_error_falls(make_data, train_params, diffusion_params):
    states = run(make_data(8), train_params.model_copy(update={"steps": 150}), diffusion_params)
    first, last = (sum(float(state.mae) for state in part) / 20 for part in (states[:20], states[-20:]))
    assert last < 0.85 * first


def test_a_run_repeats_itself_bit_by_bit(make_data, train_params, diffusion_params):
    first, again = (run(make_data(8), train_params, diffusion_params) for _ in range(2))
    assert [float(state.mae) for state in first] == [float(state.mae) for state in again]
    for one, other in zip(first[-1].average.parameters(), again[-1].average.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_seed_gives_another_run(make_data, train_params, diffusion_params):
    first, other = (run(make_data(8), train_params, diffusion_params, seed=seed) for seed in (0, 1))
    assert float(first[-1].mae) != float(other[-1].mae)


def test_states_are_numbered_and_tell_the_rate_that_was_used(make_data, train_params, diffusion_params):
    states = run(make_data(8), train_params, diffusion_params)
    assert [state.step for state in states] == list(range(1, 41))
    assert [state.learning_rate for state in states] == [learning_rate_at(step, train_params) for step in range(40)]


def test_the_average_is_the_exponential_moving_average_of_the_weights(make_data, train_params, diffusion_params):
    net = network()
    average = [parameter.detach().double() for parameter in net.parameters()]
    for state in train(net, make_data(8), params=train_params, diffusion=diffusion_params, seed=0):
        decay = math.exp(-8 / min(80, 0.8 * state.step))
        average = [
            decay * old + (1 - decay) * new.detach().double()
            for old, new in zip(average, net.parameters(), strict=True)
        ]
    for ours, expected in zip(state.average.parameters(), average, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-4)


def test_the_rate_warms_up_linearly_and_falls_to_zero_as_a_cosine(train_params):
    rates = [learning_rate_at(step, train_params) for step in range(41)]
    assert rates[:5] == pytest.approx([3e-3 * part / 5 for part in range(1, 6)])
    assert rates[5:] == pytest.approx([3e-3 * (1 + math.cos(math.pi * part / 35)) / 2 for part in range(36)])


def test_averaging_forgets_the_first_weights_soon():
    assert ema_decay_at(0, 8, 1e6) < 1e-4
    assert ema_decay_at(99, 8, 1e6) == pytest.approx(math.exp(-1 / 10))


def test_the_averages_horizon_means_the_same_images_at_every_batch_size():
    for batch_size in (1, 8, 64):
        decay = ema_decay_at(10**6, batch_size, 12800)
        assert decay ** (12800 / batch_size) == pytest.approx(1 / math.e)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_says_when_and_what_to_try(
    make_data, train_params, diffusion_params, fault
):
    net = network()
    steps = train(net, make_data(8), params=train_params, diffusion=diffusion_params, seed=0)
    for _ in range(7):
        next(steps)
    with torch.no_grad():
        net.head.bias.fill_(fault)
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 8: loss (nan|inf).*train\.learning_rate"):
        list(steps)


def test_bf16_learns_as_well(make_data, train_params, diffusion_params):
    settings = train_params.model_copy(update={"steps": 60})
    plain = run(make_data(8), settings, diffusion_params)
    states = list(
        train(network(), make_data(8), params=settings, diffusion=diffusion_params, seed=0, dtype=torch.bfloat16)
    )
    assert float(states[-1].mae) == pytest.approx(float(plain[-1].mae), rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in states[-1].average.parameters())


def test_without_a_label_the_trained_network_answers_otherwise_than_with_one(make_data, train_params, diffusion_params):
    data = make_data(4)
    state = run(data, train_params.model_copy(update={"steps": 200}), diffusion_params)[-1]
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.ones(4)
    with torch.no_grad():
        named = state.average(noise, levels, data.primary_embeddings())
        shuffled = state.average(noise, levels, data.primary_embeddings().roll(1, 0))
        null = state.average(noise, levels, torch.zeros(4, 12))
    error = (named - data.mean).abs().mean()
    assert error < 0.9 * (shuffled - data.mean).abs().mean()
    assert error < 0.9 * (null - data.mean).abs().mean()
