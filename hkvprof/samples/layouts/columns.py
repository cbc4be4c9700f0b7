"""Tables of the hub with columns of their own: MMMU, The Cauldron.

Published: huggingface.co/datasets/MMMU/MMMU (`question`, `options`, `image_1` to `image_7`,
`answer`; `<image 1>` marks a picture's place) and huggingface.co/datasets/HuggingFaceM4/
the_cauldron (`images`, `texts` with `user`, `assistant`, `source`).
"""

from __future__ import annotations

import ast
import re
from string import ascii_uppercase

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.conversations import needed_in
from hkvprof.samples.layouts.drafts import Draft, Row, RowLayout, interleave, needed, text
from hkvprof.samples.layouts.pictures import Part, Pictures, wrong
from hkvprof.samples.layouts.questions import asked, reply_of

_MARK = re.compile(r"<image ([0-9]{1,3})>")
_COLUMN = re.compile(r"image_[0-9]{1,3}")
_LONGEST_LIST = 65536


def _mmmu(row: Row, pictures: Pictures) -> Draft:
    field, question = needed(row, "question")
    content = "\n".join([text(question, field), *_lettered(_options(row.get("options")))])
    marked = {f"image_{int(number)}" for number in _MARK.findall(content)}
    given = {name for name in row if _COLUMN.fullmatch(name) and row[name] is not None}
    explained = {f"image_{int(n)}" for n in _MARK.findall(str(row.get("explanation") or ""))}
    if missing := sorted(marked - given):
        raise SampleError(f"field '{missing[0]}': no picture for <image {missing[0][6:]}>")
    if unmarked := sorted(given - marked - explained):
        raise SampleError(
            f"field '{unmarked[0]}': a picture without a place: expected <image {unmarked[0][6:]}> "
            "in 'question' or 'options'"
        )

    def picture(match: re.Match[str]) -> Part:
        name = f"image_{int(match[1])}"
        return pictures.part(row[name], name)

    parts = interleave(content, _MARK, picture)
    return {"messages": [{"role": "user", "content": parts}], "reply": reply_of(row, ("answer",))}


def _options(value: object) -> list[str]:
    """The options: a list, or a list written as Python writes it."""
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value) if len(value) <= _LONGEST_LIST else value
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise wrong("options", "a list of texts", value) from None
    if not value:
        return []
    if not isinstance(value, list) or len(value) > len(ascii_uppercase):
        raise wrong("options", f"a list of at most {len(ascii_uppercase)} texts", value)
    return [text(option, f"options[{number}]") for number, option in enumerate(value)]


def _lettered(options: list[str]) -> list[str]:
    return [f"({ascii_uppercase[number]}) {option}" for number, option in enumerate(options)]


def _cauldron(row: Row, pictures: Pictures) -> Draft:
    field, texts = needed(row, "texts")
    if not isinstance(texts, list) or not texts:
        raise wrong(field, "a list of objects with 'user' and 'assistant'", texts)
    turns = [_turn(entry, f"{field}[{number}]") for number, entry in enumerate(texts)]
    (question, reply), later = turns[0], turns[1:]
    return {
        **asked(question, f"{field}[0].user", {"images": row.get("images")}, pictures),
        "reply": reply,
        "followups": [{"question": more, "reply": answer} for more, answer in later],
    }


def _turn(turn: object, field: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise wrong(field, "an object with 'user' and 'assistant'", turn)
    user, assistant = needed_in(turn, field, "user")[1], needed_in(turn, field, "assistant")[1]
    return text(user, f"{field}.user"), text(assistant, f"{field}.assistant")


MMMU = RowLayout(
    name="mmmu",
    title="MMMU",
    source="https://huggingface.co/datasets/MMMU/MMMU",
    fits=lambda columns: {"question", "image_1"} <= columns,
    build=_mmmu,
    fields=(
        ("question", "question"),
        ("options", "lettered below the question"),
        ("image_1", "picture in the place of <image 1>; the others alike"),
        ("answer", "reply"),
        ("subfield", "task"),
    ),
    tasks=("task", "subfield"),
)
CAULDRON = RowLayout(
    name="cauldron",
    title="The Cauldron",
    source="https://huggingface.co/datasets/HuggingFaceM4/the_cauldron",
    fits=lambda columns: {"images", "texts"} <= columns,
    build=_cauldron,
    fields=(
        ("images", "pictures before the question"),
        ("texts", "question and reply; later ones become followups"),
    ),
)
