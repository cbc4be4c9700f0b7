"""What a piece of work asks of a device, counted where there is none: operators and launches.

Every operator of torch passes a dispatch mode; Triton's launches are taken down in place of being
done. What they would have computed must not matter for what comes next (nothing waits for values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operators that take memory and launch nothing."""


@dataclass(frozen=True)
class TritonLaunch:
    """One launch of a Triton kernel: its grid, its arguments by position and by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """What the kernel's function is called."""
        return str(self.kernel.fn.__name__)

    @property
    def programs(self) -> int:
        """How many programs the grid has."""
        count = 1
        for side in self.grid:
            count *= side
        return count


@dataclass
class Watched(TorchDispatchMode):
    """Counts while it is entered: `operators` that launch, `allocated` names of those that take
    memory, `triton` launches. Views cost nothing; an operator counts as one launch, though some
    are more."""

    operators: list[str] = field(default_factory=list)
    allocated: list[str] = field(default_factory=list)
    triton: list[TritonLaunch] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    @property
    def launches(self) -> int:
        """Of torch and of Triton."""
        return len(self.operators) + len(self.triton)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _storages([args, kwargs or {}])
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = _storages(out) - known
        if made:
            self.allocated.append(name)
        if name not in FREE and (made or _writes(func)):
            self.operators.append(name)
        return out


def _storages(values: Any) -> set[int]:
    tensors = [one for one in tree_leaves(values) if isinstance(one, Tensor)]
    return {one.untyped_storage().data_ptr() for one in tensors if one.numel()}


def _writes(func: Any) -> bool:
    arguments: Sequence[Any] = func._schema.arguments
    return any(one.alias_info is not None and one.alias_info.is_write for one in arguments)


@contextmanager
def watched() -> Iterator[Watched]:
    """Operators run and are counted; Triton's launches are counted and left out."""
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    made = Watched()

    def take(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.triton.append(TritonLaunch(self, tuple(grid), args, kwargs))

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", take))
        stack.enter_context(made)
        yield made
