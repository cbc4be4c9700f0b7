"""Which of Video-ChatGPT's answers a judge is asked about, and the judgements on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.evaluate.records import Answer, TaskSet
from hkvprof.evaluate.scorers.judge import ASPECTS, Judge, JudgeCase
from hkvprof.files import strict_json
from hkvprof.files.atomic import read_limited, write_atomically

FILE = "judgements*.jsonl"
_MAX_BYTES, _MAX_MARKS = 256 * 2**20, 1_000
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def judgements(tasks: TaskSet, answers: Sequence[Answer]) -> list[JudgeCase]:
    """Everything to be judged of one method's answers, in the order of the aspects.

    A question on consistency is judged when both its wordings are answered.
    """
    said = {answer.sample: answer for answer in answers}
    asked = {s.id: s for s in tasks.samples if s.id in said}
    found = []
    for aspect, (task, _) in ASPECTS.items():
        mine = [sample for sample in asked.values() if sample.task == task]
        if task == "consistency":
            names = sorted({sample.id.rpartition("-")[0] for sample in mine})
            pairs = [(f"{name}-Q1", f"{name}-Q2") for name in names]
            found += [_pair(tasks, asked, said, *pair) for pair in pairs if set(pair) <= set(asked)]
        else:
            found += [
                JudgeCase(aspect, {"question": question_of(sample),
                                   "answer": tasks.gold[sample.id].references[0],
                                   "pred": said[sample.id].text})
                for sample in mine
            ]  # fmt: skip
    return found


def question_of(sample: Any) -> str:
    """The text of a question, without its video."""
    parts = sample.messages[0]["content"]
    return "".join(part["text"] for part in parts if part["type"] == "text")


def _pair(tasks: TaskSet, asked: Any, said: Any, first: str, second: str) -> JudgeCase:
    fields = {
        "question1": question_of(asked[first]),
        "question2": question_of(asked[second]),
        "answer": tasks.gold[first].references[0],
        "pred1": said[first].text,
        "pred2": said[second].text,
    }
    return JudgeCase("consistency", fields)


class Judgements:
    """Scores by key, of one judge, in a folder that several processes may fill."""

    def __init__(self, folder: Path, judge: str | None, shard: str = "") -> None:
        """Read what is there, of the only judge if none is named.

        Raises UsageError for a file that is none of ours, and where no name says which of several.
        """
        self._path = folder / FILE.replace("*", shard)
        rows = [row for path in sorted(folder.glob(FILE)) for row in _read(path)]
        names = sorted({name for name, _, _ in rows})
        if judge is None and len(names) > 1:
            raise UsageError(f"{folder} holds scores of several judges ({'; '.join(names)}): name "
                             "one with --judge and --judge-model")  # fmt: skip
        self.judge = judge or "".join(names)
        self.scores = {key: score for name, key, score in rows if name == self.judge}

    def ask(self, judge: Judge, wanted: Sequence[JudgeCase], track: Track) -> None:
        """Have judged what is not: every score is on disk before the next is asked for.

        Raises HkvError where the judge does not answer.
        """
        if self._path.exists():
            whole = read_limited(self._path, _MAX_BYTES)
            write_atomically(self._path, whole[: whole.rfind(b"\n") + 1])
        missing = {one.key: one for one in wanted if one.key not in self.scores}
        for one in track(list(missing.values()), "judging", len(missing)):
            score = judge.score(one)
            line = json.dumps([self.judge, one.key, score]) + "\n"
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self.scores[one.key] = score


def _read(path: Path) -> list[tuple[str, str, int]]:
    try:
        data = read_limited(path, _MAX_BYTES)
        whole = data[: data.rfind(b"\n") + 1].decode("utf-8")
        rows = [strict_json.loads(line, _MAX_MARKS) for line in whole.splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): delete it, or use another -o") from None
    for row in rows:
        if not (isinstance(row, list) and [type(v) for v in row] == [str, str, int]):
            raise UsageError(f"{path} holds no judgements: delete it, or use another -o")
    return [(name, key, score) for name, key, score in rows]
