"""How the page looks, by Gradio: six tabs over the `Studio`, which does what they show.

Nothing leaves the machine: fonts are the system's, and Gradio's statistics, checks for versions, share links, history
of runs and API are off. One request is computed at a time; the others wait in a queue of bounded length.
"""

import html
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from latentloom.diffusion.sampling_settings import SAMPLER_NAMES
from latentloom.errors import UserError
from latentloom.evaluation.image_generator import STRENGTH
from latentloom.layout import IMAGES, NEAR_DUPLICATES, REJECTS
from latentloom.page import data
from latentloom.page.handlers import Studio
from latentloom.page.local import TEMPORARY, gr

QUEUE = 16  # requests that wait
LONGEST = 2000  # characters of a prompt
LARGEST_UPLOAD = "32mb"
BUTTONS = ["download", "fullscreen"]  # of pictures; another would share them on the web
KEPT, REJECTED, ALIKE = "kept", "rejected", "near duplicates"
CAPTION = "woman astronaut, medium-dark skin tone"  # of the kind that the models that are there were trained on
# Gradio writes one line of a caption into the picture; a whole one belongs below it.
CSS = """
.grid-wrap { min-height: 0 !important; max-height: none !important }
.grid-container { grid-auto-rows: auto !important; grid-template-rows: auto !important; align-items: start }
.thumbnail-lg { aspect-ratio: auto !important; height: auto !important }
.table textarea { font-family: ui-monospace, monospace; white-space: pre; overflow-x: auto }
.caption-label { position: static !important; max-width: none !important; white-space: normal !important }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
MODELS = "models/unet, showcase, champion, candidate, a version, or an MLflow run"
OF_REQUEST = ("negative", "seed", "count")  # options that no model decides
OF_MODEL = ("steps", "guidance", "sampler", "guidance_rescale", "threshold")


def warn(sentence: str) -> None:
    """Show a remark to the person whose request is being answered."""
    gr.Warning(html.escape(sentence))


def build(studio: Studio) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Latent Loom", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# Latent Loom")
        model = gr.Dropdown(studio.models, label="Model", allow_custom_value=True, elem_id="model", info=MODELS)
        tabs = []
        with gr.Tab("Draw"):
            tabs.append(_draw(studio, model))
        with gr.Tab("From a picture"):
            tabs.append(_draw(studio, model, from_a_picture=True))
        with gr.Tab("Between"):
            tabs.append(_between(studio, model))
        with gr.Tab("Compare"):
            tabs.append(_compare(studio, model))
        with gr.Tab("Find"):
            _find(studio, model)
        with gr.Tab("Data") as tab:
            _data(studio, tab)
        of_model = [field for fields in tabs for field in fields[len(OF_REQUEST) :]]
        on(model.input, lambda reference: _defaults(studio, reference) * len(tabs), [model], of_model)
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
        css=CSS,
    )
    return page


def said(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors that a person can fix are shown as their sentence."""

    def shown(error: Exception) -> gr.Error:
        if not isinstance(error, UserError) and not type(error).__module__.startswith("mlflow"):
            raise error
        sentence = re.sub(rf"{re.escape(TEMPORARY.name)}/\w+/", "", str(error))  # an upload by its own name
        return gr.Error(html.escape(sentence), duration=None, print_exception=False)

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
        said(handler),
        inputs,
        outputs,
        api_visibility="private",
        concurrency_id="all",
        show_progress="minimal",
        show_progress_on=outputs[:1] if isinstance(outputs, list) else outputs,
    )


def _prompt(label: str = "Prompt", **more: Any) -> gr.Textbox:
    return gr.Textbox(label=label, max_length=LONGEST, **more)


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


def _table(label: str) -> gr.Textbox:
    """Lines with columns, which is not there until there are any."""
    return gr.Textbox(label=label, max_lines=30, buttons=["copy"], elem_classes="table", visible=False)


def _fields(studio: Studio, *, one: bool = False) -> list[Any]:
    """The fields of `OF_REQUEST`, of `OF_MODEL` and of the guidance interval; a model's have the first one's values."""
    steps, guidance, sampler, rescale, threshold, low, high = _defaults(studio, studio.models[0])
    negative = _prompt("Negative prompt", placeholder="what it should not be")
    with gr.Row():
        fields = [negative, gr.Number(0, label="Seed"), gr.Number(1 if one else 4, label="Count", visible=not one)]
    with gr.Row():
        fields += [gr.Number(steps, label="Steps"), gr.Number(guidance, label="Guidance")]
        fields += [gr.Dropdown(list(SAMPLER_NAMES), value=sampler, label="Sampler")]
    with gr.Accordion("More", open=False), gr.Row():
        interval = [gr.Number(low, label="Guidance from level"), gr.Number(high, label="to level")]
        fields += [gr.Number(rescale, label="Guidance rescale")]
        fields += [gr.Number(threshold, label="Threshold percentile, or nothing")]
    return fields + interval


def _defaults(studio: Studio, reference: str) -> list[Any]:
    """The values that a model has of the fields after `OF_REQUEST`."""
    own = studio.defaults(reference)
    return [*(own[name] for name in OF_MODEL), *own["guidance_interval"]]


def _options(values: Sequence[Any]) -> dict[str, Any]:
    """The options that the values of `_fields` stand for."""
    *plain, low, high = values
    return dict(zip(OF_REQUEST + OF_MODEL, plain, strict=True)) | {"guidance_interval": (low, high)}


def _draw(studio: Studio, model: gr.Dropdown, *, from_a_picture: bool = False) -> list[Any]:
    with gr.Row():
        with gr.Column(scale=2):
            prompt = _prompt(placeholder="nothing, for variations" if from_a_picture else CAPTION)
            upload = gr.File(label="Picture", file_types=["image"], visible=from_a_picture)
            strength = gr.Slider(0, 1, STRENGTH, label="Strength: how much is made anew", visible=from_a_picture)
            fields = _fields(studio)
            with gr.Row():
                draw, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
        with gr.Column(scale=3):
            seen = gr.Image(
                label="As the model sees it", visible=from_a_picture, interactive=False, height=200, buttons=BUTTONS
            )
            pictures = _gallery("Pictures")
            made = gr.Textbox(
                label="The command that makes the picture that is chosen",
                lines=2,
                buttons=["copy"],
                elem_classes="made",
            )
            with gr.Row():
                download = gr.DownloadButton("Download PNG", interactive=False)
                lineage, near = gr.Button("Lineage"), gr.Button("Nearest images")
            told = _table("Lineage")
            nearest = _gallery("Nearest images of the data", visible=False)
    made_by, chosen = gr.State((None, [])), gr.State()  # the model's reference and the files; the file that is chosen

    def drawn(reference: str, prompt: str, upload: str | None, strength: float, *values: Any) -> Iterator[list[Any]]:
        if from_a_picture and upload is None:
            raise UserError("choose a picture to start from")
        start = (upload, strength) if from_a_picture else ()
        for shown in studio.draw(reference, prompt, _options(values), *start):
            yield [shown, (reference, []), *choose(reference, [])]
        files = [path for path, _ in shown]
        yield [shown, (reference, files), *choose(reference, files)]

    def choose(reference: str, files: list[str], place: int = 0) -> list[Any]:
        path = files[place] if files else None
        command = studio.command_of(path, reference) if path else None
        # What was said of another picture would be taken for this one's.
        return [path, command, gr.DownloadButton(value=path, interactive=bool(path)), *[gr.update(visible=False)] * 2]

    def selected(made_by: tuple[str, list[str]], event: gr.SelectData) -> list[Any]:
        return choose(*made_by, event.index)

    def of_chosen(what: Callable[..., Any], *given: Any) -> Any:
        if not given[-1]:
            raise UserError("draw a picture first")
        return gr.update(value=what(*given), visible=True)

    of_picture = [chosen, made, download, told, nearest]
    asked = [model, prompt, upload, strength, *fields]
    drawing = [on(event, drawn, asked, [pictures, made_by, *of_picture]) for event in (draw.click, prompt.submit)]
    stop.click(None, cancels=drawing, api_visibility="private")
    pictures.select(selected, [made_by], of_picture, api_visibility="private")
    on(lineage.click, lambda path: of_chosen(studio.lineage_of, path), [chosen], told)
    on(near.click, lambda *given: of_chosen(studio.nearest, *given), [model, chosen], nearest)
    if from_a_picture:
        on(upload.upload, studio.prepared, [model, upload], seen)
    return fields


def _between(studio: Studio, model: gr.Dropdown) -> list[Any]:
    with gr.Row():
        with gr.Column(scale=2):
            a, b = _prompt("From", placeholder=CAPTION), _prompt("To", placeholder="nothing: the same prompt")
            with gr.Row():
                to_seed = gr.Number(label="To seed", placeholder="nothing: the same seed")
                count = gr.Number(8, label="Pictures")
            fields = _fields(studio, one=True)
            draw = gr.Button("Draw the way", variant="primary")
        with gr.Column(scale=3):
            strip = gr.Image(label="Strip", type="filepath", format="png", interactive=False, buttons=BUTTONS)
            moving = gr.Image(
                label="There and back", type="filepath", format="webp", interactive=False, buttons=BUTTONS
            )
            files = gr.File(label="PNG, WebP, GIF", file_count="multiple", interactive=False)

    def drawn(reference: str, a: str, b: str, to_seed: int, count: int, *values: Any) -> list[Any]:
        made = studio.between(reference, [a, b], _options(values), pictures=count, to_seed=to_seed)
        return [made[0], made[1], list(made)]

    on(draw.click, drawn, [model, a, b, to_seed, count, *fields], [strip, moving, files])
    return fields


def _compare(studio: Studio, model: gr.Dropdown) -> list[Any]:
    with gr.Row():
        with gr.Column(scale=2):
            other = gr.Dropdown(studio.models, value="showcase", label="With", allow_custom_value=True, info=MODELS)
            prompt, fields = _prompt(placeholder=CAPTION), _fields(studio)
            draw = gr.Button("Compare", variant="primary")
        with gr.Column(scale=3):
            sides = [_gallery("The model above"), _gallery("With")]
            verdict = _table("By their figures")

    def drawn(a: str, b: str, prompt: str, *values: Any) -> Iterator[list[Any]]:
        left, right, silent = [], [], gr.update(visible=False)
        for left in studio.draw(a, prompt, _options(values)):
            yield [gr.Gallery(left, label=a), gr.Gallery([], label=b), silent]
        for right in studio.draw(b, prompt, _options(values)):
            yield [left, right, silent]
        yield [left, right, gr.update(value=studio.verdict(a, b), visible=True)]

    on(draw.click, drawn, [model, other, prompt, *fields], [*sides, verdict])
    return fields


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


def _data(studio: Studio, tab: gr.Tab) -> None:
    with gr.Row():
        what = gr.Radio([KEPT, REJECTED, ALIKE], value=KEPT, label="Show", scale=2)
        words, page = _prompt("With the words"), gr.Number(1, label=f"Page, of {data.ROWS} rows")
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

    for event in (tab.select, look.click, what.change, page.submit, words.submit):
        on(event, shown, [what, words, page], [pictures, table])


def _captioned(rows: list[data.Row]) -> list[tuple[Any, str]]:
    return [(row.pixels, f"{row.key}: {'; '.join(row.captions)}") for row in rows]
