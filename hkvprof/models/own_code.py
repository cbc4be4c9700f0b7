"""Checkpoints that bring code of their own: it is never run."""

from __future__ import annotations

import transformers

from hkvprof.errors import ModelError


def needs_own_code(error: BaseException) -> bool:
    """Whether transformers could go on only by running code that came with a checkpoint.

    It says so in a ValueError that advises `trust_remote_code=True` (dynamic_module_utils).
    """
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def own_code_refused(name: str) -> ModelError:
    """What to raise then."""
    return ModelError(
        f"cannot load {name!r}: it needs code of its own (auto_map in its configs), which hkvprof "
        "never runs. Expected an architecture, tokenizer and processor of transformers itself "
        f"({transformers.__version__} here): try a newer one, or a checkpoint converted to it"
    )
