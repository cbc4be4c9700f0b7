"""Free memory is what the tests say, not what the machine has just now."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hkvprof.bench import machine


@pytest.fixture(scope="session", autouse=True)
def _free_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """8 GiB."""
    path = tmp_path_factory.mktemp("proc") / "meminfo"
    path.write_text(f"MemTotal: {2**24} kB\nMemAvailable: {2**23} kB\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_MEMINFO", path)
        yield
