"""hkvprof inside vLLM: KV heads that keep planned blocks and free the others (docs/vllm.md).

Nothing of vLLM is imported before its plugin loader calls `register`.
"""

from __future__ import annotations


def register() -> None:
    """The entry point `vllm.general_plugins`: tells vLLM of hkvprof's models and cache spec.

    Without `additional_config["hkvprof"]` everything goes on as before. vLLM calls it once in every
    process.
    """
    from hkvprof.engines.vllm.models import register_models
    from hkvprof.engines.vllm.startup import watch_configurations

    register_models()
    watch_configurations()
