"""The shortest context from which on compression is not slower."""

import pytest

from hkvprof.bench.compare import crossover_contexts, find_crossovers
from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import Context, Crossover, Row
from tests.bench.results import row

OURS = Method(Kind.PROFILE, "0.1")


def context(tokens: int, dense_ms: float, ours_ms: float | None, resident: int = 100) -> Context:
    ours = Row(OURS.name, "profile", "0.1", "too short")
    if ours_ms is not None:
        ours = row(OURS, tokens, resident, ours_ms)
    return Context(tokens, 1, "prose", (row(Method(Kind.DENSE), tokens, 1000, dense_ms), ours))


@pytest.mark.parametrize(
    ("steps", "found"),
    [([(2, 3), (2, 2.5), (3, 3), (4, 3)], 256),
     ([(2, 1), (2, 2.5), (3, 2), (4, 3)], 256),
     ([(2, 1), (2, 1), (3, 1), (4, 5)], None),
     ([(2, 1), (2, 1), (3, 1), (4, 3)], 64),
     ([(2, None), (2, None), (3, 4), (4, 3)], 512)],
)  # fmt: skip
def test_from_there_on_it_pays(steps: list[tuple[float, float | None]], found: int | None) -> None:
    contexts = [context(64 << i, dense, ours) for i, (dense, ours) in enumerate(steps)]
    saved = None if found is None else 900
    assert find_crossovers(contexts, ["0.1"]) == (Crossover("0.1", found, saved),)


def test_equal_time_without_saved_bytes_is_no_gain() -> None:
    assert find_crossovers([context(64, 2, 2, resident=1000)], ["0.1"])[0].tokens is None


def test_contexts_double_up_to_the_limit() -> None:
    assert crossover_contexts(None) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert crossover_contexts(1000) == (64, 128, 256, 512)
