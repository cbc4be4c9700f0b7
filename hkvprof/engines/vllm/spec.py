"""The KV cache of one head, and the manager that frees its blocks at the end of a prompt.

How many blocks go is a function of the prompt's length (profile.blocks), which scheduler and
workers both ask. Blocks that stay hold other tokens than their place says once a worker compacted
them: these are never offered to other requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hkvprof.engines.vllm.seams import (
    FullAttentionManager,
    FullAttentionSpec,
    KVCacheSpecRegistry,
    register_kv_cache_spec,
)
from hkvprof.profile.blocks import BlockPlan

KVCacheSpecRegistry._ensure_registered()


class PlannedBlocksManager(FullAttentionManager):
    """Frees a prompt's planned blocks as soon as its last token is computed.

    `shares` holds the budgets of requests that have their own.
    """

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.shares: dict[str, float] = {}

    def dropped(self, request_id: str, tokens: int) -> int:
        """Blocks that this request's prompt frees at its end."""
        return self.kv_cache_spec.dropped(tokens, self.shares.get(request_id))

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the planned blocks once the whole prompt has been processed."""
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        dropped = self.dropped(request_id, num_prompt_tokens)
        self._remove_blocks_in_range(request_id, 0, dropped)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer only blocks to other requests that hold the tokens of their place.

        A request that is computed again after preemption reads no cache: a hit beyond its prompt's
        last rows would leave nothing to choose its tokens by.
        """
        if self.kv_cache_spec.plan.at(
            request.num_prompt_tokens, share=self.shares.get(request.request_id)
        ).frees:
            request.skip_reading_prefix_cache = True
        dropped = self.dropped(request.request_id, request.num_prompt_tokens)
        if dropped:
            num_tokens = min(num_tokens, dropped * self.block_size)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[Any],
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **rest: Any,
    ) -> Any:
        """Leave the prompt's last rows to be computed: their attention chooses what stays.

        The bound comes from the prompt's whole blocks alone, so that groups which are asked one
        after another, each with what the last one found, do not shorten it again.
        """
        prompt = len(block_hashes) * block_pool.hash_block_size
        max_length = min(max_length, max(0, prompt - kv_cache_spec.plan.keep.window))
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **rest
        )


@register_kv_cache_spec(manager_class=PlannedBlocksManager)
@dataclass(frozen=True, kw_only=True)
class PlannedHeadSpec(FullAttentionSpec):
    """One KV head's cache; heads of one `group` share a block table."""

    plan: BlockPlan
    group: int

    def dropped(self, tokens: int, share: float | None = None) -> int:
        """Blocks that a prompt of so many tokens frees at its end, with a budget of its own where
        there is a `share`."""
        return self.plan.at(tokens, share=share).dropped[self.group]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all heads belong to this one's group."""
        return all(
            isinstance(spec, PlannedHeadSpec) and (spec.plan, spec.group) == (self.plan, self.group)
            for spec in kv_cache_specs.values()
        )

    @classmethod
    def merge(cls, specs: list[PlannedHeadSpec]) -> PlannedHeadSpec:
        """The spec of heads of one group; heads of several are refused."""
        if any(spec != specs[0] for spec in specs[1:]):
            raise AssertionError("heads of different groups do not share a block table")
        return specs[0]
