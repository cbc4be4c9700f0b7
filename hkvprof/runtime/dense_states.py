"""A layer's dense keys and values, and what is said to those who look for them elsewhere."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.runtime.receipt import LayerAccount


class DenseStates:
    """`keys` and `values` [rows, kv_heads, tokens, dim] of a layer that holds them whole.

    None before the first token. Raises CompressionError where there is no such tensor: once the
    layer is compressed, and between the chunks of a prompt, which wait on the host.
    """

    account: LayerAccount
    ragged: Any
    parked: Any
    _keys: Tensor | None = None
    _values: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether dense keys and values are here."""
        return self._keys is not None

    @property
    def keys(self) -> Tensor | None:
        """Post-RoPE keys of all tokens."""
        self._require_dense("keys")
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        """Values of all tokens."""
        self._require_dense("values")
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    def offload(self) -> None:
        """Move dense keys and values to the CPU, as the stock layer does."""
        self._require_dense("offload")
        if self.is_whole:
            super().offload()  # type: ignore[misc]

    def prefetch(self) -> None:
        """Bring them back."""
        self._require_dense("prefetch")
        if self.is_whole:
            super().prefetch()  # type: ignore[misc]

    def _require_dense(self, what: str) -> None:
        if self.ragged is not None:
            self._refuse(what, "is compressed: every head keeps tokens of its own")
        elif self.parked is not None and self._keys is None:
            self._refuse(what, "waits on the host for the next chunk of its prompt")

    def _refuse(self, what: str, why: str) -> NoReturn:
        raise CompressionError(
            f"layer {self.account.layer} {why}, so that it has no dense {what}. Use "
            "get_seq_length() for lengths, receipt() for what is kept, measure_storage(cache) for "
            "bytes, copy.deepcopy for copies, and apply(budget=1.0) or detach() where keys and "
            "values must be whole"
        )
