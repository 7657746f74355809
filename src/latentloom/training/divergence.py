"""When a training has gone wrong beyond repair: a loss that is no number, or gradients far beyond their history."""

import torch

HISTORY = 500  # steps whose gradient norms are remembered
ENOUGH_HISTORY = 50
FAR_BEYOND = 100.0


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient is no finite number, or gradients have exploded; the message says when and what to try.

    The checkpoints from before are kept.
    """


class DivergenceGuard:
    """Looks at the steps' losses and gradient norms, some steps at a time, so that the device is seldom waited for.

    Gradients count as exploded when the median norm of the steps looked at is ``FAR_BEYOND`` times the median of the
    steps before: a single outlier is clipped and forgotten, and norms that drift are followed.

    Attributes:
        norms: the last gradient norms, on the CPU; all that a resumed run needs to go on judging.
    """

    def __init__(self) -> None:
        self.norms = torch.empty(0)

    def check(self, losses: torch.Tensor, norms: torch.Tensor, last_step: int) -> None:
        """Judge the steps up to ``last_step``: losses (n,) and gradient norms before clipping (n,), on the CPU.

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
        if len(self.norms) >= ENOUGH_HISTORY:
            usual, now = float(self.norms.median()), float(norms.median())
            if now > FAR_BEYOND * usual:
                first = int((norms > FAR_BEYOND * usual).nonzero()[0])
                raise TrainingDivergedError(
                    _message(first_step + first, f"gradient norm {float(norms[first]):.3g}, {usual:.3g} before")
                )
        self.norms = torch.cat([self.norms, norms])[-HISTORY:]


def _message(step: int, what: str) -> str:
    return (
        f"training diverged at step {step}: {what}. "
        "Try a lower train.learning_rate, more train.warmup_steps, or train.precision: fp32."
    )
