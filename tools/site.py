"""What mkdocs asks while it builds the site (mkdocs.yml): pages from outside docs/, anchors, links.

Pages are written for GitHub; here their links are turned, so that both show the same. mkdocs is
imported when it calls, so that tests know names and anchors without it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = "docs"
BROUGHT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "profiles/README.md": "profiles.md",
    "LICENSE": "LICENSE",
    "examples/story.ipynb": "story.md",
}
"""What lies outside docs/, by its place in the repository, and where the site has it."""
HELP_MARK = "<!-- verbs -->"
"""Where docs/command-line.md takes the help of all verbs."""

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"^(?:```.*?^```|    .*?$)|`[^`\n]+`", flags=re.M | re.S)


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it: `Will it fit?` is `will-it-fit`."""
    plain = re.sub(r"<[^>]*>", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", separator)


def site_path(source: str) -> str | None:
    """Where the site has a file of the repository; None where it has it not."""
    if source in BROUGHT:
        return BROUGHT[source]
    return source.removeprefix(f"{DOCS}/") if source.startswith(f"{DOCS}/") else None


def links(text: str) -> Iterator[str]:
    """Targets of a page's links and pictures, those in code left out."""
    for found in _LINK.finditer(_CODE.sub("", text)):
        yield found[2]


def turned(text: str, source: str) -> str:
    """A page with the links that it has on the site; `source` is its place in the repository."""
    here = posixpath.dirname(site_path(source) or "")

    def turn(found: re.Match[str]) -> str:
        target, mark, place = found[2].partition("#")
        if not target or ":" in target:
            return found[0]
        there = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if there is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(there, here or '.')}{mark}{place}{found[3]}"

    return _LINK.sub(turn, text)


# -- what mkdocs calls ----------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Anchors as on GitHub."""
    config.mdx_configs["toc"] = {"slugify": anchor, "permalink": True}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Bring the pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, there in BROUGHT.items():
        files.append(File.generated(config, there, content=brought(source)))
    return files


def brought(source: str) -> str:
    """A file from outside docs/ as the site has it, with its links turned."""
    text = (ROOT / source).read_text(encoding="utf-8")
    return turned(shown(json.loads(text)) if source.endswith(".ipynb") else text, source)


def shown(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its text, code, and what the code printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    """Text or a picture; what goes to stderr is left out."""
    if output["output_type"] == "stream":
        told = "".join(output["text"]).rstrip() if output["name"] == "stdout" else ""
        return f"```text\n{told}\n```" if told else ""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="what the code above drew" src="data:image/png;base64,{picture}">'
    return f"```text\n{''.join(data.get('text/plain', ''))}\n```"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links, and put the help of all verbs where docs/command-line.md wants it."""
    if HELP_MARK in markdown:
        markdown = markdown.replace(HELP_MARK, verbs())
    if page.file.src_uri in BROUGHT.values():
        return markdown
    return turned(markdown, f"{DOCS}/{page.file.src_uri}")


def verbs() -> str:
    """What `hkvprof VERB --help` prints, a section per verb."""
    import typer.main

    from hkvprof.cli import app

    command = typer.main.get_command(app)
    parts = []
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        with command.make_context("hkvprof", [], resilient_parsing=True) as above:
            context = verb.make_context(name, [], parent=above, resilient_parsing=True)
            parts.append(f"## {name}\n\n```text\n{verb.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)
