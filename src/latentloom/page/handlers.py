"""What the page does, apart from how it looks: pictures that appear step by step, and are saved as the command does.

    what was chosen -> SampleRequest -> TextToImage, in a thread of its own -> pictures so far, and at last PNG files

A PNG holds the same bytes as that of `latentloom sample` with the same options.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch

from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.encoding.dataset import load_caches
from latentloom.errors import UserError
from latentloom.evaluation.animation import save_animation
from latentloom.evaluation.metadata import file_words, generate_command, read_metadata, save_image
from latentloom.evaluation.recall import nearest
from latentloom.evaluation.text_to_image import StartImage, TextToImage, default_settings, load_text_to_image
from latentloom.files import read_json
from latentloom.ids import to_hex
from latentloom.image_grid import image_grid
from latentloom.ingestion.one_picture import prepare_picture
from latentloom.layout import IMAGES, LATENTS, MODEL, PARAMS, SAMPLES, TEXT
from latentloom.lineage.lineage import render, trace
from latentloom.page.data import rows_of
from latentloom.registry.compare import compare
from latentloom.registry.models import SHOWCASE, find_model, is_model

MODELS_KEPT = 2  # in memory: as many as are compared
MOST_PICTURES = 16  # of one request
PREVIEWS = 8  # of each picture, on its way
NEAREST = 6

Shown = TypeVar("Shown")
Picture = tuple[np.ndarray | str, str]  # pixels, uint8 (H, W, 3), or the PNG's path; and what stands below


class Studio:
    """The page's project: its models, its pictures, its data.

    Args:
        root: its folder, the current one.
        warn: is told what a model does not read of a prompt, and other remarks, a sentence each.
    """

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root, self.warn = root, warn
        self.folder = root / SAMPLES / "page"
        self._load = lru_cache(MODELS_KEPT)(self._load_model)

    @property
    def models(self) -> list[str]:
        """What is there without asking MLflow: the trained model, where there is one, and the package's own."""
        return [*([str(MODEL)] if is_model(self.root / MODEL) else []), SHOWCASE]

    def load(self, reference: str) -> TextToImage:
        """The model that `find_model` finds; those used last stay loaded, as long as they do not change."""
        found = find_model(reference.strip(), self.root)
        return self._load(reference.strip(), found.sha256)

    def _load_model(self, reference: str, sha256: str) -> TextToImage:
        found = find_model(reference, self.root)
        return load_text_to_image(found.folder, provenance=found.provenance and found.provenance.in_images())

    def settings(self, reference: str) -> SamplingSettings:
        """The settings that samples of a model have unless others are chosen."""
        return default_settings(find_model(reference.strip(), self.root).folder, self.root / PARAMS)

    def draw(
        self,
        reference: str,
        prompt: str,
        options: Mapping[str, Any],
        upload: str | None = None,
        strength: float | None = None,
    ) -> Iterator[list[Picture]]:
        """The pictures so far, again and again; at last the PNGs.

        Args:
            reference: of the model.
            prompt: what to generate.
            options: of `SampleRequest`; what is None is as in the model's settings.
            upload: the file of a picture to start from, with ``strength``.

        Raises:
            UserError: when something cannot be generated, with the sentence of the command line.
        """
        model, request = self.load(reference), request_of(self.settings(reference), options)
        if request.count > MOST_PICTURES:
            raise UserError(f"count = {request.count}: the page makes at most {MOST_PICTURES}; the command line, more")
        if upload is None and not prompt.strip():
            raise UserError("the prompt is empty: say what to draw")
        start = upload and StartImage(*prepare_picture(Path(upload), model.image_size(request.size)), strength)
        for remark in model.remarks([prompt], request, start=start):
            self.warn(remark)
        blank = np.full((*model.image_size(request.size)[::-1], 3), 255, np.uint8)
        pictures: list[Picture] = [(blank, "waiting")] * request.count
        every = max(1, request.settings.diffusion_steps // PREVIEWS)

        def work(show: Callable[[list[Picture]], None]) -> list[Picture]:
            def on_prediction(place: int, step: int, prediction: torch.Tensor) -> None:
                if step % every == 0:
                    pictures[place] = (model.codec.decode(prediction[None])[0], f"step {step + 1}")
                    show(list(pictures))

            images = model.generate([prompt], request, start=start, on_prediction=on_prediction)
            saved = []
            for _, number, pixels, metadata in model.one_by_one([prompt], request, images, start=start):
                path = self._path(prompt or "variation", f"{request.seed}-{number}")
                save_image(path, pixels, metadata)
                saved.append((str(path), f"sample {number}"))
            return saved

        yield from in_a_thread(work)

    def _path(self, prompt: str, name: str) -> Path:
        """A new PNG, whose name says what it shows."""
        names = (f"{file_words(prompt)}-{name}{again}.png" for again in chain([""], (f"-{n}" for n in count(2))))
        return next(path for path in map(self.folder.joinpath, names) if not path.exists())

    def between(
        self, reference: str, prompts: Sequence[str], options: Mapping[str, Any], *, pictures: int, to_seed: int | None
    ) -> tuple[str, str, str]:
        """The files of a strip (PNG) and of the animations there and back (WebP, GIF); raises as `draw`."""
        model, request = self.load(reference), request_of(self.settings(reference), options)
        if pictures not in range(2, MOST_PICTURES + 1):
            raise UserError(f"pictures = {pictures}: must be a whole number from 2 to {MOST_PICTURES}")
        asked, to_seed = [prompt for prompt in prompts if prompt.strip()], None if to_seed == request.seed else to_seed
        for remark in model.remarks(asked, request):
            self.warn(remark)
        drawn = model.between(asked, request, pictures=pictures, to_seed=to_seed)
        strip = self._path(" to ".join(asked), f"{request.seed}-{pictures}")
        metadata = model.metadata(asked, request, pictures=pictures, to_seed=to_seed)
        save_image(strip, image_grid(drawn, columns=pictures), metadata)
        animations = [strip.with_suffix(suffix) for suffix in (".webp", ".gif")]
        for path in animations:
            save_animation(path, drawn)
        return str(strip), *map(str, animations)

    def defaults(self, reference: str) -> dict[str, Any]:
        """The options that samples of a model have unless others are chosen."""
        return SampleRequest(self.settings(reference)).options()

    def command_of(self, path: str, reference: str) -> str:
        """The command that generates a picture's bytes again."""
        return generate_command(read_metadata(Path(path)), model=reference)

    def verdict(self, a: str, b: str) -> str:
        """What `latentloom compare` says of two models by their figures."""
        try:
            return compare(a.strip(), b.strip(), self.root).text()
        except UserError as error:  # they are one and the same
            return str(error)

    def lineage_of(self, path: str) -> str:
        """What a picture came from, as `latentloom lineage` says it."""
        return render(trace(path, self.root))

    def prepared(self, reference: str, upload: str) -> np.ndarray:
        """An uploaded picture as the model sees it, uint8 (H, W, 3)."""
        return prepare_picture(Path(upload), self.load(reference).image_size(None))[0]

    def nearest(self, reference: str, path: str) -> list[Picture]:
        """The images of the data nearest to a picture, each with its distance, its split and its captions.

        Raises:
            UserError: when there is no data, or it was encoded by another VAE than the model's.
        """
        latents, text = self.root / LATENTS, self.root / TEXT
        vae = self.load(reference).codec.vae
        if not latents.exists():
            raise UserError("there is no data here to compare with: `make repro` makes it")
        if read_json(latents / "stats.json")["vae"]["fingerprint"] != vae.fingerprint:
            raise UserError(f"{LATENTS} was encoded by another VAE than {reference}'s: their latents do not compare")
        caches = load_caches(latents, text)
        pixels = self.prepared(reference, path)
        sample = caches.train.codec.standardise(vae.encode(pixels[None])["mean"])[0]
        (rows,), (distances,) = nearest([sample], [caches.train, caches.validation], NEAREST)
        everything = np.concatenate([caches.train.ids, caches.validation.ids])
        ids = to_hex(everything[rows.numpy()]).to_pylist()
        found = {row.id: row for row in rows_of(self.root / IMAGES, set(ids))}
        return [
            (own.pixels, f"{distance:.3f} ({own.split}): {'; '.join(own.captions)}")
            for own, distance in ((found[own_id], distance) for own_id, distance in zip(ids, distances, strict=True))
        ]


def request_of(settings: SamplingSettings, options: Mapping[str, Any]) -> SampleRequest:
    """What was chosen; of a number field, 3 is 3.0 as on the command line, so that metadata are the same bytes."""
    chosen = {name: value for name, value in options.items() if value is not None or name in ("threshold", "negative")}
    for name in ("guidance", "guidance_rescale", "threshold"):
        if isinstance(chosen.get(name), int):
            chosen[name] = float(chosen[name])
    try:
        return SampleRequest.of(settings, chosen)
    except ValueError as error:
        raise UserError(str(error)) from error


def in_a_thread(work: Callable[[Callable[[Shown], None]], Shown]) -> Iterator[Shown]:
    """What ``work`` shows, and at last what it returns; who stops listening stops the work at its next `show`."""
    shown: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    stopped = False

    def show(value: Shown) -> None:
        if stopped:
            raise _Stopped
        shown.put(("so far", value))

    def run() -> None:
        try:
            shown.put(("done", work(show)))
        except BaseException as error:  # who listens raises it
            shown.put(("error", error))

    Thread(target=run, daemon=True).start()
    try:
        kind = "so far"
        while kind == "so far":
            kind, value = shown.get()
            if kind == "error":
                raise value
            yield value
    finally:
        stopped = True


class _Stopped(Exception):
    """Nobody listens any more."""
