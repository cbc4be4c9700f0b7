"""Budgets as users write them: what is understood, and what is said of anything else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import BudgetError, UsageError
from hkvprof.profile.budgets import Budget, Fetch, parse_size

SEARCH = settings(max_examples=200, deadline=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("15.2 gib", 16320875724), ("80GB", 80 * 10**9),
     ("800MiB", 800 * 2**20), ("1b", 1), ("0", 0), ("0GiB", 0), (" .5kb ", 500)],
)  # fmt: skip
def test_sizes_that_are_understood(text: str, size: int) -> None:
    assert parse_size(text, "--gpu") == size


@pytest.mark.parametrize(
    "text", ["24", "", "GiB", "-1GiB", "1e9b", "24 TB", "10%", "nan", "24GiBs"]
)
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--gpu is a size in bytes, found .*such as 24GiB"):
        parse_size(text, "--gpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.1, Budget(share=0.1)), ("0.10", Budget(share=0.1)), ("10%", Budget(share=0.1)),
        (" 12.5 % ", Budget(share=0.125)), ("100%", Budget(share=1.0)), (1, Budget(share=1.0)),
        (1.0, Budget(share=1.0)), ("1", Budget(share=1.0)), (".5", Budget(share=0.5)),
        (4096, Budget(tokens=4096)), ("4096", Budget(tokens=4096)), (2, Budget(tokens=2)),
        (np.int64(64), Budget(tokens=64)), (np.float32(0.5), Budget(share=0.5)),
        ("2GiB", Budget(bytes=2 * 2**30)), ("1.5 MB", Budget(bytes=1_500_000)),
        ("300b", Budget(bytes=300)), ("2gib", Budget(bytes=2 * 2**30)),
        (Budget(tokens=5), Budget(tokens=5)),
    ],
)  # fmt: skip
def test_what_is_understood(text: object, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "value",
    [0, -1, 0.0, -0.5, 1.5, 2.5, "0", "0%", "101%", "1.5", "-3", "", " ", "ten", "10 %%", "GiB",
     "2 TB", "1e-1", "0.1.2", "0x10", "nan", "inf", float("nan"), float("inf"), True, False, None,
     "0B", "0.1B", "１０", "1" * 5000],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_what_is_not_understood_says_what_would_be(value: object) -> None:
    with pytest.raises(BudgetError, match=r"not understood: .*expected a share"):
        Budget.parse(value)
    assert issubclass(BudgetError, UsageError)


@pytest.mark.parametrize("text", ["5", " 20", "1.5", "99"])
def test_a_percentage_without_its_sign_is_asked_about(text: str) -> None:
    with pytest.raises(BudgetError, match=f"did you mean {text.strip()}%?"):
        Budget.parse(text)
    assert Budget.parse("100") == Budget(tokens=100)


@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.none()))
@SEARCH
def test_parsing_anything_gives_a_budget_or_the_error(value: object) -> None:
    try:
        budget = Budget.parse(value)
    except BudgetError:
        return
    assert 0 < budget.resolve(1000, 10**9) <= 1
    assert str(budget)


def test_resolve() -> None:
    assert Budget(tokens=100).resolve(1000, 1) == 0.1
    assert Budget(tokens=100).resolve(50, 1) == 1.0
    assert Budget(bytes=2**20).resolve(1, 2**22) == 0.25
    assert Budget(bytes=2**20).resolve(1, 2**10) == 1.0
    assert Budget(share=0.3).resolve(0, 0) == 0.3


INF = math.inf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Fetch()), (0.01, Fetch(0.01)), ("1%", Fetch(0.01)), (0, Fetch(0)), ("0", Fetch(0)),
        ("0%", Fetch(0)), (1, Fetch(1)), (" .5 ", Fetch(0.5)), ("2MiB", Fetch(bytes=2**21)),
        ("0b", Fetch(bytes=0)), ("unlimited", Fetch(INF)), (INF, Fetch(INF)), ("inf", Fetch(INF)),
        (Fetch(bytes=3), Fetch(bytes=3)),
    ],
)  # fmt: skip
def test_what_is_understood_as_a_budget_of_reads(text: object, expected: Fetch) -> None:
    assert Fetch.parse(text) == expected
    assert str(expected)


@pytest.mark.parametrize(
    "value",
    [-0.01, 1.01, 2, "2", "101%", "-1%", "2 TB", "knee", "", True, float("nan"), "nan", [0.1]],
    ids=repr,
)
def test_other_budgets_of_reads_are_refused_with_examples(value: object) -> None:
    with pytest.raises(BudgetError, match=r"fetch .* is not understood: .*'1%'.*'2MiB'.*unlimited"):
        Fetch.parse(value)


@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.none()))
@SEARCH
def test_parsing_anything_gives_reads_or_the_error(value: object) -> None:
    try:
        share = Fetch.parse(value).resolve(10**6)
    except BudgetError:
        return
    assert share is None or share >= 0


def test_reads_in_bytes_are_a_share_of_the_rows_dense_ones() -> None:
    assert Fetch.parse("1kb").resolve(10**6) == 0.001
    assert Fetch.parse("1GiB").resolve(10**6) == pytest.approx(1073.741824)  # more than there is
    assert Fetch.parse(None).resolve(10**6) is None
