"""The table of sizes that pictures of any shape are cropped to, and which of them a picture gets."""

import pytest

from latentloom.sizes import Size, best_bucket, bucket_table, prepared_size

TABLE = (Size(96, 192), Size(96, 160), Size(128, 128), Size(160, 96), Size(192, 96))


def test_a_table_has_about_the_area_of_its_square_in_every_ratio_up_to_the_largest():
    assert bucket_table(128, 32, 2.0) == TABLE
    assert bucket_table(128, 32, 1.0) == bucket_table(128, 128, 2.0) == (Size(128, 128),)
    for base, multiple, most in [(512, 64, 2.0), (256, 32, 4.0), (96, 8, 3.0)]:
        table = bucket_table(base, multiple, most)
        assert Size(base, base) in table
        assert {Size(size.height, size.width) for size in table} == set(table)
        assert [size.ratio for size in table] == sorted(size.ratio for size in table)
        for width, height in table:
            assert width % multiple == height % multiple == 0
            assert max(width, height) <= most * min(width, height)
            assert abs(width * height - base**2) <= max(width, height) * multiple / 2


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (100, 100, (128, 128)),
        (640, 480, (160, 96)),  # of 4:3, 5:3 keeps 80 % and the square 75 %
        (480, 640, (96, 160)),
        (600, 480, (128, 128)),  # of 5:4, the square keeps 80 % and 5:3 75 %
        (1600, 900, (160, 96)),
        (1900, 1000, (192, 96)),
        (5000, 1000, (192, 96)),
    ],
)
def test_a_picture_gets_the_bucket_that_keeps_most_of_it(width, height, size):
    assert best_bucket(width, height, TABLE) == size


def test_of_buckets_that_keep_as_much_the_larger_is_taken():
    assert best_bucket(200, 100, [Size(100, 100), Size(400, 100)]) == Size(400, 100)
    assert best_bucket(200, 100, [Size(64, 32), Size(128, 64)]) == Size(128, 64)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (192, 192, (192, 192)),
        (127, 400, (96, 192)),
        (256, 500, (128, 256)),
        (150, 160, (128, 128)),
        (60, 40, (160, 96)),
    ],
)
def test_a_picture_is_prepared_at_the_largest_size_that_does_not_enlarge_it(width, height, size):
    assert prepared_size(width, height, [bucket_table(base, 32, 2.0) for base in (128, 192)]) == size


def test_a_size_is_read_as_it_is_written():
    assert Size.parse("192x128") == Size(192, 128)
    assert str(Size(192, 128)) == "192x128"
    for text in ("192", "192x", "192X128", "0x8", "-1x8", "192x128x3", "1.5x2", ""):
        with pytest.raises(ValueError, match="is no size: it is written as WIDTHxHEIGHT in pixels, such as 192x128"):
            Size.parse(text)
