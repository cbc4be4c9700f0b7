"""What is checked before vLLM starts: settings, model, and every feature that is not proven."""

from __future__ import annotations

from typing import Any

from hkvprof.engines.vllm.models import MODELS
from hkvprof.engines.vllm.seams import VERSION, VllmConfig, current_platform, problems, untested
from hkvprof.engines.vllm.settings import EngineSettings, settings_of
from hkvprof.errors import UsageError

SCHEDULERS = "hkvprof.engines.vllm.scheduler"
PROCESSOR = "hkvprof.engines.vllm.requests:RowBudgets"


def watch_configurations() -> None:
    """Check every configuration that vLLM makes from here on, where it asks for hkvprof.

    vLLM has no hook for this; without one a model that is not split would be served whole without
    a word.
    """
    own = VllmConfig.__post_init__
    if getattr(own, "hkvprof", False):
        return

    def check_after(self: Any) -> None:
        own(self)
        settings = settings_of(self.additional_config)
        if settings is not None:
            check_configuration(self, settings)
            tell_of_requests(self)

    check_after.hkvprof = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = check_after


def check_configuration(config: Any, settings: EngineSettings) -> None:
    """Raises UsageError, which names everything that hkvprof does not do."""
    found = [*problems()]
    if found:
        raise UsageError(
            f"this hkvprof does not fit vLLM {VERSION}: {'; '.join(found)}; install vllm 0.32"
        )
    if untested() and not settings.untested:
        raise UsageError(
            f'{untested()}: install a tested one, or set "untested": true under "hkvprof"'
        )
    refused = [what for what, given in _refused(config) if given]
    if refused:
        raise UsageError(
            f"hkvprof in vLLM does not run with {', '.join(refused)}: leave that out, or start "
            'without "hkvprof" in --additional-config'
        )


def tell_of_requests(config: Any) -> None:
    """Have vLLM use the scheduler and the logits processor that know requests' own budgets."""
    scheduler, model = config.scheduler_config, config.model_config
    kind = "PlannedAsyncScheduler" if scheduler.async_scheduling else "PlannedScheduler"
    scheduler.scheduler_cls = f"{SCHEDULERS}.{kind}"
    if PROCESSOR not in (model.logits_processors or []):
        model.logits_processors = [*(model.logits_processors or []), PROCESSOR]


def _is_own(scheduler: object) -> bool:
    return scheduler is None or str(scheduler).startswith(SCHEDULERS)


def _refused(config: Any) -> list[tuple[str, bool]]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    architectures = list(model.architectures) if model is not None else []
    shape = model is not None and model.use_mla
    return [
        (
            f"the model {', '.join(architectures)} (only {', '.join(MODELS)})",
            not set(architectures) & set(MODELS),
        ),
        (f"the platform {current_platform.device_name}", not current_platform.is_cpu()),
        ("speculative decoding", config.speculative_config is not None),
        ("MLA", shape),
        ("a sliding window", cache.sliding_window is not None),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("tensor parallelism", parallel.tensor_parallel_size > 1),
        (
            "context parallelism",
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        ),
        ("KV connectors", config.kv_transfer_config is not None),
        (f"kv_cache_dtype {cache.cache_dtype}", cache.cache_dtype not in ("auto", "bfloat16")),
        ("a scheduler class of its own", not _is_own(config.scheduler_config.scheduler_cls)),
        ("LoRA", config.lora_config is not None),
        (
            "the hybrid KV cache manager disabled",
            bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
        ),
    ]
