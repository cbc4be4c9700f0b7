"""Every name of vLLM that hkvprof touches, and what is relied on of it. Nothing else imports vLLM.

vLLM calls much of this internal, so that minors are pinned: `problems` says what does not fit the
installed release, by import alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hkvprof.lazy import require_extra

require_extra("vllm", "vllm")

import vllm
from vllm import LLM, ModelRegistry, SamplingParams
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

__all__ = [
    "LLM",
    "AsyncScheduler",
    "Attention",
    "CommonAttentionMetadata",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheSpecRegistry",
    "LogitsProcessor",
    "ModelRegistry",
    "SamplingParams",
    "Scheduler",
    "VLLMValidationError",
    "VllmConfig",
    "current_platform",
    "get_current_vllm_config",
    "get_kv_quant_mode",
    "init_logger",
    "ops",
    "problems",
    "process_dict_updates",
    "register_kv_cache_spec",
    "subclass_attention_backend_with_overrides",
    "untested",
]

TESTED = ("0.32",)
"""Minor releases that the tests ran on."""
VERSION: str = vllm.__version__


def _takes(owner: Callable[..., Any], *names: str) -> list[str]:
    """Names of arguments that a function of vLLM should take and does not."""
    have = inspect.signature(owner).parameters
    where = f"{owner.__module__}.{owner.__qualname__}"
    return [f"{where} has no argument {name!r}" for name in names if name not in have]


def _has(owner: type, *names: str) -> list[str]:
    """Attributes that a class of vLLM should have and does not."""
    known = {one.name for one in fields(owner)} if hasattr(owner, "__dataclass_fields__") else set()
    where = f"{owner.__module__}.{owner.__qualname__}"
    return [
        f"{where} has no attribute {name!r}"
        for name in names
        if name not in known and not hasattr(owner, name)
    ]


def problems() -> list[str]:
    """What the installed vLLM lacks of all that is relied on; empty where it has everything."""
    manager, metadata = FullAttentionManager, CommonAttentionMetadata
    return [
        *_takes(ModelRegistry.register_model, "model_arch", "model_cls"),
        *_takes(manager.remove_skipped_blocks, "processed_computed_tokens", "num_prompt_tokens"),
        *_takes(manager.cache_blocks, "request", "num_tokens", "retention_interval"),
        *_takes(manager.find_longest_cache_hit, "max_length", "kv_cache_spec", "block_hashes"),
        *_takes(manager._remove_blocks_in_range, "first_block", "last_block"),
        *_takes(Attention.__init__, "attn_backend", "prefix", "cache_config", "num_kv_heads"),
        *_takes(Attention.get_kv_cache_spec, "vllm_config"),
        *_takes(ops.cpu_attn_reshape_and_cache, "key", "value", "slot_mapping", "isa"),
        *_takes(subclass_attention_backend_with_overrides, "overrides"),
        *_has(
            metadata, "rswa_prefix_lens", "block_table_tensor", "seq_lens", "query_start_loc_cpu"
        ),
        *_has(FullAttentionSpec, "num_kv_heads", "head_size", "head_size_v", "kv_quant_mode"),
        *_has(FullAttentionSpec, "is_uniform_with_collection", "merge"),
        *_takes(Scheduler.add_request, "request"),
        *_takes(KVCacheManager.get_computed_blocks, "request"),
        *_has(KVCacheBlocks, "blocks"),
        *_takes(Scheduler._free_request, "request", "delay_free_blocks"),
        *_takes(process_dict_updates, "req_entries", "batch_update", "new_state"),
        *_takes(LogitsProcessor.validate_params, "sampling_params"),
        *_has(VllmConfig, "additional_config", "__post_init__"),
    ]


def untested() -> str:
    """Why this release is not one of those tested, or an empty string."""
    if VERSION.startswith(tuple(f"{minor}." for minor in TESTED)):
        return ""
    return f"vLLM {VERSION} is untested (tested: {', '.join(TESTED)})"
