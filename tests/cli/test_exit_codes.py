"""Exit codes: 2 where the command line is wrong, 1 where what it names fails, in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from hkvprof.cli import app, run
from hkvprof.cli.errors import FAILURE, USAGE
from tests.profiles import GOLDEN

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FAILS = {
    "demo": "demo -o FILE/there",
    "calibrate": "calibrate --model NONE --data DATA -o OUT",
    "merge": "merge NONE -o OUT",
    "inspect": "inspect NONE",
    "report": "report NONE -o OUT",
    "plan": "plan NONE",
    "diff": "diff NONE NONE",
    "validate": "validate NONE",
    "push": "push NONE me/mine",
    "pull": "pull me/mine -o OUT",
    "export": "export NONE --format duo -o OUT",
    "import": "import NONE --format duo --model tinyvl -o OUT",
    "doctor": "doctor NONE",
    "eval": "eval --model tinyvl --profile NONE",
    "certify": "certify NONE --model tinyvl",
    "bench": "bench --model tinyvl --profile NONE",
    "reproduce": "reproduce hybridkv NONE --model tinyvl",
    "serve": "serve tinyvl --profile NONE --port 0",
}
"""What names a thing that is not there, or cannot be had."""


def words(line: str, folder: Path) -> list[str]:
    (folder / "file").touch()
    data = folder / "data.jsonl"
    data.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}], "reply": "y"}')
    names = {"NONE": folder / "none" / "there", "OUT": folder / "out", "DATA": data}
    return [
        str(names.get(word, word.replace("FILE", str(folder / "file")))) for word in line.split()
    ]


def last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("verb", COMMANDS)
def test_unknown_options_and_arguments_are_wrong_usage(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--no-such-option"]) == USAGE
    assert last(capsys).startswith("error: ")
    assert run([verb, *"abcdef"]) == USAGE


@pytest.mark.parametrize(
    "verb", [name for name, one in COMMANDS.items() if any(p.required for p in one.params)]
)
def test_what_is_missing_is_wrong_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb]) == USAGE
    assert "Missing" in last(capsys)


def numbers() -> list[tuple[str, str]]:
    """Every option of every verb that is a number."""
    found = []
    for verb, command in COMMANDS.items():
        context = command.make_context(verb, [], resilient_parsing=True)
        for parameter in command.params:
            name = (parameter.get_help_record(context) or ("",))[0]
            if "<int" in name or "<float" in name:
                found.append((verb, parameter.opts[0]))
    assert len(found) > 20
    return found


@pytest.mark.parametrize(("verb", "option"), numbers())
def test_no_number_is_wrong_usage(
    verb: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = [
        word
        for parameter in COMMANDS[verb].params
        if parameter.required
        for word in ((parameter.opts[0], "x") if parameter.opts[0].startswith("-") else ("x",))
    ]
    assert run([verb, *required, option, "many"]) == USAGE
    assert f"'{option}'" in last(capsys)


@pytest.mark.parametrize("verb", FAILS)
def test_what_is_not_there_is_a_failure(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(words(FAILS[verb], tmp_path))
    is_option = verb in ("demo", "merge")  # a folder to write, a folder that is none of rows
    assert (code, last(capsys)[:7]) == (USAGE if is_option else FAILURE, "error: ")


def test_every_verb_that_can_fail_does() -> None:
    assert FAILS.keys() | {"models"} == COMMANDS.keys()


def test_differences_are_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", str(GOLDEN), str(GOLDEN)]) == 0
    other = Path(__file__).parents[2] / "profiles" / "smollm2.hkv.safetensors"
    assert run(["diff", str(GOLDEN), str(other)]) == FAILURE
