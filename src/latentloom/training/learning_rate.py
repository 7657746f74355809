"""Learning-rate schedules: a linear warm-up, then what ``train.lr_schedule`` names.

cosine               half a cosine down to zero (Loshchilov & Hutter 2017); it needs to know its end from the start
constant             stays; a finished run can be extended
warmup_stable_decay  stays, then falls to zero over the last ``decay_steps`` as 1 - sqrt (Hu et al. 2024; the shape:
                     Hägele et al. 2024, section 3); a finished run can be extended from where its decay began
"""

import math

from latentloom.params import TrainParams


def learning_rate_at(step: int, params: TrainParams) -> float:
    """The rate of step ``step`` (from 0)."""
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    if params.lr_schedule == "cosine":
        progress = (step - params.warmup_steps) / max(params.steps - params.warmup_steps, 1)
        return params.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if step < open_ended_steps(params):
        return params.learning_rate
    return params.learning_rate * (1.0 - math.sqrt((step - open_ended_steps(params)) / params.decay_steps))


def open_ended_steps(params: TrainParams) -> int:
    """How many steps are the same whatever ``train.steps`` says, as long as it is no less: those before a decay."""
    return {
        "cosine": 0,
        "constant": params.steps,
        "warmup_stable_decay": params.steps - params.decay_steps,
    }[params.lr_schedule]
