"""When a training has diverged: a loss that is no finite number, or gradients far beyond their history."""

import torch

from latentloom.errors import UserError

NORMS_COMPARED = 500  # gradient norms of the last steps, with which new ones are compared
FEWEST_NORMS = 50  # below so many, nothing is compared
EXPLODED = 100.0  # times the usual norm


class TrainingDivergedError(UserError):
    """The loss or the gradient is no finite number, or gradients have exploded; the message says when and what to try.

    The checkpoints from before are kept.
    """


def check_divergence(losses: torch.Tensor, norms: torch.Tensor, norms_before: torch.Tensor, last_step: int) -> None:
    """Check the steps up to ``last_step``: losses (n,) and gradient norms before clipping (n,), on the CPU.

    Gradients have exploded when the median norm of the steps is ``EXPLODED`` times the median of the steps before:
    a single outlier is clipped and forgotten, and a slow drift is followed.

    Raises:
        TrainingDivergedError: naming the first bad step.
    """
    first_step = last_step - len(losses) + 1
    bad = (~(losses.isfinite() & norms.isfinite())).nonzero()
    if len(bad):
        first = int(bad[0])
        raise _diverged(first_step + first, f"loss {float(losses[first])}, gradient norm {float(norms[first])}")
    if len(norms_before) < FEWEST_NORMS:
        return
    usual = float(norms_before[-NORMS_COMPARED:].median())
    if float(norms.median()) > EXPLODED * usual:
        first = int((norms > EXPLODED * usual).nonzero()[0])
        raise _diverged(first_step + first, f"gradient norm {float(norms[first]):.3g}, {usual:.3g} before")


def _diverged(step: int, what: str) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"training diverged at step {step}: {what}. "
        "Try a lower train.learning_rate, more train.warmup_steps, or train.precision: fp32."
    )
