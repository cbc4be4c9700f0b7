"""Run examples/story.ipynb and keep what it prints and draws: `python -m tools.story [-o COPY]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hkvprof.files.atomic import write_atomically

ROOT = Path(__file__).parents[1]
STORY = ROOT / "examples" / "story.ipynb"
SECONDS = 900
"""For a cell, on a machine that is busy."""


def run(path: Path) -> str:
    """The notebook with its outputs, run from the repository's root in a fresh kernel."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute(cwd=str(ROOT))
    for cell in notebook.cells:
        _tidy(cell)
    return str(nbformat.writes(notebook)) + "\n"


def _tidy(cell: Any) -> None:
    """Without times and without what went to stderr, so that the same run gives the same file."""
    cell.metadata.clear()
    if "outputs" in cell:
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]


def main() -> None:
    """Write the notebook, or a copy of it, with outputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=STORY)
    options = parser.parse_args()
    write_atomically(options.output, run(STORY).encode())


if __name__ == "__main__":
    main()
