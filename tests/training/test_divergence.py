"""A training that has diverged stops and says when; one that only stumbles continues."""

import math

import pytest
import torch

from latentloom.training.divergence import TrainingDivergedError, check_divergence

HEALTHY = 1 + torch.rand(100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_the_run_and_says_when_and_what_to_try(fault, of):
    losses, norms = torch.full((10,), 0.3), torch.full((10,), 1.0)
    (losses if of == "loss" else norms)[7] = fault
    with pytest.raises(TrainingDivergedError, match=rf"at step 18: .*{of} {fault}.*Try a lower train\.learning_rate"):
        check_divergence(losses, norms, torch.empty(0), last_step=20)


def test_gradients_that_explode_and_stay_so_stop_the_run_and_say_when():
    norms = torch.tensor([1.0, 1.0, 1.0, 1e3, 1e4, 1e5, 1e6])
    with pytest.raises(TrainingDivergedError, match=r"at step 104: gradient norm 1e\+03, 1\.\d+ before"):
        check_divergence(torch.full((7,), 0.3), norms, HEALTHY, last_step=107)


def test_a_single_outlier_is_tolerated():
    norms = torch.ones(10)
    norms[4] = 1e6
    check_divergence(torch.full((10,), 0.3), norms, HEALTHY, last_step=110)


def test_norms_that_grow_slowly_are_followed():
    norms = torch.tensor([1.05**number for number in range(200)]).repeat_interleave(10)
    for last in range(10, 2001, 10):
        check_divergence(torch.full((10,), 0.3), norms[last - 10 : last], norms[: last - 10], last)


def test_the_first_steps_may_be_as_wild_as_they_like():
    check_divergence(torch.full((20,), 0.3), torch.logspace(-4, 4, 20), torch.ones(20), last_step=40)
