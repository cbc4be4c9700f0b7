"""The report of a profile: one HTML page with everything in it, for a browser without a network.

Figures are drawn by a small script of our own (assets/page.js): heat maps, lines and two sliders
need a few kilobytes, where a library for all kinds of charts would be most of the page. What a
profile or an answer says was perhaps written by strangers: it is escaped in the page, and the
page's policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.profile.record import SCHEMA_VERSION, Profile
from hkvprof.report import attention, certainty, summary
from hkvprof.report.card import making, model_facts
from hkvprof.report.figures import figures

MOST_BYTES = 5 * 10**6
"""Largest page that is written."""


def page(profile: Profile, profile_name: str, evaluation: str = "") -> str:
    """The report as HTML; `evaluation` is a section that `report.evaluated` made, or empty.

    Raises UsageError for a page of more than MOST_BYTES.
    """
    drawn = figures(profile)
    body = "\n".join(
        [
            f"<h1>{_model_name(profile)}</h1>",
            f'<p class="dim">Profile {escape(profile_name)}, made by hkvprof, recipe '
            f"{escape(profile.recipe)}, schema {SCHEMA_VERSION}</p>",
            _found(profile),
            _heads(profile, drawn),
            _planning(profile, drawn),
            f"<h2>How sure it is</h2>{_lines(certainty.certainty(profile))}",
            _certificate(profile),
            evaluation,
            _provenance(profile),
            _usage(profile, profile_name),
        ]
    )
    text = _document(f"hkvprof: {_model_name(profile)}", body, drawn)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise UsageError(
            f"the report would have {size:,} bytes, expected at most {MOST_BYTES:,}: leave --eval "
            "out, or read the profile by `hkvprof inspect`"
        )
    return text


def escape(value: object) -> str:
    """A stranger's value as text of HTML, on one line, control characters escaped."""
    return html.escape(certainty.plain(value), quote=True)


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a table of two columns."""
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _model_name(profile: Profile) -> str:
    return escape(profile.fingerprint.hub_id or profile.fingerprint.architecture)


def _lines(lines: Iterable[str]) -> str:
    return "<pre>" + "\n".join(html.escape(line) for line in lines) + "</pre>"


def _found(profile: Profile) -> str:
    """What was found, as a paragraph."""
    said = summary.sentence(profile, profile.usual_tokens)
    parts = [f"{said[:1].upper()}{said[1:]}.", *filter(None, [summary.unserved(profile)])]
    if doubts := certainty.doubts(profile):
        parts.append(f"{doubts}.")
    close = len(summary.borderline(profile))
    if close:
        parts.append(f"Of {profile.grid.total} heads {close} could as well be of the other type.")
    return f'<h2>What was found</h2><p id="found">{" ".join(map(escape, parts))}</p>'


def _heads(profile: Profile, drawn: Mapping[str, Any]) -> str:
    curves = (
        f"Click a head for its loss curves, on prompts of {profile.usual_tokens:,} tokens."
        if drawn["curves"]
        else "No loss curves: this recipe measured none."
    )
    measured = "" if drawn["query_maps"] else "<p>No statistics of query heads are recorded.</p>"
    return (
        f'<h2>Heads</h2><p class="dim">At the default budget of '
        f"{summary.percent(profile.default_budget)}. {curves}</p>"
        '<div class="pair" id="heads"></div><div id="curves"></div>'
        f'<h2>What heads attend to</h2>{measured}<div class="maps" id="maps"></div>'
        f"{_lines(attention.attention(profile))}"
    )


def _planning(profile: Profile, drawn: Mapping[str, Any]) -> str:
    budgets, fetches = drawn["plans"]["budgets"], drawn["plans"]["fetches"]
    start = min(range(len(budgets)), key=lambda i: abs(budgets[i] - profile.default_budget))
    return (
        f'<h2>Bytes, loss and reads</h2><p class="dim">One prompt of {profile.usual_tokens:,} '
        "tokens in 16 bits. Loss is what planning minimises; 100% is every head pruned to the "
        "least measured share without fetching. It compares budgets and is no share of wrong "
        "answers.</p>"
        '<div class="controls">'
        f"{_slider('budget', 'Budget (share of dense bytes)', start, len(budgets))}"
        f"{_slider('fetch', 'What a step may read', 0, len(fetches))}</div>"
        '<p id="plan-said"></p><div class="pair" id="plan"></div>'
        '<div class="pair" id="pareto"></div>'
    )


def _slider(name: str, label: str, start: int, count: int) -> str:
    return (
        f'<label>{label}: <output id="{name}-said"></output><input type="range" id="{name}" '
        f'min="0" max="{count - 1}" step="1" value="{start}"></label>'
    )


def _certificate(profile: Profile) -> str:
    lines = certainty.section(profile) or ["None: `hkvprof certify` was not run on it."]
    return f"<h2>Certificate</h2>{_lines(lines)}"


def _provenance(profile: Profile) -> str:
    return (
        f"<h2>How it was made</h2>{table(making(profile))}"
        f"<h2>The model</h2>{table(model_facts(profile))}"
    )


def _usage(profile: Profile, profile_name: str) -> str:
    lines = summary.usage(profile, profile_name)
    return f"<h2>How to use it</h2>{_lines(lines)}"


def _document(title: str, body: str, drawn: Mapping[str, Any]) -> str:
    """The page; its policy names the one script that may run by its digest."""
    style, script = (
        (files("hkvprof.report") / "assets" / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    plain = json.dumps(drawn, separators=(",", ":"), allow_nan=False)
    plain = plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{style}</style></head>\n<body>\n{body}\n"
        f'<div id="tip"></div>\n<script type="application/json" id="data">{plain}</script>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )
