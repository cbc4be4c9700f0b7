"""What lmms-eval's entry point finds; light, as the harness loads it at every start."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model hkvprof`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="hkvprof", chat_class_path="hkvprof.plugins.lmms_eval.HkvVLM")
