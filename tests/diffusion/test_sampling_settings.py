"""What samples are asked for: one set of names and limits, whoever asks."""

import pytest

from latentloom.diffusion import SampleRequest, SamplingSettings

OPTIONS = {
    "seed": 7,
    "count": 2,
    "first": 3,
    "size": "192x128",
    "negative": "a cat",
    "steps": 20,
    "guidance": 2.5,
    "sampler": "dpmpp_2m",
    "guidance_interval": (0.1, 0.9),
    "guidance_rescale": 0.3,
    "threshold": None,
    "precision": "fp32",
}


def test_what_is_asked_for_comes_back_by_the_same_names_and_the_rest_is_as_it_was():
    request = SampleRequest.of(SamplingSettings(), OPTIONS)
    assert request.options() == OPTIONS
    assert SampleRequest.of(request.settings, {}) == SampleRequest(request.settings)
    assert request.settings == SamplingSettings(20, 2.5, "dpmpp_2m", (0.1, 0.9), 0.3, None, "fp32")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seed", -1, "seed = -1: must be a whole number from 0 to 9223372036854775807"),
        ("seed", 2**63, "seed = 9223372036854775808: must be"),
        ("seed", True, "seed = True: must be"),
        ("count", 10_001, "count = 10001: must be a whole number from 1 to 10000"),
        ("first", 2**63 - 1, "first = 9223372036854775807: must be"),  # the last of as many as one may ask for is too
        ("size", 128, "size = 128: must be text such as 192x128, or none"),
        ("negative", 3, "negative = 3: must be text, or none"),
        ("steps", 20.0, r"diffusion_steps = 20\.0: must be"),
        ("threshold", 50 - 1e-9, "threshold_percentile = .*, or none"),
        (
            "smapler",
            "ddim",
            r"smapler: not an option \(did you mean sampler\?\); options are seed, count, first, size, negative",
        ),
        ("class_guidance", 2.0, r"class_guidance: not an option \(did you mean guidance\?\)"),
    ],
)
def test_what_cannot_be_asked_for_is_named_with_what_can(option, value, message):
    with pytest.raises(ValueError, match=message):
        SampleRequest.of(SamplingSettings(), {option: value})
