"""Learning rates warm up and then do what their schedule's name says."""

import math

import pytest

from latentloom.training.loop import learning_rate_at, open_ended_steps


def rates(params, **changes):
    params = params.model_copy(update=changes)
    return [learning_rate_at(step, params) for step in range(params.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "warmup_stable_decay"])
def test_every_schedule_warms_up_linearly_to_the_full_rate(train_params, schedule):
    got = rates(train_params, lr_schedule=schedule)
    assert got[:5] == pytest.approx([3e-3 * part / 5 for part in range(1, 6)])
    assert got[5] == pytest.approx(3e-3)


def test_cosine_falls_to_zero_over_half_a_period(train_params):
    assert rates(train_params)[5:] == pytest.approx([3e-3 * (1 + math.cos(math.pi * n / 35)) / 2 for n in range(35)])


def test_constant_stays(train_params):
    assert set(rates(train_params, lr_schedule="constant")[5:]) == {3e-3}


def test_warmup_stable_decay_stays_and_then_falls_as_one_minus_a_root(train_params):
    got = rates(train_params, lr_schedule="warmup_stable_decay", decay_steps=10)
    assert set(got[5:31]) == {3e-3}
    assert got[30:] == pytest.approx([3e-3 * (1 - math.sqrt(n / 10)) for n in range(10)])


@pytest.mark.parametrize(("schedule", "open_ended"), [("cosine", 0), ("constant", 40), ("warmup_stable_decay", 30)])
def test_the_open_ended_steps_have_the_same_rates_in_a_longer_run(train_params, schedule, open_ended):
    params = train_params.model_copy(update={"lr_schedule": schedule})
    assert open_ended_steps(params) == open_ended
    longer = params.model_copy(update={"steps": 100})
    assert rates(params)[:open_ended] == rates(longer)[:open_ended]


def test_without_a_warm_up_the_first_rate_is_the_full_one(train_params):
    assert rates(train_params, warmup_steps=0)[0] == 3e-3
