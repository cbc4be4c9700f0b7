"""Process memory follows what is held, and the collector is given back."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hkvprof.bench import machine
from hkvprof.bench.machine import machine_for, no_collector
from hkvprof.bench.run import PROMPT_SHARE

CPU = machine_for(torch.device("cpu"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_process_memory_follows_a_tensor() -> None:
    """In a process of its own, which no other test has left anything to free."""
    code = (
        "import torch; from hkvprof.bench.machine import machine_for\n"
        "read = machine_for(torch.device('cpu')).process_bytes; read(); seen = [read()]\n"
        "held = torch.ones(64 * 2**20, dtype=torch.uint8); seen.append(read())\n"
        "del held; seen.append(read()); print(*seen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, with_it, after = map(int, done.stdout.split())
    assert with_it - before == pytest.approx(64 * 2**20, rel=0.1)
    assert after - before < 8 * 2**20


def test_unknown_devices_have_no_figure() -> None:
    assert machine_for(torch.device("meta")).process_bytes() is None


def test_caches_may_take_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """MemAvailable is 8 GiB here (conftest); without it half of all memory counts as free."""
    assert CPU.free(PROMPT_SHARE) == int(PROMPT_SHARE * 2**33)
    assert 0.5 <= PROMPT_SHARE < 1
    monkeypatch.setattr(machine, "_MEMINFO", Path("/nowhere"))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(machine.os, "sysconf", pages.__getitem__)
    assert CPU.free(PROMPT_SHARE) == int(PROMPT_SHARE * 2**31)


def test_the_collector_rests_within_and_works_after() -> None:
    with no_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
