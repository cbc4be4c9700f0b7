"""Freeze the texts whose true continuation is judged, as package data.

    python -m tools.make_texts --translations es=FOLDER pl=FOLDER zh=FOLDER

Code is of CPython's standard library, tables and JSON are of the IANA time zone database as the
package `tzdata` ships it, and prose in three languages is of the translated Python tutorial and FAQ
(folders of .po files: github.com/python/python-docs-es and its siblings).
"""

from __future__ import annotations

import argparse
import ast
import gzip
import io
import json
import re
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from hkvprof.evaluate.truetext import TEXTS

MODULES = (
    "textwrap", "calendar", "fractions", "heapq", "shlex", "sched", "graphlib", "filecmp",
    "fnmatch", "queue", "netrc", "reprlib",
)  # fmt: skip
MOST_CODE, MOST_PROSE = 120_000, 60_000
"""Characters of all code, and of each language."""
_MARKUP = re.compile(r":[\w:!+-]+:`!?~?([^`<]*?)(?:\s*<[^`]*>)?`")


def code() -> str:
    """Modules of the standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    return "\n\n".join(texts)[:MOST_CODE]


def zones() -> list[dict[str, str]]:
    """Every row of zone.tab, with the name of its country."""
    folder = files("tzdata") / "zoneinfo"
    names = dict(_rows((folder / "iso3166.tab").read_text(encoding="utf-8"), 2))
    return [
        {"zone": zone, "country": names[country], "coordinates": place, "remark": remark}
        for country, place, zone, remark in _rows((folder / "zone.tab").read_text("utf-8"), 4)
    ]


def _rows(text: str, columns: int) -> list[list[str]]:
    """Tab-separated lines without comments, short ones filled up."""
    lines = [line.split("\t") for line in text.splitlines() if line and line[0] != "#"]
    return [line + [""] * (columns - len(line)) for line in lines]


def table(rows: list[dict[str, str]]) -> str:
    """The zones as a table in Markdown."""
    lines = ["| zone | country | coordinates | remark |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join(lines)


def translated(folder: Path) -> str:
    """Prose of all .po files: translations without markup, code and short lines."""
    kept: list[str] = []
    for path in sorted(folder.rglob("*.po")):
        for entry in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            found = re.search(r"^msgstr ((?:\".*\"\s*)+)", entry, re.M)
            text = "".join(map(ast.literal_eval, found[1].splitlines())) if found else ""
            text = re.sub(r"`+([^`<_]*?)(?:\s*<[^`]*>)?`+_*", r"\1", _MARKUP.sub(r"\1", text))
            prose = len(text) >= 25 and ">>>" not in text and "\n" not in text
            if prose and "fuzzy" not in entry and 'msgid ""\nmsgstr' not in entry:
                kept.append(text.replace("*", "").replace("\\", "").removesuffix("::"))
    return "\n\n".join(kept)


def main() -> None:
    """Write the data file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--translations", nargs="+", required=True, metavar="LANGUAGE=FOLDER")
    given = dict(one.split("=", 1) for one in parser.parse_args().translations)
    rows = zones()
    texts = {
        "code": [code()],
        "json": [json.dumps(rows, indent=2, ensure_ascii=False)],
        "multilingual": [translated(Path(given[name]))[:MOST_PROSE] for name in sorted(given)],
        "table": [table(rows)],
    }
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(json.dumps(texts, ensure_ascii=False, indent=0).encode("utf-8"))
    TEXTS.write_bytes(buffer.getvalue())
    sizes = {kind: [len(text) for text in parts] for kind, parts in texts.items()}
    sys.stdout.write(f"{TEXTS}: {len(buffer.getvalue())} bytes, characters {sizes}\n")


if __name__ == "__main__":
    main()
