"""Reading a params file, and what is said of what is wrong in it: each key, its value, and what to write instead."""

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from latentloom.diffusion.sampling_settings import SETTING_NAMES
from latentloom.errors import UserError
from latentloom.params import ONE, SEVERAL, Params, SourceParams, SweepParams

# What keys of earlier versions are called now; those that only changed their section are found without.
RENAMED = {
    "recall_captions": "evaluate.training_captions",
    "sample_every": "previews.every",
    "sample_count": "previews.captions",
    "sample_guidance": "previews.guidance",
}
# What a params file of the version before lacks, at the value that changes nothing.
ADDED = {
    "ingest.shape": "square",
    "ingest.bucket_multiple": 32,
    "ingest.max_bucket_ratio": 2.0,
    "train.block_rows": None,
    "validate.min_reconstruction_psnr": 0.0,
    "validate.max_same_embeddings": 1.0,
    "evaluate.sizes": None,
    "train.init": None,
    "train.init_strict": False,
}


class ParamsError(UserError):
    """``params.yaml`` cannot be used; the message names each key, its value and what is allowed."""


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check a whole params file, which is YAML 1.2, as DVC has it: 010 is ten, ``yes`` and ``1:30`` are text.

    Raises:
        ParamsError: when the file is missing, is not YAML, holds a key or a value that is not allowed, or sections that
            do not fit together; one line for each, as ``KEY = VALUE: what is wrong``.
    """
    path = Path(path)
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # with the library and the reader of DVC
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist: run from the project's root, where params.yaml lies") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ParamsError(f"{path} is not valid YAML: line {line}: {error.problem}") from error
    except (YAMLError, ValueError) as error:  # the latter from a date such as 2024-13-01, or bytes that are not UTF-8
        raise ParamsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ParamsError(f"{path} must hold sections ({', '.join(ALLOWED_KEYS[''])}), not {content!r}")
    added = _add_missing(content)
    if added:
        warnings.warn(
            f"{path} is of an earlier version. Change it now, since DVC stops at a key that a stage reads and the file "
            f"lacks, and the next version will not read it: {', '.join(added)}",
            stacklevel=2,
        )
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError("\n".join([f"{path}:", *(_explain(item) for item in error.errors())])) from error


def _add_missing(content: dict[str, Any]) -> list[str]:
    """Add to the sections of ``content`` what they lack of `ADDED`; return what that was."""
    added = []
    for key, value in ADDED.items():
        section, name = key.split(".")
        if isinstance(keys := content.get(section), dict) and name not in keys:
            keys[name] = value
            added.append(f"add {key}: {json.dumps(value)}")
    return added


def _explain(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if part not in (ONE, SEVERAL)]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        *section, name = location
        if name in RENAMED:
            return f"  {key} is now {RENAMED[name]}"
        allowed = ALLOWED_KEYS[".".join(part for part in section if not part.isdigit())]
        elsewhere = [
            f"{other}.{name}".lstrip(".") for other, keys in ALLOWED_KEYS.items() if name in keys and "." not in other
        ]
        close = elsewhere or difflib.get_close_matches(name, allowed, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"  {key} = {error['input']!r}: unknown key{hint}; allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"  {key}: missing; every key of the section must be given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and location in ([], ["evaluate"]):
        return "  " + ".".join([*location, message])  # which names the keys, or the sampling setting
    given = error["input"]
    value = "" if isinstance(given, dict) else f" = {given!r}"
    return f"  {key}{value}: {message[0].lower()}{message[1:]}{_as_it_is_written(error['type'], given)}"


def _as_it_is_written(kind: str, given: Any) -> str:
    """What to write where YAML 1.2 reads another type than was meant."""
    if kind == "string_type" and not isinstance(given, dict | list | None):
        return "; put it in quotes"
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f"; write {given:.0f}"
    if kind == "bool_type" and str(given).lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
    return ""


def _allowed_keys() -> dict[str, list[str]]:
    """The keys of each section, by the section's name; of the file itself under no name."""
    models = {field.alias or name: field.annotation for name, field in Params.model_fields.items() if name != "seed"}
    models |= {"": Params, "ingest.source": SourceParams, "evaluate.sweep": SweepParams}
    keys = {name: [own.alias or key for key, own in model.model_fields.items()] for name, model in models.items()}
    return keys | {"evaluate": [*SETTING_NAMES, *keys["evaluate"][1:]]}


ALLOWED_KEYS = _allowed_keys()
