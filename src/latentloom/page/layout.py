"""How the page looks, by Gradio: six tabs over the `Studio`, which does what they show.

Nothing leaves the machine: fonts are the system's, and Gradio's statistics, checks for versions, share links, history
of runs and API are off. One request is computed at a time; the others wait in a queue of bounded length.
"""

import html
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from latentloom.diffusion.sampling_settings import SAMPLER_NAMES
from latentloom.errors import UserError
from latentloom.evaluation.image_generator import STRENGTH
from latentloom.layout import IMAGES, NEAR_DUPLICATES, REJECTS
from latentloom.page import data
from latentloom.page.handlers import Studio
from latentloom.page.local import gr

QUEUE = 16  # requests that wait
LONGEST = 2000  # characters of a prompt
LARGEST_UPLOAD = "32mb"
BUTTONS = ["download", "fullscreen"]  # of pictures; another would share them on the web
KEPT, REJECTED, ALIKE = "kept", "rejected", "near duplicates"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
MODELS = "models/unet, showcase, champion, candidate, a version, or an MLflow run"
OPTIONS = ("negative", "seed", "count", "steps", "guidance", "sampler", "guidance_rescale", "threshold")


def warn(sentence: str) -> None:
    """Show a remark to the person whose request is being answered."""
    gr.Warning(html.escape(sentence))


def build(studio: Studio) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Latent Loom", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# Latent Loom")
        model = gr.Dropdown(studio.models, label="Model", allow_custom_value=True, elem_id="model", info=MODELS)
        with gr.Tab("Draw"):
            _draw(studio, model)
        with gr.Tab("From a picture"):
            _draw(studio, model, from_a_picture=True)
        with gr.Tab("Between"):
            _between(studio, model)
        with gr.Tab("Compare"):
            _compare(studio, model)
        with gr.Tab("Find"):
            _find(studio, model)
        with gr.Tab("Data"):
            _data(studio)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def serve(root: Path, host: str, port: int, *, wait: bool = True) -> gr.Blocks:
    """Serve the page of the project in ``root`` until Ctrl-C, or with ``wait`` false from a thread."""
    studio = Studio(root, warn)
    page = build(studio)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[str(studio.folder)],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=THEME,
    )
    return page


def said(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors that a person can fix are shown as their sentence."""

    def shown(error: Exception) -> gr.Error:
        if not isinstance(error, UserError) and not type(error).__module__.startswith("mlflow"):
            raise error
        return gr.Error(html.escape(str(error)), duration=None, print_exception=False)

    @wraps(handler)
    def once(*given: Any) -> Any:
        try:
            return handler(*given)
        except Exception as error:
            raise shown(error) from error

    @wraps(handler)
    def step_by_step(*given: Any) -> Iterator[Any]:
        try:
            yield from handler(*given)
        except Exception as error:
            raise shown(error) from error

    return step_by_step if inspect.isgeneratorfunction(handler) else once


def on(event: Callable[..., Any], handler: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Have a handler answer an event."""
    return event(
        said(handler), inputs, outputs, api_visibility="private", concurrency_id="all", show_progress="minimal"
    )


def _prompt(label: str = "Prompt", **more: Any) -> gr.Textbox:
    return gr.Textbox(label=label, max_length=LONGEST, **more)


def _number(label: str, value: float | None, **more: Any) -> gr.Number:
    return gr.Number(value, label=label, **({"precision": 0} | more))


def _gallery(label: str, **more: Any) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        columns=4,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=BUTTONS,
        **more,
    )


def _options(studio: Studio, model: gr.Dropdown, *, one: bool = False) -> Callable[[tuple[Any, ...]], dict[str, Any]]:
    """The fields of a request, in ``fields`` of what is returned, which makes options of their values."""
    own = studio.defaults(studio.models[0])
    negative = _prompt("Negative prompt", placeholder="what it should not be")
    with gr.Row():
        fields = [negative, _number("Seed", 0), _number("Count", 1 if one else 4, visible=not one)]
    with gr.Row():
        steps = _number("Steps", own["steps"])
        guidance = _number("Guidance", own["guidance"], precision=None)
        sampler = gr.Dropdown(list(SAMPLER_NAMES), value=own["sampler"], label="Sampler")
    with gr.Accordion("More", open=False), gr.Row():
        low, high = own["guidance_interval"]
        interval = [_number("Guidance from level", low, precision=None), _number("to level", high, precision=None)]
        rescale = _number("Guidance rescale", own["guidance_rescale"], precision=None)
        threshold = _number("Threshold percentile, or nothing", own["threshold"], precision=None)
    fields += [steps, guidance, sampler, rescale, threshold, *interval]

    def of_model(reference: str) -> list[Any]:
        chosen = studio.defaults(reference)
        return [*(chosen[name] for name in OPTIONS[3:]), *chosen["guidance_interval"]]

    on(model.input, of_model, [model], fields[3:])

    def options(values: tuple[Any, ...]) -> dict[str, Any]:
        *plain, low, high = values
        return dict(zip(OPTIONS, plain, strict=True)) | {"guidance_interval": (low, high)}

    options.fields = fields
    return options


def _draw(studio: Studio, model: gr.Dropdown, *, from_a_picture: bool = False) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            prompt = _prompt(placeholder="nothing, for variations" if from_a_picture else "a smiling cat")
            upload = gr.File(label="Picture", file_types=["image"], visible=from_a_picture)
            strength = gr.Slider(0, 1, STRENGTH, label="Strength: how much is made anew", visible=from_a_picture)
            options = _options(studio, model)
            with gr.Row():
                draw, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
        with gr.Column(scale=3):
            seen = gr.Image(
                label="As the model sees it", visible=from_a_picture, interactive=False, height=200, buttons=BUTTONS
            )
            pictures = _gallery("Pictures")
            made = gr.Textbox(
                label="What made the picture that is chosen", lines=2, buttons=["copy"], elem_classes="made"
            )
            with gr.Row():
                download = gr.DownloadButton("Download PNG")
                lineage, near = gr.Button("Lineage"), gr.Button("Nearest images of the data")
            told = gr.Code(label="Lineage", language="shell", interactive=False, lines=3, max_lines=30)
            nearest = _gallery("Nearest images of the data")
    paths, chosen = gr.State([]), gr.State()

    def drawn(reference: str, prompt: str, upload: str | None, strength: float, *values: Any) -> Iterator[list[Any]]:
        if from_a_picture and upload is None:
            raise UserError("choose a picture to start from")
        start = (upload, strength) if from_a_picture else ()
        for shown in studio.draw(reference, prompt, options(values), *start):
            yield [shown, [], None, None, None, None, None]
        files = [path for path, _ in shown]
        yield [shown, files, *choose(reference, files, 0), None, None]

    def choose(reference: str, files: list[str], place: int) -> list[Any]:
        return [files[place], studio.command_of(files[place], reference), files[place]]

    def selected(reference: str, files: list[str], event: gr.SelectData) -> list[Any]:
        return choose(reference, files, event.index) if files else [None, None, None]

    def of_chosen(what: Callable[..., Any], *given: Any) -> Any:
        if not given[-1]:
            raise UserError("draw a picture first")
        return what(*given)

    shown = [pictures, paths, chosen, made, download, told, nearest]
    drawing = on(draw.click, drawn, [model, prompt, upload, strength, *options.fields], shown)
    stop.click(None, cancels=[drawing], api_visibility="private")
    pictures.select(selected, [model, paths], [chosen, made, download], api_visibility="private")
    on(lineage.click, lambda path: of_chosen(studio.lineage_of, path), [chosen], told)
    on(near.click, lambda *given: of_chosen(studio.nearest, *given), [model, chosen], nearest)
    if from_a_picture:
        on(upload.upload, studio.prepared, [model, upload], seen)


def _between(studio: Studio, model: gr.Dropdown) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            a, b = _prompt("From"), _prompt("To; nothing: the same")
            with gr.Row():
                to_seed, count = _number("To seed", 0), _number("Pictures", 8)
            options = _options(studio, model, one=True)
            draw = gr.Button("Draw the way", variant="primary")
        with gr.Column(scale=3):
            strip = gr.Image(label="Strip", type="filepath", format="png", interactive=False, buttons=BUTTONS)
            moving = gr.Image(
                label="There and back", type="filepath", format="webp", interactive=False, buttons=BUTTONS
            )
            files = gr.File(label="PNG, WebP, GIF", file_count="multiple", interactive=False)

    def drawn(reference: str, a: str, b: str, to_seed: int, count: int, *values: Any) -> list[Any]:
        made = studio.between(reference, [a, b], options(values), pictures=count, to_seed=to_seed)
        return [made[0], made[1], list(made)]

    on(draw.click, drawn, [model, a, b, to_seed, count, *options.fields], [strip, moving, files])


def _compare(studio: Studio, model: gr.Dropdown) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            other = gr.Dropdown(studio.models, value="showcase", label="With", allow_custom_value=True, info=MODELS)
            prompt, options = _prompt(), _options(studio, model)
            draw = gr.Button("Compare", variant="primary")
        with gr.Column(scale=3):
            sides = [_gallery("The model above"), _gallery("With")]

    def drawn(a: str, b: str, prompt: str, *values: Any) -> Iterator[list[Any]]:
        left = []
        for left in studio.draw(a, prompt, options(values)):
            yield [left, []]
        for right in studio.draw(b, prompt, options(values)):
            yield [left, right]

    on(draw.click, drawn, [model, other, prompt, *options.fields], sides)


def _find(studio: Studio, model: gr.Dropdown) -> None:
    gr.Markdown("The images of the data nearest to a picture, by their latents: did it copy?")
    with gr.Row():
        with gr.Column(scale=2):
            upload = gr.File(label="Picture", file_types=["image"])
            seen = gr.Image(label="As the model sees it", interactive=False, height=200, buttons=BUTTONS)
        with gr.Column(scale=3):
            nearest = _gallery("Nearest images of the data")
    on(
        upload.upload,
        lambda *given: (studio.prepared(*given), studio.nearest(*given)),
        [model, upload],
        [seen, nearest],
    )


def _data(studio: Studio) -> None:
    with gr.Row():
        what = gr.Radio([KEPT, REJECTED, ALIKE], value=KEPT, label="Show")
        words, page = _prompt("Words, in captions"), _number(f"Page of {data.ROWS} rows", 1)
        look = gr.Button("Show", variant="primary")
    pictures = _gallery("Images")
    table = gr.Dataframe(label="Rows", interactive=False, wrap=True, datatype="str")

    def shown(what: str, words: str, page: int) -> list[Any]:
        images = studio.root / IMAGES
        if what == KEPT:
            rows = data.kept(images, words, page)
            cells = [[row.key, row.split, "; ".join(row.captions)] for row in rows]
            return [_captioned(rows), {"headers": ["key", "split", "captions"], "data": cells}]
        if what == REJECTED:
            rejects = data.rejected(studio.root / REJECTS, words, page)
            cells = [[row[name] for name in ("source", "key", "reason", "detail")] for row in rejects]
            pictures = [(data.decode(row["preview"]), row["reason"]) for row in rejects if row["preview"]]
            return [pictures, {"headers": ["source", "key", "reason", "detail"], "data": cells}]
        pairs = data.alike(studio.root / NEAR_DUPLICATES, images, words, page)
        cells = [[a.key, b.key, distance, "; ".join(a.captions), "; ".join(b.captions)] for a, b, distance in pairs]
        both = [row for a, b, _ in pairs for row in (a, b)]
        return [
            _captioned(both),
            {"headers": ["key", "other key", "distance", "captions", "other's captions"], "data": cells},
        ]

    for event in (look.click, what.change, page.submit, words.submit):
        on(event, shown, [what, words, page], [pictures, table])


def _captioned(rows: list[data.Row]) -> list[tuple[Any, str]]:
    return [(row.pixels, f"{row.key}: {'; '.join(row.captions)}") for row in rows]
