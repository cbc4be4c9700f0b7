"""A short slice of `python -m tests.fuzz.run`, and that the fuzzers themselves find something."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from hkvprof.profile.record import METADATA_KEY
from tests.fuzz import jsons, tensors
from tests.fuzz import run as runner
from tests.fuzz.run import fuzz, make_target
from tests.fuzz.targets import Profiles


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are bounded where one process has the machine: `python -m tests.fuzz.run`."""
    monkeypatch.setattr(runner, "MOST_SECONDS", float("inf"))


@pytest.mark.parametrize(
    ("name", "count", "least"), [("profiles", 500, 30), ("samples", 300, 60), ("rows", 100, 5)]
)
def test_only_errors_of_our_own_come_out(name: str, count: int, least: int, tmp_path: Path) -> None:
    tally = fuzz(name, make_target(name, tmp_path), range(count), seed=7, keep=None, total=count)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.count == count
    assert min(tally.accepted, tally.refused) >= least, "mutants are all sound, or all nonsense"


def test_a_mutant_is_made_again_from_its_number(tmp_path: Path) -> None:
    for number in range(20):
        made = [tmp_path / "one", tmp_path / "two"]
        for folder in made:
            folder.mkdir(exist_ok=True)
            Profiles().mutate(Random(f"profiles:0:{number}"), folder)
        one, two = ((folder / Profiles.NAME).read_bytes() for folder in made)
        assert one == two


def test_a_file_taken_apart_and_put_together_is_the_same_profile(tmp_path: Path) -> None:
    target = Profiles()
    for seed in target.seeds:
        file = tensors.File.of(seed, METADATA_KEY)
        (tmp_path / target.NAME).write_bytes(file.to_bytes(json.dumps(file.about)))
        loaded = None
        try:
            loaded = target.load(tmp_path)
        except Exception as error:
            assert "schema version 1" in str(error)  # noqa: PT017
        if loaded is not None and file.about["schema"] > 2:  # older ones are upgraded
            assert sorted(loaded.tensors()) == sorted(tensor.name for tensor in file.tensors)


def test_json_mutants_differ_from_their_seed() -> None:
    seed = {"a": [1, {"b": "x"}], "c": 0.5}
    made = [jsons.text_of(Random(i), jsons.mutated(Random(i), seed)) for i in range(200)]
    assert sum(text != json.dumps(seed, separators=(",", ":")) for text in made) > 190
    assert len(set(made)) > 150


def test_the_runner_tells_failures(tmp_path: Path) -> None:
    """A loader that lets another error through, and one that takes what is not its own."""

    class Broken(Profiles):
        def load(self, folder: Path) -> object:
            raise KeyError("not ours")

    tally = fuzz("broken", Broken(), range(3), seed=0, keep=tmp_path, total=3)
    assert len(tally.failures) == 3
    why = (tmp_path / "broken-0-1" / "why.txt").read_text()
    assert "--only broken:1 --seed 0" in why
    assert "not ours" in why
    assert (tmp_path / "broken-0-1" / Profiles.NAME).exists()
