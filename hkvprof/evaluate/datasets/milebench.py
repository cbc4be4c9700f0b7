"""MileBench: multimodal tasks with many images.

    <root>/<Task>/<Task>.json     {"meta_data": {...}, "data": [...]}
    <root>/<Task>/images/...

Layout and scoring: github.com/MileBench/MileBench (generate.py, utils.py, evaluate.py) and
huggingface.co/datasets/FreedomIntelligence/MileBench. All its tasks have the same layout; a task
is its folder's name. `root` may also be the folder of one task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets.records import Record, as_record, read_json
from hkvprof.evaluate.datasets.source import (
    DatasetQuestion,
    Layout,
    ListedQuestion,
    Part,
    Source,
    image_part,
    interleave,
    text_part,
)
from hkvprof.evaluate.metrics import LETTERS, ROUGE_L, SUBSTRING, WORDS, fold, multiple_choice
from hkvprof.evaluate.records import Gold
from hkvprof.evaluate.scorers import milebench as published

_MARK = re.compile(r"\{(?:image|table)#([0-9]{1,6})\}")


Judge = Callable[[str, Record, Record, tuple[str, ...]], Gold]
"""Task, its meta data, a row and its options: what is correct, and by which metric."""


def _entries(judge: Judge, source: Source) -> Iterator[ListedQuestion]:
    for file in _files(source):
        top = as_record(file, read_json(source.root, file))
        meta, task = top.record("meta_data"), file.stem
        for row in top.records("data"):
            build = partial(_question, source.root, file.parent, meta, row, partial(judge, task))
            yield ListedQuestion(task, f"{task}-{row.label('sample_id')}", build)


def _files(source: Source) -> list[Path]:
    """`<Task>.json` of every task below the root, or of the one task that the root is."""
    if source.file is not None:
        return [source.file]
    own = source.root / f"{source.root.name}.json"
    if own.is_file():
        return [own]
    files = [path for path in sorted(source.root.glob("*/*.json")) if path.stem == path.parent.name]
    if not files:
        raise UsageError(f"{source.root} holds no <Task>/<Task>.json (docs/tasks.md)")
    return files


def _question(
    root: Path,
    folder: Path,
    meta: Record,
    row: Record,
    judge: Callable[[Record, Record, tuple[str, ...]], Gold],
) -> DatasetQuestion:
    instructions = meta.texts("task_instruction")
    instruction = instructions[row.integer("task_instruction_id", len(instructions))]
    instance = row.record("task_instance")
    below = folder.relative_to(root).as_posix()
    images = [
        image_part(
            root, (f"{below}/images",), written, f"{instance.where}: field 'images_path[{i}]'"
        )
        for i, written in enumerate(instance.texts("images_path", at_least=0))
    ]
    options = instance.texts("choice_list", 2) if instance.fields.get("choice_list") else ()
    context = instance.text("context") + _listed(options)
    parts = [text_part(f"{instruction}\n"), *_placed(context, images)]
    return DatasetQuestion(parts, judge(meta, row, options))


def _placed(context: str, images: list[Part]) -> list[Part]:
    """The context with every `{image#n}` replaced; images that it does not name come first.

    A number without an image stays as it is written, as in the reference implementation.
    """
    named = {int(number) for number in _MARK.findall(context)}
    first = [image for i, image in enumerate(images, start=1) if i not in named]

    def image(match: re.Match[str]) -> Part:
        number = int(match[1])
        return images[number - 1] if 0 < number <= len(images) else text_part(match[0])

    return [*first, *interleave(context, _MARK, image)]


def _listed(options: tuple[str, ...]) -> str:
    """Options below the context: lettered, unless there are more of them than letters."""
    if not options:
        return ""
    marks = [f"{letter}. " for letter in LETTERS] if len(options) <= len(LETTERS) else None
    lines = [f"{marks[i] if marks else ''}{option}" for i, option in enumerate(options)]
    return "\n".join(["", "Choice list:", *lines, "Your answer is:"])


def _gold(task: str, meta: Record, row: Record, options: tuple[str, ...]) -> Gold:
    """Metric by task name and kind, as evaluate.py picks it."""
    response = _response(row)
    if "NeedleInAHaystack" in task:
        return Gold((response,), WORDS)
    if "MMCoQA" in task:
        return Gold((response,), SUBSTRING)
    if _is_open(meta):
        return Gold((response,), ROUGE_L)
    right = _right(row, options, response)
    reference = LETTERS[right] if len(options) <= len(LETTERS) else options[right]
    return Gold((reference,), multiple_choice(options))


def _published_gold(task: str, meta: Record, row: Record, options: tuple[str, ...]) -> Gold:
    """The same with the scores of evaluate.py itself."""
    response = _response(row)
    if "NeedleInAHaystack" in task:
        return Gold((response,), published.NEEDLE)
    if "MMCoQA" in task:
        return Gold((response,), published.CONTAINED)
    if _is_open(meta):
        return Gold((response,), published.ROUGE)
    right = _right(row, options, response)
    return Gold((options[right],), published.choice(options))


def _response(row: Record) -> str:
    return row.label("response") if type(row.get("response")) is int else row.text("response")


def _is_open(meta: Record) -> bool:
    """Whether a task's questions have no options. Raises SampleError for an unknown kind."""
    kind = meta.text("question_type")
    if kind not in ("open-ended", "multi-choice"):
        raise meta.wrong("question_type", "'open-ended' or 'multi-choice'")
    return kind == "open-ended"


def _right(row: Record, options: tuple[str, ...], response: str) -> int:
    """The number of the correct option."""
    if not options:
        row.record("task_instance").get("choice_list")  # says that it is missing
    right = [i for i, option in enumerate(options) if fold(option) == fold(response)]
    if not right:
        raise row.wrong("response", "one of the texts in choice_list")
    return right[0]


LAYOUT = Layout(partial(_entries, _gold), max_new_tokens=128)
PUBLISHED = Layout(partial(_entries, _published_gold), max_new_tokens=128)
"""As LAYOUT, scored by MileBench's own evaluate.py."""
