"""The command `latentloom`. Each command imports what it needs, so that `--help` answers at once."""

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from latentloom.errors import UserError
from latentloom.files import read_json
from latentloom.layout import EVALUATE_METRICS, MODEL, PARAMS, SAMPLE_SHEET, SAMPLES, TRAIN_METRICS, project_root
from latentloom.params_file import load_params
from latentloom.stage import use_utf8

UI_PORTS, PAGE_PORTS = range(5000, 5020), range(7860, 7880)
FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)]  # a library's error may have it in its text alone
ANIMATED = (".gif", ".webp")
MODEL_HELP = "A model folder, showcase, champion, candidate, a registry's version, or an MLflow run (id or name)."


class Commands(TyperGroup):
    """Ends with the message alone where the user can fix the cause; anything else is a bug and shows its traceback."""

    def invoke(self, context: typer.Context) -> Any:
        use_utf8()
        try:
            return super().invoke(context)
        except UserError as error:
            sys.exit(str(error))
        except Exception as error:
            library = type(error).__module__.partition(".")[0]
            if library == "mlflow":
                sys.exit(f"MLflow: {error}")
            if isinstance(error, OSError) and (full := [own for own in FULL if own in str(error)]):
                folders = f"{project_root()} or {tempfile.gettempdir()}"
                sys.exit(f"{full[0]}, in {folders}: make room, and run the command again")
            if library not in ("sqlalchemy", "sqlite3"):
                raise
            from latentloom.tracking.store import tracking_uri, without_credentials

            store = without_credentials(tracking_uri(project_root()))
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            sys.exit(f"{store} cannot be used: {cause}. Make room on a full disk; put a copy back of a damaged file")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Train your own text-to-image model: see README.md.",
)


@app.command()
def check(params: Annotated[Path, typer.Argument(help="A params file.")] = PARAMS) -> None:
    """Check a params file: every key and value, before any work; and that sources on other machines are there.

    Show the sizes of images, where there are several, and what a training takes of the model that it starts from.
    """
    checked = load_params(params)
    ingest = checked.ingest
    if ingest.several_sizes:
        for image_size, table in zip(ingest.image_sizes, ingest.tables, strict=True):
            print(f"ingest.image_size {image_size}: " + ", ".join(map(str, table)))
    if any(entry.path for entry in ingest.sources):
        from latentloom.ingestion.fingerprints import found_elsewhere

        for line in filter(None, map(found_elsewhere, ingest.sources)):
            print(line)
    if checked.train.init:
        from latentloom.registry.base import describe

        print(*describe(checked, project_root()), sep="\n")


@app.command()
def summary() -> None:
    """Show what the last `dvc repro` left: the sample sheet, the figures, and where to look further."""
    figures = read_json(TRAIN_METRICS) | read_json(EVALUATE_METRICS)
    shown = ("held_out_recall_at_1", "held_out_recall_at_5", "memorisation_recall", "val_mae", "train_mae")
    print(f"\nSamples   {SAMPLE_SHEET}")
    print("Figures   " + ", ".join(f"{name} {figures[name]:.4g}" for name in shown if name in figures))
    print(f"Model     {MODEL}")
    print("Data      reports/data_docs/index.html")
    print("MLflow    make ui")


@app.command()
def ui(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the address on this machine; by default 5000, or the next.")
    ] = None,
) -> None:
    """Serve MLflow's pages of all runs (images, curves, figures) on this machine until Ctrl-C, and print where."""
    from latentloom.tracking.store import existing_store, experiment_id, tracking_uri, ui_address, without_credentials

    root = project_root()
    store, experiment = tracking_uri(root), experiment_id(existing_store(root), root)
    if store.startswith(("http://", "https://")):
        print(f"MLflow: {ui_address(without_credentials(store), experiment)}")
        return
    port = free_port(UI_PORTS if port is None else [port])
    print(f"MLflow: {ui_address(f'http://127.0.0.1:{port}', experiment)}", flush=True)
    # The store is named by the environment, where no list of processes shows its password. Without the jobs, which only
    # judge language models, and with one worker, which is enough for one person, the server takes two processes instead
    # of ten, and ends when its worker does: several would be started again for ever.
    environment = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, command, environment | os.environ)


def free_port(ports: Sequence[int]) -> int:
    """The first of ``ports`` on which this machine lets us listen, and nothing answers yet.

    Raises:
        UserError: when there is none, saying what is the matter with the first.
    """
    reasons = []
    for port in ports:
        with socket.socket() as client, socket.socket() as server:
            # Listening on one address is allowed beside another program that listens on all of them, as AirPlay does.
            client.settimeout(1)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                reasons.append("another program listens there")
                continue
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("127.0.0.1", port))
            except OSError as error:
                reasons.append(error.strerror)
                continue
        return port
    raise UserError(f"port {ports[0]} cannot be used: {reasons[0]}. Give another: --port {ports[-1] + 1}")


@app.command()
def page(
    host: Annotated[str, typer.Option(help="Of the address; 0.0.0.0 lets other machines in, without a password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default 7860, or the next.")] = None,
) -> None:
    """Serve a page to draw on, to look into the data and to compare models, on this machine until Ctrl-C."""
    try:
        from latentloom.page.layout import serve
    except ImportError as error:
        if not (error.name or "").startswith("gradio"):
            raise
        raise UserError(
            'the page needs Gradio, which is not installed: `make page`, or pip install "latentloom[page]"'
        ) from error
    port = free_port(PAGE_PORTS if port is None else [port])
    print(f"Page: http://{host}:{port}", flush=True)
    serve(project_root(), host, port)


@app.command()
def sync() -> None:
    """Deliver to MLflow the runs that wait on the disk, because the store was away or MLflow was not installed."""
    from latentloom.tracking.delivery import sync

    waits = False
    for synced in sync(project_root()):
        print(f"{synced.key}: {synced.message}")
        waits = waits or synced.waits
    raise typer.Exit(waits)


def _percentile(text: str) -> float | str | None:
    """A percentile as it is typed; what is neither a number nor `none` stays text, which the request's check names."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        return text


@app.command()
def sample(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to generate; one or more samples per prompt. With --image there may be none."),
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = str(MODEL),
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="FILE.png, or FOLDER/ for one PNG per sample; with --between FILE.gif or .webp, too."
        ),
    ] = str(SAMPLES / "sample.png"),
    seed: Annotated[int, typer.Option(help="Of the noise that samples start from.")] = 0,
    count: Annotated[int, typer.Option(help="Samples per prompt.")] = 1,
    first: Annotated[int, typer.Option(help="The number of the first sample.")] = 0,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; by default the model's own.")] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt that samples are guided away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from, instead of noise alone.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="0 to 1: how much of the picture is made anew; by default 0.6.")
    ] = None,
    between: Annotated[
        int | None, typer.Option(help="So many pictures on the way from the first prompt to the second.")
    ] = None,
    to_seed: Annotated[int | None, typer.Option(help="With --between, the seed at its end.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default as in params.yaml.")] = None,
    guidance: Annotated[float | None, typer.Option(help="1: as trained; more: closer to the prompt.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim or dpmpp_2m.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Noise levels at which guidance acts.")
    ] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="0 to 1: how much contrast is taken back.")] = None,
    threshold: Annotated[
        str | None, typer.Option(parser=_percentile, help="The percentile of dynamic thresholding, or none.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
) -> None:
    """Generate images of prompts. The same command gives the same bytes on one machine's CPU."""
    folder = _is_folder(output, ANIMATED if between is not None else ())
    if not prompts and image is None:
        raise typer.BadParameter("give a prompt, or --image", context)
    if (between is None and to_seed is not None) or (between is not None and (image or folder or count != 1)):
        raise UserError("--between N goes with --to-seed and -o FILE, and not with --image, --count or -o FOLDER/")
    if strength is not None and image is None:
        raise UserError("--strength needs --image FILE, the picture to start from")
    prompts = [_in_utf8(prompt) for prompt in prompts or [""]]
    from latentloom.diffusion.sampling_settings import OPTION_NAMES, SampleRequest
    from latentloom.evaluation.animation import save_animation
    from latentloom.evaluation.image_generator import STRENGTH
    from latentloom.evaluation.metadata import file_words, save_image
    from latentloom.evaluation.text_to_image import StartImage, default_settings, load_text_to_image, prompt_grid
    from latentloom.image_grid import image_grid
    from latentloom.ingestion.one_picture import prepare_picture
    from latentloom.registry.models import find_model

    found = find_model(model, project_root())
    settings = default_settings(found.folder)
    # All options are read by their names; those that were not given are as in the params.
    given = [name for name in OPTION_NAMES if context.get_parameter_source(name).name != "DEFAULT"]
    try:
        options = {name: context.params[name] for name in given}
        request = SampleRequest.of(settings, options | {"negative": negative and _in_utf8(negative)})
    except ValueError as error:
        raise UserError(str(error)) from error
    loaded = load_text_to_image(found.folder, provenance=found.provenance and found.provenance.in_images())
    start = None
    if image is not None:
        prepared = prepare_picture(image, loaded.image_size(request.size))
        start = StartImage(*prepared, STRENGTH if strength is None else strength)
    for warning in loaded.remarks(prompts, request, start=start):
        print(f"warning: {warning}", file=sys.stderr)
    if between is not None:
        pictures = loaded.between(prompts, request, pictures=between, to_seed=to_seed)
        if Path(output).suffix.lower() in ANIMATED:
            save_animation(Path(output), pictures)
        else:
            made_by = loaded.metadata(prompts, request, pictures=between, to_seed=to_seed)
            save_image(Path(output), image_grid(pictures, columns=between), made_by)
        print(output)
        return
    images = loaded.generate(prompts, request, start=start)
    if not folder:
        save_image(Path(output), prompt_grid(images), loaded.metadata(prompts, request, start=start))
        print(output)
        return
    samples = loaded.one_by_one(prompts, request, images, start=start)
    for place, (prompt, number, pixels, made_by) in enumerate(samples):
        path = Path(output) / f"{place // request.count + 1:02d}-{file_words(prompt)}-{number}.png"
        save_image(path, pixels, made_by)
        print(path)


def _in_utf8(text: str) -> str:
    """What was typed, in UTF-8 whatever the locale says."""
    return os.fsencode(text).decode(errors="surrogateescape")


def _is_folder(output: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether an output is a folder for many PNGs, rather than one PNG, or a file of one of ``suffixes``."""
    try:
        folder = output.endswith("/") or (bool(output) and Path(output).is_dir())
    except OSError as error:
        raise UserError(f"-o {output}: {error.strerror}") from error
    if not folder and Path(output).suffix.lower() not in (".png", *suffixes):
        raise UserError(f"-o {output or repr(output)}: give FILE.png, or FOLDER/ for one PNG per sample")
    return folder


@app.command()
def promote(
    model: Annotated[str, typer.Argument(metavar="RUN", help=MODEL_HELP)],
    to: Annotated[Literal["champion", "candidate"], typer.Option(help="What to call it.")],
    force: Annotated[bool, typer.Option("--force", help="Though validation failed or it is worse; say --why.")] = False,
    why: Annotated[str | None, typer.Option(help="Kept with the version and in the history.")] = None,
) -> None:
    """Register a model and call it the champion or the candidate; rejected where it is worse than the champion."""
    if force and not why:
        sys.exit('--force needs a reason that others will read: --why "..."')
    from latentloom.registry import registry
    from latentloom.registry.models import find_model

    root = project_root()
    version, moved = registry.promote(find_model(model, root), to, root, force=force, why=why)
    print(f"version {version} of latentloom is the {to}" + ("" if moved else " already"))


@app.command()
def demote(
    alias: Annotated[Literal["champion", "candidate"], typer.Option("--from", help="What it is called now.")],
    why: Annotated[str | None, typer.Option(help="Kept in the history.")] = None,
) -> None:
    """Take a promotion back: the one before is the champion (or the candidate) again."""
    from latentloom.registry import registry

    was, now = registry.demote(alias, project_root(), why=why)
    print(f"version {was} of latentloom is no longer the {alias}; " + (f"version {now} is" if now else "none is"))


@app.command()
def history() -> None:
    """Show what was done to champion and candidate: promotions, forced ones, demotions; by whom, why, how good."""
    from latentloom.registry import registry

    root = project_root()
    moves, current = registry.history(root), registry.current(root)
    row = "{:<20}  {:<7}  {:<9}  {:<4}  {:<4}  {:<10}  {:<7}  {:<10}  {}".format
    print(row("when", "what", "alias", "from", "to", "by", "recall", "val_mae", "why"))
    for move, figures in moves:
        names = (move.kind, move.alias, move.previous or "none", move.version or "none", move.by or "")
        values = [figures.values.get(name) for name in ("held_out_recall_at_1", "val_mae")]
        shown = ["" if value is None else f"{value:.4g}" for value in values]
        print(row(f"{move.when:%Y-%m-%dT%H:%M:%SZ}", *names, *shown, move.why or "").rstrip())
    print("now: " + (", ".join(f"{alias} is version {version}" for alias, version in current.items()) or "nothing"))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The sheet; by default comparisons/A-B.png.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of the sheet, may be repeated; by default evaluate.prompts.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise that samples start from.")] = 0,
    count: Annotated[int, typer.Option(help="Samples per prompt and model.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: docs/models.md has the form.")] = False,
) -> None:
    """Say which of two models is better, as far as their figures tell, and show samples of both side by side."""
    from latentloom.registry import compare as comparing

    root = project_root()
    found = comparing.compare(a, b, root)
    if not as_json:
        print(found.text())
    sheet = comparing.make_sheet(found, root, prompts=prompt, seed=seed, count=count, path=output)
    print(found.json(sheet) if as_json else f"sheet: {sheet}")


@app.command()
def lineage(
    of: Annotated[str, typer.Argument(metavar="X", help=f"A PNG of `latentloom sample`, or: {MODEL_HELP}")] = (
        str(MODEL)
    ),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: docs/lineage.md has the form.")] = False,
) -> None:
    """Show what an image or a model came from, where the bytes of each part are, and how to bring it back.

    Exit status 1 where something that is needed for it is lost, or not known.
    """
    from latentloom.lineage.lineage import render, to_json, trace

    found = trace(of, project_root())
    print(to_json(found) if as_json else render(found))
    if found.missing:
        raise typer.Exit(1)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    folder: Annotated[Path, typer.Argument(help="What to make; a new folder, or an empty one.")],
    to: Annotated[Literal["diffusers", "onnx"], typer.Option(help="What is to load it; docs/export.md has both.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of its samples, may be repeated; by default evaluate.prompts.")
    ] = None,
) -> None:
    """Write a model as a folder for diffusers, or for ONNX Runtime, that needs nothing of this package."""
    from latentloom.export.folders import shown_figures
    from latentloom.registry.models import find_model

    root = project_root()
    found = find_model(model, root)
    if to == "diffusers":
        from latentloom.export.diffusers_folder import export_diffusers as write
    else:
        from latentloom.export.onnx_folder import export_onnx as write
    write(found, folder, root, figures=shown_figures(found, root), prompts=prompt)
    print(folder)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `latentloom export` made.")],
    hub_id: Annotated[str, typer.Argument(metavar="HUB_ID", help="OWNER/NAME on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else for you alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
) -> None:
    """Send an exported model to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN."""
    from latentloom.export.hub import Upload

    upload = Upload.of(folder, hub_id, public=public)
    print(upload.text())
    print("nothing was sent (--dry-run)" if dry_run else upload.send())


if __name__ == "__main__":
    app()
