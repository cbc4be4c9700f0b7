"""The judge: what it is sent, what is understood, what is kept."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hkvprof.errors import HkvError, UsageError
from hkvprof.evaluate.reproduce.judging import Judgements
from hkvprof.evaluate.scorers.judge import (
    ASPECTS,
    Judge,
    JudgeCase,
    check_judge,
    mean_score,
    published_messages,
)
from tests.evaluate.reproduce.judges import LoopbackJudge

ASKED = JudgeCase("correctness", {"question": "Who runs?", "answer": "a man", "pred": "a boy"})
SCRIPT = """
import openai
def annotate(prediction_set):
    question, answer, pred = prediction_set
    raise SystemExit("a script is read, never run")
    openai.ChatCompletion.create(model="m", messages=[
        {"role": "system", "content": "Grade. " "With care."},
        {"role": "user", "content": "One:\\n" f"Q: {question}\\n" f"A: {answer} P: {pred}"},
    ])
"""


def no_wait(seconds: float) -> None:
    """As long as it takes to be called."""


def test_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with LoopbackJudge(score=4) as server:
        assert Judge(server.url, "m").score(ASKED) == 4
    (body,) = server.asked
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("m", 0)
    told = body["messages"][1]["content"]
    assert all(text in told for text in ASKED.fields.values())
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [("{'score': 3}", 3), ('{"score": 4.8}', 4), ("{''score': 2}", 2), ("Score: 5", 5)],
)
def test_scores_are_cut_to_whole_numbers(reply: str, score: int) -> None:
    with LoopbackJudge(replies=[reply]) as server:
        assert Judge(server.url, "m").score(ASKED) == score


def test_it_is_asked_again_after_overload_and_nonsense() -> None:
    with LoopbackJudge(score=1, replies=[503, 429, "I cannot say.", "{'score': 9}"]) as server:
        assert Judge(server.url, "m", wait=no_wait).score(ASKED) == 1
    assert len(server.asked) == 5


def test_what_stops_it() -> None:
    with LoopbackJudge(replies=["no"] * 9) as server, pytest.raises(HkvError, match="no score"):
        Judge(server.url, "m").score(ASKED)
    with LoopbackJudge(replies=[401]) as server, pytest.raises(HkvError, match="answers 401"):
        Judge(server.url, "m").score(ASKED)
    with pytest.raises(HkvError, match="no judge answers"):
        Judge("http://127.0.0.1:9/v1", "m", wait=no_wait).score(ASKED)
    with pytest.raises(UsageError, match="expected an address"):
        check_judge("file:///etc/passwd")


def test_instructions_of_a_published_script(tmp_path: Path) -> None:
    script = tmp_path / ASPECTS["correctness"][1]
    script.write_text(SCRIPT)
    assert Judge("http://x", "m", tmp_path).messages(ASKED) == [
        {"role": "system", "content": "Grade. With care."},
        {"role": "user", "content": "One:\nQ: Who runs?\nA: a man P: a boy"},
    ]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (SCRIPT.replace("{pred}", "{key}"), "expected text and question, answer, pred"),
        (SCRIPT.replace("{pred}", "{open('x')}"), "expected text and"),
        ("x = 1", "sends no messages"),
        ("x = (", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_script_that_is_not_as_published(tmp_path: Path, written: str | None, says: str) -> None:
    script = tmp_path / "script.py"
    if written is not None:
        script.write_text(written)
    with pytest.raises(UsageError, match=says):
        published_messages(script, ASKED.fields)


def test_the_mean_is_over_aspects() -> None:
    assert mean_score({"correctness": [5, 5, 5], "temporal": [1]}) == 3


def test_judgements_are_kept_at_once_and_survive_a_cut_line(tmp_path: Path) -> None:
    others = [JudgeCase("temporal", {**ASKED.fields, "pred": str(n)}) for n in range(3)]
    with LoopbackJudge(score=2, replies=["{'score': 5}", 401]) as server:
        judge = Judge(server.url, "m", wait=no_wait)
        with pytest.raises(HkvError):
            Judgements(tmp_path, judge.name).ask(judge, others, lambda items, *_: items)
        file = tmp_path / "judgements.jsonl"
        assert len(file.read_text().splitlines()) == 1
        file.write_text(file.read_text() + '["cut off')
        kept = Judgements(tmp_path, judge.name)
        kept.ask(judge, others, lambda items, *_: items)
    assert [kept.scores[one.key] for one in others] == [5, 2, 2]
    assert Judgements(tmp_path, None).scores == kept.scores
    assert Judgements(tmp_path, "another").scores == {}
    assert [ast.literal_eval(line)[2] for line in file.read_text().splitlines()] == [5, 2, 2]
