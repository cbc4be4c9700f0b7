"""What a set of samples is like, told before a model is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from hkvprof.errors import counted
from hkvprof.samples.digest import samples_digest
from hkvprof.samples.record import Message, Sample
from hkvprof.samples.videos import seen_frames

_LEFT_OVER = re.compile(r"<image(?: [0-9]+)?>|<video>")


@dataclass(frozen=True)
class Survey:
    """Counts over samples.

    `pictures`, `frames` and `characters` have one number per sample; `contexts` counts samples with
    text marked as context; `bare` are the ids of samples with a mark such as `<image>` in their
    text; `equal` are pairs of ids of samples that differ in nothing else.
    """

    pictures: tuple[int, ...]
    frames: tuple[int, ...]
    characters: tuple[int, ...]
    replies: int
    followups: int
    contexts: int
    bare: tuple[str, ...]
    equal: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Survey:
        """Count; samples of the same text are compared by their pictures. Raises SampleError."""
        parts = [list(_parts(sample)) for sample in samples]
        texts = ["".join(part.get("text", "") for part in own) for own in parts]
        return cls(
            pictures=tuple(sum(part["type"] == "image" for part in own) for own in parts),
            frames=tuple(
                sum(seen_frames(part) for part in own if part["type"] == "video") for own in parts
            ),
            characters=tuple(map(len, texts)),
            replies=sum(sample.reply is not None for sample in samples),
            followups=sum(bool(sample.followups) for sample in samples),
            contexts=sum(any(p.get("modality") == "context" for p in own) for own in parts),
            bare=tuple(
                sample.id
                for sample, text in zip(samples, texts, strict=True)
                if _LEFT_OVER.search(text)
            ),
            equal=tuple(_equal(samples, texts)),
        )

    @property
    def seen(self) -> int:
        """How many samples show a picture or a video."""
        return sum(bool(sum(both)) for both in zip(self.pictures, self.frames, strict=True))

    def lines(self) -> list[str]:
        """What there is, in two lines."""
        count = len(self.characters)
        films = sum(map(bool, self.frames))
        shown = f"pictures in {sum(map(bool, self.pictures))} of {count} samples"
        if any(self.pictures):
            shown += f", {_range(self.pictures)} a sample, {sum(self.pictures):,} in all"
        if films:
            shown += f"; videos in {films}, {_range(self.frames)} frames a sample"
        told = f"text of {_range(self.characters)} characters; replies in {self.replies}"
        return [f"check: {shown}", f"       {told}, followups in {self.followups}"]

    def doubts(self, takes_pictures: bool) -> list[str]:
        """What is odd about the samples, for a model that takes pictures or text alone."""
        found = []
        if takes_pictures and not self.seen:
            found.append(
                "no sample has a picture, and the model takes pictures: its heads would be judged "
                "by text alone"
            )
        elif takes_pictures and self.seen < len(self.pictures):
            found.append(f"{counted(len(self.pictures) - self.seen, 'sample')} without a picture")
        if self.bare:
            found.append(
                f"{counted(len(self.bare), 'sample')} with <image> or the like as text, where a "
                f"picture should be, such as {self.bare[0]!r}: the model would read it as text"
            )
        if self.equal:
            one, other = self.equal[0]
            found.append(
                f"{counted(len(self.equal), 'sample')} like another but for its id, as {other!r} "
                f"and {one!r}: what they say counts twice"
            )
        return found


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {median(counts):,.0f})"


def _parts(sample: Sample) -> Iterator[Message]:
    for message in sample.messages:
        content: Any = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _equal(samples: Sequence[Sample], texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Ids of a sample and a later one with the same text, pictures and reply; pictures are read
    only where texts are the same."""
    seen: dict[str, list[Sample]] = {}
    for sample, text in zip(samples, texts, strict=True):
        seen.setdefault(f"{text}\0{sample.reply}", []).append(sample)
    for alike in seen.values():
        first: dict[str, str] = {}
        for sample in alike if len(alike) > 1 else ():
            digest = samples_digest([replace(sample, id="", task="")])
            if digest in first:
                yield first[digest], sample.id
            first.setdefault(digest, sample.id)
