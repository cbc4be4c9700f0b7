"""Triton kernels compiled for a CUDA device that need not be there, and what came of them.

`ptxas` and `cuobjdump` come with Triton. Registers, stack (where they spill) and shared memory are
told by the machine code's own tables; instructions are counted in its listing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hkvprof.bench.watch import TritonLaunch
from hkvprof.errors import UsageError

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""Triton's names of pointers."""
TARGETS = (80, 89, 90)
"""A100; L40S and its like; H100 and H200."""


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one compute capability. `registers` per thread, `stack` and `shared` in bytes;
    `instructions` of the listing, each once however often it runs; `loop` those of its longest loop
    that holds no other."""

    registers: int
    stack: int
    shared: int
    instructions: int
    warps: int
    loop: int


def compile_launch(launch: TritonLaunch, capability: int) -> Any:
    """What triton.compile makes of a launch's kernel with its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, kwargs = launch.kernel, dict(launch.kwargs)
    names = [param.name for param in kernel.params]
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    given = dict(zip(names, launch.args, strict=False))
    given |= {name: kwargs.pop(name) for name in names if name in kwargs}
    signature = {n: "constexpr" if n in fixed else _type(given[n]) for n in names}
    constants = {(i,): given[n] for i, n in enumerate(names) if n in fixed}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kwargs)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def inspect_code(made: Any) -> MachineCode:
    """Read a compiled kernel. Raises UsageError where there is no cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise UsageError(f"{tool} is not there: registers and instructions cannot be told")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _ask(tool, "--dump-resource-usage", file.name)
        listing = _ask(tool, "--dump-sass", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)", listing, re.MULTILINE))
    meta = made.metadata
    made_of = (numbers["REG"], numbers["STACK"], meta.shared, count, meta.num_warps)
    return MachineCode(*made_of, _longest_loop(listing))


def _longest_loop(listing: str) -> int:
    """By branches that go back; an instruction has 16 bytes."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*BRA[^;]*?0x([0-9a-f]+)", listing)
    spans = [(int(to, 16), int(at, 16)) for at, to in jumps if int(to, 16) < int(at, 16)]
    inner = [
        (start, end) for start, end in spans
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in spans)
    ]  # fmt: skip
    return max(((end - start) // 16 + 1 for start, end in inner), default=0)


def _ask(tool: Path, option: str, path: str) -> str:
    command = [str(tool), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
