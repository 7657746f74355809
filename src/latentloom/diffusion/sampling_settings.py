"""How a sample is generated: the one declaration of its settings, and of what may be asked for.

The same `SamplingSettings` are read from ``params.yaml``, are taken by the `Diffuser`, and are written into an image's
metadata, the MLflow run and the registered model. A `SampleRequest` is what the command line, Python and HTTP ask for:
they have the same names, the same limits and the same messages, since none of them checks anything itself.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SAMPLER_NAMES = ("ddim", "dpmpp_2m")
PRECISIONS = ("auto", "fp32", "bf16")
LARGEST = 2**63 - 1  # of seeds and of samples' numbers
MOST_SAMPLES = 10_000  # per prompt


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a sample.

    diffusion_steps:      sampling steps, from 2 to 1000.
    class_guidance:       w of classifier-free guidance: 1 is the plain conditional model, more follows the text.
    sampler:              `ddim` or `dpmpp_2m`.
    guidance_interval:    the lowest and the highest noise level at which guidance acts; at other levels the prediction
                          is the plain conditional one, for half the work (Kynkäänniemi et al. 2024).
    guidance_rescale:     phi, from 0 to 1: how far the guided prediction is scaled back to the standard deviation of
                          the conditional one, per sample (Lin et al. 2024, eq. 15 and 16).
    threshold_percentile: of dynamic thresholding (Saharia et al. 2022), above 50; None: no thresholding.
    precision:            what the network computes in: `fp32`, `bf16`, or `auto` (bf16 where the device is good at it).

    Raises `ValueError` naming the setting, its value and what is allowed.
    """

    diffusion_steps: int = 70
    class_guidance: float = 3.0
    sampler: str = "ddim"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    threshold_percentile: float | None = 99.5
    precision: str = "auto"

    def __post_init__(self) -> None:
        _check_integer("diffusion_steps", self.diffusion_steps, 2, 1000)
        _check_number("class_guidance", self.class_guidance, 0.0)
        _check_choice("sampler", self.sampler, SAMPLER_NAMES)
        object.__setattr__(self, "guidance_interval", _interval("guidance_interval", self.guidance_interval))
        _check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.threshold_percentile is not None:
            _check_number("threshold_percentile", self.threshold_percentile, 50.0, 100.0, or_none=True)
        _check_choice("precision", self.precision, PRECISIONS)

    def changed(self, **given: Any) -> SamplingSettings:
        """These settings, with those that are given and not None in their place.

        Raises `ValueError` as the constructor does.
        """
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """Settings from JSON, as `dataclasses.asdict` gives them; what is missing has its default.

        Raises `ValueError` as the constructor does, and for a name that is no setting.
        """
        if unknown := values.keys() - set(SETTING_NAMES):
            raise ValueError(f"{', '.join(sorted(unknown))}: not a setting; settings are {', '.join(SETTING_NAMES)}")
        return cls(**values)


SETTING_NAMES = tuple(field.name for field in fields(SamplingSettings))
# As options of the command line and params of a served model.
SHORT_NAMES = {"steps": "diffusion_steps", "guidance": "class_guidance", "threshold": "threshold_percentile"}


@dataclass(frozen=True)
class SampleRequest:
    """Which samples of each prompt, and how.

    settings: of each sample.
    seed:     of the noise that samples start from, from 0 to 2**63 - 1.
    count:    samples per prompt, from 1 to 10,000.
    first:    the number of each prompt's first sample; its noise is a function of the seed and its number.
    size:     of the images, `WIDTHxHEIGHT` in pixels; None: the model's own. Which there are, a model knows.
    negative: a prompt that samples are guided away from; None, or blank: from what the model makes without any text.

    Raises `ValueError` naming the option, its value and what is allowed.
    """

    settings: SamplingSettings
    seed: int = 0
    count: int = 1
    first: int = 0
    size: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        _check_integer("seed", self.seed, 0, LARGEST)
        _check_integer("count", self.count, 1, MOST_SAMPLES)
        _check_integer("first", self.first, 0, LARGEST - MOST_SAMPLES)
        if not isinstance(self.size, str | None):
            raise ValueError(f"size = {self.size!r}: must be text such as 192x128, or none")
        if not isinstance(self.negative, str | None):
            raise ValueError(f"negative = {self.negative!r}: must be text, or none")
        if self.negative is not None and not self.negative.strip():
            object.__setattr__(self, "negative", None)

    @classmethod
    def of(cls, settings: SamplingSettings, options: Mapping[str, Any]) -> SampleRequest:
        """What ``options`` ask for; what they leave out is as in ``settings``, and one sample of seed 0.

        Raises `ValueError` as the constructors do, and for a name that is no option.
        """
        if unknown := [name for name in options if name not in OPTION_NAMES]:
            close = _SHORT.get(unknown[0]) or next(iter(difflib.get_close_matches(unknown[0], OPTION_NAMES)), None)
            hint = f" (did you mean {close}?)" if close else ""
            raise ValueError(f"{', '.join(unknown)}: not an option{hint}; options are {', '.join(OPTION_NAMES)}")
        which = {name: value for name, value in options.items() if name in WHICH}
        how = {SHORT_NAMES.get(name, name): value for name, value in options.items() if name not in WHICH}
        return cls(replace(settings, **how), **which)

    def options(self) -> dict[str, Any]:
        """All options by their names: `of` gives the same request for them."""
        values = asdict(self.settings) | {name: getattr(self, name) for name in WHICH}
        return {name: values[SHORT_NAMES.get(name, name)] for name in OPTION_NAMES}


WHICH = tuple(field.name for field in fields(SampleRequest))[1:]
_SHORT = {setting: name for name, setting in SHORT_NAMES.items()}
OPTION_NAMES = (*WHICH, *(_SHORT.get(name, name) for name in SETTING_NAMES))


def _check_choice(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")


def _check_integer(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{name} = {value!r}: must be a whole number from {lowest} to {highest}")


def _check_number(name: str, value: object, lowest: float, highest: float = math.inf, *, or_none: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not lowest <= value <= highest:
        bounds = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} = {value!r}: must be a number, {bounds}{', or none' if or_none else ''}")


def _interval(name: str, value: Any) -> tuple[float, float]:
    allowed = "must be [lowest, highest] noise level with lowest < highest, both from 0 to 1"
    try:
        low, high = value
        ordered = 0 <= low < high <= 1
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise ValueError(f"{name} = {value!r}: {allowed}")
    return (float(low), float(high))
