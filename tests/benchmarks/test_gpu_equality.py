"""What `benchmarks/on_gpu.py` compares tells a fault from rounding: on a CPU, with either of them added."""

import pytest
import torch
from gpu import equality
from synthetic import write_caches
from train_step import Settings

from latentloom.training.orthogonal import newton_schulz

SETTINGS = Settings((16, 32), 1, equality.BATCH, None, torch.device("cpu"), False)
ROUNDING = 2.6e-6  # how far the gradients of an H100 and of a CPU are apart, relative to their norm


def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient with noise, and all that is orthogonalised."""
    loss_and_gradients = equality._loss_and_gradients

    def with_noise(network, batch):
        loss, _ = loss_and_gradients(network, batch)
        for weight in network.parameters():
            noise = torch.randn_like(weight)
            weight.grad.add_(noise, alpha=float(ROUNDING * weight.grad.norm() / noise.norm()))
        return loss, equality._flat(weight.grad for weight in network.parameters())

    def orthogonalised(matrices, dtype):
        return newton_schulz(matrices * (1 + 1e-7 * torch.randn_like(matrices)))

    monkeypatch.setattr(equality, "_loss_and_gradients", with_noise)
    monkeypatch.setattr(equality, "_as_on_a_device", orthogonalised)


def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two trainings has a learning rate that is 1 % too large."""
    start, started = equality.TrainingState.start, []

    def larger_rate(optimizer, *_):
        for group in optimizer.param_groups:
            group["lr"] *= 1.01

    def started_with_a_fault(*arguments):
        started.append(start(*arguments))
        for optimizer in started[-1].optimizers if len(started) == 2 else ():
            optimizer.register_step_pre_hook(larger_rate)
        return started[-1]

    monkeypatch.setattr(equality.TrainingState, "start", started_with_a_fault)


@pytest.mark.parametrize(
    ("change", "gradients", "update", "holds"),
    [(rounded, (1e-6, 1e-5), (1e-8, 1e-4), True), (faulty, (0, 0), (0.0099, 0.0101), False)],
)
def test_a_step_on_two_devices_may_differ_by_rounding_and_not_by_a_percent_of_the_learning_rate(
    change, gradients, update, holds, tmp_path, monkeypatch
):
    write_caches(tmp_path, equality.ROWS, equality.HELD_OUT)
    change(monkeypatch)
    compared = equality._against_cpu(SETTINGS, tmp_path)
    for name, (low, high) in (("gradients", gradients), ("update", update)):
        assert low <= compared[f"of the {name}"] <= high, name
    assert compared["holds"] is holds
