"""Full against compressed cache: conversations token by token, summaries by hand, the command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hkvprof
import hkvprof.runtime
from hkvprof.artifact import Profile
from hkvprof.cli import run
from hkvprof.errors import BudgetError, CompressionError, UsageError
from hkvprof.evaluate.compare import Answer, compare, summarise, task_scores
from hkvprof.evaluate.converse import converse
from hkvprof.evaluate.metrics import EXACT_MATCH as SAME
from hkvprof.evaluate.tasks import TINYVL_UNJUDGED, TaskSet, default_tasks, load_tasks
from hkvprof.models.adapter import view_model
from hkvprof.profile.samples import Sample
from hkvprof.profile.uniform import uniform_profile
from hkvprof.testbed.generator import make_sample
from hkvprof.testbed.questions import TASKS


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return tuple(
        make_sample(task, 3, images=3, rows=6, cols=6, split="heldout", followups=2)
        for task in ("list", "find")
    )


@pytest.fixture(scope="module")
def hybrid(tiny: tuple[Any, Any]) -> Profile:
    """Static and dynamic heads in turn."""
    types = torch.arange(24).view(6, 4).remainder(2).numpy()
    return uniform_profile(tiny[0], types, budget=0.4, chunk=8)


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


# -- conversations --------------------------------------------------------------------------------


def record_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Token ids that every generation was given."""
    prompts: list[Tensor] = []
    generate = model.generate

    def recording(**kwargs: Any) -> Tensor:
        prompts.append(kwargs["input_ids"])
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", recording)
    return prompts


@pytest.mark.parametrize("max_new_tokens", [16, 1])
def test_every_turn_has_the_ids_of_the_whole_conversation(
    tiny: tuple[Any, Any],
    samples: tuple[Sample, ...],
    max_new_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether answers end by themselves (16) or are cut short (1)."""
    model, processor = tiny
    prompts = record_prompts(model, monkeypatch)
    cache = DynamicCache(config=view_model(model).text_config)
    replies = converse(model, processor, samples[0], cache, max_new_tokens)
    conversation = list(samples[0].messages)
    for turn, reply in enumerate(replies):
        encoded = processor.encode([conversation])
        assert torch.equal(prompts[turn], encoded.inputs["input_ids"]), turn
        assert reply.prompt_tokens == encoded.tokens
        if turn < 2:
            conversation.append(message("assistant", reply.text))
            conversation.append(message("user", samples[0].followups[turn].question))
    assert len(prompts) == len(replies) == 3
    expected = [samples[0].reply, *(turn.reply for turn in samples[0].followups)]
    assert [reply.expected for reply in replies] == expected


def test_full_cache_answers_are_those_of_plain_generation(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...]
) -> None:
    """Every turn answered anew from the whole conversation, without hkvprof and without a cache."""
    model, processor = tiny
    for sample in samples:
        cache = DynamicCache(config=view_model(model).text_config)
        replies = converse(model, processor, sample, cache, 16)
        conversation = list(sample.messages)
        for turn, reply in enumerate(replies):
            inputs = processor.encode([conversation]).to(model.device, model.dtype)
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            assert reply.text == processor.decode(new)
            assert reply.decode_steps == len(new) - 1
            if turn < 2:
                conversation.append(message("assistant", reply.text))
                conversation.append(message("user", sample.followups[turn].question))


def test_a_budget_of_everything_answers_as_the_full_cache(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    tasks = TaskSet("two", samples, SAME, 12)
    answers = compare(*tiny, hybrid, tasks, [1.0])
    full = [a for a in answers if a.method == "full"]
    whole = [a for a in answers if a.method != "full"]
    assert [a.text for a in full] == [a.text for a in whole]
    assert [a.resident_bytes for a in full] == [a.resident_bytes for a in whole]


# -- comparisons ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile) -> list[Answer]:
    return compare(*tiny, hybrid, TaskSet("two", samples, SAME, 12), [0.4, "60%"])


def test_every_sample_and_turn_is_answered_by_every_method(
    answers: list[Answer], samples: tuple[Sample, ...]
) -> None:
    found = [(a.sample, a.method, a.turn) for a in answers]
    methods = ("full", "budget 0.4", "budget 60%")
    assert found == [(s.id, m, turn) for s in samples for m in methods for turn in range(3)]
    for answer in answers:
        sample = next(s for s in samples if s.id == answer.sample)
        replies = [sample.reply, *(turn.reply for turn in sample.followups)]
        assert answer.expected == replies[answer.turn]
        assert answer.score == SAME(answer.text, (answer.expected,))
        assert answer.metric == "exact_match"
        assert answer.task == (sample.task if answer.turn == 0 else "later question")


def test_receipts_agree_with_the_tensors_within_one_percent(answers: list[Answer]) -> None:
    compressed = [a for a in answers if a.method != "full"]
    assert compressed
    for answer in compressed:
        assert answer.storage_bytes == pytest.approx(answer.resident_bytes, rel=0.01)
        assert answer.resident_bytes < answer.dense_bytes
        assert answer.host_bytes > 0
        assert answer.hit_rate is not None
        assert 0 <= answer.hit_rate <= 1
    for summary in summarise(answers)[1:]:
        assert summary.storage_share == pytest.approx(summary.share, rel=0.01)
        assert summary.share < 0.9
    for answer in (a for a in answers if a.method == "full"):
        # Keys and values of 6 layers, 4 heads, 32 channels in float32, of this turn's prompt.
        assert answer.dense_bytes == answer.prompt_tokens * 2 * 6 * 4 * 32 * 4
        assert (answer.resident_bytes, answer.storage_bytes) == (answer.dense_bytes,) * 2
        assert (answer.host_bytes, answer.hit_rate) == (0, None)


def test_a_smaller_budget_keeps_less(answers: list[Answer]) -> None:
    full, small, large = summarise(answers)
    assert (full.share, full.storage_share) == (1, 1)
    assert small.share < large.share < 1


def test_the_model_is_free_again_after_a_comparison(
    tiny: tuple[Any, Any], answers: list[Answer], hybrid: Profile
) -> None:
    assert answers
    with hkvprof.runtime.apply(tiny[0], hybrid):
        pass


def test_nothing_compressed_is_an_error(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    tasks = TaskSet("one", (replace(samples[0], followups=()),), SAME, 2)
    with pytest.raises(CompressionError, match="budget 2GiB compressed nothing"):
        compare(*tiny, hybrid, tasks, [0.4, "2GiB"])
    short = [{"type": "text", "text": "is there any blue square"}]
    question = Sample("short", "short", ({"role": "user", "content": short},), reply="no")
    with pytest.raises(CompressionError, match=r"budget 0\.4 compressed nothing"):
        compare(*tiny, hybrid, TaskSet("short", (question,), SAME, 2), [0.4])


@pytest.mark.parametrize("budget", ["1.0", "100%", 1, "1"])
def test_everything_may_be_asked_for(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile, budget: Any
) -> None:
    tasks = TaskSet("one", (replace(samples[0], followups=()),), SAME, 2)
    assert len(compare(*tiny, hybrid, tasks, [budget])) == 2


def test_progress_sees_every_sample(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    seen: list[Any] = []

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        seen.append(total)
        for item in items:
            seen.append(item.id)
            yield item

    plain = tuple(replace(sample, followups=()) for sample in samples)
    compare(*tiny, hybrid, TaskSet("two", plain, SAME, 1), [0.4], track)
    assert seen == [2, *(sample.id for sample in samples)]


# -- summaries by hand ----------------------------------------------------------------------------


def answer(method: str, task: str, turn: int, score: float, **changes: Any) -> Answer:
    plain = Answer(
        sample="s", task=task, turn=turn, method=method, text="", expected="", metric="m",
        score=score, prompt_tokens=100, decode_seconds=0.5, decode_steps=5, resident_bytes=1000,
        storage_bytes=1000, host_bytes=0, dense_bytes=1000, end_share=1.0, hit_rate=None,
    )  # fmt: skip
    return replace(plain, **changes)


def test_summaries_are_means_that_can_be_checked_by_hand() -> None:
    small = {"resident_bytes": 100, "storage_bytes": 110, "host_bytes": 900}
    large = {"resident_bytes": 500, "storage_bytes": 520, "host_bytes": 0, "dense_bytes": 3000}
    full, half = summarise(
        [
            answer("full", "ocr", 0, True),
            answer("full", "ocr", 0, True),
            answer("full", "count", 0, True),
            answer("full", "count", 0, False),
            answer("full", "later question", 1, True),
            answer("half", "ocr", 0, True, **small, hit_rate=0.5, decode_steps=0, decode_seconds=0),
            answer("half", "ocr", 0, False, **large),
            answer("half", "count", 0, True, **small, hit_rate=0.7),
            answer("half", "count", 0, True, **small),
            answer("half", "later question", 1, False, **large, hit_rate=0.1, decode_seconds=2.0),
        ]
    )
    assert (full.method, full.answers, full.score) == ("full", 5, 0.8)
    assert (full.score_first, full.score_later) == (0.75, 1.0)
    assert (full.worst_ratio, full.share, full.hit_rate) == (1.0, 1.0, None)
    assert full.decode_ms == pytest.approx(100)
    assert (half.score, half.score_first, half.score_later) == (0.6, 0.75, 0.0)
    assert (half.worst_task, half.worst_ratio) == ("later question", 0.0)
    assert half.resident_bytes == (100 + 500 + 100 + 100) / 4
    assert half.host_bytes == 900 * 3 / 4
    assert half.share == 800 / 6000
    assert half.storage_share == 850 / 6000
    assert half.hit_rate == pytest.approx(0.6)
    assert half.decode_ms == pytest.approx(1000 * (0 + 0.5 + 0.5 + 0.5 + 2.0) / 20)


def test_the_worst_task_is_relative_to_the_full_cache() -> None:
    """A task that the full cache fails cannot be the worst; one that halves is."""
    answers = [
        answer("full", "hard", 0, False),
        *[answer("full", "easy", 0, True) for _ in range(4)],
        *[answer("full", "fair", 0, i < 2) for i in range(4)],
        answer("b", "hard", 0, False),
        *[answer("b", "easy", 0, i < 3) for i in range(4)],
        *[answer("b", "fair", 0, i < 1) for i in range(4)],
    ]
    summary = summarise(answers)[1]
    assert (summary.worst_task, summary.worst_ratio) == ("fair", 0.5)
    assert task_scores(answers[9:]) == {"hard": 0.0, "easy": 0.75, "fair": 0.25}


# -- tasks ----------------------------------------------------------------------------------------


def test_generated_tasks_are_held_out_and_leave_out_what_the_model_cannot_do(
    tiny: tuple[Any, Any],
) -> None:
    tasks = load_tasks("tinyvl", tiny[1], per_task=2)
    assert {s.task for s in tasks.samples} == set(TASKS) - set(TINYVL_UNJUDGED)
    assert len(tasks.samples) == 2 * (len(TASKS) - len(TINYVL_UNJUDGED))
    assert all(s.id.startswith("heldout-") and len(s.followups) == 1 for s in tasks.samples)
    assert tasks.metric("yellow  cross ", ("yellow cross",)) == 1
    assert tasks.metric("yellow cross yellow", ("yellow cross",)) == 0


def test_unknown_tasks_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="expected tinyvl, longtext"):
        load_tasks("nonsense", tiny[1], 1)
    with pytest.raises(UsageError, match="give --tasks"):
        default_tasks("some/model")


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, samples: tuple[Sample, ...]) -> Path:
    """The samples (one later question each) as a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for sample in samples:
        content = []
        for number, part in enumerate(sample.messages[0]["content"]):
            if part["type"] == "image":
                name = f"{sample.id}-{number}.png"
                part["image"].save(folder / name)
                content.append({"type": "image", "path": name})
            else:
                content.append(part)
        turns = [{"question": t.question, "reply": t.reply} for t in sample.followups[:1]]
        record = {"id": sample.id, "task": sample.task, "reply": sample.reply, "followups": turns}
        record["messages"] = [{"role": "user", "content": content}]
        lines.append(json.dumps(record))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def profile_file(tmp_path: Path, hybrid: Profile) -> Path:
    return hybrid.save(tmp_path / "p.safetensors")


def command(profile: Path, data: Path, *more: str) -> list[str]:
    return ["eval", "--model", "tinyvl", "--dtype", "float32", "--device", "cpu",
            "--profile", str(profile), "--tasks", str(data), *more]  # fmt: skip


def test_the_command_writes_answers_and_summary(
    profile_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run(command(profile_file, data, "--budget", "0.4,60%", "--json", "-o", str(out)))
    printed, err = capsys.readouterr()
    assert code == 0, err
    written = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert len(written) == 2 * 3 * 2
    assert summary == json.loads(printed)
    assert [s["method"] for s in summary] == ["full", "budget 0.4", "budget 60%"]
    again = summarise([Answer(**line) for line in written])
    assert [s.score for s in again] == [s["score"] for s in summary]
    assert [s.share for s in again] == [s["share"] for s in summary]


@pytest.mark.parametrize("budget", ["", ",", "0", "1.5", "lots", "0.4,0.4", "0.4,-1", "5 tokens"])
def test_bad_budgets_are_wrong_usage(
    budget: str, profile_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(command(profile_file, data, "--budget", budget, "-o", str(out))) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_budget_too_small_for_the_prompts_is_wrong_usage(
    profile_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(command(profile_file, data, "--budget", "0.02", "-o", str(out))) == 2
    assert "too small" in capsys.readouterr().err
    assert not out.exists()


def test_budgets_are_checked_by_compare_too(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    tasks = TaskSet("one", (replace(samples[0], followups=()),), SAME, 1)
    with pytest.raises(BudgetError):
        compare(*tiny, hybrid, tasks, ["lots"])
