"""The device comes from the machine, the precision from what it is good at."""

import pytest
import torch

from latentloom import devices
from latentloom.devices import autocast, autocast_dtype, check_convolutions, choose_device
from latentloom.errors import UserError

SETTINGS = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
)


def arithmetic() -> list[bool]:
    return [getattr(owner, name) for owner, name in SETTINGS]


@pytest.fixture
def approximate():
    """Torch's settings of CUDA's arithmetic, all for speed; they are set back after the test."""
    before = arithmetic()
    for owner, name in SETTINGS:
        setattr(owner, name, True)
    yield
    for (owner, name), value in zip(SETTINGS, before, strict=True):
        setattr(owner, name, value)


def test_the_environment_names_the_device(monkeypatch):
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
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


def test_fp32_on_cuda_is_fp32_in_products_and_in_convolutions(monkeypatch, approximate):
    monkeypatch.delenv("LATENTLOOM_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda")
    assert arithmetic() == [False, False, False]


def test_settings_of_cuda_are_left_alone_on_other_devices(monkeypatch, approximate):
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    choose_device()
    assert arithmetic() == [True, True, True]


def test_convolutions_that_agree_with_the_cpu_pass():
    check_convolutions.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("broken", [lambda wrong: wrong + 1.0, lambda wrong: wrong * float("nan")])
def test_on_mps_a_wrong_convolution_stops_with_its_kind_and_a_way_out(monkeypatch, broken):
    strided, calls = devices.CONVOLUTIONS["strided"], []

    def right_only_at_first(x, weight):
        calls.append(1)
        return strided(x, weight) if len(calls) == 1 else broken(strided(x, weight))

    monkeypatch.setitem(devices.CONVOLUTIONS, "strided", right_only_at_first)
    with pytest.raises(UserError, match=r"wrong convolutions \(strided\).*LATENTLOOM_DEVICE=cpu"):
        check_convolutions.__wrapped__(torch.device("cpu"))


def test_mps_is_checked_when_it_is_chosen(monkeypatch):
    checked = []
    monkeypatch.delenv("LATENTLOOM_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "check_convolutions", checked.append)
    assert choose_device() == torch.device("mps")
    assert checked == [torch.device("mps")]
