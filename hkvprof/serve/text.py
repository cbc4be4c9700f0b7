"""A reply as it grows: text from tokens piece by piece, cut where a stop text begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""
_LONGEST_WAIT = 8
"""Tokens after which such bytes are taken to be what they are."""


class GrowingText:
    """Turns tokens into text that never has to be taken back.

    All pieces together are `decode` of all tokens, up to the first of `stops`. `ended` tells that
    one was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.ended = False
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []
        self._from, self._to = 0, 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token makes certain; perhaps none."""
        self._ids.append(token)
        return "" if self.ended else self._cut(self._fresh(last=False), last=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        return "" if self.ended else self._cut(self._fresh(last=True), last=True)

    def _fresh(self, last: bool) -> str:
        """Text of tokens that were not decoded yet, decoded beside those before them."""
        before = self._decode(self._ids[self._from : self._to])
        now = self._decode(self._ids[self._from :])
        waits = len(self._ids) - self._to <= _LONGEST_WAIT and now.endswith(_UNFINISHED)
        if len(now) <= len(before) or (waits and not last):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return now[len(before) :]

    def _cut(self, fresh: str, last: bool) -> str:
        """What may be said of the held text and the fresh one: nothing that may begin a stop."""
        text = self._held + fresh
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.ended, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
