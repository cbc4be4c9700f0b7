"""Sizes as people write them."""

import pytest

from hkvprof.errors import UsageError
from hkvprof.profile.budgets import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("15.2 gib", 16320875724), ("80GB", 80 * 10**9),
     ("800MiB", 800 * 2**20), ("1b", 1), ("0", 0), ("0GiB", 0), (" .5kb ", 500)],
)  # fmt: skip
def test_what_is_understood(text: str, size: int) -> None:
    assert parse_size(text, "--gpu") == size


@pytest.mark.parametrize(
    "text", ["24", "", "GiB", "-1GiB", "1e9b", "24 TB", "10%", "nan", "24GiBs"]
)
def test_what_is_not_says_what_would_be(text: str) -> None:
    with pytest.raises(UsageError, match=r"--gpu is a size in bytes, found .*such as 24GiB"):
        parse_size(text, "--gpu")
