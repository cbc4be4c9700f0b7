"""The seams of vLLM by import alone; skipped where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "hkvprof" / "engines" / "vllm"


def test_vllm_is_imported_in_one_place() -> None:
    for path in PACKAGE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = "import vllm" in text or "from vllm" in text
        assert found == (path.name == "seams.py"), path


def test_the_installed_release_has_what_is_relied_on() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed here: make test-vllm")
    from hkvprof.engines.vllm import seams

    assert seams.problems() == []
    assert seams.untested() == ""


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed here: make test-vllm")
    from hkvprof.engines.vllm import seams

    class Moved(seams.FullAttentionManager):
        def remove_skipped_blocks(self, request_id: str) -> None: ...

    monkeypatch.setattr(seams, "FullAttentionManager", Moved)
    monkeypatch.setattr(seams, "VERSION", "0.33.1")
    assert any("num_prompt_tokens" in one for one in seams.problems())
    assert "0.33.1 is untested" in seams.untested()
