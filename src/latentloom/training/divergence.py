"""When a training has diverged: a loss that is no finite number, or gradients far beyond their history."""

import torch

from latentloom.errors import UserError

NORMS_KEPT = 500  # gradient norms of the last steps, with which new ones are compared
FEWEST_NORMS = 50  # below so many, nothing is compared
EXPLODED = 100.0  # times the usual norm


class TrainingDivergedError(UserError):
    """The loss or the gradient is no finite number, or gradients have exploded; the message says when and what to try.

    The checkpoints from before are kept.
    """


class DivergenceCheck:
    """Checks losses and gradient norms, some steps at a time, so that the device is seldom waited for.

    Gradients have exploded when the median norm of the new steps is ``EXPLODED`` times the median of the steps before:
    a single outlier is clipped and forgotten, and a slow drift is followed.

    Attributes:
        norms: the last gradient norms, on the CPU: all the state there is.
    """

    def __init__(self) -> None:
        self.norms = torch.empty(0)

    def check(self, losses: torch.Tensor, norms: torch.Tensor, last_step: int) -> None:
        """Check the steps up to ``last_step``: losses (n,) and gradient norms before clipping (n,), on the CPU.

        Raises:
            TrainingDivergedError: naming the first bad step.
        """
        first_step = last_step - len(losses) + 1
        bad = (~(losses.isfinite() & norms.isfinite())).nonzero()
        if len(bad):
            first = int(bad[0])
            raise TrainingDivergedError(
                _message(first_step + first, f"loss {float(losses[first])}, gradient norm {float(norms[first])}")
            )
        if len(self.norms) >= FEWEST_NORMS:
            usual, now = float(self.norms.median()), float(norms.median())
            if now > EXPLODED * usual:
                first = int((norms > EXPLODED * usual).nonzero()[0])
                raise TrainingDivergedError(
                    _message(first_step + first, f"gradient norm {float(norms[first]):.3g}, {usual:.3g} before")
                )
        self.norms = torch.cat([self.norms, norms])[-NORMS_KEPT:]


def _message(step: int, what: str) -> str:
    return (
        f"training diverged at step {step}: {what}. "
        "Try a lower train.learning_rate, more train.warmup_steps, or train.precision: fp32."
    )
