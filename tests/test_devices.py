"""The device comes from the machine, the precision from what it is good at."""

import pytest
import torch

from latentloom.devices import autocast, autocast_dtype, choose_device


def test_the_environment_names_the_device(monkeypatch):
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_rejected_with_what_is_allowed(monkeypatch, name):
    monkeypatch.setenv("LATENTLOOM_DEVICE", name)
    with pytest.raises(ValueError, match=f"LATENTLOOM_DEVICE={name} cannot be used here .*try cuda, mps or cpu"):
        choose_device()


def test_precision_asked_for_is_precision_used():
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
    assert autocast_dtype("auto", torch.device("mps")) is None
    product = torch.ones(4, 4)
    with autocast(None, cpu):
        assert (product @ product).dtype is torch.float32
    with autocast(torch.bfloat16, cpu):
        assert (product @ product).dtype is torch.bfloat16
