"""Captions come out as one line of valid Unicode each, in order, none twice; what is no text is rejected."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentloom.ingestion.captions import caption_lines, clean_caption, clean_captions, flat_captions
from latentloom.ingestion.rejects import Reason, RejectedSample


def reason(raw: list[object]) -> Reason:
    with pytest.raises(RejectedSample) as caught:
        clean_captions(raw)
    caught.value.detail.encode("utf-8")
    return caught.value.reason


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  red\tapple \r\n", "a red apple"),
        ("two\nlines", "two lines"),
        ("\ufeffwith a mark", "with a mark"),
        ("a\u00a0hard space", "a hard space"),
        ("nul\x00bell\x07", "nul bell"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u4e00\u53ea\u732b", "\u4e00\u53ea\u732b"),
    ],
)
def test_white_space_controls_and_accents_are_put_in_order(raw, clean):
    assert clean_caption(raw) == clean


def test_repeated_captions_are_kept_once_and_in_order():
    assert clean_captions(["a dog", "a cat", " a  dog", "", "a bird"]) == ["a dog", "a cat", "a bird"]


def test_numbers_and_bytes_are_text():
    assert clean_captions([7, 2.5, "caf\u00e9".encode()]) == ["7", "2.5", "caf\u00e9"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([], Reason.NO_CAPTION),
        (["", " \n", "\ufeff"], Reason.EMPTY_CAPTION),
        (["good", "caf\udce9"], Reason.CAPTION_NOT_UTF8),
        ([{"text": "nested"}], Reason.CAPTION_NOT_TEXT),
        ([True], Reason.CAPTION_NOT_TEXT),
        ([b"caf\xe9"], Reason.CAPTION_NOT_UTF8),
    ],
)
def test_what_cannot_be_a_caption_is_rejected_with_its_reason(raw, expected):
    assert reason(raw) is expected


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
        (b"one\n\ntwo\r", ["one", "two"]),
        ("a cat\u2028on\x1c a\x0c sofa\x85".encode(), ["a cat on a sofa"]),
    ],
)
def test_a_text_file_holds_one_caption_a_line_and_no_other_control_character_ends_one(data, lines):
    assert clean_captions(caption_lines(data)) == lines


def test_an_empty_text_file_holds_an_empty_caption():
    assert caption_lines(b"") == [""]


def test_lists_are_laid_flat_and_nulls_left_out():
    row = {"a": "one", "b": None, "c": ["two", None, float("nan")], "d": [], "e": 3, "f": float("nan"), "g": "no"}
    assert flat_captions(row, dict.fromkeys("abcdef", 1)) == ["one", "two", 3]


def test_a_caption_stands_as_often_as_its_column_asks_whatever_else_repeats_it():
    row = {"long": "a long one", "all": ["one", "two"], "short": "two ", "other": "one"}
    raw = flat_captions(row, {"long": 3, "all": 1, "short": 2, "other": 1})
    assert clean_captions(raw) == ["a long one"] * 3 + ["one", "two", "two"]


@given(st.text())
def test_cleaning_is_idempotent_and_leaves_valid_composed_text(text):
    try:
        once = clean_caption(text)
    except RejectedSample as rejected:
        assert rejected.reason is Reason.CAPTION_NOT_UTF8
        return
    assert clean_caption(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")
