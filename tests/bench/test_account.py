"""A step's account: what is counted, pinned; and its arithmetic against the kernels' own counts."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from hkvprof.bench import account
from hkvprof.bench.account import CARDS, Plan, bound, take_account
from hkvprof.bench.compiled import MachineCode, _longest_loop
from hkvprof.bench.methods import Kind
from hkvprof.bench.watch import watched
from hkvprof.errors import UsageError
from tests.runtime.kernels.cases import make_layer
from tests.runtime.kernels.triton_cases import HAS_TRITON, INTERPRETED, QUIET, triton_kernels

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
SELECTION = ["table_kernel", "coded_kernel", "best_kernel", "candidate_kernel", "choose_kernel",
             "gather_kernel"]  # fmt: skip
ATTENTION = ["append_kernel", "_split_kernel", "_merge_kernel"]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("kind", "launches", "allocated"),
    [(Kind.STATIC, ATTENTION, 2), (Kind.PROFILE, SELECTION + ATTENTION, 3)],
)
def test_a_layers_launches_and_allocations(
    kind: Kind, launches: list[str], allocated: int, bits: int
) -> None:
    """Nothing but Triton's kernels, once each; memory for scratch and for the result alone. As many
    where tokens are in fewer bits."""
    seen = take_account(Plan("tiny", 16384, kind=kind, bits=bits)).watched
    if bits < 16:
        launches = [{"gather_kernel": "gather_rows_kernel"}.get(name, name) for name in launches]
    assert Counter(one.name for one in seen.triton) == Counter(launches)
    assert not seen.operators
    assert len(seen.allocated) == allocated


def test_operators_are_counted_by_what_they_do() -> None:
    with watched() as seen:
        made = torch.empty(4)
        made.view(2, 2).transpose(0, 1)[0]
        made.zero_()
        made + 1
        torch.cat([made, made]).split(2)
    assert seen.operators == ["zero_", "add", "cat"]
    assert seen.allocated == ["empty", "add", "cat"]


def test_a_step_costs_what_the_arithmetic_says() -> None:
    plan = Plan("tiny", 16384, batch=3, hits=1.0)
    one = take_account(plan)
    (head,) = one.heads
    assert head.missed == 0
    assert one.host_bytes == 3 * (head.picked - head.hot) * 16 * 2
    code = MachineCode(registers=1, stack=0, shared=0, instructions=100, warps=4, loop=10)
    codes = {launch.name: code for launch in one.watched.triton}
    made = bound(one, CARDS[0], codes)
    issued = 2 * (100 + 61 * 10) * 4 / 4 / CARDS[0].clock  # two kernels, two layers, ms
    assert made.alone == pytest.approx(2 * 1e3 * issued)
    assert made.exact == pytest.approx(made.memory + made.link + made.alone)
    assert made.memory > made.dense * 0.5


@QUIET
@pytest.mark.skipif(not INTERPRETED, reason="kernels count for themselves in the interpreter")
def test_the_link_carries_what_the_kernels_count() -> None:
    layer = make_layer(0, "projected", [120], [9], rerank=7, group=1)
    bound = triton_kernels(torch.bfloat16).bind(layer.key, layer.value, layer.heads, 0.3)
    bound.step(layer.query)
    missed = int(bound.fetched)
    step = account.HeadStep(120, 9, 16, missed, 1, 32, 2, 4, 32, 128)
    counted = int(bound.reads) * 32 * 2 + missed * 2 * 32 * 2
    assert step.host_bytes == counted > 0


def test_loops_are_found_in_a_listing() -> None:
    lines = [f"        /*{16 * n:04x}*/    IADD3 R1, R1, R2 ;" for n in range(20)]
    lines[9] = "        /*0090*/    @P0 BRA 0x40 ;"
    lines[12] = "        /*00c0*/    @P1 BRA `(.L_1) 0x20 ;"
    lines[15] = "        /*00f0*/    BRA 0x120 ;"
    assert _longest_loop("\n".join(lines)) == 6


@pytest.mark.parametrize(
    "wrong", [{"shape": "huge"}, {"tokens": 10}, {"batch": 0}, {"hits": 1.5}, {"bits": 3}]
)
def test_what_cannot_be_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Plan(**wrong)


@pytest.mark.slow
def test_the_command(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "hkvprof.bench.account", "--shape", "tiny"]
    options = ["--context", "2048", "--compile", "80"]
    made = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stderr
    assert "| choose_kernel | 80 | " in made.stdout
