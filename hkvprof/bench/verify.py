"""A row that claims to compress must have done so: every claim is held against a second figure."""

from __future__ import annotations

from typing import Any

from hkvprof.bench.methods import Method
from hkvprof.bench.records import Sizes
from hkvprof.errors import CompressionError
from hkvprof.profile.budgets import Budget

TOLERANCE = 0.05
"""By how much of itself a budget may be exceeded."""


def verify(method: Method, tokens: int, sizes: Sizes, receipt: Any) -> None:
    """Raise CompressionError unless the cache is compressed, within its budget and truly counted.

    `receipt` and `sizes` are those after a prompt of `tokens` tokens.
    """
    where = f"{method.name}, {tokens} tokens"
    if not receipt.compressed_layers or sizes.resident >= sizes.dense:
        reasons = "; ".join(sorted({layer.reason for layer in receipt.layers if layer.reason}))
        raise CompressionError(
            f"{where}: nothing was compressed ({reasons or 'no reason given'}); expected "
            f"{sizes.dense} bytes to become fewer, found {sizes.resident}: use a longer context"
        )
    if sizes.storage != sizes.resident:
        raise CompressionError(
            f"{where}: the receipt tells {sizes.resident} resident bytes, the cache's tensors hold "
            f"{sizes.storage}; expected the same: please report it with this command"
        )
    budget = Budget.parse(method.budget).resolve(tokens, sizes.dense)
    share = sizes.resident / sizes.dense
    if share > budget * (1 + TOLERANCE):
        raise CompressionError(
            f"{where}: expected at most {budget:.2%} of the dense bytes, found {share:.2%}: please "
            "report it with this command; a longer context or a larger budget may help"
        )
