"""What is said of the showcase model, by its figures: `card.md` for its folder, `readme.md` for the project's README."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.tracking.provenance import Provenance

CARD, README = (
    Template(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("card.md", "readme.md")
)


def card(metrics: Mapping[str, Any], params: Params, known: Provenance, config: ModelConfig) -> str:
    """The card, in Markdown."""
    sampling, trained, rounding = params.evaluate.sampling, metrics["as_trained"], metrics["rounding"]
    ingested = known.ingested
    return CARD.substitute(
        _shares(metrics),
        sampling=f"{sampling.diffusion_steps} steps of {sampling.sampler} at guidance {sampling.class_guidance:g}",
        memorised=_share(trained, "memorisation_recall"),
        train_mae=f"{trained['train_mae']:.3f}",
        val_mae=f"{trained['val_mae']:.3f}" if "val_mae" in trained else "not measured",
        trained_recall=_share(trained, "held_out_recall_at_1"),
        commit=f"`{known.commit[:12]}`",
        kept=f"{ingested['kept']:,}",
        train=f"{ingested['train']:,}",
        validation=f"{ingested['validation']:,}",
        steps=f"{params.train.steps:,}",
        batch=params.train.batch_size,
        parameters=f"{trained['parameters']:,}",
        widths="/".join(map(str, config.widths)),
        cost=f" Training took {cost}." if (cost := _cost(metrics["training"])) else "",
        difference=f"{rounding['pixel_difference']:.2%}",
        same_nearest=round(rounding["same_nearest"] * rounding["captions"]),
        compared=rounding["captions"],
        attribution=config.attribution,
    )


def readme_lines(metrics: Mapping[str, Any]) -> str:
    """The first section of README.md, in Markdown."""
    trained, figures = metrics["as_trained"], metrics["figures"]
    return README.substitute(
        _shares(metrics),
        train=f"{figures['images'] - figures['held_out_images']:,}",
        parameters=f"{trained['parameters'] / 1e6:.0f} million",
        size=f"{2 * trained['parameters'] / 1e6:.0f} MB",
        cost_short=_cost(metrics["training"]) or "not recorded",
    )


def _shares(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What both texts say of the held-out captions."""
    figures = metrics["figures"]
    shares = {
        "recall_at_1": "held_out_recall_at_1",
        "recall_at_5": "held_out_recall_at_5",
        "toned": "skin_tones_recall_at_1",
        "figure": "skin_tones_figure_at_1",
        "others": "other_recall_at_1",
        "new_words": "new_words_recall_at_1",
        "copied": "copied_share",
    }
    counts = {
        "combinations": "held_out_combinations",
        "toned_count": "skin_tones_captions",
        "others_count": "other_captions",
        "new_words_count": "new_words_captions",
    }
    return {
        "images": f"{figures['images']:,}",
        **{short: _share(figures, name) for short, name in shares.items()},
        **{short: figures[name] for short, name in counts.items()},
    }


def _share(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "not measured"
    return f"{figures[name]:.2f} ({figures[f'{name}_low']:.2f} to {figures[f'{name}_high']:.2f})"


def _cost(training: Mapping[str, Any]) -> str | None:
    if training["seconds"] is None:
        return None
    precision = "bf16" if training["bf16"] else "fp32"
    return f"{training['seconds'] / 60:.0f} minutes in {precision} on {training['cores']} CPU cores"
