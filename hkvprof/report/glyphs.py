"""The characters that pictures of profiles are drawn with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Glyphs:
    """One set of characters; `shades` are five, from light to dark. Styles are rich's."""

    static: str
    dynamic: str
    shades: str
    whole: str
    static_style: str = ""
    dynamic_style: str = ""


ASCII = Glyphs(static="#", dynamic="o", shades=".-=%@", whole="W")
UNICODE = Glyphs(
    static="■",
    dynamic="○",
    shades="·░▒▓█",
    whole="▲",
    static_style="blue",
    dynamic_style="yellow",
)
