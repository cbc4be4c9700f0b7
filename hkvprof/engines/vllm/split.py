"""Every KV head becomes an attention layer of its own, so that heads can hold different blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.engines.vllm.attention import planned_backend
from hkvprof.engines.vllm.compaction import HeadRule
from hkvprof.engines.vllm.seams import Attention, get_current_vllm_config, get_kv_quant_mode
from hkvprof.engines.vllm.spec import PlannedHeadSpec
from hkvprof.engines.vllm.windows import Windows
from hkvprof.errors import UsageError
from hkvprof.profile.blocks import BlockPlan

WATCHERS: list[Callable[..., None]] = []
"""Called with a layer's name, the chunk and what was kept, whenever a head is compacted."""
UNLIMITED = 1 << 30


class HeadAttention(Attention):
    """One KV head with its query heads."""

    def __init__(self, plan: BlockPlan, layer: int, head: int, old: Any) -> None:
        config = get_current_vllm_config()
        super().__init__(
            old.num_heads // old.num_kv_heads,
            old.head_size,
            old.impl.scale,
            num_kv_heads=1,
            cache_config=config.cache_config,
            quant_config=old.quant_config,
            prefix=f"{old.layer_name}.head{head}",
            attn_backend=planned_backend(old.attn_backend),
        )
        self.plan, self.group = plan, int(plan.group[layer, head])
        strategy = plan.head(layer, head)
        pages = plan.pages[self.group]
        self.hkvprof_rule = HeadRule(strategy, plan.keep, float(old.impl.scale), pages)
        self.hkvprof_windows = Windows()
        self.hkvprof_watchers = WATCHERS

    def get_kv_cache_spec(self, vllm_config: Any) -> PlannedHeadSpec:
        """The spec of this head's cache, in its group."""
        return PlannedHeadSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            plan=self.plan,
            group=self.group,
        )


class SplitAttention(nn.Module):
    """What takes the place of a layer's attention: one HeadAttention per KV head."""

    def __init__(self, plan: BlockPlan, layer: int, old: Any) -> None:
        super().__init__()
        self.kv_heads, self.head_size = old.num_kv_heads, old.head_size
        self.heads = nn.ModuleList(
            HeadAttention(plan, layer, head, old) for head in range(self.kv_heads)
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of all heads, [tokens, query_heads * head_size]."""
        tokens = query.shape[0]
        parts = [x.view(tokens, self.kv_heads, -1) for x in (query, key, value)]
        made = [
            head(*(part[:, number].contiguous() for part in parts))
            for number, head in enumerate(self.heads)
        ]
        return torch.cat(made, dim=-1)


def split_heads(model: nn.Module, plan: BlockPlan, vllm_config: Any) -> None:
    """Replace all attention layers of a model's decoder. Raises UsageError for others."""
    found: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        old: Any = getattr(module, "attn", None)
        if type(old) is not Attention:
            continue
        layer = int(re.findall(r"layers\.(\d+)\.", f"{name}.")[-1])
        _check_layer(old, name, plan)
        vllm_config.compilation_config.static_forward_context.pop(old.layer_name)
        module.attn = SplitAttention(plan, layer, old)
        found[layer] = module
    if sorted(found) != list(range(plan.grid.layers)):
        raise UsageError(
            f"the profile is of {plan.grid.layers} layers, found {len(found)} layers of plain "
            "attention in vLLM's model: give the profile of this model"
        )
    # Asks the model runner to tell prompts' lengths to the builders of metadata.
    vllm_config.model_config.model_arch_config.rswa_window = UNLIMITED


def _check_layer(old: Any, name: str, plan: BlockPlan) -> None:
    grid = plan.grid
    expected = (grid.query_heads, grid.kv_heads, grid.head_dim)
    if (old.num_heads, old.num_kv_heads, old.head_size) != expected:
        raise UsageError(
            f"{name} has {old.num_heads} query heads, {old.num_kv_heads} KV heads of width "
            f"{old.head_size}, the profile {expected}: give the profile of this model"
        )
    if old.sliding_window is not None or old.has_sink or old.impl.alibi_slopes is not None:
        raise UsageError(f"{name} has a sliding window, sinks or ALiBi: hkvprof does not split it")
