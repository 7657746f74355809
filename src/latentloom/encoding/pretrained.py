"""The folder of a pretrained encoder: its config, the weights that are read of it, its fingerprint, and loading it.

    config.json                                 what the model is; of diffusers where it has a ``_class_name``
    [diffusion_pytorch_]model.safetensors       its weights, or its index of several files; ``pytorch_model.bin`` and
                                                the like where there is no other, then a variant in half precision

Of several files with weights one is read, and only that one decides the fingerprint.
"""

import hashlib
import importlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from latentloom.errors import UserError
from latentloom.files import refuses_maps, sha256_file

STEMS = {  # by whether it is a model of diffusers: (name, suffix) of the weights, in the order in which they are tried
    True: (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
    False: (("model", "safetensors"), ("pytorch_model", "bin")),
}
VARIANTS = ("fp16", "bf16")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES += ("spm.model",)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What the tokenizer of an uncased BERT does, whether its settings say so or not: for such a one they count for nothing.
UNCASED_BERT = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    "do_basic_tokenize": True,
    "never_split": None,
    "model_max_length": 512,
    **{f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "MASK", "PAD", "SEP", "UNK")},
}
POOLING = "1_Pooling/config.json"  # of a sentence encoder, as sentence-transformers writes it
POOLING_MODES = ("cls", "mean")
GIT_LFS = b"version https://git-lfs"  # how the file begins that stands for one which git-lfs has not fetched
LONGEST = 300  # characters that are shown of a library's message


@dataclass(frozen=True)
class Weights:
    """The files with weights that are read, and the variant by which the libraries know them; None: the plain ones."""

    files: tuple[Path, ...]
    variant: str | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        UserError: when it is no JSON object.
    """
    return _read_json(folder / "config.json")


def pooling(folder: Path) -> str:
    """How a sentence encoder makes one vector of its token states: ``mean`` (also where nothing is said) or ``cls``.

    Raises:
        UserError: when it is done in another way, naming the file.
    """
    path = folder / POOLING
    if not path.is_file():
        return "mean"
    settings = _read_json(path)
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


def find_weights(folder: Path) -> Weights:
    """The weights that are read of ``folder``: the plain ones, or else those of one of `VARIANTS`.

    Raises:
        UserError: when it holds none, lacks a file that their index names, or one was not fetched by git-lfs.
    """
    stems = STEMS["_class_name" in read_config(folder)]
    for variant in (None, *VARIANTS):
        for stem, suffix in stems:
            if files := _weight_files(folder, stem, suffix, variant):
                return Weights(files, variant)
    names = " or ".join(f"{stem}.{suffix}" for stem, suffix in stems)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    there = f"; {', '.join(others)} is not read: rename it" if others else ""
    raise UserError(f"{folder} holds no weights ({names}){there}")


def _weight_files(folder: Path, stem: str, suffix: str, variant: str | None) -> tuple[Path, ...]:
    dotted = f".{variant}" if variant else ""
    whole, index = folder / f"{stem}{dotted}.{suffix}", folder / f"{stem}.{suffix}.index{dotted}.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    else:
        return ()
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}, which {index.name} names, is missing: fetch the model again")
        with open(path, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise UserError(f"{path} only stands for the weights: run `git lfs pull` where the model was cloned")
    return tuple(files)


def check_same(folder: Path, found: str, wanted: str) -> None:
    """Compare the fingerprint of an encoder on the machine of a worker with the stage's.

    Raises:
        UserError: when they differ, so that the worker would compute other rows.
    """
    if found != wanted:
        raise UserError(
            f"{folder} on {platform.node()} holds another encoder than on the machine of the stage: copy it"
        )


def fingerprint(
    folder: Path, hash_file: Callable[[Path], str] = sha256_file, *, tokenizer_settings: bool = True
) -> str:
    """A hash of what decides an encoder's output: its config, tokenizer and weights. 64 hexadecimal digits.

    Keys of ``config.json`` that begin with an underscore (library versions, original paths) do not count, nor do names
    and paths in the tokenizer's settings.

    Args:
        folder: of the encoder.
        hash_file: gives the SHA-256 of a file.
        tokenizer_settings: whether they count, as they do since models name an encoder by them too.

    Raises:
        UserError: when the folder holds no weights, or its pooling is not known.
    """
    config = read_config(folder)
    config = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in [*find_weights(folder).files, *(folder / name for name in TOKENIZER_FILES)]:
        if path.is_file():
            digest.update(f"{path.name}={hash_file(path)}\n".encode())
    if (mode := pooling(folder)) != "mean":  # which is what a folder without the file does
        digest.update(f"pooling={mode}\n".encode())
    settings = _tokenizer_settings(folder) if tokenizer_settings else {}
    is_uncased_bert = all(own.items() <= UNCASED_BERT.items() for own in settings.values())
    if settings and not (config.get("model_type") == "bert" and is_uncased_bert):
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def has_fingerprint(folder: Path, wanted: str) -> bool:
    """Whether ``wanted`` is the fingerprint of what is in ``folder``, or was before tokenizer settings counted."""
    return any(fingerprint(folder, tokenizer_settings=counted) == wanted for counted in (True, False))


def _tokenizer_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """By file, what decides how a caption becomes tokens, beside the vocabulary: lower case, special tokens, length."""
    return {
        name: {
            key: value
            for key, value in _read_json(folder / name).items()
            if key not in ("name_or_path", "transformers_version") and not key.endswith("_file")
        }
        for name in TOKENIZER_SETTINGS
        if (folder / name).is_file()
    }


def library(name: str) -> ModuleType:
    """diffusers or transformers, which take seconds to import; they print nothing but errors.

    Otherwise they warn of config keys that they wrote themselves, and list each weight that is not asked for.

    Raises:
        UserError: when Python runs without docstrings, of which transformers makes others as it is imported.
    """
    if sys.flags.optimize > 1:
        raise UserError(f"{name} cannot be imported with PYTHONOPTIMIZE=2 (python -OO): unset it, or set it to 1")
    module = importlib.import_module(name)
    module.utils.logging.disable_progress_bar()  # stages show their own
    module.utils.logging.set_verbosity_error()
    return module


def load_model(loader: Any, folder: Path, name: str, *, unused: str | None = None, **options: Any) -> Any:
    """The model in ``folder``, whole: where weights are missing, both libraries would put random ones.

    Args:
        loader: a class of diffusers or transformers.
        folder: of the model.
        name: the key of the params and their value, for messages.
        unused: how the names of weights begin that may be missing, since nothing asks the model for what they compute.
        options: for the loader.

    Raises:
        UserError: when it cannot be loaded, or weights are missing or of other shapes, naming the first.
    """
    weights = find_weights(folder)
    if any(refuses_maps(path) for path in weights.files):
        options["disable_mmap"] = True
    model, found = load_part(loader, folder, name, variant=weights.variant, output_loading_info=True, **options)
    wrong = [own for own in found["missing_keys"] if unused is None or not own.startswith(unused)]
    wrong += [own for own, *_ in found["mismatched_keys"]]
    if wrong:
        unknown = sorted(found["unexpected_keys"])
        others = f" (it holds others, such as {unknown[0]})" if unknown else ""
        raise UserError(
            f"{name} lacks {len(wrong)} weights of {loader.__name__}, or has them in other shapes, the first: "
            f"{min(wrong)}{others}; random ones would take their place: give a whole model of that class"
        )
    return model


def load_part(loader: Any, folder: Path, name: str, **options: Any) -> Any:
    """What ``loader`` makes of ``folder``, such as a tokenizer; the arguments are those of `load_model`.

    Raises:
        UserError: when the files are damaged, or are not those of the config.
    """
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
        raise UserError(f"{name} cannot be loaded ({said})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): put the model's own file back") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: put the model's own file back")
    return content
