"""One run of vLLM: `python -m tests.engines.vllm.drive JSON` prints what came of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def main(job: dict[str, Any]) -> None:
    """Serve the job's prompts step by step; `waves` times, one after another."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "block_size": 32,
               "seed": 0, "disable_log_stats": True, "skip_tokenizer_init": True}  # fmt: skip
    engine = LLM(job["model"], **{**options, **job.get("engine", {})}).llm_engine
    kept: dict[str, dict[str, list[int]]] = {}
    stored: dict[int, dict[str, torch.Tensor]] = {}
    if "additional_config" in job.get("engine", {}):
        from hkvprof.engines.vllm.split import WATCHERS

        def watch(name: str, chunk: Any, made: Any) -> None:
            kept.setdefault(str(chunk.tokens), {})[name] = made.tokens.tolist()
            if job.get("values"):
                stored.setdefault(chunk.tokens, {})[name] = torch.stack(made.stored())

        WATCHERS.append(watch)
    kind = RequestOutputKind.DELTA if job.get("stream") else RequestOutputKind.FINAL_ONLY
    scheduler = engine.engine_core.engine_core.scheduler
    tokens: dict[str, list[list[int]]] = {}
    logprobs: dict[str, list[list[float]]] = {}
    preempted: dict[str, int] = {}
    cached: dict[str, int] = {}
    receipts: dict[str, Any] = {}
    most = 0
    for wave in range(job.get("waves", 1)):
        for number, prompt in enumerate(job["prompts"]):
            params = SamplingParams(
                temperature=job.get("temperature", 0), top_k=job.get("top_k", 0),
                max_tokens=job.get("max_tokens", 8),
                ignore_eos=True, logprobs=1, n=job.get("n", 1), detokenize=False, output_kind=kind,
                extra_args=job["extra_args"][number] if "extra_args" in job else None,
            )  # fmt: skip
            engine.add_request(f"{wave}-{number}", {"prompt_token_ids": prompt}, params)
        steps = 0
        while engine.has_unfinished_requests():
            for made in engine.step():
                cached[made.request_id] = made.num_cached_tokens or 0
                receipts[made.request_id] = (made.kv_transfer_params or {}).get("hkvprof")
                for one in made.outputs:
                    given = tokens.setdefault(made.request_id, [[] for _ in range(job.get("n", 1))])
                    given[one.index] += list(one.token_ids)
                    scores = logprobs.setdefault(made.request_id, [[] for _ in given])
                    scores[one.index] += [
                        found[token].logprob
                        for token, found in zip(one.token_ids, one.logprobs, strict=True)
                    ]
            for request in scheduler.requests.values():
                preempted[request.request_id] = request.num_preemptions
            most = max(most, len(scheduler.running))
            steps += 1
            if steps == job.get("abort_at"):
                engine.abort_request([f"{wave}-{one}" for one in job["abort"]])
    if job.get("values"):
        torch.save(stored, job["values"])
    names = [f"{w}-{n}" for w in range(job.get("waves", 1)) for n in range(len(job["prompts"]))]
    told = {
        "tokens": [tokens.get(name, []) for name in names],
        "logprobs": [logprobs.get(name, []) for name in names],
        "kept": kept,
        "preemptions": sum(preempted.values()),
        "cached": [cached.get(name, 0) for name in names],
        "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "blocks": scheduler.kv_cache_config.num_blocks,
        "most_running": most,
        "scheduler": type(scheduler).__name__,
        "receipts": [receipts.get(name) for name in names],
    }
    sys.stdout.write(f"TOLD {json.dumps(told)}\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
