"""A training that has diverged stops and says when; one that only stumbles continues."""

import math

import pytest
import torch

from latentloom.training.divergence import DivergenceCheck, TrainingDivergedError


def healthy(check, steps=100, last_step=100):
    noise = torch.rand(steps, generator=torch.Generator().manual_seed(0))
    check.check(torch.full((steps,), 0.3), 1 + noise, last_step)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_the_run_and_says_when_and_what_to_try(fault, of):
    losses, norms = torch.full((10,), 0.3), torch.full((10,), 1.0)
    (losses if of == "loss" else norms)[7] = fault
    with pytest.raises(TrainingDivergedError, match=rf"at step 18: .*{of} {fault}.*Try a lower train\.learning_rate"):
        DivergenceCheck().check(losses, norms, last_step=20)


def test_gradients_that_explode_and_stay_so_stop_the_run_and_say_when():
    check = DivergenceCheck()
    healthy(check)
    norms = torch.tensor([1.0, 1.0, 1.0, 1e3, 1e4, 1e5, 1e6])
    with pytest.raises(TrainingDivergedError, match=r"at step 104: gradient norm 1e\+03, 1\.\d+ before"):
        check.check(torch.full((7,), 0.3), norms, last_step=107)


def test_a_single_outlier_is_tolerated():
    check = DivergenceCheck()
    healthy(check)
    norms = torch.ones(10)
    norms[4] = 1e6
    check.check(torch.full((10,), 0.3), norms, last_step=110)


def test_norms_that_grow_slowly_are_followed():
    check = DivergenceCheck()
    for number in range(200):
        check.check(torch.full((10,), 0.3), torch.full((10,), 1.05**number), last_step=10 * number + 10)


def test_the_first_steps_may_be_as_wild_as_they_like():
    DivergenceCheck().check(torch.full((20,), 0.3), torch.logspace(-4, 4, 20), last_step=20)
