"""What makes the shipped long-text samples, and the prose that they are made of."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from hkvprof.evaluate import longtext
from hkvprof.evaluate.longtext import TASKS, make_samples
from tools import make_prose
from tools.make_longtext import to_json, write_samples


def test_set_mixes_tasks_and_lengths(tmp_path: Path) -> None:
    samples = make_samples(48, (600, 1500), "calibration")
    assert len({sample.id for sample in samples}) == 48
    assert {sample.task for sample in samples} == set(TASKS)
    assert sum(bool(sample.followups) for sample in samples) == 24
    assert {bool(s.followups) for s in samples if s.task == "passkey"} == {True, False}
    write_samples(samples, tmp_path / "samples.jsonl")
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [to_json(sample) for sample in samples]


def test_frozen_corpus_is_small_and_its_encoding_deterministic() -> None:
    frozen = longtext.PROSE.read_bytes()
    assert len(frozen) < 350_000
    record = json.loads(gzip.decompress(frozen))
    assert make_prose.encode(record["topics"], record["source"]) == make_prose.encode(
        record["topics"], record["source"]
    )
    assert json.loads(gzip.decompress(make_prose.encode({"a": ["b"]}, "c"))) == {
        "source": "c",
        "topics": {"a": ["b"]},
    }


def test_cleaning_keeps_prose_and_drops_markup() -> None:
    block = (
        "* A *scope* defines the visibility of a name [1]\n  within a block, and it is **here**:"
    )
    assert (
        make_prose.clean_paragraph(block)
        == "A scope defines the visibility of a name within a block, and it is here."
    )
    for other in ("Binding of names\n=======", ">>> f(x)\n3", "a_stmt ::= b [c] and more of it."):
        assert make_prose.clean_paragraph(other) is None


def test_a_paragraph_in_two_topics_stays_in_the_shorter() -> None:
    shared = "This sentence is long enough to be prose and stands in two of the topics."
    own = "Another sentence that is long enough to be prose stands in one topic only."
    corpus = make_prose.clean_corpus({"long": f"{shared}\n\n{own}", "short": shared})
    assert corpus == {"long": [own], "short": [shared]}
