"""Freeze the prose of the Python Language Reference as package data.

    python -m tools.make_prose

The text ships with CPython (`pydoc_data.topics`) and changes from release to release; the frozen
file makes every long-text sample independent of the Python that generates it. Topics overlap
(long ones contain short ones), so each paragraph is kept in one topic only: then a split by topic
is a split by text.
"""

from __future__ import annotations

import gzip
import io
import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping

from hkvprof.evaluate.longtext import PROSE, split_sentences

MIN_CHARACTERS = 60  # of a paragraph; shorter ones are headings and leftovers of lists
_LONG_SENTENCE = 50  # characters; the same long sentence may not occur in two topics
_CODE = re.compile(r">>>|::=|^\s*[|+#@]|[=\-+]{4,}|^\s*(def|class|import|from|for|print)\b", re.M)


def clean_paragraph(block: str) -> str | None:
    """One reST block as a line of prose, or None for code, grammar, tables and headings."""
    if _CODE.search(block):
        return None
    text = " ".join(block.split())
    text = re.sub(r"^(\* |\[\d+\] |\d+\. |See also: )", "", text)
    text = re.sub(r" ?\[\d+\]", "", text)
    text = re.sub(r"(?<!\w)\*\*?([\w .-]+)\*\*?(?!\w)", r"\1", text)
    prose = len(text) >= MIN_CHARACTERS and text[0].isupper() and text[-1] in ".:!)"
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return re.sub(":$", ".", text) if prose and letters >= 0.87 * len(text) else None


def clean_corpus(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Topic name -> paragraphs of prose; no long sentence occurs in two topics.

    Short topics choose first, so that the long ones, which quote them, do not swallow them.
    """
    owner: dict[str, str] = {}
    corpus: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        kept = [text for text in _paragraphs(topics[name]) if _claim(text, name, owner)]
        if kept:
            corpus[name] = kept
    return dict(sorted(corpus.items()))


def _paragraphs(text: str) -> Iterator[str]:
    """Clean paragraphs of one topic, each once."""
    seen: set[str] = set()
    for block in re.split(r"\n\s*\n", text):
        paragraph = clean_paragraph(block)
        if paragraph and paragraph not in seen:
            seen.add(paragraph)
            yield paragraph


def _claim(paragraph: str, topic: str, owner: dict[str, str]) -> bool:
    """Record the paragraph's long sentences for this topic; False if another topic has one."""
    long = [s for s in split_sentences(paragraph) if len(s) >= _LONG_SENTENCE] or [paragraph]
    if any(owner.get(sentence, topic) != topic for sentence in long):
        return False
    owner.update(dict.fromkeys(long, topic))
    return True


def encode(corpus: Mapping[str, list[str]], source: str) -> bytes:
    """Deterministic gzip (no time stamp, no file name) of the corpus as JSON."""
    text = json.dumps({"source": source, "topics": corpus}, ensure_ascii=False, indent=0)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(text.encode("utf-8"))
    return buffer.getvalue()


def main() -> None:
    """Write the data file from the Python that runs this."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    corpus = clean_corpus(topics)
    data = encode(corpus, f"The Python Language Reference, CPython {platform.python_version()}")
    PROSE.parent.mkdir(exist_ok=True)
    PROSE.write_bytes(data)
    count = sum(len(paragraphs) for paragraphs in corpus.values())
    sys.stdout.write(f"{PROSE}: {len(corpus)} topics, {count} paragraphs, {len(data)} bytes\n")


if __name__ == "__main__":
    main()
