"""Which encoders the params name, by fingerprint, as `find_sources` found them: what stages depend on.

    data/encoders/encode_images.json   {"vae": {"reference", "pinned", "fingerprint"}}; a file for each stage that
                                       names encoders, so that another one reruns that stage alone; null: none is named

A name may stand for something else tomorrow: files in a folder are replaced, a repository on the hub moves on. So each
`dvc repro` looks again at what lies here; other bytes have another fingerprint, which reruns the stage. What the hub
gave is pinned to its commit, and stays that until the params name something else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from latentloom.encoding.pretrained import fingerprint
from latentloom.encoding.references import hub_folder_here, is_local, pinned, text_folder, vae_folder, vision_folder
from latentloom.files import read_json, write_json
from latentloom.layout import ENCODERS

FOLDERS: dict[str, Callable[[str], Path]] = {  # key of the params -> where a reference leads
    "encode_images.vae": vae_folder,
    "encode_text.model": text_folder,
    "evaluate.features": lambda reference: vision_folder(reference, "evaluate.features"),
    "evaluate.clip": lambda reference: vision_folder(reference, "evaluate.clip"),
}


@dataclass(frozen=True)
class NamedEncoder:
    """What one key of the params names: its reference there, the one that leads to the same files for ever, the hash
    of what decides its output."""

    reference: str
    pinned: str
    fingerprint: str


def find_encoders(references: dict[str, str | None], folder: Path, hash_file: Callable[[Path], str]) -> None:
    """Write what the params name into ``folder``, a file for each stage.

    What is not on this machine, and what the hub gave, stays as it was recorded there.

    Args:
        references: by key of the params, as in `FOLDERS`.
        folder: `layout.ENCODERS`.
        hash_file: gives the SHA-256 of a file.

    Raises:
        UserError: when an encoder is not to be had and was not recorded either, or is no model that can be read.
    """
    found: dict[str, dict[str, dict[str, str] | None]] = {}
    for key, reference in references.items():
        stage, name = key.split(".")
        own = None if reference is None else _find(key, reference, recorded(key, reference, folder), hash_file)
        found.setdefault(stage, {})[name] = own and asdict(own)
    for stage, named in found.items():
        write_json(folder / f"{stage}.json", named)


def _find(key: str, reference: str, before: NamedEncoder | None, hash_file: Callable[[Path], str]) -> NamedEncoder:
    if before and not is_local(reference):
        # The hub's commit stays; and a clone that has the data need not have the folder.
        here = hub_folder_here(before.pinned)
        return replace(before, fingerprint=fingerprint(here, hash_file)) if here else before
    folder = FOLDERS[key](reference)
    return NamedEncoder(reference, pinned(reference, folder), fingerprint(folder, hash_file))


def recorded(key: str, reference: str, folder: Path = ENCODERS) -> NamedEncoder | None:
    """What was found for a key of the params; None where nothing was, or for another reference."""
    stage, name = key.split(".")
    path = folder / f"{stage}.json"
    entry = read_json(path).get(name) if path.exists() else None
    return NamedEncoder(**entry) if entry and entry["reference"] == reference else None


def current_fingerprint(key: str, reference: str) -> str:
    """The fingerprint of what a key of the params names, as `find_sources` found it, or else of what is here."""
    known = recorded(key, reference)
    return known.fingerprint if known else fingerprint(FOLDERS[key](reference))


def pinned_reference(key: str, reference: str) -> str:
    """The reference to load: with the commit of the hub that `find_sources` found, where it did."""
    known = recorded(key, reference)
    return known.pinned if known else reference
