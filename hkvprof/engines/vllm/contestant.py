"""One engine to be measured, in a process of its own: `python -m hkvprof.engines.vllm.contestant`.

Its first line of input are vLLM's options as JSON; every line after it is a crowd of requests,
which it serves and answers with figures.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from hkvprof.engines.vllm import attention
from hkvprof.engines.vllm.crowd import MARK, Crowd, Served
from hkvprof.engines.vllm.seams import LLM, SamplingParams


class Clock:
    """CPU seconds spent in compaction since it was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        own = attention.end_chunk

        def timed(*args: Any) -> None:
            began = time.process_time()
            own(*args)
            self.seconds += time.process_time() - began

        attention.end_chunk = timed  # type: ignore[assignment]


def serve(engine: Any, crowd: Crowd, clock: Clock, vocabulary: int, name: str) -> Served:
    """Serve a crowd to its end, step by step."""
    scheduler = engine.engine_core.engine_core.scheduler
    params = SamplingParams(
        temperature=0, max_tokens=crowd.new_tokens, ignore_eos=True, detokenize=False
    )
    for number, prompt in enumerate(crowd.prompts(vocabulary)):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": prompt}, params)
    running: list[int] = []
    cached: dict[str, int] = {}
    preempted: dict[str, int] = {}
    cpu, wall, compaction = time.process_time(), time.perf_counter(), clock.seconds
    while engine.has_unfinished_requests():
        for made in engine.step():
            cached[made.request_id] = made.num_cached_tokens or 0
        running.append(len(scheduler.running))
        preempted.update((key, one.num_preemptions) for key, one in scheduler.requests.items())
    return Served(
        steps=len(running),
        most=max(running),
        mean=sum(running) / len(running),
        tokens_out=crowd.requests * crowd.new_tokens,
        cached=sum(cached.values()),
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - wall,
        compaction_seconds=clock.seconds - compaction,
        preemptions=sum(preempted.values()),
    )


def main() -> None:
    """Serve what comes on standard input."""
    engine = LLM(**json.loads(sys.stdin.readline())).llm_engine
    vocabulary, clock = engine.model_config.get_vocab_size(), Clock()
    for number, line in enumerate(sys.stdin):
        made = serve(engine, Crowd(**json.loads(line)), clock, vocabulary, str(number))
        sys.stdout.write(f"{MARK}{json.dumps(asdict(made))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
