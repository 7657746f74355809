"""The model that ``train.init`` names: by its hash, as `find_sources` found it, and its files, when a training starts.

    data/init.json   null, or {"reference", "sha256", "out"}: the stage `train` depends on it

A name may stand for another model tomorrow, and a folder's files are replaced. So each `dvc repro` looks again, and
another hash trains again. What is not on this machine, or in a store that does not answer, stays as it was recorded.
``out`` is the hash that DVC gives the folder: so a clone fetches the files from a remote that has the same, as a model
that was trained here and copied.
"""

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from latentloom.base_model import Carried, compare
from latentloom.dvc_outs import bring, out_hash
from latentloom.encoding.named_encoders import current_fingerprint, pinned_reference
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.errors import UserError, notify
from latentloom.files import read_json, user_path, write_json
from latentloom.layout import INIT, MODEL
from latentloom.model_files import EncoderReference, ModelConfig, model_hash, read_config
from latentloom.params import Params, downsampling
from latentloom.registry.models import (
    fetched_folder,
    find_model,
    is_model,
    look_up,
    model_by_hash,
    named_folder,
    run_provenance,
)
from latentloom.tracking.store import existing_store, first_line


@dataclass(frozen=True)
class Base:
    """A model that a training starts from: what the params call it, its hash, and DVC's hash of its folder."""

    reference: str
    sha256: str
    out: str | None  # None: not known


def find_base(params: Params, root: Path) -> Base | None:
    """Write to `INIT` what ``train.init`` names, and check that the network of ``params`` can start from it.

    Raises:
        UserError: when it names no model, nothing was recorded of it either, or it does not fit.
    """
    reference, known = params.train.init, recorded_base()
    base = None if reference is None else _find(reference, known, root)
    if base:
        folder = at_hand(base, root)
        if folder or base != known:  # a clone that does not train again fetches nothing
            carried = look(params, folder or base_folder(base, root), reference)
            if base != known:
                notify(f"train.init = {reference}: {'; '.join(carried.lines())}")
    write_json(INIT, base and asdict(base))
    return base


def recorded_base() -> Base | None:
    """What `find_base` wrote last; None where no base was named."""
    entry = read_json(INIT) if INIT.exists() else None
    return entry and Base(**entry)


def named_base(reference: str | None) -> Base | None:
    """The base that the params name.

    Raises:
        UserError: when the file is of other params.
    """
    base = recorded_base()
    if (base and base.reference) != reference:
        raise UserError(f"train.init = {reference}: {INIT} is of other params; run `dvc repro`, which looks it up")
    return base


def at_hand(base: Base, root: Path) -> Path | None:
    """The base's folder, where it is on this machine, but for the project's own model, which a training replaces."""
    folders = (_local(base.reference, root), fetched_folder(base.sha256, root))
    return next((folder for folder in folders if folder and is_model(folder, base.sha256)), None)


def base_folder(base: Base, root: Path) -> Path:
    """The base's folder; fetched from DVC, its remote or the registry where it is not on this machine.

    Raises:
        UserError: when its bytes are nowhere, saying what to do.
    """
    if folder := at_hand(base, root):
        return folder
    kept = fetched_folder(base.sha256, root)
    if is_model(root / MODEL, base.sha256):
        _copy(root / MODEL, kept)
        return kept
    if base.out:
        with suppress(UserError):
            bring(root, {base.out: kept})
            if is_model(kept, base.sha256):
                return kept
    try:
        return model_by_hash(base.sha256, root)
    except Exception as error:  # a store that is away has errors of its own
        raise UserError(
            f"train.init = {base.reference}: the model {base.sha256[:12]}, as it was found, is not on this machine "
            f"({_reason(error)}): put its folder there, or `dvc push` it from where it is; or name another"
        ) from error


def look(params: Params, folder: Path, reference: str) -> Carried:
    """What a training with ``params`` takes of the model in ``folder``; nothing has to be encoded for that.

    Raises:
        UserError: when it does not fit, naming all that does not.
    """
    base = read_config(folder)
    return compare(base, _expected(params, base), reference, strict=params.train.init_strict)


def describe(params: Params, root: Path) -> list[str]:
    """In lines for people, which model the params start from, and what is taken of it; raises as `find_base`."""
    reference = params.train.init
    base = _find(reference, recorded_base(), root)
    folder = base_folder(base, root)
    config = read_config(folder)
    widths, shapes = "/".join(map(str, config.widths)), ", ".join(f"{h}x{w}" for _, h, w in config.trained_shapes)
    lines = [f"train.init {reference}: model {base.sha256[:12]}, widths {widths}, trained on latents of {shapes}"]
    return lines + [f"  {line}" for line in look(params, folder, reference).lines()]


def _find(reference: str, recorded: Base | None, root: Path) -> Base:
    """What a reference names now, or else what is recorded of it."""
    known = recorded if recorded and recorded.reference == reference else None
    if folder := _local(reference, root):
        if folder.resolve() in (MODEL.resolve(), (root / MODEL).resolve()):
            raise UserError(
                f"train.init = {reference}: a training replaces this very folder; copy it (cp -r {reference} "
                f"{MODEL.parent}/base) and name the copy, or name its run"
            )
        sha256 = model_hash(folder)
        return known if known and known.sha256 == sha256 else Base(reference, sha256, out_hash(folder))
    try:
        stored = look_up(reference, root)
        if stored.sha256 is None:
            find_model(reference, root)  # which says why
        if known and known.sha256 == stored.sha256:
            return known
        provenance = run_provenance(existing_store(root), stored.run) if stored.run else None
        return Base(reference, stored.sha256, provenance and provenance.outs.get(str(MODEL)))
    except Exception as error:  # a store that is away has errors of its own
        if known is None:
            raise UserError(f"train.init = {reference}: {_reason(error)}") from error
        notify(f"train.init = {reference} stays model {known.sha256[:12]}: {_reason(error)}")
        return known


def _local(reference: str, root: Path) -> Path | None:
    """The model's folder that a reference names, in the current one or else in the project's root."""
    folders = (named_folder(reference), root / user_path(reference))
    return next((folder for folder in folders if is_model(folder)), None)


def _expected(params: Params, base: ModelConfig) -> ModelConfig:
    """The config of a training with ``params``, in what decides which weights there are; the rest is the base's."""
    vae, text, tokens = params.encode_images.vae, params.encode_text.model, params.model.text == "tokens"
    fingerprints = [current_fingerprint(*own) for own in (("encode_images.vae", vae), ("encode_text.model", text))]
    dims = base.text_dim, base.token_dim or base.text_dim  # where it reads no token states, that layer is new anyhow
    if fingerprints[1] != base.text_encoder.fingerprint:
        encoder = TextEncoder(pinned_reference("encode_text.model", text))
        dims = encoder.dim, encoder.token_dim
    shape, factor, several = base.latent_shape, downsampling(vae), params.ingest.several_sizes
    if factor and not several:
        shape = (shape[0], *(params.ingest.image_sizes[0] // factor,) * 2)
    return base.model_copy(
        update={
            "latent_shape": shape,
            "widths": tuple(params.model.widths),
            "block_depth": params.model.block_depth,
            "emb_size": params.model.emb_size,
            "schedule": params.diffusion.schedule,
            "text_dim": dims[0],
            "token_dim": dims[1] if tokens else None,
            "latent_shapes": base.trained_shapes if several else None,
            "vae": EncoderReference(reference=vae, class_name="", fingerprint=fingerprints[0]),
            "text_encoder": EncoderReference(reference=text, class_name="", fingerprint=fingerprints[1]),
        }
    )


def _copy(folder: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent, prefix=".") as temporary:
        copied = Path(shutil.copytree(folder, Path(temporary) / "model"))
        shutil.rmtree(kept, ignore_errors=True)
        copied.rename(kept)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else first_line(error)
