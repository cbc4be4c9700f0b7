"""docs/models.md and `hkvprof models` say what the tests run, and nothing else.

`python -m tests.models.test_coverage_table` writes the table into docs/models.md.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hkvprof.models.adapter import view_model
from hkvprof.models.architectures import FAMILIES as ADAPTERS
from hkvprof.models.coverage import COVERAGE, markdown
from hkvprof.models.vision import torchvision_works
from tests.models.families import FAMILIES, processor_of
from tests.models.tiny import COVERED, build_covered

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: hkvprof/models/coverage.py -->\n", "<!-- end -->"


def page_with_table() -> str:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + markdown() + "\n" + END + rest.split(END)[1]


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page_with_table(), __doc__


def test_every_row_runs_and_everything_that_runs_is_a_row() -> None:
    assert list(COVERAGE) == list(COVERED)


@pytest.mark.parametrize("name", COVERAGE)
def test_a_row_says_what_ran(name: str) -> None:
    row, model = COVERAGE[name], build_covered(name)
    view = view_model(model)
    assert (row.model_class, row.model_type) == (type(model).__name__, model.config.model_type)
    assert not view.generic, "an adapter names it"
    assert (row.layers == "all") is (len(view.layer_ids) == view.text_config.num_hidden_layers)
    assert (row.images != "no") is (name in FAMILIES)
    _, how = processor_of(name, model)
    if row.images == "Pillow":
        assert how != "stand-in"
    if row.images.startswith("torchvision") and not torchvision_works() and not row.note:
        assert how == "stand-in", "its processor works without torchvision: say so in the table"


def test_no_adapter_names_what_is_not_tested() -> None:
    named = {model_type for adapter in ADAPTERS for model_type in adapter.model_types}
    assert named == {row.model_type for row in COVERAGE.values()}


def test_only_adapters_decide_by_architecture() -> None:
    """No branch on `model_type` anywhere else: an error may name it, a fingerprint hash it."""
    package, branches = PAGE.parents[1] / "hkvprof", []
    for path in package.rglob("*.py"):
        if path.name == "architectures.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If | ast.IfExp | ast.Compare | ast.Match):
                test = node.subject if isinstance(node, ast.Match) else getattr(node, "test", node)
                if "model_type" in ast.unparse(test):
                    branches.append(f"{path.relative_to(package)}:{node.lineno}")
    assert branches == []


if __name__ == "__main__":
    PAGE.write_text(page_with_table(), encoding="utf-8")
