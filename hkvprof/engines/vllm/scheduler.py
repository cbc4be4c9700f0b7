"""vLLM's schedulers, which tell block managers of requests' own budgets, and give receipts.

A receipt comes back as `kv_transfer_params["hkvprof"]` of a finished request: of all that the
scheduler may answer with, vLLM's servers pass on this alone. Their `usage` has no room for it.
"""

from __future__ import annotations

from typing import Any

from hkvprof.engines.vllm.requests import own_share
from hkvprof.engines.vllm.seams import AsyncScheduler, Scheduler
from hkvprof.engines.vllm.spec import PlannedBlocksManager


def receipt(managers: list[PlannedBlocksManager], request: Any) -> dict[str, Any]:
    """What a request that ends holds, in plain numbers; blocks are those of single groups."""
    spec = managers[0].kv_cache_spec
    share = managers[0].shares.get(request.request_id)
    planned = spec.plan.at(request.num_prompt_tokens, share=share)
    tables = [manager.req_to_blocks.get(request.request_id) or [] for manager in managers]
    freed = [sum(block.is_null for block in table) for table in tables]
    return {
        "budget": spec.plan.share if share is None else share,
        "prompt_tokens": request.num_prompt_tokens,
        "planned_share": round(planned.share, 6),
        "kept_tokens": list(planned.kept_tokens),
        "resident_bits": list(planned.bits),
        "dense_reason": planned.dense_reason,
        "blocks_held": sum(map(len, tables)) - sum(freed),
        "blocks_freed": sum(freed),
    }


def only_free_blocks(managers: list[PlannedBlocksManager], request: Any, found: Any) -> Any:
    """Of cached blocks that were `found` (KVCacheManager.get_computed_blocks), those that this
    prompt frees at its end.

    The others are where its kept tokens go, in place of what the cache, and perhaps another request
    that runs, holds there: blocks of a longer prompt that begins alike, or of a smaller budget.
    """
    blocks, tokens, boundary = found
    drops = [one.dropped(request.request_id, request.num_prompt_tokens) for one in managers]
    size = managers[0].block_size
    limit = min((size * count for count in drops if count), default=tokens)
    if tokens <= limit:
        return found
    taken = tuple(list(group)[: limit // size] for group in blocks.blocks)
    return type(blocks)(taken), limit, boundary


class _Planned:
    kv_cache_manager: Any

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        manager = self.kv_cache_manager
        ask, managers = manager.get_computed_blocks, self._managers
        if managers:
            manager.get_computed_blocks = lambda request: only_free_blocks(
                managers, request, ask(request)
            )

    @property
    def _managers(self) -> list[PlannedBlocksManager]:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return [one for one in managers if isinstance(one, PlannedBlocksManager)]

    def add_request(self, request: Any) -> None:
        """See vLLM's scheduler."""
        share = own_share(request.sampling_params)
        if share is not None:
            for manager in self._managers:
                manager.shares[request.request_id] = share
        super().add_request(request)  # type: ignore[misc]

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> Any:
        managers = self._managers
        told = receipt(managers, request) if managers else None
        given, other = super()._free_request(request, delay_free_blocks)  # type: ignore[misc]
        for manager in managers:
            manager.shares.pop(request.request_id, None)
        return {**(given or {}), "hkvprof": told}, other


class PlannedScheduler(_Planned, Scheduler):
    """Of engines that wait for every step."""


class PlannedAsyncScheduler(_Planned, AsyncScheduler):
    """Of engines that schedule ahead."""
