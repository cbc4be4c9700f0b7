"""One engine to be measured, in a process of its own: `python -m hkvprof.engines.vllm.contestant`.

Its first line of input are vLLM's options as JSON; every line after it is a crowd of requests or a
script for one, which it serves and answers with figures.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from hkvprof.engines.vllm import attention
from hkvprof.engines.vllm.crowd import MARK, Crowd, Served
from hkvprof.engines.vllm.forcing import ARGUMENT, SCRIPTS, Recital
from hkvprof.engines.vllm.script import ReplyScript, Spoken
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


@dataclass
class EngineWatch:
    """What is seen of an engine step by step."""

    engine: Any
    running: list[int] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Step until no request is left."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        while self.engine.has_unfinished_requests():
            for made in self.engine.step():
                self.last[made.request_id] = made
            running = len(scheduler.running)
            self.running.append(running)
            if running:
                # One block is vLLM's null block.
                used = scheduler.kv_cache_config.num_blocks - 1 - pool.get_num_free_blocks()
                self.held.append(used / running)
            for name, one in scheduler.requests.items():
                self.preempted[name] = one.num_preemptions


def serve(engine: Any, crowd: Crowd, clock: Clock, name: str) -> Served:
    """Serve a crowd to its end, step by step."""
    params = SamplingParams(
        temperature=0, max_tokens=crowd.new_tokens, ignore_eos=True, detokenize=False
    )
    prompts = crowd.prompts(engine.model_config.get_vocab_size())
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": prompt}, params)
    cpu, wall, compaction = time.process_time(), time.perf_counter(), clock.seconds
    seen = EngineWatch(engine)
    seen.run()
    made = [seen.last[f"{name}-{number}"] for number in range(len(prompts))]
    return Served(
        steps=len(seen.running),
        most=max(seen.running),
        mean=fmean(seen.running),
        tokens_out=crowd.requests * crowd.new_tokens,
        cached=sum(one.num_cached_tokens or 0 for one in made),
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - wall,
        compaction_seconds=clock.seconds - compaction,
        preemptions=sum(seen.preempted.values()),
        held=fmean(seen.held),
        said=[list(one.outputs[0].token_ids) for one in made] if crowd.given else [],
    )


def recite(engine: Any, script: ReplyScript, clock: Clock, name: str) -> Spoken:
    """Serve one request that follows a script."""
    compaction = clock.seconds
    SCRIPTS[name] = Recital(script)
    params = SamplingParams(
        temperature=0, max_tokens=len(script.forced) + script.more, ignore_eos=True,
        detokenize=False, extra_args={ARGUMENT: name},
    )  # fmt: skip
    engine.add_request(name, {"prompt_token_ids": script.prompt}, params)
    seen = EngineWatch(engine)
    seen.run()
    heard, last = SCRIPTS.pop(name), seen.last[name]
    if script.path:
        np.save(script.path, heard.rows().numpy())
    receipt = (last.kv_transfer_params or {}).get("hkvprof") or {}
    said = list(last.outputs[0].token_ids)
    return Spoken(said, receipt, clock.seconds - compaction)


def main() -> None:
    """Serve what comes on standard input."""
    engine, clock = LLM(**json.loads(sys.stdin.readline())).llm_engine, Clock()
    for number, line in enumerate(sys.stdin):
        ((asked, told),) = json.loads(line).items()
        made: Served | Spoken
        if asked == ReplyScript.__name__:
            made = recite(engine, ReplyScript(**told), clock, str(number))
        else:
            made = serve(engine, Crowd(**told), clock, str(number))
        sys.stdout.write(f"{MARK}{json.dumps(asdict(made))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
