"""Captions in any script, in lines that fit."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from latentloom import lettering
from latentloom.lettering import draw_caption, wrap


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat on a sofa", ["a cat on a", "sofa"]),
        ("  a \n cat ", ["a cat"]),
        ("", [""]),
        ("a hippopotamus", ["a", "hippopotam", "us"]),
        ("extraordinary hippopotamuses", ["extraordin", "ary", "hippopota…"]),
        ("一只在雪地里奔跑的棕色小狗", ["一只在雪地里奔跑的棕", "色小狗"]),
        ("one two three four five six seven", ["one two", "three four", "five six…"]),
    ],
)
def test_lines_end_between_words_and_long_words_go_on_in_the_next_line(text, expected):
    assert wrap(text, len, 10, 3) == expected


def test_an_accent_stays_with_its_letter():
    lines = wrap("e\u0301" * 6, len, 5, 9)
    assert lines == ["e\u0301" * 2] * 3


def drawn(caption: str) -> np.ndarray:
    canvas = Image.new("RGB", (128, 60), "white")
    draw_caption(canvas, caption, (64, 4), width=124, lines=3)
    return np.asarray(canvas)


@pytest.mark.parametrize(
    ("script", "captions"),
    [
        ("noto_cjk_sans_jp_regular", ["\u732b", "\u72ac", "\u3075\u308f", "\uace0\uc591", "\uac1c"]),
        ("fontpkg_noto_sans_thai", ["\u0e41\u0e21\u0e27", "\u0e2b\u0e21\u0e32"]),
        ("fontpkg_noto_sans_devanagari", ["\u092c\u093f", "\u0915\u0941"]),
    ],
)
def test_captions_in_other_scripts_are_written_in_a_font_that_has_them(script, captions, monkeypatch, recwarn):
    pytest.importorskip(script)
    pictures = {drawn(caption).tobytes() for caption in captions}
    assert len(pictures) == len(captions)
    assert not recwarn.list
    latin = drawn("a cat")
    monkeypatch.setattr(lettering, "_installed_fonts", tuple)
    with pytest.warns(UserWarning, match=r"pip install -e '\.\[fonts\]' brings more scripts"):
        boxes = drawn(captions[0])
    assert boxes.tobytes() not in pictures
    assert (drawn("a cat") == latin).all()  # of English, the font is the same wherever it is drawn


def test_marks_that_have_no_glyph_need_no_font(recwarn):
    assert unicodedata.category("\u200d") == "Cf"
    drawn("a\u200db")
    assert not recwarn.list
