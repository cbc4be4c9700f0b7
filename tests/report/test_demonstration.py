"""What a demonstration shows: examples chosen before the rival is looked at, and its verdict."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console, RenderableType

from hkvprof.evaluate.records import FULL, OURS, Answer
from hkvprof.evaluate.statistics import summarise
from hkvprof.report.demonstration import (
    demonstration_table,
    example_page,
    examples,
    lengths,
    verdict,
)
from hkvprof.report.picture import UPPER_HALF
from hkvprof.samples.record import Sample

RIVAL = "snapkv"


def answer(sample: str, method: str, score: float, regime: str = "inside", turn: int = 0) -> Answer:
    full, ours = method == FULL, method == OURS
    return Answer(
        sample=sample, task="cell", regime=regime, turn=turn, method=method,
        budget="" if full else "0.05", text=f"{method} says {score:g}", expected="red",
        metric="exact_match", score=score, kl=0.0 if full else 0.5, agreement=0.9, nll=0.2, steps=4,
        prompt_tokens=600, resident_bytes=1000 if full else 50, storage_bytes=50,
        host_bytes=2048 if ours else 0, dense_bytes=1000, compress_seconds=0.0, hit_rate=None,
        read_share=0.031 if ours else 0.0,
    )  # fmt: skip


def sample(name: str, question: str = "what is at B3 of image #2") -> Sample:
    content = [
        {"type": "text", "text": "image #1 :"},
        {"type": "image", "image": Image.new("RGB", (60, 60), "red")},
        {"type": "text", "text": "image #2 :"},
        {"type": "image", "image": Image.new("RGB", (60, 60), "blue")},
        {"type": "text", "text": question},
    ]
    return Sample(name, "cell", ({"role": "user", "content": content},), "red")


def trio(
    name: str, full: float, ours: float, theirs: float, regime: str = "inside"
) -> list[Answer]:
    scores = {RIVAL: theirs, OURS: ours, FULL: full}
    return [answer(name, method, score, regime) for method, score in scores.items()]


def printed(what: RenderableType, **more: object) -> str:
    file = io.StringIO()
    console = Console(file=file, **{"width": 80, "markup": False, **more})  # type: ignore[arg-type]
    console.print(what)
    return file.getvalue()


def test_examples_are_the_first_that_the_full_cache_answers() -> None:
    """Whether the rival fails, or hkvprof does, has no part in it."""
    told = [
        *trio("a", 1, 1, 1), *trio("b", 0, 1, 0), *trio("c", 1, 0, 1),
        *trio("d", 1, 1, 0), *trio("e", 1, 1, 0), *trio("d", 1, 0, 0, "after"),
    ]  # fmt: skip
    found = examples(told, [sample(name) for name in "abcde"])
    assert [one.sample.id for one in found] == ["a", "c", "d"]
    assert [one.method for one in found[1].answers] == [FULL, OURS, RIVAL]
    assert {one.regime for example in found for one in example.answers} == {"inside"}


@pytest.mark.parametrize(
    ("question", "expected", "label"),
    [
        ("what is at B3 of image #2", "red", "#2"),
        ("which image has the disc", "#2", "#2"),
        ("which image has more red #7 or #1", "#1", "#1"),
        ("code for red star", "008", "#1"),
    ],
)
def test_the_picture_that_is_asked_about_is_shown(question: str, expected: str, label: str) -> None:
    told = [replace(one, expected=expected) for one in trio("a", 1, 1, 0)]
    (example,) = examples(told, [sample("a", question)])
    assert example.picture is not None
    name, image = example.picture
    assert name == label
    assert image.getpixel((0, 0)) == {"#1": (255, 0, 0), "#2": (0, 0, 255)}[label]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_page_says_who_is_right(width: int) -> None:
    (example,) = examples(trio("a", 1, 1, 0), [sample("a")])
    plain = printed(example_page(example, 1, pictures=False), width=width)
    assert UPPER_HALF not in plain
    assert [line.split()[-1] for line in plain.splitlines() if "says" in line] == [
        "right", "right", "wrong",
    ]  # fmt: skip
    drawn = printed(
        example_page(example, 1, pictures=True), width=80, force_terminal=True,
        color_system="truecolor",
    )  # fmt: skip
    assert drawn.count(UPPER_HALF) == 36 * 18
    assert "picture #2 of 2" in drawn


def test_the_table_has_every_method_in_every_regime() -> None:
    told = [*trio("a", 1, 1, 0), *trio("b", 1, 0, 0), *trio("a", 1, 1, 1, "after")]
    lines = printed(demonstration_table(summarise(told))).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if "hkvprof" in line] == [
        ["hkvprof", "5%", "5.0%", "3.1%", "50.0%", "0.5"],
        ["hkvprof", "5%", "5.0%", "3.1%", "100.0%", "0.5"],
    ]
    assert sum("full cache" in line for line in lines) == 2
    assert "(2 questions, 2 samples)" in lines[0]


def test_the_verdict_follows_the_figures() -> None:
    names = [f"s{number}" for number in range(20)]
    told = [one for name in names for one in trio(name, 1, 1, 0)]
    told += [one for name in names for one in trio(name, 1, 0, 1, "after")]
    first, second, price = verdict(told, 51.2)
    assert "keeps 100% of the full cache's score at 5.0%" in first
    assert first.endswith("better than SnapKV by +100 points [+100, +100].")
    assert second.endswith("worse than SnapKV by -100 points [-100, -100].")
    assert price == (
        "Price: a step reads 3.1% of the dense bytes from host memory, where 2 KiB lie; "
        "calibrated once, in 51 s."
    )


def test_few_samples_do_not_make_a_verdict() -> None:
    told = [*trio("a", 1, 1, 0), *trio("b", 1, 1, 1)]
    line, price = verdict([replace(one, host_bytes=0, read_share=0.0) for one in told])
    assert line.endswith("not told from SnapKV on 2 samples (+50 points [+0, +100]).")
    assert price == "Price: nothing is read from host memory."


def test_lengths_in_words() -> None:
    told = trio("a", 1, 1, 1)
    assert lengths(told) == "600 tokens"
    assert lengths([*told, replace(told[0], prompt_tokens=1234)]) == "600 to 1,234 tokens"
