"""How handles and receipts look in an interactive session: one line, or a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """A caption and one row per entry, escaped, in the notebook's own style."""
    lines = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"


def mib(count: int) -> str:
    """Bytes as `12.34 MiB`."""
    return f"{count / 2**20:.2f} MiB"
