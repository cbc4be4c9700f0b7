"""Full against compressed caches: every regime against plain generation, distances by brute force,
runs that stop and go on, the command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hkvprof
import hkvprof.runtime
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli import run
from hkvprof.errors import BudgetError, CompressionError, UsageError
from hkvprof.evaluate.baselines import base, find
from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, MethodAtBudget, ProfiledModel
from hkvprof.evaluate.journal import CONDITIONS, Journal
from hkvprof.evaluate.metrics import EXACT_MATCH as SAME
from hkvprof.evaluate.prefill import capture
from hkvprof.evaluate.questions import Stage
from hkvprof.evaluate.records import FULL, Answer, TaskSet
from hkvprof.evaluate.replay import Lead, end_tokens, refer, replay
from hkvprof.evaluate.replay import answer as greedy
from hkvprof.evaluate.tasks import TINYVL_UNJUDGED, default_tasks, load_tasks
from hkvprof.models.calls import with_cache
from hkvprof.profile.record import Profile
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import TASKS, make_sample

STEPS = 10
NEW_TOKENS = 12


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
def tasks(samples: tuple[Sample, ...]) -> TaskSet:
    return TaskSet("two", samples, SAME, NEW_TOKENS)


@pytest.fixture(scope="module")
def hybrid(tiny: tuple[Any, Any]) -> Profile:
    """Static and dynamic heads in turn."""
    types = torch.arange(24).view(6, 4).remainder(2).numpy()
    return uniform_profile(tiny[0], types, budget=0.4, chunk=8)


@pytest.fixture(scope="module")
def answers(tiny: tuple[Any, Any], tasks: TaskSet, hybrid: Profile) -> list[Answer]:
    comparison = ComparisonPlan(("0.4", "60%", "1.0"), ("snapkv", "quest"), steps=STEPS)
    return compare(ProfiledModel(*tiny, hybrid), tasks, comparison)


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def generate(model: Any, processor: Any, conversation: list[Any], **options: Any) -> str:
    """Plain generation from a whole conversation, on whatever cache generate() brings."""
    encoded = processor.encode([conversation])
    inputs = encoded.to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return str(processor.decode(ids[0, encoded.tokens :]))


def asked_otherwise(sample: Sample, question: str) -> list[Any]:
    """The sample's prompt with another question."""
    content = [*sample.messages[0]["content"][:-1], {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


# -- what is asked --------------------------------------------------------------------------------


def test_the_full_cache_answers_as_plain_generation_does(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], answers: list[Answer]
) -> None:
    """In every regime, without hkvprof and from the whole conversation at once."""
    said = {(a.sample, a.regime, a.turn): a.text for a in answers if a.method == "full"}
    for sample in samples:
        own = generate(*tiny, list(sample.messages))
        assert said[sample.id, "inside", 0] == said[sample.id, "after", 0] == own
        for number, turn in enumerate(sample.followups, start=1):
            alone = asked_otherwise(sample, turn.question)
            assert said[sample.id, "after", number] == generate(*tiny, alone)
            told = [*sample.messages, message("assistant", own), message("user", turn.question)]
            assert said[sample.id, "later", number] == generate(*tiny, told)
    assert len(said) == 2 * (1 + 3 + 2)


def test_hkvprof_answers_as_generation_under_apply_does(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], answers: list[Answer], hybrid: Profile
) -> None:
    model, processor = tiny
    for sample in samples:
        with hkvprof.runtime.apply(model, hybrid, budget=0.4, min_tokens=64):
            wanted = generate(model, processor, list(sample.messages))
        (mine,) = [
            a.text for a in answers
            if (a.sample, a.regime, a.method, a.budget) == (sample.id, "inside", "hkvprof", "0.4")
        ]  # fmt: skip
        assert mine == wanted


def test_what_is_compressed_before_the_question_knows_nothing_of_it(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], tasks: TaskSet
) -> None:
    model, processor = tiny
    prompt = Stage(model, processor, samples[0], tasks).after()
    assert prompt is not None
    prefix = [int(i) for i in prompt.prefill.ids[0]]
    turns = [t.question for t in samples[0].followups]
    own = samples[0].messages[0]["content"][-1]["text"]
    for question, text in zip(prompt.questions, [own, *turns], strict=True):
        whole = processor.encode([asked_otherwise(samples[0], text)]).inputs["input_ids"][0]
        assert [*prefix, *question.lead.ids] == whole.tolist()
    assert own not in processor.decode(prefix)
    assert own in processor.decode(list(prompt.questions[0].lead.ids))
    # Its keys are those of the context run by itself.
    alone = capture(model, processor.encode([asked_otherwise(samples[0], turns[0])]))
    for mine, other in zip(prompt.prefill.calls, alone.calls, strict=True):
        same = other.key[:, :, : prompt.prefill.tokens]
        torch.testing.assert_close(mine.key, same, rtol=1e-4, atol=1e-4)


def test_a_question_before_its_context_has_no_such_regime(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    content = samples[0].messages[0]["content"]
    images = [i for i, part in enumerate(content) if part["type"] == "image"]
    turned_round = [content[-1], *content[: images[-1] + 1]]
    first = ({"role": "user", "content": turned_round},)
    sample = replace(samples[0], messages=first, followups=())
    turned = TaskSet("turned", (sample,), SAME, 2)
    with pytest.raises(UsageError, match="no sample has a question in the regime 'after'"):
        compare(
            ProfiledModel(*tiny, hybrid),
            turned,
            ComparisonPlan(("0.4",), regimes=("inside", "after"), steps=2),
        )
    with pytest.raises(UsageError, match="in the regime 'later'"):
        compare(
            ProfiledModel(*tiny, hybrid),
            turned,
            ComparisonPlan(("0.4",), regimes=("later",), steps=2),
        )


# -- distances ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_is_a_teacher_forced_pass(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...]
) -> None:
    """Distributions from one dense pass over prompt and forced tokens; the end token is passed
    over, what ended the reply is known."""
    model, processor = tiny
    ends = end_tokens(model, processor)
    for sample in samples:
        encoded = processor.encode([sample.messages])
        prefill = capture(model, encoded)
        found = refer(
            model, prefill.dense_cache(), prefill.logits[0], Lead(), ends, STEPS, NEW_TOKENS
        )
        inputs = encoded.to(model.device, model.dtype)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], found.forced[None]], dim=1)
        ones = torch.ones_like(inputs["input_ids"])
        extra = {k: torch.nn.functional.pad(v, (0, STEPS)) for k, v in inputs.items()
                 if k == "mm_token_type_ids"}  # fmt: skip
        logits = model(**{**inputs, "attention_mask": ones, **extra}).logits[0]
        wanted = logits[encoded.tokens - 1 :].log_softmax(-1)
        torch.testing.assert_close(found.log_probs, wanted, rtol=1e-3, atol=1e-3)
        assert not set(found.forced.tolist()) & ends
        assert processor.decode(list(found.reply)) == generate(model, processor, sample.messages)
        assert found.ended in ends
        assert found.forced.tolist()[: len(found.reply)] == list(found.reply)[:STEPS]


@torch.no_grad()
@pytest.mark.parametrize("types", ["static", "dynamic"])
def test_distances_are_those_of_decoding_token_by_token(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], types: str
) -> None:
    model, processor = tiny
    ends = end_tokens(model, processor)
    prefill = capture(model, processor.encode([samples[0].messages]))
    found = refer(model, prefill.dense_cache(), prefill.logits[0], Lead(), ends, STEPS, NEW_TOKENS)
    with hkvprof.runtime.apply(model, uniform_profile(model, types, chunk=4), budget=0.3) as handle:
        rows = [prefill.logits[0]]
        cache = handle.new_cache()
        prefill.fill(cache)
        for token in found.forced:
            rows.append(model(input_ids=token.view(1, 1), **with_cache(model, cache)).logits[0, -1])
        log_probs = torch.stack(rows).log_softmax(-1)
        for stepwise in (True, False) if types == "static" else (True,):
            cache = handle.new_cache()
            prefill.fill(cache)
            distance, left = replay(model, cache, prefill.logits[0], Lead(), found, stepwise)
            kl = torch.nn.functional.kl_div(
                log_probs[1:], found.log_probs[1:], log_target=True, reduction="none"
            )
            assert distance.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3, abs=1e-6)
            same = (log_probs.argmax(-1) == found.log_probs.argmax(-1))[1:].float().mean()
            assert distance.agreement == pytest.approx(float(same))
            said = [*found.reply, found.ended]
            chances = [float(-log_probs[i, token]) for i, token in enumerate(said)]
            assert distance.nll == pytest.approx(sum(chances) / len(said), rel=1e-3, abs=1e-5)
            assert distance.rows == STEPS
            cache = handle.new_cache()
            prefill.fill(cache)
            own = greedy(model, cache, prefill.logits[0], Lead(), ends, NEW_TOKENS)
            assert (left is None) == (own == found.reply)
            if left is not None:
                assert own[:left] == found.reply[:left]


def test_no_distance_at_the_whole_cache(answers: list[Answer]) -> None:
    whole = [a for a in answers if a.budget == "1.0"]
    full = [a for a in answers if a.method == "full"]
    assert {a.method for a in whole} == {"hkvprof"}  # baselines have nothing to show there
    assert [a.text for a in whole] == [a.text for a in full]
    assert [a.resident_bytes for a in whole] == [a.resident_bytes for a in full]
    for mine, dense in zip(whole, full, strict=True):
        assert mine.kl < 1e-5
        assert mine.nll == pytest.approx(dense.nll, rel=1e-3, abs=1e-4)
        assert (mine.agreement, dense.agreement) == (1, 1)
        assert abs(dense.kl) < 1e-5  # the noise of float32


def test_less_room_means_more_distance(answers: list[Answer]) -> None:
    def mean(budget: str) -> float:
        mine = [a.kl for a in answers if (a.method, a.budget) == ("hkvprof", budget)]
        return sum(mine) / len(mine)

    assert mean("0.4") > mean("60%") > 0


# -- bytes ----------------------------------------------------------------------------------------


def test_every_question_is_answered_by_every_method(answers: list[Answer], tasks: TaskSet) -> None:
    order = [("inside", 0), ("after", 0), ("after", 1), ("after", 2), ("later", 1), ("later", 2)]
    rows = [("full", ""), ("hkvprof", "0.4"), ("hkvprof", "60%"), ("hkvprof", "1.0"),
            ("snapkv", "0.4"), ("snapkv", "60%"), ("quest", "0.4"), ("quest", "60%")]  # fmt: skip
    found = [(a.sample, a.method, a.budget, a.regime, a.turn) for a in answers]
    assert found == [(s.id, *row, *turn) for s in tasks.samples for row in rows for turn in order]
    for answer in answers:
        sample = next(s for s in tasks.samples if s.id == answer.sample)
        replies = [sample.reply, *(turn.reply for turn in sample.followups)]
        assert answer.expected == replies[answer.turn]
        assert answer.score == SAME(answer.text, (answer.expected,))
        assert (answer.metric, answer.task, answer.questions) == ("exact_match", sample.task, 6)
        assert answer.steps == (STEPS if answer.regime == "inside" else STEPS + 1)


def test_receipts_agree_with_the_tensors_within_one_percent(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.storage_bytes == pytest.approx(answer.resident_bytes, rel=0.01)
        # Keys and values of 6 layers, 4 heads, 32 channels in float32.
        assert answer.dense_bytes == answer.prompt_tokens * 2 * 6 * 4 * 32 * 4
        if answer.method == "full":
            assert answer.resident_bytes == answer.dense_bytes
            assert (answer.host_bytes, answer.hit_rate, answer.compress_seconds) == (0, None, 0)
        elif answer.budget in ("0.4", "60%"):
            share = 0.4 if answer.budget == "0.4" else 0.6
            assert answer.resident_bytes <= share * answer.dense_bytes + 8 * 24
            assert answer.compress_seconds > 0
        if answer.method in ("hkvprof", "quest") and answer.budget != "1.0":
            assert answer.host_bytes > 0
            assert answer.hit_rate is not None


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
    comparison = ComparisonPlan(("0.4", "2GiB"), regimes=("inside",), steps=1)
    with pytest.raises(CompressionError, match="hkvprof at budget 2GiB compressed nothing"):
        compare(ProfiledModel(*tiny, hybrid), tasks, comparison)
    short = [{"type": "text", "text": "is there any blue square"}]
    question = Sample("short", "short", ({"role": "user", "content": short},), reply="no")
    comparison = ComparisonPlan(("0.4",), regimes=("inside",), steps=1)
    with pytest.raises(CompressionError, match=r"hkvprof at budget 0\.4 compressed nothing"):
        compare(ProfiledModel(*tiny, hybrid), TaskSet("short", (question,), SAME, 2), comparison)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"baselines": ("h2o",)}, "unknown baseline 'h2o': expected one of"),
        ({"regimes": ("before",)}, "unknown regime before: expected some of inside"),
        ({"regimes": ()}, r"unknown regime \(none\)"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_plans_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ComparisonPlan(("0.4",), **options)
    with pytest.raises(BudgetError):
        ComparisonPlan(("lots",))


# -- runs that stop and go on ---------------------------------------------------------------------

CONDITION = {"model": "m", "steps": STEPS}


def told(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Everything but the seconds."""
    return [{**asdict(a), "compress_seconds": 0} for a in answers]


def test_a_run_that_was_stopped_goes_on(
    tiny: tuple[Any, Any], tasks: TaskSet, hybrid: Profile, answers: list[Answer], tmp_path: Path
) -> None:
    comparison = ComparisonPlan(("0.4", "60%", "1.0"), ("snapkv", "quest"), steps=STEPS)

    def one_sample(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        assert total == 2
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            ProfiledModel(*tiny, hybrid),
            tasks,
            comparison,
            Journal(tmp_path, CONDITION),
            one_sample,
        )
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(answers) / 2
    # Killed in the middle of the last unit: two whole lines of it are there, and half of a third.
    file.write_text("".join(lines[:-4]) + lines[-4][:50])
    seen = []
    journal = Journal(tmp_path, CONDITION)
    assert len(journal.answers) == len(lines) - 6
    journal_add = journal.add

    def add(more: Iterable[Answer]) -> None:
        new = list(more)
        seen.extend((a.sample, a.method, a.budget) for a in new)
        journal_add(new)

    journal.add = add  # type: ignore[method-assign]
    again = compare(ProfiledModel(*tiny, hybrid), tasks, comparison, journal)
    assert (tasks.samples[0].id, "quest", "60%") == seen[0]
    assert len(seen) == 6 + len(answers) / 2
    assert told(again) == told(answers)
    assert told(Journal(tmp_path, CONDITION).answers) == told(answers)


def test_rows_can_be_added_to_a_folder(
    tiny: tuple[Any, Any], tasks: TaskSet, hybrid: Profile, answers: list[Answer], tmp_path: Path
) -> None:
    for comparison in (
        ComparisonPlan(("60%",), steps=STEPS),
        ComparisonPlan(("0.4",), ("snapkv",), steps=STEPS),
    ):
        found = compare(
            ProfiledModel(*tiny, hybrid), tasks, comparison, Journal(tmp_path, CONDITION)
        )
        rows = {(FULL, ""), *((e.method, e.budget) for e in comparison.entries)}
        wanted = [a for a in answers if (a.method, a.budget) in rows]

        def order(one: Answer) -> tuple[str, str, str, str, int]:
            return one.sample, one.method, one.budget, one.regime, one.turn

        assert told(sorted(found, key=order)) == told(sorted(wanted, key=order))


def test_folders_of_other_runs_are_refused(tmp_path: Path, answers: list[Answer]) -> None:
    Journal(tmp_path / "a", CONDITION).add(answers[:6])
    with pytest.raises(UsageError, match=r"other conditions .steps: 10 there, 11 now"):
        Journal(tmp_path / "a", {**CONDITION, "steps": 11})
    with (tmp_path / "a" / "answers.jsonl").open("a") as file:
        file.write('{"sample": "x"}\n')
    with pytest.raises(UsageError, match=r"line 7: not an answer of this version"):
        Journal(tmp_path / "a", CONDITION)
    (tmp_path / "a" / CONDITIONS).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Journal(tmp_path / "a", CONDITION)
    (tmp_path / "a" / CONDITIONS).unlink()
    with pytest.raises(UsageError, match="holds answers but no conditions"):
        Journal(tmp_path / "a", CONDITION)
    Journal(tmp_path / "b", CONDITION)
    assert not (tmp_path / "b").exists()


def test_shards_fill_one_folder(tmp_path: Path, answers: list[Answer]) -> None:
    Journal(tmp_path, CONDITION, "-1of2").add(answers[:6])
    Journal(tmp_path, CONDITION, "-2of2").add(answers[-6:])
    assert Journal(tmp_path, CONDITION).answers == [*answers[:6], *answers[-6:]]


def test_a_budget_without_room_for_the_profile_is_told_beside_the_others(
    tiny: tuple[Any, Any], tasks: TaskSet, hybrid: Profile
) -> None:
    profiled = ProfiledModel(*tiny, hybrid)
    refused: dict[MethodAtBudget, str] = {}
    comparison = ComparisonPlan(("0.5", "0.005"), regimes=("inside",), steps=1)
    found = compare(profiled, tasks, comparison, refused=refused)
    assert {(a.method, a.budget) for a in found} == {("full", ""), ("hkvprof", "0.5")}
    assert tasks.samples[0].id in refused[MethodAtBudget("hkvprof", "0.005")]
    with pytest.raises(BudgetError, match="no budget can be met on any of the samples, first on"):
        compare(profiled, tasks, replace(comparison, budgets=("0.005",)), refused={})


def test_a_baseline_that_cannot_meet_a_budget_is_named(
    tiny: tuple[Any, Any], tasks: TaskSet, hybrid: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def select(prompt: Any) -> Any:
        if prompt.share < 0.5:
            raise BudgetError("too small for it")
        return find("random").select(prompt)

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    base.baseline("picky", "picky", "none")(select)
    refused: dict[MethodAtBudget, str] = {}
    comparison = ComparisonPlan(("0.4", "60%"), ("picky",), ("inside",), steps=1)
    found = compare(ProfiledModel(*tiny, hybrid), tasks, comparison, refused=refused)
    assert refused == {MethodAtBudget("picky", "0.4"): f"{tasks.samples[0].id}: too small for it"}
    assert {(a.method, a.budget) for a in found} == {
        ("full", ""), ("hkvprof", "0.4"), ("hkvprof", "60%"), ("picky", "60%")
    }  # fmt: skip
    with pytest.raises(BudgetError, match="too small"):
        compare(
            ProfiledModel(*tiny, hybrid),
            tasks,
            ComparisonPlan(("0.005",), regimes=("inside",), steps=1),
        )


def test_progress_sees_every_sample(
    tiny: tuple[Any, Any], samples: tuple[Sample, ...], hybrid: Profile
) -> None:
    seen: list[Any] = []

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        seen.append(total)
        for item in items:
            seen.append(item.id)
            yield item

    comparison = ComparisonPlan(("0.4",), regimes=("inside",), steps=1)
    compare(ProfiledModel(*tiny, hybrid), TaskSet("two", samples, SAME, 1), comparison, track=track)
    assert seen == [2, *(sample.id for sample in samples)]


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
    return ["eval", "--model", "tinyvl", "--dtype", "float32", "--device", "cpu", "--steps", "4",
            "--profile", str(profile), "--tasks", str(data), *more]  # fmt: skip


def test_the_command_writes_answers_summary_and_plot(
    profile_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = command(profile_file, data, "--budget", "0.4,60%", "--baselines", "snapkv", "--json")
    for part in ("1/2", "2/2"):  # as two processes would
        assert run([*args, "-o", str(out), "--shard", part]) == 0, capsys.readouterr().err
    printed, _ = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert printed.endswith((out / "summary.json").read_text())
    files = sorted(out.glob("answers*.jsonl"))
    assert [file.name for file in files] == ["answers-1of2.jsonl", "answers-2of2.jsonl"]
    written = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(written) == 2 * (1 + 2 + 2) * (1 + 2 + 1)
    rows = [(s["regime"], s["method"], s["budget"]) for s in summary["summaries"]]
    assert len(rows) == len(set(rows)) == 3 * 5
    for one in summary["summaries"]:
        mine = [a for a in written if (a["regime"], a["method"], a["budget"]) ==
                (one["regime"], one["method"], one["budget"])]  # fmt: skip
        assert one["score"] == pytest.approx(sum(a["score"] for a in mine) / len(mine))
        assert one["kl"]["value"] == pytest.approx(sum(a["kl"] for a in mine) / len(mine))
    assert {d["budget"] for d in summary["duels"]} == {"0.4", "60%"}
    assert "<svg " in (out / "quality.svg").read_text()
    # Again, with a row more: only that is computed, and the answers are in a file of their own.
    assert run([*args, "-o", str(out), "--baselines", "snapkv,random"]) == 0
    more = (out / "answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in more} == {"random"}


def test_samples_without_followups_have_two_regimes(
    profile_file: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({**line, "followups": []}) for line in lines))
    assert run(command(profile_file, data, "--budget", "0.4", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {s["regime"] for s in summary["summaries"]} == {"inside", "after"}
    assert run(command(profile_file, data, "--budget", "0.4", "--regimes", "later")) == 2
    assert "no sample has a question in the regime 'later'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        *(("--budget", text) for text in
          ("", ",", "0", "1.5", "lots", "0.4,0.4", "0.4,-1", "5 tokens")),
        ("--baselines", "h2o"),
        ("--regimes", "inside,outside"),
        ("--shard", "3/2"),
        ("--shard", "one"),
        ("--budget", "0.02"),
    ],
)  # fmt: skip
def test_bad_options_are_wrong_usage(
    more: tuple[str, str],
    profile_file: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(command(profile_file, data, *more, "-o", str(out))) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert not list(out.glob("summary*"))
