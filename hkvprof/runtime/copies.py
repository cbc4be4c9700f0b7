"""Copies of a cache in use: deep, independent, and sharing what never changes.

A conversation is branched, and a prefix kept for many prompts, with `copy.deepcopy(cache)`. What a
copy may share with its original: the planner with its tables, indexes, and host items until either
of them stores more (host.HostChunks). Everything else is copied, accounts included, which carry on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

from hkvprof.errors import CompressionError

T = TypeVar("T")


def deep_copy(original: T, memo: dict[int, Any], shared: Iterable[Any] = (), **given: Any) -> T:
    """A deep copy, attribute by attribute, in which `shared` objects are the original's own.

    Attributes in `given` are set to what is given. `memo` is that of `copy.deepcopy`.
    """
    for one in shared:
        memo[id(one)] = one
    made = object.__new__(type(original))
    memo[id(original)] = made
    for name, value in vars(original).items():
        made.__dict__[name] = given[name] if name in given else copy.deepcopy(value, memo)
    return made


class NeverCopied:
    """Objects that do not change, or belong to the model: a copy of their owner shares them."""

    def __copy__(self: T) -> T:
        return self

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        return self


class LiveState:
    """State of a conversation: `copy.copy` is deep, too, and pickling is refused.

    A shallow copy would let two conversations write into one storage.
    """

    shared_in_copies: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that are not this object's own, such as a model's config."""

    def __copy__(self: T) -> T:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deep_copy(self, memo, [getattr(self, name) for name in self.shared_in_copies])

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises CompressionError: pickle, torch.save and other processes are out of reach."""
        raise CompressionError(
            f"{type(self).__name__} cannot be pickled or saved: it refers to storage, kernels and "
            "a plan of this process. Save the token ids and prefill again, or branch it in this "
            "process with copy.deepcopy(cache)"
        )
