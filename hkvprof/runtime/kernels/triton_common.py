"""What the Triton kernels share. Importing this module imports triton: see `kernels.for_device`.

Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) the kernels run on
CPU tensors. There a product of bfloat16 tiles returns garbage and a conversion to bfloat16 cuts
bits off, so that UPCAST multiplies in float32 and rounds by hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_DOT = 16
"""Least rows, columns and depth of a tl.dot."""


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """Product of two tiles, accumulated in float32; float32 tiles are not cut to TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x: tl.tensor, DTYPE: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """float32 as DTYPE, rounded to the nearest, of equals the even one."""
    if UPCAST:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


INTERPRETED = not isinstance(dot, triton.runtime.JITFunction)
"""Whether this process runs kernels in Triton's interpreter."""


def padded(number: int, least: int = LEAST_DOT) -> int:
    """The least power of two that is not below `number` nor `least`."""
    return max(least, 1 << (number - 1).bit_length())


def blocks(total: int, block: int) -> int:
    """How many blocks cover `total`; at least one, since a grid must not be empty."""
    return max(1, -(-total // block))
