"""The check of untested releases: it passes on tested ones, and names what was moved in others."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli import run
from hkvprof.errors import HkvWarning, ModelError
from hkvprof.models import approval as tested
from hkvprof.models.approval import TESTED
from hkvprof.runtime import apply, selfcheck
from hkvprof.runtime.selfcheck.examine import examine
from tests.models.tiny import build_covered
from tests.runtime.moves import MOVES, Move, mask_sizes_ignored

UNTESTED = "5.999.0"


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has imported a release of which nothing is known; its cache folder."""
    for user in (tested, selfcheck):  # what they imported, whatever other tests import again
        monkeypatch.setattr(user.transformers, "__version__", UNTESTED)
    monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(selfcheck.OVERRIDE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a check that finds nothing was run for; entries put in are what it finds."""
    runs: list[str] = []

    def check(apply: Any) -> str:
        runs.append("")
        return runs[0]

    monkeypatch.setattr("hkvprof.runtime.selfcheck.examine.examine", check)
    return runs


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_covered("llama")


def use(model: Any) -> None:
    with apply(model, uniform_profile(model), budget=0.5, min_tokens=1):
        pass


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_what_moved_is_named(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move(monkeypatch)
    found = examine(apply)
    assert re.search(MOVES[move], found), found


def test_this_release_passes() -> None:
    assert examine(apply) == ""


def test_the_releases_tested_are_those_of_the_constraints() -> None:
    root = Path(__file__).parents[2]
    names = ("constraints-oldest.txt", "constraints.txt", "constraints-newest.txt")
    pins = [
        line.removeprefix("transformers==")
        for name in names
        for line in (root / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("transformers==")
    ]
    assert tuple(pins) == TESTED


def test_a_tested_release_is_not_checked(
    llama: Any, checks: list[str], untested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested.transformers, "__version__", TESTED[0])
    use(llama)
    assert checks == []


def test_the_check_runs_once_in_a_process_and_once_on_a_machine(
    llama: Any, checks: list[str], untested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(llama)
    use(llama)
    assert len(checks) == 1
    (record,) = untested.rglob("*.json")
    assert json.loads(record.read_text())["passed"]["transformers"] == UNTESTED
    monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())  # as a new process
    use(llama)
    assert len(checks) == 1
    monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())
    monkeypatch.setattr(tested.transformers, "__version__", "5.999.1")
    use(llama)
    assert len(checks) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 9999])
def test_a_record_that_says_something_else_is_none(
    llama: Any, checks: list[str], untested: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    use(llama)
    (record,) = untested.rglob("*.json")
    whole = record.read_bytes()
    record.write_bytes(content)
    monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())
    use(llama)
    assert len(checks) == 2
    assert record.read_bytes() == whole


@pytest.mark.parametrize("broken", ["a file", "no home"])
def test_a_broken_cache_folder_is_no_failure(
    llama: Any, checks: list[str], untested: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "a file":
        untested.write_bytes(b"")
    else:
        monkeypatch.setattr("hkvprof.models.approval.user_cache", _homeless)
    for _ in range(2):
        monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())
        use(llama)
    assert len(checks) == 2


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_failing_check_raises_and_is_not_remembered(
    llama: Any, untested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mask_sizes_ignored(patch)
        for _ in range(2):
            with pytest.raises(ModelError, match=rf"{UNTESTED} is none of .*get_mask_sizes.*=1"):
                use(llama)
        assert not hasattr(llama, "_hkvprof_handle")
    assert not list(untested.rglob("*.json"))
    monkeypatch.setattr(selfcheck, "_OUTCOME", selfcheck._Outcome())
    use(llama)
    assert list(untested.rglob("*.json"))


def test_the_override_warns_once(
    llama: Any, checks: list[str], untested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.append("the cache is called otherwise")
    with pytest.raises(ModelError, match="the cache is called otherwise"):
        use(llama)
    monkeypatch.setenv(selfcheck.OVERRIDE, "1")
    with pytest.warns(HkvWarning, match="the cache is called otherwise.*going on"):
        use(llama)
    use(llama)


def test_threads_wait_for_one_check(llama: Any, checks: list[str], untested: Path) -> None:
    threads = [
        threading.Thread(target=selfcheck.require_tested_seam, args=(apply,)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_disturbed(untested: Path, grad: bool) -> None:
    """Random state, default dtype and device, threads, modes: as before, and of no influence."""

    def state() -> tuple[Any, ...]:
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        made = torch.empty(0)
        return (
            torch.get_rng_state().tolist(), modes, torch.get_default_dtype(), made.dtype,
            made.device, torch.get_num_threads(), torch.is_autocast_enabled("cpu"),
        )  # fmt: skip

    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.set_grad_enabled(grad), torch.device("meta"), torch.autocast("cpu"):
            before = state()
            selfcheck.require_tested_seam(apply)
            assert state() == before
        with torch.inference_mode():
            assert examine(apply) == ""
    finally:
        torch.set_default_dtype(dtype)
    assert list(untested.rglob("*.json"))


def test_calibration_is_checked_before_the_model_is_loaded(
    checks: list[str], untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks.append("the cache is called otherwise")
    line = ["calibrate", "--model", "tinyvl", "--data", "calibration/mini", "--max-samples", "1"]
    assert run([*line, "-o", str(tmp_path / "made.hkv.safetensors")]) != 0
    said = capsys.readouterr().err
    assert "the cache is called otherwise" in said
    assert "loading" not in said
