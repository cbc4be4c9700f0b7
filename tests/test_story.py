"""examples/story.ipynb runs from top to bottom in a fresh kernel, and says what its text says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = "the notebook is run by nbclient and ipykernel (extra dev)"


def test_the_story_is_true(tmp_path: Path) -> None:
    """In a process of its own: Jupyter's warnings are not ours."""
    pytest.importorskip("nbclient", reason=NEEDS)
    pytest.importorskip("ipykernel", reason=NEEDS)
    copy = tmp_path / "story.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "tools.story", "-o", copy], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    holds(json.loads(copy.read_text(encoding="utf-8")))


def test_the_story_in_the_repository_shows_its_pictures() -> None:
    holds(json.loads((ROOT / "examples" / "story.ipynb").read_text(encoding="utf-8")))


def holds(notebook: dict[str, list[dict[str, list[dict[str, object]]]]]) -> None:
    """The outputs say what the text between them claims."""
    outputs = [one for cell in notebook["cells"] for one in cell.get("outputs", [])]
    said = "".join("".join(one.get("text", "")) for one in outputs)  # type: ignore[call-overload]
    right = said.split("right: ")[1].splitlines()[0]
    assert f"full cache says: {right}" in said
    assert f"at 5% hkvprof says: {right}" in said
    assert f"at 5% SnapKV says: {right}" not in said
    assert "of two halves of them agree on the type of" in said
    assert sum("image/png" in one.get("data", {}) for one in outputs) >= 5  # type: ignore[operator]
