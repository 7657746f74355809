"""The validation error: fixed noise, comparable over time, the same rows every time, by bins of noise level."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from latentloom.diffusion.denoising_error import NOISE_SEED, ROWS_PER_CHUNK, denoising_error

SETTINGS = {"schedule": "vp", "noise_levels": "cosine"}
LEVELS = [math.sin(math.pi / 2 * (k + 0.5) / 8) for k in range(8)]


class Rows:
    """Random latents (rows, 4, 8, 8), each with a caption of its own, as `denoising_error` reads them."""

    device = torch.device("cpu")

    def __init__(self, rows: int, size: tuple[int, int] = (8, 8)) -> None:
        self.latent_shape = (4, *size)
        random = torch.Generator().manual_seed(0)
        self.latents = torch.randn(1000, *self.latent_shape, generator=random)[:rows]
        self.embeddings = torch.randn(1000, 12, generator=random)[:rows]
        self.rows_read: list[int] = []

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def buckets(self) -> list["Rows"]:
        return [self]

    def take(self, count: int) -> "Rows":
        taken = Rows(min(count, len(self)))
        taken.rows_read = self.rows_read
        return taken

    def latents_at(self, rows: slice) -> tuple[torch.Tensor, None]:
        self.rows_read += range(len(self))[rows]
        return self.latents[rows], None

    def primary_embeddings(self, rows: slice) -> torch.Tensor:
        return self.embeddings[rows]


class Shapes:
    """Rows of several shapes."""

    device = torch.device("cpu")

    def __init__(self, *buckets: Rows) -> None:
        self.buckets = buckets

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


class Zero(nn.Module):
    def forward(self, x_t, noise_levels, labels):
        return torch.zeros_like(x_t)


class Identity(nn.Module):
    """Gives its input back: the error is then that of the noise itself."""

    def forward(self, x_t, noise_levels, labels):
        return x_t


class Reads(nn.Module):
    """Answers with a number that the label gives."""

    def forward(self, x_t, noise_levels, labels):
        return labels.sum(1).view(-1, 1, 1, 1).expand_as(x_t)


class OneOf:
    """A process of a job; ``others`` is what the other processes measured."""

    def __init__(self, process_index: int, num_processes: int) -> None:
        self.process_index, self.num_processes = process_index, num_processes
        self.own = self.others = torch.zeros(())

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        self.own = tensor
        return tensor + self.others


def test_a_network_that_answers_zero_errs_by_the_mean_absolute_latent():
    data = Rows(10)
    error = denoising_error(Zero(), data, **SETTINGS)
    assert error["mae"] == pytest.approx(float(data.latents.abs().mean()), rel=1e-5)


def test_the_error_grows_with_the_noise_level():
    error = denoising_error(Identity(), Rows(50), **SETTINGS)
    bins = [error[f"mae_noise_{low:.2f}-{low + 0.25:.2f}"] for low in (0.0, 0.25, 0.5, 0.75)]
    assert bins == sorted(bins)


def test_the_error_is_what_the_formula_says():
    # z - (gamma z + alpha e) is normal with variance (1 - gamma)^2 + alpha^2; E|N(0, s)| = s sqrt(2 / pi).
    spread = [math.hypot(1 - math.sqrt(1 - level**2), level) for level in LEVELS]
    expected = np.mean(spread) * math.sqrt(2 / math.pi)
    assert denoising_error(Identity(), Rows(400), **SETTINGS)["mae"] == pytest.approx(expected, rel=0.02)


def test_it_is_the_same_at_every_call_and_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    following = torch.rand(1)
    torch.manual_seed(1)
    first = denoising_error(Identity(), Rows(10), **SETTINGS)
    assert torch.equal(torch.rand(1), following)
    assert denoising_error(Identity(), Rows(10), **SETTINGS) == first


def test_each_row_is_denoised_with_its_primary_caption():
    data = Rows(ROWS_PER_CHUNK + 10)
    expected = float((data.embeddings.sum(1).view(-1, 1, 1, 1) - data.latents).abs().mean())
    assert denoising_error(Reads(), data, **SETTINGS)["mae"] == pytest.approx(expected)


def test_a_rows_noise_does_not_depend_on_how_many_rows_there_are():
    sums = [denoising_error(Identity(), Rows(count), **SETTINGS)["mae"] * count for count in (20, 21, 22)]
    noise = torch.randn(ROWS_PER_CHUNK, 4, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))
    for added, row in ((sums[1] - sums[0], 20), (sums[2] - sums[1], 21)):
        latent = Rows(22).latents[row]
        errors = [((1 - math.sqrt(1 - level**2)) * latent - level * noise[row]).abs().mean() for level in LEVELS]
        assert added == pytest.approx(float(np.mean(errors)), rel=1e-4)


def test_of_several_shapes_each_image_counts_once_however_many_values_it_has():
    data = Shapes(Rows(ROWS_PER_CHUNK + 3, (4, 6)), Rows(5, (16, 12)))
    errors, chunk = [], 0
    for bucket in data.buckets:
        for latents in bucket.latents.split(ROWS_PER_CHUNK):
            drawn = torch.Generator().manual_seed(NOISE_SEED + chunk)
            noise = torch.randn(ROWS_PER_CHUNK, *latents.shape[1:], generator=drawn)[: len(latents)].double().numpy()
            chunk += 1
            for x0, epsilon in zip(latents.double().numpy(), noise, strict=True):
                errors.append([np.abs((1 - math.sqrt(1 - a * a)) * x0 - a * epsilon).mean() for a in LEVELS])
    measured = denoising_error(Identity(), data, **SETTINGS)
    assert measured["mae"] == pytest.approx(np.mean(errors), rel=1e-5)
    jobs = [OneOf(index, 2) for index in range(2)]
    for job in jobs:
        denoising_error(Identity(), data, accelerator=job, **SETTINGS)
    jobs[0].others = jobs[1].own
    assert denoising_error(Identity(), data, accelerator=jobs[0], **SETTINGS) == measured


@pytest.mark.parametrize("rows", [200, 900])
def test_at_most_the_first_so_many_rows_are_read_whatever_the_size_of_the_split(rows):
    data = Rows(rows)
    capped = denoising_error(Identity(), data, images=150, **SETTINGS)
    assert data.rows_read == list(range(150))
    assert capped == denoising_error(Identity(), Rows(150), **SETTINGS)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_rows_and_get_the_result_of_one(processes):
    alone = denoising_error(Identity(), Rows(600), **SETTINGS)
    jobs = [OneOf(index, processes) for index in range(processes)]
    data = [Rows(600) for _ in jobs]
    for job, rows in zip(jobs, data, strict=True):
        denoising_error(Identity(), rows, accelerator=job, **SETTINGS)
    assert sorted(row for rows in data for row in rows.rows_read) == list(range(600))
    measured = [job.own for job in jobs]
    for index, job in enumerate(jobs):
        job.others = sum(measured[:index] + measured[index + 1 :])
        assert denoising_error(Identity(), Rows(600), accelerator=job, **SETTINGS) == alone


def test_without_rows_there_is_no_error():
    assert denoising_error(Zero(), Rows(0), **SETTINGS) == {}
