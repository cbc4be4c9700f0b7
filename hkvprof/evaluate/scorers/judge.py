"""Video-ChatGPT's score: a language model says from 0 to 5 how good an answer is.

Benchmark: github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation/. Its instructions to the
judge are read out of its own five scripts where they lie beside the data; without them the judge is
asked in the words below. Scores are whole numbers there, cut off, and here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import HkvError, UsageError
from hkvprof.files import strict_json
from hkvprof.files.atomic import read_limited

ASPECTS = {
    "correctness": ("generic", "evaluate_benchmark_1_correctness.py"),
    "detail": ("generic", "evaluate_benchmark_2_detailed_orientation.py"),
    "context": ("generic", "evaluate_benchmark_3_context.py"),
    "temporal": ("temporal", "evaluate_benchmark_4_temporal.py"),
    "consistency": ("consistency", "evaluate_benchmark_5_consistency.py"),
}
"""Per aspect: the sub-task whose answers it judges, and the script with its instructions."""
SCRIPTS = "quantitative_evaluation"
_LOOKED_AT = {
    "correctness": "whether the facts of the answer are those of the correct answer",
    "detail": "how complete and how specific the answer is, beside the correct answer",
    "context": "whether the answer fits what the video is about as a whole",
    "temporal": "whether events come in the order in which the correct answer has them",
    "consistency": "whether both answers agree with the correct answer and with each other",
}
_ATTEMPTS, _SECONDS, _MOST_BYTES = 4, 120, 2**20
_NUMBER = re.compile(r"score\W*?(\d+(?:\.\d+)?)")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class JudgeCase:
    """What is to be judged: fields as the published scripts name them (question, answer, pred; of
    consistency question1, question2, answer, pred1, pred2)."""

    aspect: str
    fields: Mapping[str, str]

    @property
    def key(self) -> str:
        """The same for the same texts, whoever wrote them."""
        text = json.dumps([self.aspect, dict(self.fields)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible address and a model there; `scripts` has the published instructions.

    The key, if one is needed, is taken from the variable OPENAI_API_KEY.
    """

    url: str
    model: str
    scripts: Path | None = None
    wait: Callable[[float], None] = time.sleep

    @property
    def name(self) -> str:
        """What scores of this judge are kept under: another one's differ."""
        return f"{self.model}, {'published' if self.scripts else 'own'} instructions"

    def score(self, judgement: JudgeCase) -> int:
        """From 0 to 5. Raises HkvError where the judge gives no such number."""
        messages, said = self.messages(judgement), ""
        for _ in range(_ATTEMPTS):
            said = self._ask(messages)
            found = _NUMBER.search(said.lower())
            if found and 0 <= float(found[1]) <= 5:
                return int(float(found[1]))
        raise HkvError(
            f"the judge {self.model} gave no score from 0 to 5, but {said[:200]!r}: try another "
            "--judge-model; what is judged so far is kept"
        )

    def messages(self, judgement: JudgeCase) -> Messages:
        """What the judge is sent. Raises UsageError where a script is not as published."""
        if self.scripts is None:
            return own_messages(judgement)
        return published_messages(self.scripts / ASPECTS[judgement.aspect][1], judgement.fields)

    def _ask(self, messages: Messages) -> str:
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, headers)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                    return _content(reply.read(_MOST_BYTES), address)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or attempt == _ATTEMPTS:
                    raise HkvError(f"the judge at {address} answers {error.code}: "
                                   f"{error.read(300)!r}") from error  # fmt: skip
            except (OSError, ValueError) as error:
                if attempt == _ATTEMPTS or isinstance(error, ValueError):
                    raise HkvError(f"no judge answers at {address} ({error})") from error
            self.wait(2.0**attempt)
        raise AssertionError


def check_judge(url: str) -> None:
    """Raise UsageError unless `url` is an address of HTTP."""
    if not re.match(r"https?://[^/]", url):
        raise UsageError(f"--judge {url}: expected an address such as http://127.0.0.1:8000/v1")


def own_messages(judgement: JudgeCase) -> Messages:
    """Instructions in our own words, and what is to be judged."""
    told = "\n".join(f"{name}: {text}" for name, text in judgement.fields.items())
    asked = (
        f"You grade answers to questions about a video. Judge {_LOOKED_AT[judgement.aspect]}. "
        "Other words for the same thing are as good. Reply with a dictionary alone, whose key "
        "'score' has a whole number from 0 (worst) to 5 (best)."
    )
    return [{"role": "system", "content": asked}, {"role": "user", "content": told}]


def published_messages(script: Path, fields: Mapping[str, str]) -> Messages:
    """The messages that a published script sends, with these fields in their places.

    The script is read, never run. Raises UsageError where it has no such messages.
    """
    try:
        tree = ast.parse(read_limited(script, _MOST_BYTES))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{script} cannot be read ({error}): expected Video-ChatGPT's") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "messages":
            return [_message(script, entry, fields) for entry in getattr(node.value, "elts", [])]
    raise UsageError(f"{script} sends no messages: expected Video-ChatGPT's {script.name}")


def _message(script: Path, entry: ast.expr, fields: Mapping[str, str]) -> dict[str, str]:
    assert isinstance(entry, ast.Dict)
    pairs = zip(entry.keys, entry.values, strict=True)
    return {_text(script, k, fields): _text(script, value, fields) for k, value in pairs if k}


def _text(script: Path, node: ast.expr, fields: Mapping[str, str]) -> str:
    """A literal, or an f-string whose only places are names of the fields."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(script, part, fields) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) if name in fields:
            return fields[name]
    raise UsageError(f"{script}, line {node.lineno}: expected text and {', '.join(fields)}")


def mean_score(scores: Mapping[str, Sequence[int]]) -> float:
    """The mean over aspects of each one's mean."""
    means = [sum(given) / len(given) for given in scores.values()]
    return sum(means) / len(means)


def _content(reply: bytes, address: str) -> str:
    try:
        value: Any = strict_json.loads_foreign(reply.decode("utf-8"), 100_000)
        return str(value["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{address} sent no chat completion: {reply[:200]!r}") from error
