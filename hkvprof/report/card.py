"""The card of a profile on the hub: what it is, how it was made, and how to use it. Markdown.

What a profile says of itself was perhaps written by strangers: it stands in the card as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hkvprof.errors import BudgetError, UsageError
from hkvprof.profile.budgets import Fetch
from hkvprof.profile.hub import FILE
from hkvprof.profile.record import SCHEMA_VERSION, Profile
from hkvprof.report import certainty, summary
from hkvprof.report.measured import covering

CARD, PICTURE = "README.md", "curves.png"
_BUDGETS = (0.05, 0.1, 0.2, 0.5)
_ITEM_BYTES = 2
_MODEL = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|!~])")


def card(profile: Profile, repository: str, licence: str, pictured: bool) -> str:
    """The card of a profile in `repository`; `licence` is an identifier of the hub, or empty.

    Raises UsageError for a licence that is no identifier.
    """
    if licence and not _LICENCE.fullmatch(licence):
        raise UsageError(
            f"--license {licence!r}: expected an identifier of the hub such as apache-2.0 or mit"
        )
    parts = [
        _front(profile, licence),
        f"# {repository}\n\n{_what(profile)}",
        f"## What it keeps\n\n{_budgets(profile)}",
        *([f"![loss over budget, and the share of every head]({PICTURE})"] if pictured else []),
        f"## Certificate\n\n{_certificate(profile)}",
        f"## How to use it\n\n{_usage(profile, repository)}",
        f"## How it was made\n\n{_table(making(profile))}",
        f"## The model\n\n{_table(model_facts(profile))}",
        f"## Licence\n\n{_licence(licence)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front(profile: Profile, licence: str) -> str:
    """What the hub itself reads."""
    lines = ["library_name: hkvprof", "tags:", "- hkvprof", "- kv-cache", "- kv-cache-compression"]
    if _MODEL.fullmatch(profile.fingerprint.hub_id):
        lines += [f"base_model: {profile.fingerprint.hub_id}"]
    if licence:
        lines += [f"license: {licence}"]
    return "\n".join(["---", *lines, "---"])


def _what(profile: Profile) -> str:
    model = _plain(profile.fingerprint.hub_id or profile.fingerprint.architecture)
    said = _plain(summary.sentence(profile, profile.usual_tokens))
    return (
        f"A profile of the attention heads of {model}, by which hkvprof compresses its KV cache. "
        "It holds no weights: for every KV head it says what to keep of a prompt at any budget.\n\n"
        f"{said[:1].upper()}{said[1:]}."
    )


def _budgets(profile: Profile) -> str:
    tokens = profile.usual_tokens
    known = covering(profile, Fetch())
    heading = "expected loss" if known is None else "quality"
    rows = [f"| budget | on the device | in host memory | {heading} |", "|---|---|---|---|"]
    for budget in _BUDGETS:
        try:
            plan = profile.plan(budget, tokens, _ITEM_BYTES)
        except BudgetError:
            rows.append(f"| {budget:.0%} | too small for this length | | |")
            continue
        loss = plan.expected_loss
        said = "not measured" if loss is None or known else f"{loss:.3g}"
        said = (known.at(budget) if known else "") or said
        bytes_ = [summary.human(size) for size in (plan.resident_bytes, plan.host_bytes)]
        rows.append(f"| {budget:.0%} | {bytes_[0]} | {bytes_[1]} | {said} |")
    dense = summary.human(tokens * profile.grid.token_bytes(_ITEM_BYTES))
    meaning = (
        "the loss is what planning minimises, good for comparing budgets of this profile"
        if known is None
        else _plain(known.basis)
    )
    return (
        f"A prompt of {tokens:,} tokens in 16 bits, whose dense cache holds {dense}; {meaning}:\n\n"
        + "\n".join(rows)
    )


def _certificate(profile: Profile) -> str:
    lines = certainty.section(profile)
    if not lines:
        return "None: `hkvprof certify` was not run on it."
    return "\n".join(f"    {line}" for line in lines)


def _usage(profile: Profile, repository: str) -> str:
    model = profile.fingerprint.hub_id
    name = model if _MODEL.fullmatch(model) else "MODEL"
    return (
        "    pip install hkvprof\n\n"
        "    import hkvprof\n\n"
        f'    model, processor = hkvprof.load_model("{name}")\n'
        f'    with hkvprof.apply(model, "hf:{repository}", budget=0.10):\n'
        "        model.generate(...)\n\n"
        f"`hf:{repository}@COMMIT` pins a version; a request's receipt names the one that it ran "
        f"with. `hkvprof pull {repository}` gets the file `{FILE}`."
    )


def making(profile: Profile) -> Iterator[tuple[str, Any]]:
    """How a profile was made, as names and values."""
    told = profile.provenance
    yield "recipe", profile.recipe
    yield "default budget", f"{profile.default_budget:.3g}"
    for name in ("samples", "tasks", "tokens", "data", "data_digest", "replies", "dtype", "seed"):
        if name in told:
            yield name.replace("_", " "), told[name]
    yield "versions", told.get("versions", "not recorded")
    if "imported" in told:
        yield "imported from", told["imported"]
    yield "schema", SCHEMA_VERSION
    yield "digest of the content", profile.content_digest


def model_facts(profile: Profile) -> Iterator[tuple[str, Any]]:
    """Which model a profile is of, as names and values."""
    found, grid = profile.fingerprint, profile.grid
    yield "architecture", found.architecture
    yield (
        "heads",
        (
            f"{grid.layers} layers of {grid.kv_heads} KV and {grid.query_heads} query heads, "
            f"{grid.head_dim} wide"
        ),
    )
    for name in ("hub_id", "commit", "weights_digest", "config_hash", "quantisation", "adapters"):
        if value := getattr(found, name):
            yield name.replace("_", " "), value


def _licence(licence: str) -> str:
    stated = f"`{licence}`" if licence else "Not stated by who pushed it"
    return (
        f"{stated}. A profile is made of figures about a model, measured on samples: the licences "
        "of both may matter to its use."
    )


def _table(rows: Iterator[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _plain(value: object) -> str:
    """A value as text on one line, in which Markdown finds nothing to do."""
    return _MARKS.sub(r"\\\1", certainty.plain(value))
