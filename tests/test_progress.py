"""Sizes are read as they are written."""

import pytest

from reverie.errors import InputError
from reverie.progress import bytes_of, size


def test_sizes_are_read_as_people_write_them():
    assert [bytes_of(text) for text in ("1GB", "1.5 mb", "64MiB", "7 B", "2k", ".29g", "3TiB")] == [
        10**9, 1_500_000, 64 * 2**20, 7, 2000, 290_000_000, 3 * 2**40,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["34 kB", "1.5 MB", "120 MB", "2.4 GB"])
def test_what_is_said_can_be_given(text):
    assert size(bytes_of(text)) == text


@pytest.mark.parametrize(
    "text", ["", "0", "7", "0GB", "much", "-1GB", "1XB", "1 bB", "GB", "\u0661GB", "1e3MB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="is no size: write one such as 500MB"):
        bytes_of(text)
