"""What a piece of tensor code holds at its peak, beyond what it was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: `peak` is the most bytes of storages alive at once, after any operation.

    Storages of `given` do not count, nor do views of them. Scratch memory within an operation is
    not seen.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.known = {_identity(tensor) for tensor in tree_leaves(given)}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _identity(tensor) not in self.known:
                storage = tensor.untyped_storage()
                self.live[_identity(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


def _identity(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata
