"""Every piece of transformers that hkvprof touches without a promise of stability.

When a new release breaks hkvprof, this module should say what moved and which file uses it. Names
that are imported are found by reading hkvprof's own source.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from hkvprof.models.adapter import view_model
from hkvprof.models.calls import cache_keyword, cache_of, with_cache
from tests.models.conversations import picture, user
from tests.models.families import FAMILIES, processor_of, tokenizer_of
from tests.models.tiny import REFUSED, TEXT, build, build_covered

CACHE = "hkvprof/runtime/cache.py"
HANDLE = "hkvprof/runtime/handle.py"
OBSERVE = "hkvprof/calibration/observe.py"
SEAM = "hkvprof/models/attention.py"
ADAPTER = "hkvprof/models/architectures.py"
FINGERPRINT = "hkvprof/models/fingerprint.py"
INPUT = "hkvprof/models/decoder_input.py"
LOAD = "hkvprof/models/load.py"
PROCESSING = "hkvprof/models/processors.py"
VISION = "hkvprof/models/vision.py"
BACKEND = "hkvprof/models/vision.py"
ROOT = Path(__file__).parents[2]
TABLES = "transformers.integrations.gguf"


def moved(what: str, *users: str) -> str:
    return f"transformers {transformers.__version__}: {what}; used by {', '.join(users)}"


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def layer_states(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)


# -- names that are imported --------------------------------------------------------------------


def imported() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of every import from transformers and huggingface_hub in hkvprof."""
    for path in sorted((ROOT / "hkvprof").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            if module and module.split(".")[0] in ("transformers", "huggingface_hub"):
                for alias in node.names:
                    yield str(path.relative_to(ROOT)), module, alias.name


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(imported())))
def test_what_is_imported_is_there(file: str, module: str, name: str) -> None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        if module == TABLES and int(transformers.__version__.split(".")[1]) < 23:
            pytest.skip("no such table yet; hkvprof.models.gguf_tokenizer has its own rules")
        pytest.fail(moved(f"the module {module} is gone", file))
    there = hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None
    assert there, moved(f"{module}.{name} is gone", file)


# -- cache layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lazy_initialization", ["self", "key_states", "value_states"]),
        ("update", ["self", "key_states", "value_states", "args", "kwargs"]),
        ("get_seq_length", ["self"]),
        ("get_mask_sizes", ["self", "query_length"]),
        ("reset", ["self"]),
        ("crop", ["self", "tokens_to_remove"]),
        ("reorder_cache", ["self", "beam_idx"]),
        ("batch_select_indices", ["self", "indices"]),
        ("batch_repeat_interleave", ["self", "repeats"]),
    ],
)
def test_methods_of_a_layer(name: str, expected: list[str]) -> None:
    function = getattr(DynamicLayer, name, None)
    assert function is not None, moved(f"DynamicLayer.{name} is gone", CACHE, OBSERVE)
    found = parameters(inspect.unwrap(function))
    assert found == expected, moved(f"DynamicLayer.{name} takes {found}", CACHE, OBSERVE)


def test_a_layer_is_made_without_arguments() -> None:
    assert issubclass(DynamicLayer, CacheLayerMixin), moved("the layer's base", CACHE)
    layer = DynamicLayer()
    state = (layer.keys, layer.values, layer.is_initialized)
    assert state == (None, None, False), moved(f"a new DynamicLayer holds {state}", CACHE, OBSERVE)


def test_no_method_of_a_layer_is_unknown() -> None:
    """A new method would run on tensors that a compressed layer does not have."""
    known = {
        "activate_past_recording",  # of linear and sliding layers
        "batch_repeat_interleave", "batch_select_indices", "crop", "get_mask_sizes",
        "get_max_length", "get_seq_length", "lazy_initialization", "offload", "prefetch",
        "reorder_cache", "reset", "update",
        "get_max_cache_shape",  # deprecated, in 5.16 and 5.17
    }  # fmt: skip
    public = {name for name, _ in inspect.getmembers(DynamicLayer, inspect.isfunction)}
    new = {name for name in public if not name.startswith("_")} - known
    assert not new, moved(f"DynamicLayer has new methods {sorted(new)}", CACHE)


def test_what_a_stock_layer_does() -> None:
    layer = DynamicLayer()
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(5) == (5, 0), moved("get_mask_sizes of an empty layer", CACHE)
    first, second = layer_states(5), layer_states(2)
    layer.update(*first)
    assert layer.get_mask_sizes(2) == (7, 0), moved("get_mask_sizes: (stored + new, 0)", CACHE)
    keys, values = layer.update(*second)
    assert keys is layer.keys, moved("update returns the stored keys themselves", OBSERVE)
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=2)), moved("update", OBSERVE)
    assert torch.equal(values, torch.cat([first[1], second[1]], dim=2)), moved("update", OBSERVE)
    layer.crop(-2)
    assert layer.get_seq_length() == 5, moved("crop takes minus the count to remove", CACHE)


def test_a_cache_keeps_its_layers_in_a_list() -> None:
    cache = DynamicCache(config=build_covered("llama").config)
    assert isinstance(cache, Cache)
    assert type(cache.layers) is list, moved("DynamicCache.layers is no list", CACHE, OBSERVE)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicLayer] * 2, moved(f"a plain decoder's layers are {kinds}", ADAPTER)
    found = parameters(DynamicCache.__init__)
    assert "config" in found, moved(f"DynamicCache takes {found}", CACHE, OBSERVE, ADAPTER)


def test_a_cache_passes_calls_on_to_its_layers() -> None:
    called: list[tuple[str, Any]] = []

    class Spy(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            called.append(("update", key_states.shape[2]))
            return super().update(key_states, value_states, *args, **kwargs)

        def get_seq_length(self) -> int:
            called.append(("get_seq_length", None))
            return 9

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            called.append(("get_mask_sizes", query_length))
            return query_length, 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            called.append(("reorder_cache", beam_idx.tolist()))

        def batch_select_indices(self, indices: Tensor) -> None:
            called.append(("batch_select_indices", indices.tolist()))

        def batch_repeat_interleave(self, repeats: int) -> None:
            called.append(("batch_repeat_interleave", repeats))

        def crop(self, tokens_to_remove: int) -> None:
            called.append(("crop", tokens_to_remove))

        def reset(self) -> None:
            called.append(("reset", None))

    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 1})
    cache = DynamicCache(config=config)
    cache.layers = [Spy()]
    cache.update(*layer_states(3), 0)
    assert cache.get_seq_length() == 9
    assert tuple(cache.get_mask_sizes(4, 0)) == (4, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    cache.reset()
    wanted = [
        ("update", 3), ("get_seq_length", None), ("get_mask_sizes", 4), ("reorder_cache", [1, 0]),
        ("batch_select_indices", [1]), ("batch_repeat_interleave", 2), ("crop", -2),
        ("reset", None),
    ]  # fmt: skip
    own = [call for call in called if call in wanted]
    missing = [call for call in wanted if call not in own]
    assert not missing, moved(f"Cache does not pass on {missing}", CACHE)


def test_sliding_layers_are_told_from_full_ones() -> None:
    cache = DynamicCache(config=build_covered("gemma3").config)
    sliding = cache_utils.DynamicSlidingWindowLayer
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [sliding, DynamicLayer] * 2, moved(f"layers of Gemma3 are {kinds}", ADAPTER)


# -- attention ----------------------------------------------------------------------------------


def test_attention_functions_can_be_registered_and_found() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def function() -> None: ...

    for interface, table in (
        (AttentionInterface, ALL_ATTENTION_FUNCTIONS),
        (AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS),
    ):
        name = interface.__name__
        interface.register("hkvprof_test", function)
        assert table["hkvprof_test"] is function, moved(f"{name}.register", SEAM)
        assert "hkvprof_test" in table.valid_keys(), moved(f"{name}.valid_keys", SEAM)
        assert callable(table["sdpa"]), moved(f"{name} has no 'sdpa'", SEAM)
        del interface._global_mapping["hkvprof_test"]


def test_the_signature_of_attention_functions() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = parameters(ALL_ATTENTION_FUNCTIONS["sdpa"])
    wanted = ["module", "query", "key", "value", "attention_mask"]
    assert found[:5] == wanted, moved(f"the SDPA function takes {found}", SEAM)
    assert "scaling" in found, moved(f"the SDPA function takes {found}", SEAM)


def test_an_implementation_can_be_set_for_the_decoder_alone() -> None:
    model = build_covered("qwen2.5-vl")
    assert model.config._attn_implementation == "sdpa", moved("_attn_implementation", SEAM)
    assert "text_config" in model.config.sub_configs, moved("config.sub_configs", SEAM)
    model.set_attn_implementation({"text_config": "eager"})
    parts = (model.config, model.config.text_config, model.config.vision_config)
    found = [part._attn_implementation for part in parts]
    assert found == ["sdpa", "eager", "sdpa"], moved(
        f"set_attn_implementation(dict): {found}", SEAM
    )
    inner = model.model.language_model.config
    assert inner is model.config.text_config, moved("the decoder has its own config", SEAM)


def test_keys_reach_the_attention_function_as_the_layer_returned_them() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build_covered("qwen2.5-vl")
    seen: list[tuple[bool, Any, int]] = []

    class Layer(DynamicLayer):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(*args, **kwargs)
            keys.marked = True  # type: ignore[attr-defined]
            return keys, values

    def function(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((hasattr(key, "marked"), module.layer_idx, query.shape[2]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)

    cache = DynamicCache(config=model.config)
    cache.layers = [Layer() for _ in cache.layers]
    transformers.AttentionInterface.register("hkvprof_test", function)
    try:
        model.set_attn_implementation({"text_config": "hkvprof_test"})
        with torch.no_grad():
            model(input_ids=torch.arange(10, 16)[None], **with_cache(model, cache))
    finally:
        del transformers.AttentionInterface._global_mapping["hkvprof_test"]
    assert seen == [(True, 0, 6), (True, 1, 6)], moved(f"attention received {seen}", SEAM, CACHE)


def test_attributes_of_attention_modules() -> None:
    attention = build_covered("qwen2").model.layers[1].self_attn
    assert attention.layer_idx == 1, moved("attention.layer_idx", ADAPTER)
    assert attention.head_dim == 16, moved("attention.head_dim", ADAPTER)
    assert attention.num_key_value_groups == 2, moved("attention.num_key_value_groups", ADAPTER)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert hasattr(attention, name), moved(f"attention.{name}", ADAPTER)


@pytest.mark.parametrize(
    ("model", "argument"),
    [("gpt_oss", "s_aux="), ("gemma2", "softcap="), ("mistral", "sliding_window=")],
)
def test_the_arguments_that_are_refused_are_still_called_so(model: str, argument: str) -> None:
    """What attention functions are told by models whose softmax is another one."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    source = inspect.getsource(module)
    assert argument in source, moved(f"{model} passes no {argument[:-1]} to attention", SEAM)


def test_whether_an_implementation_can_be_chosen() -> None:
    for name, can in (("LlamaForCausalLM", True), ("BloomForCausalLM", False)):
        found = getattr(transformers, name)._can_set_attn_implementation()
        assert found is can, moved(f"{name}._can_set_attn_implementation() is {found}", ADAPTER)


@pytest.mark.parametrize("padding", [0, 3])
def test_the_mask_of_a_prompt(padding: int) -> None:
    """The runtime reads the rows' starts from it: None, or [rows, 1, queries, keys]."""
    model, seen = build_covered("llama"), []
    ids = torch.arange(10, 20).expand(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"])

    model.model.layers[0].self_attn.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    users = ("hkvprof/runtime/prompt.py", "hkvprof/runtime/layer.py")
    if padding == 0:
        assert seen == [None], moved("SDPA gets a mask without padding", *users)
        return
    assert seen[0].shape == (2, 1, 10, 10), moved(f"the mask is {seen[0].shape}", *users)
    visible = seen[0][:, 0, -1] if seen[0].dtype == torch.bool else seen[0][:, 0, -1] == 0
    assert torch.equal(visible, mask.bool()), moved("the mask's last row hides padding", *users)


@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl", "gemma3", "gpt-neox"])
def test_what_a_decoder_layer_is_called_with(name: str) -> None:
    """watch_input reads hidden states from the block, rotary angles from the attention."""
    model, seen = build_covered(name), {}
    attention = view_model(model).attention[0]
    block = next(m for m in model.modules() if any(c is attention for c in m.children()))

    def keep(key: str) -> Callable[..., None]:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen[key] = (args, kwargs)

        return before

    block.register_forward_pre_hook(keep("block"), with_kwargs=True)
    attention.register_forward_pre_hook(keep("attention"), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(10, 16)[None])
    args, kwargs = seen["block"]
    hidden = args[0] if args else kwargs.get("hidden_states")
    assert hidden is not None, moved("a block's hidden states", INPUT)
    assert hidden.shape == (1, 6, TEXT["hidden_size"]), moved("a block's hidden states", INPUT)
    pair = seen["attention"][1].get("position_embeddings")
    assert pair is not None, moved("attention(position_embeddings=...)", INPUT)
    assert len(pair) == 2, moved("position_embeddings are cosines and sines", INPUT)


# -- models and configs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava", "gemma3"])
def test_the_text_config_of_a_vision_model(name: str) -> None:
    config = build_covered(name).config
    found = config.get_text_config(decoder=True)
    assert found is config.text_config, moved("get_text_config(decoder=True)", ADAPTER, SEAM)
    assert found.rope_parameters, moved("text_config.rope_parameters", ADAPTER)


def test_the_config_of_a_text_model_is_its_text_config() -> None:
    config = build_covered("llama").config
    assert config.get_text_config(decoder=True) is config, moved("get_text_config", ADAPTER, SEAM)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_where_qwen_keeps_rope_deltas(name: str) -> None:
    model = build_covered(name)
    assert hasattr(model.model, "rope_deltas"), moved("model.model.rope_deltas", HANDLE)
    assert model.model.rope_deltas is None, moved("rope_deltas before the first pass", HANDLE)


def test_rope_deltas_shift_the_positions_of_later_steps() -> None:
    model = build_covered("qwen2.5-vl")
    ids, step = torch.arange(10, 16)[None], torch.tensor([[20]])
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        model.model.rope_deltas = torch.tensor([[0]])
        plain = model(input_ids=step, **with_cache(model, cache)).logits
        cache.crop(-1)
        model.model.rope_deltas = torch.tensor([[3]])
        shifted = model(input_ids=step, **with_cache(model, cache)).logits
    assert not torch.equal(plain, shifted), moved("rope_deltas are read elsewhere", HANDLE)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ("Gemma2Config", "attn_logit_softcapping"),
        ("DeepseekV3Config", "kv_lora_rank"),
        ("T5Config", "is_encoder_decoder"),
        ("Gemma3nTextConfig", "num_kv_shared_layers"),
    ],
)
def test_the_fields_by_which_models_are_refused(config: str, field: str) -> None:
    found = getattr(getattr(transformers, config)(), field, None)
    assert found, moved(f"{config}.{field} is {found!r}", ADAPTER)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_token_of_a_vision_model(name: str) -> None:
    config = build_covered(name).config
    assert config.image_token_id == 5, moved(f"{name}: config.image_token_id", ADAPTER, FINGERPRINT)
    assert config.vision_config is not None, moved(f"{name}: config.vision_config", LOAD)


def test_sinks_are_parameters_of_the_attention() -> None:
    config, model, arguments, _ = REFUSED["gpt-oss"]
    modules = build(config, model, arguments).modules()
    found = [m for m in modules if getattr(m, "sinks", None) is not None]
    assert len(found) == 2, moved("GPT-OSS: attention.sinks", ADAPTER)


def test_where_a_model_says_what_it_was_loaded_from() -> None:
    model = build_covered("llama")
    assert hasattr(model, "name_or_path"), moved("model.name_or_path", FINGERPRINT)
    source = inspect.getsource(transformers.PreTrainedConfig)
    assert "_commit_hash" in source, moved("config._commit_hash", FINGERPRINT)


def test_a_static_cache_is_made_from_a_config() -> None:
    model = build_covered("llama")
    made = transformers.StaticCache(config=model.config, max_cache_len=16)
    assert made.get_seq_length() == 0, moved("StaticCache", "hkvprof/bench/contestant.py")


def test_which_models_take_images() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    vision, text = transformers.Qwen2_5_VLConfig, transformers.Qwen2Config
    assert vision in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, moved("the auto mapping", LOAD)
    assert text not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, moved("the auto mapping", LOAD)


def test_from_pretrained_takes_dtype_and_implementation() -> None:
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    for name in ("dtype", "device_map", "attn_implementation", "local_files_only"):
        assert name in source, moved(f"from_pretrained knows no {name}", LOAD)


# -- generation ---------------------------------------------------------------------------------


def test_generate_uses_the_cache_it_is_given() -> None:
    model = build_covered("llama")
    cache = DynamicCache(config=model.config)
    ids = torch.arange(10, 16)[None]
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **with_cache(model, cache),
        max_new_tokens=3, min_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert cache.get_seq_length() == 8, moved("generate(cache=...)", HANDLE)


def test_a_forward_hook_sees_and_changes_the_cache() -> None:
    """The runtime's hooks read and set the cache among the keyword arguments."""
    model = build_covered("llama")
    cache, seen = DynamicCache(config=model.config), []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(kwargs.get(cache_keyword(module.forward)))
        return args, {**kwargs, **with_cache(module, cache)}

    model.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        output = model(input_ids=torch.arange(10, 16)[None])
    assert seen == [None], moved("forward's keyword arguments", HANDLE)
    assert cache_of(output) is cache, moved("forward(cache=...)", HANDLE)
    assert "logits_to_keep" in parameters(model.forward), moved(
        "forward knows no logits_to_keep", "hkvprof/models/calls.py"
    )


def test_stopping_criteria() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    calls: list[int] = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            calls.append(input_ids.shape[1])
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    ids = torch.arange(10, 16)[None]
    build_covered("llama").generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2,
        do_sample=False, stopping_criteria=StoppingCriteriaList([Count()]),
    )  # fmt: skip
    assert calls == [7, 8], moved(
        "stopping criteria run once a token", "hkvprof/evaluate/converse.py"
    )


# -- processors ---------------------------------------------------------------------------------


def test_the_pillow_image_processor_of_qwen() -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as module

    processor = module.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)
    assert processor.merge_size == 2, moved("image_processor.merge_size", PROCESSING)
    found = processor(images=[picture(56, 56)], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 4, 4]], moved("image_grid_thw", PROCESSING)
    assert found["pixel_values"].shape == (16, 1176), moved("pixel_values", PROCESSING)


def test_a_processor_takes_its_template_and_tells_its_tokenizer() -> None:
    processor = processor_of("llava", build_covered("llava"))[0].processor
    for name in ("chat_template", "tokenizer", "image_token"):
        assert getattr(processor, name, None), moved(f"processor.{name}", VISION)
    rendered = processor.apply_chat_template(
        [user("w1")], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|user|> w1<|assistant|>", moved("apply_chat_template", VISION)


def test_the_rate_of_a_videos_frames() -> None:
    from transformers.video_utils import VideoMetadata

    made = VideoMetadata(total_num_frames=4, fps=3.0, frames_indices=[0, 1, 2, 3])
    assert made.sampled_fps == 3.0, moved("VideoMetadata.sampled_fps", VISION)


def test_a_tokenizer_tells_the_offsets_of_its_tokens() -> None:
    found = tokenizer_of(None)(["w1 w2"], return_offsets_mapping=True, return_tensors="pt")
    wanted = [[0, 2], [3, 5]]
    assert found["offset_mapping"][0].tolist() == wanted, moved(
        "return_offsets_mapping", "hkvprof/models/processing.py"
    )


def test_transformers_caches_the_presence_of_torchvision() -> None:
    from transformers.utils import import_utils

    for name in ("is_torchvision_available", "is_torchvision_v2_available"):
        function = getattr(import_utils, name, None)
        assert hasattr(function, "cache_clear"), moved(f"import_utils.{name}", BACKEND)


def test_helpers() -> None:
    from huggingface_hub import constants
    from transformers.utils import cached_file, logging

    found = inspect.getsource(cached_file) + inspect.getsource(inspect.getmodule(cached_file))
    for name in ("local_files_only", "_raise_exceptions_for_missing_entries"):
        assert name in found, moved(f"cached_file knows no {name}", PROCESSING)
    for name in ("HF_HUB_OFFLINE", "ENDPOINT"):
        assert hasattr(constants, name), moved(f"huggingface_hub.constants.{name}", LOAD)
    for name in ("set_verbosity_error", "disable_progress_bar"):
        assert hasattr(logging, name), moved(f"logging.{name}", "hkvprof/cli/output.py")
