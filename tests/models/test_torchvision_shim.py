"""The tests' own shim stands aside where a torchvision loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.test_processing import run_python

LOADS = "import torch\nkept = torch.library.Library('torchvision', 'DEF')\n"
"""Declares its operators when it is imported, as the compiled one does; twice is an error."""
FAILS = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.mark.parametrize(("init", "declared"), [(LOADS, False), (FAILS, True)])
def test_operators_are_declared_only_where_they_are_missing(
    init: str, declared: bool, tmp_path: Path
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        init + "[kept.define(f'{n}(Tensor x) -> Tensor') for n in ('nms', 'qnms')]\n"
    )
    program = (
        "import torch\n"
        "from tests.models.torchvision_shim import declare_operators\n"
        "kept = declare_operators()\n"
        f"assert (kept is not None) is {declared}\n"
        f"assert hasattr(torch.ops.torchvision, 'nms') is {declared}\n"
    ) + ("" if declared else "import torchvision\n")
    run_python("-c", program, path=str(tmp_path))
