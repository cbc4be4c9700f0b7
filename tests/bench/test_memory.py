"""Process memory follows what is held, and the collector is given back."""

import gc
from pathlib import Path

import pytest
import torch

from hkvprof.bench.memory import available_bytes, no_collector, process_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_process_memory_follows_a_tensor() -> None:
    before = process_bytes(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    with_it = process_bytes(CPU)
    del held
    after = process_bytes(CPU)
    assert before is not None
    assert with_it is not None
    assert after is not None
    assert with_it - before == pytest.approx(64 * 2**20, rel=0.1)
    assert after - before < 8 * 2**20


def test_unknown_devices_have_no_figure() -> None:
    assert process_bytes(torch.device("meta")) is None
    assert available_bytes(CPU) > 2**20


def test_the_collector_rests_within_and_works_after() -> None:
    with no_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
