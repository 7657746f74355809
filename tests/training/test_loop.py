"""The loop learns, repeats itself exactly, resumes exactly from any step, and averages its weights."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from latent_data import captions_of, split_of_shapes

from latentloom.diffusion.text import Text, no_text
from latentloom.diffusion.unet import get_network
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.encoding.shard_files import TOKENS, ragged
from latentloom.errors import UserError
from latentloom.training.loop import TrainingState, ema_decay_at, learning_rate_at, losses, rank_slices, train


def network(seed: int = 0):
    torch.manual_seed(seed)
    return get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12).to(memory_format=torch.channels_last)


def run(data, params, diffusion, *, state=None, **options):
    state = state or TrainingState.start(network(), params)
    return state, list(train(state, data, params=params, diffusion=diffusion, **{"seed": 0} | options))


@pytest.fixture
def few_steps(train_params):
    """Enough for the rate to rise and fall, and for the moments of every weight to be there."""
    return train_params.model_copy(update={"steps": 10})


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_error_falls(make_data, train_params, diffusion_params):
    _, steps = run(make_data(8), train_params.model_copy(update={"steps": 80}), diffusion_params)
    first, last = (sum(float(step.mae) for step in part) / 20 for part in (steps[:20], steps[-20:]))
    assert last < 0.85 * first


def test_a_run_repeats_itself_bit_by_bit(make_data, few_steps, diffusion_params):
    (state, first), (other, again) = (run(make_data(8), few_steps, diffusion_params) for _ in range(2))
    assert [float(step.mae) for step in first] == [float(step.mae) for step in again]
    assert_equal(state.tensors(), other.tensors())


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", None), ("muon", torch.bfloat16)])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_run_resumes_from_any_step_bit_by_bit(make_data, few_steps, diffusion_params, stop, optimizer, dtype):
    data, few_steps = make_data(11, std=True), few_steps.model_copy(update={"optimizer": optimizer})
    whole, steps = run(data, few_steps, diffusion_params, dtype=dtype)
    begun = TrainingState.start(network(), few_steps)
    running = train(begun, data, params=few_steps, diffusion=diffusion_params, seed=0, dtype=dtype)
    for _ in range(stop):
        next(running)
    saved = {name: tensor.detach().clone().contiguous() for name, tensor in begun.tensors().items()}
    torch.rand(3)  # whatever else drew random numbers meanwhile
    resumed = TrainingState.start(network(seed=5), few_steps)
    resumed.load(saved, stop)
    resumed, rest = run(data, few_steps, diffusion_params, state=resumed, dtype=dtype)
    assert [float(step.loss) for step in rest] == [float(step.loss) for step in steps[stop:]]
    assert_equal(resumed.tensors(), whole.tensors())


@pytest.mark.slow
def test_a_compiled_training_makes_a_graph_for_each_of_more_shapes_than_torch_allows_by_itself(
    make_data, few_steps, diffusion_params, monkeypatch
):
    class Small(torch.nn.Conv2d):
        def forward(self, x_t, noise_levels, labels):
            return super().forward(x_t)

    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    data = split_of_shapes(make_data(5), *((1, (4, width)) for width in range(2, 7)))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        state = TrainingState.start(Small(4, 4, 1), few_steps)
        assert len(run(data, few_steps, diffusion_params, state=state, compiled=True)[1]) == few_steps.steps
    assert len(graphs) == 5


def test_a_state_that_does_not_fit_is_rejected_with_the_tensors_name(make_data, train_params, diffusion_params):
    state, _ = run(make_data(8), train_params.model_copy(update={"steps": 1, "warmup_steps": 0}), diffusion_params)
    tensors = dict(state.tensors())
    del tensors["exp_avg.head.bias"]
    with pytest.raises(UserError, match=r"exp_avg\.head\.bias is absent, expected \(4,\): .* code of another network"):
        TrainingState.start(network(), train_params).load(tensors, 1)


def test_another_seed_gives_another_run(make_data, few_steps, diffusion_params):
    (_, first), (_, other) = (run(make_data(8), few_steps, diffusion_params, seed=seed) for seed in (0, 1))
    assert float(first[-1].mae) != float(other[-1].mae)


def test_steps_are_numbered_and_each_has_its_own_rate(make_data, few_steps, diffusion_params):
    state = TrainingState.start(network(), few_steps)
    steps = train(state, make_data(8), params=few_steps, diffusion=diffusion_params, seed=0)
    for number, step in enumerate(steps, start=1):
        assert step.step == number
        rates = {group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups}
        assert rates == {learning_rate_at(number - 1, few_steps)}
    assert number == 10


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_one_after_the_other_give_the_gradient_of_the_whole(
    make_data, few_steps, diffusion_params, parts
):
    data = make_data(11, std=True)
    whole, steps = run(data, few_steps, diffusion_params)
    accumulated, again = run(data, few_steps.model_copy(update={"gradient_accumulation": parts}), diffusion_params)
    for one, other in zip(steps, again, strict=True):
        assert float(other.loss) == pytest.approx(float(one.loss), rel=1e-5)
        assert float(other.gradient_norm) == pytest.approx(float(one.gradient_norm), rel=1e-4)
    for name, tensor in whole.tensors().items():
        if name.startswith("exp_avg."):
            torch.testing.assert_close(accumulated.tensors()[name], tensor, rtol=1e-3, atol=1e-6)


def test_processes_and_parts_share_a_batch_without_overlap():
    taken = [list(range(64))[part] for process in range(4) for part in rank_slices(64, 2, process, 4)]
    assert [position for part in taken for position in part] == list(range(64))
    assert {len(part) for part in taken} == {8}
    with pytest.raises(ValueError, match=r"train\.batch_size 64 does not divide into 3 processes x 2 parts"):
        rank_slices(64, 2, 0, 3)


def test_gradient_checkpointing_changes_nothing_but_the_memory(make_data, few_steps, diffusion_params):
    plain, _ = run(make_data(8), few_steps, diffusion_params)
    state = TrainingState.start(network(), few_steps)
    state.network.gradient_checkpointing = True
    saving, _ = run(make_data(8), few_steps, diffusion_params, state=state)
    assert_equal(saving.tensors(), plain.tensors())


def test_losses_are_what_their_names_say(train_params):
    generator = torch.Generator().manual_seed(0)
    predicted, latents = torch.randn(2, 3, 4, 8, 8, generator=generator).double()
    error = (predicted - latents).abs()
    expected = {
        "mae": error.mean(),
        "mse": error.square().mean(),
        "huber": torch.where(error < 0.1, error.square() / 0.2, error - 0.05).mean(),
    }
    for name, value in expected.items():
        loss, mae = losses(predicted, latents, train_params.model_copy(update={"loss": name}))
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(mae, error.mean())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_other_losses_learn_and_the_mae_is_measured_with_them(make_data, train_params, diffusion_params, loss):
    _, steps = run(make_data(8), train_params.model_copy(update={"steps": 80, "loss": loss}), diffusion_params)
    first, last = (sum(float(step.mae) for step in part) / 20 for part in (steps[:20], steps[-20:]))
    assert last < 0.9 * first
    assert float(steps[-1].loss) != float(steps[-1].mae)


def test_the_average_is_the_exponential_moving_average_of_the_weights(make_data, few_steps, diffusion_params):
    state = TrainingState.start(network(), few_steps)
    average = [parameter.detach().double() for parameter in state.network.parameters()]
    for step in train(state, make_data(8), params=few_steps, diffusion=diffusion_params, seed=0):
        decay = math.exp(-8 / min(80, 0.8 * step.step))
        average = [
            decay * old + (1 - decay) * new.detach().double()
            for old, new in zip(average, state.network.parameters(), strict=True)
        ]
    for ours, expected in zip(state.average.parameters(), average, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-4)


def test_averaging_forgets_the_first_weights_soon():
    assert ema_decay_at(0, 8, 1e6) < 1e-4
    assert ema_decay_at(99, 8, 1e6) == pytest.approx(math.exp(-1 / 10))


def test_the_average_remembers_no_step(make_data, train_params, diffusion_params):
    state, _ = run(make_data(8), train_params.model_copy(update={"steps": 2}), diffusion_params)
    assert not any(parameter.requires_grad or parameter.grad_fn for parameter in state.average.parameters())


def test_the_averages_horizon_means_the_same_images_at_every_batch_size():
    for batch_size in (1, 8, 64):
        decay = ema_decay_at(10**6, batch_size, 12800)
        assert decay ** (12800 / batch_size) == pytest.approx(1 / math.e)


@pytest.mark.slow
def test_bf16_learns_as_well(make_data, train_params, diffusion_params):
    settings = train_params.model_copy(update={"steps": 30})
    _, plain = run(make_data(8), settings, diffusion_params)
    state, steps = run(make_data(8), settings, diffusion_params, dtype=torch.bfloat16)
    assert float(steps[-1].mae) == pytest.approx(float(plain[-1].mae), rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in state.average.parameters())


@pytest.mark.slow
def test_without_a_label_the_trained_network_answers_otherwise_than_with_one(make_data, train_params, diffusion_params):
    data = make_data(4)
    state, _ = run(data, train_params.model_copy(update={"steps": 200}), diffusion_params)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.ones(4)
    with torch.no_grad():
        named = state.average(noise, levels, data.primary_embeddings())
        shuffled = state.average(noise, levels, data.primary_embeddings().roll(1, 0))
        null = state.average(noise, levels, torch.zeros(4, 12))
    error = (named - data.latents_at(slice(0, 4))[0]).abs().mean()
    assert error < 0.9 * (shuffled - data.latents_at(slice(0, 4))[0]).abs().mean()
    assert error < 0.9 * (null - data.latents_at(slice(0, 4))[0]).abs().mean()


@pytest.mark.slow
def test_what_only_the_token_states_tell_is_learnt(make_data, train_params, diffusion_params):
    """All captions have one vector here, so that nothing else can tell which image is meant."""
    data = make_data(4, tokens=True)
    texts = data.embeddings_at(slice(0, 5))
    states = [own[mask] for own, mask in zip(texts.tokens, texts.mask, strict=True)]
    same = InMemoryRows({"embedding": torch.ones(5, 12), **ragged(states, TOKENS)})
    data = replace(data, text=same, captions=captions_of(torch.arange(4)[:, None]))
    torch.manual_seed(0)
    network = get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12, token_dim=10)
    network.token_whitening.fit(torch.cat(states))
    params = train_params.model_copy(update={"steps": 300})
    state, _ = run(data, params, diffusion_params, state=TrainingState.start(network, params))
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    named, latents = data.primary_embeddings(), data.latents_at(slice(0, 4))[0]

    def error(text: Text) -> float:
        with torch.no_grad():
            return float((state.average(noise, torch.ones(4), text) - latents).abs().mean())

    assert error(named) < 0.9 * error(named[torch.tensor([1, 2, 3, 0])])
    assert error(named) < 0.9 * error(no_text(named))
