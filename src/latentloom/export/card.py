"""The card of an exported model, as the Hugging Face hub shows it: README.md, with what machines read at its head."""

import re
import shlex
import textwrap
from typing import Any

from latentloom.export.folders import SAMPLES, Exported
from latentloom.registry.figures import Figures, in_words
from latentloom.registry.registry import MEANINGS
from latentloom.sizes import Size

# Of the hub's names for licences, those that image data come under.
LICENCES = {
    **{f"CC {kind.upper()} {version}": f"cc-{kind}-{version}" for kind in ("by", "by-sa", "by-nc", "by-nc-sa", "by-nd")
       for version in ("2.0", "2.5", "3.0", "4.0")},
    **dict.fromkeys(("CC0", "CC0 1.0", "CC0-1.0"), "cc0-1.0"),
    **dict.fromkeys(("MIT", "mit"), "mit"),
    **dict.fromkeys(("Apache-2.0", "Apache 2.0"), "apache-2.0"),
}  # fmt: skip
USE = """
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
pipeline({prompt!r}, seed=0).images[0].save("picture.png")
```

`FOLDER` is this folder's path, or its name on the hub. `pip install diffusers transformers accelerate` is all that it
needs; the code that `trust_remote_code` lets run is `pipeline.py`, `unet/latentloom_unet.py` and
`scheduler/latentloom_scheduler.py`. On one machine's CPU the same call gives the same bytes. What a call may say
besides the prompt (or a list of prompts):

| argument | |
|---|---|
| `num_inference_steps`, `guidance_scale` | {steps} and {guidance} unless given |
| `height`, `width` | in pixels, multiples of {multiple}; {size} unless given |
| `negative_prompt` | what all images are guided away from |
| `num_images_per_prompt` | each from other noise |
| `image`, `strength` | a PIL image to start from, and how much of it is made anew, from 0 to 1; 0.6 unless given |
| `seed` | of the noise, 0 unless given; or `generator`, as elsewhere in diffusers |
| `sampler` | `ddim` or `dpmpp_2m` |
| `guidance_interval`, `guidance_rescale`, `threshold` | where guidance acts, how much contrast is taken back, the percentile of dynamic thresholding or `None` |
| `precision` | `fp32`, `bf16`, or `auto` |
| `output_type` | `pil`, `np`, `pt` or `latent` |
"""  # noqa: E501


def card(exported: Exported, figures: Figures, use: str = USE, library: str = "diffusers") -> str:
    """The text of README.md.

    Args:
        exported: the model.
        figures: what was measured of it; may be empty.
        use: how to use the folder, with places for what depends on the model.
        library: by which the hub says what loads the folder.
    """
    model, settings = exported.model, exported.settings
    config, factor = model.config, model.codec.vae.factor
    sizes = [str(Size(width * factor, height * factor)) for _, height, width in config.trained_shapes]
    own = Size(config.latent_shape[2] * factor, config.latent_shape[1] * factor)
    how = use.format(
        prompt=exported.prompts[0],
        shell_prompt=shlex.quote(exported.prompts[0]),
        steps=settings.diffusion_steps,
        guidance=f"{settings.class_guidance:g}",
        multiple=factor * model.network.multiple,
        size=own,
        max_tokens=model.text_encoder.max_tokens,
    )
    base = exported.base
    start = f"from the weights of another model, `{base['sha256'][:12]}`" if base else "from scratch"
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    paragraphs = [
        _head(exported, library),
        "# A text-to-image model",
        f"A latent diffusion model of {parameters:,} parameters, trained with Latent Loom {start}, for images of "
        f"{', '.join(sizes)}.",
        "\n".join(f"![{_plain(prompt)}]({SAMPLES}/{number}.png)" for number, prompt in enumerate(exported.prompts)),
        f"{'; '.join(map(_plain, exported.prompts))}: seed 0, {in_words(settings)}.",
        "## How to use it",
        how.strip(),
        "## Figures",
        _figures(figures),
        "## Data and licence",
        _data(exported),
        "## Limits",
        _limits(exported, figures, sizes),
        "## Parts",
        _parts(exported),
        "## Lineage",
        _lineage(exported),
    ]
    return (
        "\n\n".join(paragraph if "\n" in paragraph else textwrap.fill(paragraph, 120) for paragraph in paragraphs)
        + "\n"
    )


def _head(exported: Exported, library: str) -> str:
    from huggingface_hub import ModelCardData

    licence = exported.model.config.licence
    known: dict[str, Any] = {"license": LICENCES.get(licence or "", "other")}
    if known["license"] == "other":
        known["license_name"] = re.sub(r"[^\w.]+", "-", licence or "not known").lower()
    pictures = [
        {"text": prompt, "output": {"url": f"{SAMPLES}/{number}.png"}} for number, prompt in enumerate(exported.prompts)
    ]
    tags = ["text-to-image", "latent-diffusion", "latentloom"]
    data = ModelCardData(library_name=library, pipeline_tag="text-to-image", tags=tags, widget=pictures, **known)
    return f"---\n{data.to_yaml()}\n---"


def _figures(figures: Figures) -> str:
    if not figures.names:
        return "None are known: the model was not evaluated, or not where it was exported."
    rows = [f"| `{name}` | {figures.in_words(name)} | {MEANINGS.get(name, '')} |" for name in figures.names]
    how = f"\n\nOf {figures.samples} held-out captions, seed {figures.seed}." if figures.samples else ""
    return "\n".join(["| figure | value (95 % interval) | |", "|---|---|---|", *rows]) + how


def _data(exported: Exported) -> str:
    config, provenance = exported.model.config, exported.found.provenance
    ingested = provenance.ingested if provenance else {}
    named = " and ".join(str(source["name"]) for source in ingested.get("sources", []))
    said = [f"Trained on {named}." if named else "", config.attribution or "", _licence(config.licence)]
    return " ".join(part if part.endswith((".", ")")) or not part else f"{part}." for part in said if part)


def _licence(licence: str | None) -> str:
    if licence is None:
        return "The licence of the data is not known, and so what may be done with the model is not: find out."
    return f"The data's licence: {licence}. Whoever passes the model on passes that on, too."


def _limits(exported: Exported, figures: Figures, sizes: list[str]) -> str:
    tokens = exported.model.text_encoder.max_tokens
    limits = [
        "It knows what its training images show and their captions name, and nothing else; of other words it makes "
        "something, which may be anything.",
        f"It was trained on {', '.join(sizes)}; at other sizes samples may be worse.",
        f"Of a prompt the first {tokens} tokens are read.",
        "It has no filter: whoever shows its images to others has to look at them.",
    ]
    if exported.base and figures.names:
        limits.append(
            "The model that its training started from may have seen images that were held out for the figures: then "
            "those of held-out images and captions are too good."
        )
    if "copied_share" in figures.values:
        copied = f"{figures.in_words('copied_share')} of samples of held-out captions are nearer to a training image"
        limits.append(f"{copied} than 95 % of real held-out images are: it may repeat a training image.")
    return "\n".join(f"- {limit}" for limit in limits)


def _parts(exported: Exported) -> str:
    config = exported.model.config
    rows = [
        f"| {what} | {own.class_name} | {_reference(own.reference)} | `{own.fingerprint[:12]}` |"
        for what, own in (("VAE", config.vae), ("text encoder", config.text_encoder))
    ]
    told = "Both are pretrained, and come under licences of their own."
    return "\n".join(["| part | class | from | fingerprint |", "|---|---|---|---|", *rows]) + f"\n\n{told}"


def _reference(reference: str) -> str:
    """A reference to an encoder without the folders of this machine."""
    is_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    return "a local folder" if is_path else "Latent Loom's own" if reference == "bundled" else reference


def _lineage(exported: Exported) -> str:
    provenance = exported.found.provenance
    rows = [("model", exported.found.sha256)]
    if provenance:
        changed = ", with local changes" if provenance.dirty else ""
        rows += [("commit", f"{provenance.commit}{changed}")] if provenance.commit else []
        rows += [("model that it started from", exported.base["sha256"])] if exported.base else []
        rows += list(provenance.outs.items())
    table = "\n".join(["| | hash |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows)])
    return table + "\n\n`latentloom.json` has the same for machines. Each sample's PNG says how it was generated."


def _plain(prompt: str) -> str:
    """A prompt where Markdown would take some of its characters for its own."""
    return re.sub(r"([\[\]\\`*_<>|])", r"\\\1", " ".join(prompt.split()))
