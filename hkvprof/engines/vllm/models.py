"""vLLM's own model classes, whose attention is split when `additional_config` asks for it.

A class is made when vLLM first asks this module for it by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hkvprof.engines.vllm.seams import ModelRegistry, init_logger
from hkvprof.engines.vllm.settings import EngineSettings, settings_of
from hkvprof.engines.vllm.split import split_heads
from hkvprof.errors import UsageError
from hkvprof.profile.blocks import BlockPlan, plan_blocks
from hkvprof.profile.record import load_profile

MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "InternVLForConditionalGeneration": "interns1",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
}
"""Architectures that are split, and where vLLM has them."""
logger = init_logger("vllm.hkvprof")


def register_models() -> None:
    """Tell vLLM of the classes, by name alone."""
    for architecture in MODELS:
        ModelRegistry.register_model(architecture, f"{__name__}:{architecture}")


def __getattr__(name: str) -> Any:
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"vllm.model_executor.models.{MODELS[name]}")
    made = _with_split(getattr(home, name))
    globals()[name] = made
    return made


def _with_split(base: Any) -> Any:
    def build(self: Any, *, vllm_config: Any, prefix: str = "", **rest: Any) -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **rest)
        settings = settings_of(vllm_config.additional_config)
        if settings is not None and not prefix:
            plan = plan_of(settings, vllm_config)
            split_heads(self, plan, vllm_config)
            logger.info("%s", described(plan))

    return type(base.__name__, (base,), {"__init__": build, "__module__": __name__})


def plan_of(settings: EngineSettings, vllm_config: Any) -> BlockPlan:
    """The plan that the settings ask for. Raises HkvError, also for another model's profile."""
    profile, serves = load_profile(settings.profile), vllm_config.model_config.architectures
    if profile.fingerprint.architecture not in serves:
        raise UsageError(
            f"{settings.profile} is of {profile.fingerprint.architecture}, vLLM serves "
            f"{', '.join(serves)}: give the profile of this model"
        )
    model, size = vllm_config.model_config, vllm_config.cache_config.block_size
    return plan_blocks(profile, settings.budget, size, model.dtype.itemsize)


def described(plan: BlockPlan) -> str:
    """One line about a plan, for the log."""
    each = plan.grid.total // plan.groups
    kept = ", ".join(
        f"{plan.at(tokens).share:.3f} of {tokens} tokens" for tokens in plan.lengths.tolist()
    )
    return (
        f"hkvprof: planned anew among static strategies; {plan.groups} groups of {each} KV heads "
        f"with residents in {', '.join(map(str, plan.bits))} bits, blocks of {plan.block_size} "
        f"tokens; kept: {kept}"
    )
