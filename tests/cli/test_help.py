"""Help at 80 columns: headings in `calibrate`, every option of every verb, no line too long."""

from __future__ import annotations

import re

import pytest
import typer

from hkvprof.cli import app, run
from hkvprof.cli.calibrate import EXPERTS, RECIPE, SEVERAL

VERBS = [str(command.name) for command in app.registered_commands]


def shown(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run([verb, "--help"]) == 0
    return capsys.readouterr().out


def test_calibrate_has_its_options_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown("calibrate", capsys)
    headings = ["Options:", f"{RECIPE}:", f"{SEVERAL}:", f"{EXPERTS}:"]
    places = [page.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    first = page[places[0] : places[1]]
    assert all(name in first for name in ("--model", "--data", "--dry-run", "--output"))
    assert "--theta" in page[places[3] :]
    assert "--fsdp" in page[places[2] : places[3]]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_in_the_help_within_80_columns(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = shown(verb, capsys)
    group = typer.main.get_command(app)
    command = group.commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        assert all(name in page for name in parameter.opts if name.startswith("-"))
    options = page.split("Examples:", maxsplit=1)[0]
    assert max(map(len, options.splitlines())) <= 80
    assert not re.search(r"\x1b", page)
