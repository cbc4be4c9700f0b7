"""Every feature that is not proven is refused by its name, from the configuration alone."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from hkvprof.engines.vllm.settings import EngineSettings
from hkvprof.errors import UsageError

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"
)
SETTINGS = EngineSettings("p.safetensors", 0.2)


def configuration(**changed: Any) -> Any:
    """One that runs, but for what `part__name` changes in it."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"], use_mla=False, logits_processors=None
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1,
            decode_context_parallel_size=1, prefill_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(sliding_window=None, cache_dtype="auto"),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=False, scheduler_cls=None, async_scheduling=False
        ),
        speculative_config=None, kv_transfer_config=None, lora_config=None,
    )  # fmt: skip
    for name, value in changed.items():
        part, _, field = name.partition("__")
        setattr(getattr(made, part), field, value) if field else setattr(made, part, value)
    return made


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model_config__architectures": ["GPTNeoXForCausalLM"]}, "the model GPTNeoXForCausalLM"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"cache_config__sliding_window": 4096}, "a sliding window"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__tensor_parallel_size": 2}, "tensor parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "kv_cache_dtype fp8_e5m2"),
        ({"lora_config": object()}, "LoRA"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
        ({"scheduler_config__scheduler_cls": "my.Scheduler"}, "a scheduler class of its own"),
    ],
)
def test_what_is_not_proven_is_refused_by_name(changed: dict[str, Any], told: str) -> None:
    from hkvprof.engines.vllm.startup import check_configuration

    check_configuration(configuration(), SETTINGS)
    with pytest.raises(UsageError, match=told):
        check_configuration(configuration(**changed), SETTINGS)


def test_all_that_is_refused_is_named_at_once() -> None:
    from hkvprof.engines.vllm.startup import check_configuration

    with pytest.raises(UsageError, match=r"tensor parallelism, LoRA: leave that out"):
        check_configuration(
            configuration(parallel_config__tensor_parallel_size=2, lora_config=object()), SETTINGS
        )


def test_an_untested_minor_is_refused_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hkvprof.engines.vllm import seams
    from hkvprof.engines.vllm.startup import check_configuration

    monkeypatch.setattr(seams, "VERSION", "0.33.0")
    with pytest.raises(UsageError, match=r'0\.33\.0 is untested.*"untested": true'):
        check_configuration(configuration(), SETTINGS)
    check_configuration(configuration(), EngineSettings("p.safetensors", 0.2, untested=True))


def test_a_release_that_lacks_what_is_relied_on_is_refused_even_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hkvprof.engines.vllm import startup

    monkeypatch.setattr(startup, "problems", lambda: ["something has no argument 'x'"])
    with pytest.raises(UsageError, match="something has no argument 'x'"):
        startup.check_configuration(
            configuration(), EngineSettings("p.safetensors", 0.2, untested=True)
        )


@pytest.mark.parametrize("ahead", [False, True])
def test_the_schedulers_and_the_processor_are_those_that_vllm_finds(ahead: bool) -> None:
    from hkvprof.engines.vllm import requests, scheduler
    from hkvprof.engines.vllm.startup import check_configuration, tell_of_requests

    config = configuration(scheduler_config__async_scheduling=ahead)
    for _ in range(2):  # vLLM makes some configurations from others
        check_configuration(config, SETTINGS)
        tell_of_requests(config)
    name = config.scheduler_config.scheduler_cls.rsplit(".", 1)[1]
    kind = scheduler.PlannedAsyncScheduler if ahead else scheduler.PlannedScheduler
    assert getattr(scheduler, name) is kind
    (processor,) = config.model_config.logits_processors
    assert getattr(requests, processor.split(":")[1]) is requests.RowBudgets
