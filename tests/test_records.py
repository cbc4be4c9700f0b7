"""Records of options: what they lack is refused by name, with what to do instead."""

import copy
import pickle
from typing import Any

import pytest

import hkvprof
from hkvprof.calibration import recipe as recipes
from hkvprof.cli import run
from hkvprof.errors import UsageError
from hkvprof.runtime import options

GONE = [(hkvprof.Options, name) for name in options.REMOVED]
GONE += [(hkvprof.Recipe, name) for name in recipes.REMOVED]


@pytest.mark.parametrize(("record", "name"), GONE, ids=lambda value: str(value))
def test_what_was_removed_says_what_to_do(record: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"no option '{name}': .*leave it out|keeps generated"):
        record(**{name: 1})


@pytest.mark.parametrize("record", [hkvprof.Options, hkvprof.Recipe])
def test_unknown_names_are_told_those_there_are(record: Any) -> None:
    with pytest.raises(UsageError, match="no option 'nothing': there are "):
        record(nothing=1)
    assert copy.deepcopy(record()) == record() == pickle.loads(pickle.dumps(record()))


@pytest.mark.parametrize("verb", ["calibrate", "merge"])
@pytest.mark.parametrize(
    "option", ["--conservative", "--no-conservative", "--risk", "--risk-level"]
)
def test_options_of_the_command_line_that_are_gone(
    verb: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, option]) == 2
    assert f"{option} is gone: " in capsys.readouterr().err
