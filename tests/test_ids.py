import hashlib

import numpy as np
import pyarrow as pa
import pytest

from latentloom.ids import ascending, first_words, from_hex, positions, to_hex

NAMES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(300)]


def test_ids_come_back_as_they_went_in_from_lists_arrays_slices_and_chunks():
    ids = from_hex(NAMES)
    assert ids.shape == (300, 32)
    assert ids[7].tobytes() == bytes.fromhex(NAMES[7])
    assert to_hex(ids).to_pylist() == NAMES
    column = pa.array(NAMES)
    assert (from_hex(column[20:40]) == ids[20:40]).all()
    assert (from_hex(pa.chunked_array([column[:9], column[9:]])) == ids).all()
    assert from_hex([]).shape == (0, 32)
    assert to_hex(ids[:0]).to_pylist() == []


def test_what_is_no_id_is_refused():
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        from_hex([NAMES[0][:-1], NAMES[1] + "0"])


def test_positions_are_those_of_a_dict_and_the_first_of_equal_ones():
    among = [*NAMES[:200], *NAMES[50:60]]
    expected = [among.index(name) if name in among else -1 for name in NAMES]
    assert positions(from_hex(NAMES), from_hex(among)).tolist() == expected
    assert positions(from_hex(NAMES), from_hex([])).tolist() == [-1] * 300


def test_ids_that_begin_alike_are_told_apart():
    ids = np.zeros((40, 32), np.uint8)
    ids[:, 31] = np.arange(40)
    wanted = ids[[5, 39, 0]].copy()
    wanted[2, 20] = 1
    assert positions(wanted, ids).tolist() == [5, 39, -1]


def test_first_words_sort_as_ids_do():
    ids = from_hex(NAMES)
    assert np.argsort(first_words(ids)).tolist() == sorted(range(300), key=NAMES.__getitem__)


def test_ids_are_sorted_as_their_digits_are_also_where_they_begin_alike():
    ids = from_hex(NAMES)
    assert ascending(ids).tolist() == sorted(range(300), key=NAMES.__getitem__)
    ids[:, :8] = 0
    assert ascending(ids).tolist() == sorted(range(300), key=lambda row: NAMES[row][16:])
