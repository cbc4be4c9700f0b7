"""`conversations`: lists of turns with `from` and `value`, pictures in the places of `<image>`.

Published by LLaVA (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md: `id`, `image`,
`conversations`) and, for several pictures, by LLaVA-NeXT and LLaMA-Factory (data/README.md, format
sharegpt: `conversations`, `system`, `images`, as many `<image>` as images).
"""

from __future__ import annotations

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.drafts import Draft, Row, RowLayout, needed, text, with_places
from hkvprof.samples.layouts.media import Media
from hkvprof.samples.layouts.pictures import Pictures, wrong

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "system": "system",
}  # fmt: skip


def _build(row: Row, pictures: Pictures) -> Draft:
    field, turns = needed(row, "conversations")
    if not isinstance(turns, list) or not turns:
        raise wrong(field, "a list of turns with 'from' and 'value'", turns)
    said = [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(turns)]
    if row.get("system"):
        said.insert(0, ("system", text(row["system"], "system")))
    return with_places(said, Media.of(row, pictures), field)


def _turn(turn: object, field: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise wrong(field, "an object with 'from' and 'value'", turn)
    who, speaker = needed_in(turn, field, "from", "role")
    what, said = needed_in(turn, field, "value", "content")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise wrong(f"{field}.{who}", f"one of {', '.join(_ROLES)}", speaker)
    return role, text(said, f"{field}.{what}")


def needed_in(inner: Row, field: str, *names: str) -> tuple[str, object]:
    """As `needed`, for an object inside a row, which errors call `field`."""
    try:
        return needed(inner, *names)
    except SampleError as error:
        raise SampleError(str(error).replace("field '", f"field '{field}.", 1)) from None


LLAVA = RowLayout(
    name="llava",
    title="conversations of LLaVA or ShareGPT",
    source="https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md",
    fits=lambda columns: "conversations" in columns,
    build=_build,
    fields=(
        ("conversations", "messages; the last one of gpt becomes the reply"),
        ("system", "first message"),
        ("image", "picture in the place of <image>"),
        ("images", "pictures in the places of <image>"),
        ("video", "video file or folder of frames, in the place of <video>"),
        ("videos", "video files or folders of frames, in the places of <video>"),
    ),
)
