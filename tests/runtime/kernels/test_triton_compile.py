"""Every Triton kernel compiles to machine code for CUDA devices, whether or not there is one.

Triton's interpreter accepts more than its compiler: types that change in a loop, for example.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.runtime.kernels.triton_cases import HAS_TRITON

KERNELS = {
    "_split_kernel",
    "_merge_kernel",
    "table_kernel",
    "coded_kernel",
    "digest_kernel",
    "exact_kernel",
    "share_kernel",
    "raise_kernel",
    "pick_kernel",
    "due_kernel",
    "hold_kernel",
    "select_kernel",
    "gather_kernel",
    "gather_rows_kernel",
    "append_kernel",
    "best_kernel",
    "candidate_kernel",
    "choose_kernel",
    "peak_kernel",
    "mass_kernel",
}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("80", "bfloat16"), pytest.param("90", "float32", marks=pytest.mark.slow)],
)
def test_all_kernels_compile(capability: str, dtype: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.runtime.kernels.compile_triton"]
    made = subprocess.run(
        [*command, capability, dtype], capture_output=True, text=True, env=environment, timeout=600
    )
    assert made.returncode == 0, made.stderr
    assert {line.split()[0] for line in made.stdout.splitlines()} == KERNELS
