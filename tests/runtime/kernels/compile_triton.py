"""Compile every Triton kernel for a CUDA device that need not be there.

    python -m tests.runtime.kernels.compile_triton 80 bfloat16

The launchers run on CPU tensors; instead of launching, each kernel is compiled with the arguments
it was given, down to machine code of the named compute capability. Prints a line per kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from hkvprof.runtime.kernels import Extents, QuantisedRows
from hkvprof.runtime.kernels.triton_backend import TritonKernels
from hkvprof.selection.residents import Residents
from hkvprof.selection.triton_mass import top_mass
from tests.runtime.kernels.cases import make_layer

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory per program on compute capability 8.6 and 8.9; others have more."""


class Compiler:
    """Takes the place of JITFunction.run."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.done: dict[Any, Any] = {}

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(1 <= side < 65536 for side in grid), f"{kernel.__name__}: grid {grid}"
        names = [param.name for param in kernel.params]
        fixed = {param.name for param in kernel.params if param.is_constexpr}
        given = dict(zip(names, args, strict=False))
        given |= {name: kwargs.pop(name) for name in names if name in kwargs}
        assert set(given) == set(names), f"{kernel.__name__} got {sorted(given)}"
        signature = {n: "constexpr" if n in fixed else _type(given[n]) for n in names}
        constants = {(i,): given[n] for i, n in enumerate(names) if n in fixed}
        key = (kernel.__name__, str(signature), str(constants))
        if key in self.done:
            return
        aligned = [["tt.divisibility", 16]]
        attrs = {(i,): aligned for i, n in enumerate(names) if signature[n].startswith("*")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        self.done[key] = made = triton.compile(source, target=self.target, options=kwargs)
        shared = made.metadata.shared
        shown = {names[i]: value for (i,), value in constants.items()}
        sys.stdout.write(f"{kernel.__name__} {shown} shared {shared}\n")
        assert shared <= SHARED_LIMIT, f"{kernel.__name__}: {shared} bytes of shared memory"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def layers(dtype: torch.dtype) -> Iterator[Any]:
    """Layers whose steps launch every kernel in every variant."""
    settings: list[dict[str, Any]] = [
        {"kind": "mean", "dim": 64, "chunk": 16, "group": 1},
        {"kind": "minmax", "dim": 128, "chunk": 32},
        {"kind": "projected", "dim": 128, "codes": 2, "rerank": 64, "hot": [500, 60]},
        {"kind": "projected", "dim": 80, "codes": 4, "group": 8},
        {"kind": "projected", "dim": 256, "codes": 8, "rerank": 64, "group": 4},
        {"kind": "projected", "dim": 128, "codes": 2, "rerank": 64, "bits": (8, 16)},
        {"kind": "projected", "dim": 80, "codes": 2, "rerank": 64, "bits": (4, 16)},
        {"kind": "mean", "dim": 64, "chunk": 16, "bits": (16, 8)},
        {"kind": "mean", "dim": 128, "chunk": 3, "bits": (8, 8)},
    ]
    for setting in settings:
        setting = {"group": 7, "smoothing": True, "dtype": dtype, **setting}
        yield make_layer(
            0, setting.pop("kind"), [5000, 70], setting.pop("hot", [500, 70]), **setting
        )


def few_bits(key: torch.Tensor) -> Iterator[QuantisedRows | None]:
    """What segments may hold in fewer bits beside these keys."""
    if len(key) < 560:
        return
    own = [Residents.around(key, key, bits).append(key, key) for bits in (8, 4)]
    yield QuantisedRows.of({0: own[0]})
    yield QuantisedRows.of({1: own[1]})
    yield QuantisedRows.of(dict(enumerate(own)))


def main() -> None:
    """Compile for the compute capability and the types that the command line names."""
    compiler = Compiler(int(sys.argv[1]))
    JITFunction.run = lambda self, *args, **kwargs: compiler(self, *args, **kwargs)
    for dtype in (getattr(torch, name) for name in sys.argv[2:]):
        kernels = TritonKernels(dtype)
        for layer in layers(dtype):
            bound = kernels.bind(layer.key, layer.value, layer.heads, 0.1, 0.5)
            bound.step(layer.query)
            bound.load(bound.score(layer.query))  # where the step selects among candidates
            ends = torch.tensor([500, 560], dtype=torch.int32)
            new = layer.key[:2, None]
            kernels.append(layer.key, layer.value, ends, new, new)
            extents = Extents.of([0, 500], [500, 60])
            kernels.attend(layer.key, layer.value, extents, layer.query, 0.1)
            for held in few_bits(layer.key):
                kernels.attend(layer.key, layer.value, extents, layer.query, 0.1, held)
        assert not kernels.notes
        for dim in (64, 80, 256):
            key, rows = torch.zeros(2, 5000, dim, dtype=dtype), torch.arange(0, 5000, 100)
            query = torch.zeros(6, len(rows), dim, dtype=dtype)
            top_mass(query, key, rows, 0.1, torch.ones(2, len(rows), dtype=torch.long))


if __name__ == "__main__":
    main()
