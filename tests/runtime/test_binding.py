"""Every way of reaching a model under a profile is exact, or refused by name."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, pipeline

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError, HkvError, HkvWarning, ModelError, UsageError
from hkvprof.models.calls import NAMES, OLD, cache_keyword, cache_of, rope_holder, with_cache
from hkvprof.models.wrappers import unwrap
from hkvprof.runtime import CompressedCache
from tests.models_for_tests import apply, random_llama, tiny_prompts, token_ids

PROMPT, NEW = 200, 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
IDS = token_ids(1, PROMPT)
KINDS = ("static", "dynamic")


@pytest.fixture
def llama() -> Any:
    return random_llama()


def profile_of(model: Any, kind: str = "static") -> Any:
    return uniform_profile(unwrap(model), kind, index="mean", chunk=8)


def logits(output: Any) -> Tensor:
    return torch.cat(output.logits)


def compressed(handle: Any) -> bool:
    receipt = handle.receipt()
    return receipt.compressed_layers == len(receipt.layers)


# -- wrappers --------------------------------------------------------------------------------------


def plain(model: Any) -> Any:
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_decoder(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


def compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def dispatched(model: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())
    return model


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj"], r=4, lora_alpha=32,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


COMPILED = (compiled, compiled_forward, compiled_decoder, compiled_layers, compiled_in_place)
"""Tracing takes seconds each: for dynamic heads alone, whose state is the larger."""
WRAPPERS = (
    *[(wrap, kind) for wrap in (plain, dispatched, adapted) for kind in KINDS],
    *[(wrap, "dynamic") for wrap in COMPILED],
)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "kind"), WRAPPERS, ids=lambda value: getattr(value, "__name__", value)
)
@torch.no_grad()
def test_a_wrapped_model_gives_the_bits_of_the_model_alone(
    wrap: Callable[[Any], Any], kind: str
) -> None:
    torch._dynamo.reset()
    model = wrap(random_llama(layers=2))
    dense = logits(model.generate(input_ids=IDS, **GREEDY))
    bare = unwrap(wrap(random_llama(layers=2)))
    with apply(bare, profile_of(bare, kind), budget=0.3):
        expected = logits(bare.generate(input_ids=IDS, **GREEDY))
    with apply(model, profile_of(model, kind), budget=1.0):
        assert torch.equal(logits(model.generate(input_ids=IDS, **GREEDY)), dense)
    with apply(model, profile_of(model, kind), budget=0.3) as handle:
        assert handle.model is unwrap(model)
        assert torch.equal(logits(model.generate(input_ids=IDS, **GREEDY)), expected)
        assert compressed(handle)
        assert isinstance(cache_of(model(input_ids=IDS)), CompressedCache)
    assert torch.equal(logits(model.generate(input_ids=IDS, **GREEDY)), dense)
    assert not any(name in vars(unwrap(model)) for name in ("generate", "_hkvprof_handle"))


@torch.no_grad()
def test_compiling_an_applied_model_changes_nothing() -> None:
    torch._dynamo.reset()
    llama = random_llama(layers=2)
    dense = logits(llama.generate(input_ids=IDS, **GREEDY))
    with apply(llama, profile_of(llama), budget=0.3) as handle:
        expected = logits(llama.generate(input_ids=IDS, **GREEDY))
        wrapper = torch.compile(llama, backend="eager")
        llama.forward = torch.compile(llama.forward, backend="eager")
        assert torch.equal(logits(llama.generate(input_ids=IDS, **GREEDY)), expected)
        assert torch.equal(logits(wrapper.generate(input_ids=IDS, **GREEDY)), expected)
        assert compressed(handle)
    assert torch.equal(logits(llama.generate(input_ids=IDS, **GREEDY)), dense), "it passes on"


def test_a_distributed_wrapper(llama: Any, tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(llama).eval()
        with apply(wrapper, profile_of(llama), budget=0.3) as handle:
            assert isinstance(cache_of(wrapper(input_ids=IDS)), CompressedCache)
            assert compressed(handle)
    finally:
        torch.distributed.destroy_process_group()


def test_copying_wrappers_are_refused(llama: Any) -> None:
    with pytest.raises(ModelError, match="DataParallel is not supported"):
        apply(nn.DataParallel(llama), profile_of(llama))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prompt_learning_is_refused(llama: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelError, match="prompt learning"):
        apply(peft.get_peft_model(llama, config), profile_of(llama))


def test_a_pipeline() -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    tokenizer = processor.tokenizer
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with apply(pipe, profile_of(model), budget=0.5) as handle:
        assert handle.model is model
        pipe("image " * 80, max_new_tokens=2, do_sample=False)
        assert compressed(handle)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("outer", [False, True])
def test_interleaved_chats_of_an_adapted_vision_model_keep_their_positions(outer: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, inputs = tiny_prompts((4, 14))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    wrapper = peft.get_peft_model(model, config).eval()

    def play(order: list[int]) -> list[list[Tensor]]:
        seen: list[list[Tensor]] = [[], []]
        with (
            torch.no_grad(),
            apply(wrapper if outer else model, profile_of(model), budget=0.9) as handle,
        ):
            caches = [handle.new_cache(), handle.new_cache()]
            for one in order:
                fed = inputs[one] if not seen[one] else {"input_ids": seen[one][-1].argmax(-1)}
                output = wrapper(**fed, **with_cache(model, caches[one]))
                seen[one].append(output.logits[:, -1:])
        return seen

    alone, mixed = play([0, 0, 0, 1, 1, 1]), play([0, 1, 0, 1, 1, 0])
    assert rope_holder(wrapper) is rope_holder(model) is not None
    for one in (0, 1):
        assert torch.equal(torch.cat(alone[one]), torch.cat(mixed[one]))


# -- calls -----------------------------------------------------------------------------------------


def call_positional(model: Any) -> Any:
    return model(IDS, None, None, None)


def call_forward(model: Any) -> Any:
    return model.forward(input_ids=IDS)


def call_class(model: Any) -> Any:
    return model.__call__(input_ids=IDS)


def call_with_none(model: Any) -> Any:
    return model(input_ids=IDS, **{cache_keyword(model.forward): None}, use_cache=None)


def call_old_name(model: Any) -> Any:
    return model(input_ids=IDS, **{OLD: None})


def call_as_tuple(model: Any) -> Any:
    return model(input_ids=IDS, return_dict=False)


WAYS = (
    call_positional, call_forward, call_class, call_with_none, call_old_name, call_as_tuple,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_of_calling_forward_brings_a_compressed_cache(
    llama: Any, way: Callable[[Any], Any]
) -> None:
    with torch.no_grad(), apply(llama, profile_of(llama), budget=0.3) as handle:
        output = way(llama)
        found = output[1] if isinstance(output, tuple) else cache_of(output)
        assert isinstance(found, CompressedCache)
        assert compressed(handle)
        assert handle.receipt().dense_bytes == found.receipt().dense_bytes > 0


@pytest.mark.parametrize("position", [None, 3])
@pytest.mark.parametrize("strict", [True, False])
def test_a_foreign_cache_is_refused_or_told(llama: Any, strict: bool, position: int | None) -> None:
    foreign = DynamicCache(config=llama.config)
    args = (IDS, None, None, foreign) if position else (IDS,)
    kwargs = {} if position else with_cache(llama, foreign)
    with torch.no_grad(), apply(llama, profile_of(llama), budget=0.3, strict=strict) as handle:
        if strict:
            with pytest.raises(CompressionError, match="found DynamicCache"):
                llama(*args, **kwargs)
            with pytest.raises(CompressionError, match="found DynamicCache"):
                llama.generate(input_ids=IDS, **GREEDY, **with_cache(llama, foreign))
        else:
            llama(input_ids=IDS)
            assert cache_of(llama(*args, **kwargs)) is foreign
            assert "did not make" in str(handle.receipt())
            assert not handle.receipt().compressed_layers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["forward", "generate", "both names"])
def test_a_cache_goes_by_either_name_on_every_release(llama: Any, way: str, name: str) -> None:
    """And without a word of it from transformers, which deprecates one of them."""
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": 3}
    with torch.no_grad(), apply(llama, profile_of(llama), budget=0.3) as handle:
        expected = llama.generate(input_ids=IDS, **options)
        cache = handle.new_cache()
        given = dict.fromkeys(NAMES, cache) if way == "both names" else {name: cache}
        if way == "generate":
            assert torch.equal(
                logits(llama.generate(input_ids=IDS, **given, **options)), logits(expected)
            )
        else:
            found = llama(input_ids=IDS, logits_to_keep=1, **given).logits[:, -1]
            assert torch.equal(found, expected.logits[0])
        assert cache.receipt().compressed_layers == len(handle.receipt().layers)
        foreign = DynamicCache(config=llama.config)
        with pytest.raises(CompressionError, match="found DynamicCache"):
            llama(input_ids=IDS, **{name: foreign})


def test_two_different_caches_are_refused(llama: Any) -> None:
    with apply(llama, profile_of(llama), budget=0.3) as handle:
        both = {"cache": handle.new_cache(), OLD: handle.new_cache()}
        with pytest.raises(UsageError, match="two caches were given"):
            llama(input_ids=IDS, **both)


def test_generate_with_a_positional_prompt_and_config(llama: Any) -> None:
    expected = llama.generate(input_ids=IDS, **GREEDY)
    config = copy.deepcopy(llama.generation_config)
    config.update(**GREEDY)
    with apply(llama, profile_of(llama), budget=1.0) as handle:
        found = llama.generate(IDS, config)
        assert torch.equal(logits(found), logits(expected))
        assert isinstance(cache_of(found), CompressedCache)
        assert handle.receipt().layers[0].reason == "the budget is 1.0"


PARTS = {
    "decoder": lambda model: model.model(input_ids=IDS),
    "decoder without cache": lambda model: model.model(input_ids=IDS, use_cache=False),
    "class's forward": lambda model: type(model).forward(model, input_ids=IDS),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_the_model_does_not_pass_for_a_compressed_request(
    llama: Any, part: str, strict: bool
) -> None:
    dense = PARTS[part](llama)[0]
    with apply(llama, profile_of(llama), budget=0.3, strict=strict) as handle:
        llama(input_ids=IDS)
        assert compressed(handle)
        if strict:
            with pytest.raises(CompressionError, match="without hkvprof's cache"):
                PARTS[part](llama)
        else:
            assert torch.equal(PARTS[part](llama)[0], dense)
            assert "a part of the model" in str(handle.receipt())


def test_a_part_of_the_model_cannot_fill_a_compressed_cache(llama: Any) -> None:
    with apply(llama, profile_of(llama), budget=0.3) as handle:
        cache = handle.new_cache()
        with pytest.raises(CompressionError, match="tokens came from elsewhere"):
            llama.model(input_ids=IDS, **with_cache(llama.model, cache))


def test_training_and_scoring_without_a_cache_stay_dense_and_say_so(llama: Any) -> None:
    dense = llama(input_ids=IDS, labels=IDS)
    with apply(llama, profile_of(llama), budget=0.3) as handle:
        scored = llama(input_ids=IDS, labels=IDS, use_cache=False)
        assert torch.equal(scored.logits, dense.logits)
        assert cache_of(scored) is None
        assert "use_cache is false" in str(handle.receipt())
        llama.train()
        llama(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in llama.parameters())


# -- what generate will really use -----------------------------------------------------------------


def checkpoint_says_no(model: Any) -> dict[str, Any]:
    model.config.use_cache = model.generation_config.use_cache = False
    return {}


def generation_config_says_no(model: Any) -> dict[str, Any]:
    model.generation_config.use_cache = False
    return {}


def call_says_no(model: Any) -> dict[str, Any]:
    return {"use_cache": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("how", [checkpoint_says_no, generation_config_says_no, call_says_no])
def test_without_a_cache_generate_is_exact_and_says_so(
    llama: Any, how: Callable[[Any], dict[str, Any]], budget: float, kind: str
) -> None:
    profile, more = profile_of(llama, kind), how(llama)
    dense = logits(llama.generate(input_ids=IDS, **GREEDY, **more))
    with apply(llama, profile, budget=budget) as handle:
        with pytest.warns(HkvWarning, match="use_cache is false"):
            found = llama.generate(input_ids=IDS, **GREEDY, **more)
        assert torch.equal(logits(found), dense)
        assert "use_cache is false" in str(handle.receipt())
        llama.generate(input_ids=IDS, **GREEDY, **more)  # warned once
        again = llama.generate(input_ids=IDS, **GREEDY, **{**more, "use_cache": True})
        assert isinstance(cache_of(again), CompressedCache)


def test_a_forward_pass_follows_the_config(llama: Any) -> None:
    llama.config.use_cache = False
    with apply(llama, profile_of(llama), budget=0.3) as handle:
        assert cache_of(llama(input_ids=IDS)) is None
        assert "use_cache is false" in str(handle.receipt())
        assert isinstance(cache_of(llama(input_ids=IDS, use_cache=True)), CompressedCache)


def test_embeddings_use_a_cache_whatever_the_config_says(llama: Any) -> None:
    llama.generation_config.use_cache = False
    embedded = llama.get_input_embeddings()(IDS)
    dense = llama.generate(inputs_embeds=embedded, **GREEDY)
    with apply(llama, profile_of(llama), budget=1.0):
        found = llama.generate(inputs_embeds=embedded, **GREEDY)
        assert isinstance(cache_of(found), CompressedCache)
        assert torch.equal(logits(found), logits(dense))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache kind in the call": (
        lambda m: m.generate(input_ids=IDS, **GREEDY, cache_implementation="static"),
        "cache_implementation='static'",
    ),
    "cache kind in the model's config": (
        lambda m: (
            setattr(m.generation_config, "cache_implementation", "offloaded"),
            m.generate(input_ids=IDS, **GREEDY),
        ),
        "cache_implementation='offloaded'",
    ),
    "early exit": (
        lambda m: m.generate(input_ids=IDS, assistant_early_exit=1, **GREEDY),
        "assistant_early_exit is not supported",
    ),
    "continuous batching": (lambda m: m.generate_batch([[3, 4]]), "continuous batching"),
    "continuous batching's manager": (
        lambda m: m.init_continuous_batching(), "continuous batching",
    ),
    "another's generation": (
        lambda m: m.generate(input_ids=IDS, custom_generate="someone/method", **GREEDY),
        "custom_generate",
    ),
    "attention weights": (
        lambda m: m(input_ids=IDS, output_attentions=True), "output_attentions",
    ),
    "another attention": (
        lambda m: (m.set_attn_implementation("eager"), m(input_ids=IDS)),
        "attention implementation was changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(llama: Any, what: str) -> None:
    call, reason = REFUSED[what]
    with (
        apply(llama, profile_of(llama), budget=0.3, strict=False),
        pytest.raises(HkvError, match=reason),
    ):
        call(llama)
    llama.generation_config.cache_implementation = None
    llama.set_attn_implementation("sdpa")
    llama.generate(input_ids=IDS, **GREEDY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 3}, {"assistant": 2}])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(
    llama: Any, drafts: dict[str, Any], kind: str
) -> None:
    if "assistant" in drafts:
        drafts = {"assistant_model": random_llama(layers=2, seed=3)}
    with apply(llama, profile_of(llama, kind), budget=0.99) as handle:
        expected = llama.generate(input_ids=IDS, **GREEDY)
        found = llama.generate(input_ids=IDS, **GREEDY, **drafts)
        assert torch.equal(found.sequences, expected.sequences)
        assert compressed(handle)


def test_guidance_reports_the_conditioned_stream(llama: Any) -> None:
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": token_ids(1, 120, seed=9)}
    dense = logits(llama.generate(input_ids=IDS, **GREEDY, **guided))
    with apply(llama, profile_of(llama), budget=1.0) as handle:
        found = llama.generate(input_ids=IDS, **GREEDY, **guided)
        assert torch.equal(logits(found), dense)
        assert handle.receipt().dense_bytes == cache_of(found).receipt().dense_bytes


# -- caches that outlive their model's profile -----------------------------------------------------


@pytest.fixture(params=KINDS)
def left(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A model, its profile, and a cache whose profile was detached."""
    model = random_llama()
    profile = profile_of(model, request.param)
    with torch.no_grad(), apply(model, profile, budget=0.5) as handle:
        cache = handle.new_cache()
        model(input_ids=IDS, **with_cache(model, cache))
    return model, profile, cache


def test_a_cache_is_useless_after_detach(left: tuple[Any, Any, Any]) -> None:
    model, _, cache = left
    more = torch.cat([IDS, token_ids(1, 3)], dim=1)
    with pytest.raises(CompressionError, match="has been detached"):
        model(input_ids=IDS[:, :1], **with_cache(model, cache))
    with pytest.raises(CompressionError, match="has been detached"):
        model.generate(input_ids=more, **GREEDY, **with_cache(model, cache))
    with pytest.raises(CompressionError, match="has been detached"):
        random_llama()(input_ids=IDS[:, :1], **with_cache(model, cache))


def test_a_cache_goes_on_under_a_later_apply_to_its_model(left: tuple[Any, Any, Any]) -> None:
    model, profile, cache = left
    with torch.no_grad(), apply(model, profile, budget=0.5) as handle:
        whole = handle.new_cache()
        model(input_ids=IDS, **with_cache(model, whole))
        expected = model(input_ids=IDS[:, :1], **with_cache(model, whole)).logits
        found = model(input_ids=IDS[:, :1], **with_cache(model, cache)).logits
        assert torch.equal(found, expected)
        assert handle.receipt() == cache.receipt()


@pytest.mark.parametrize("applied", [False, True])
def test_another_model_cannot_use_a_cache(llama: Any, applied: bool) -> None:
    other, profile = random_llama(), profile_of(llama)
    with ExitStack() as stack:
        handle = stack.enter_context(apply(llama, profile, budget=0.5))
        if applied:
            stack.enter_context(apply(other, profile, budget=0.5))
        cache = handle.new_cache()
        llama(input_ids=IDS, **with_cache(llama, cache))
        with pytest.raises(CompressionError, match="another model"):
            other(input_ids=IDS[:, :1], **with_cache(other, cache))


def test_detach_waits_for_a_pass_of_another_thread(llama: Any) -> None:
    began, go_on, order = threading.Event(), threading.Event(), []

    def pause(*_: Any) -> None:
        began.set()
        assert go_on.wait(60)
        order.append("pass")

    hook = llama.model.layers[1].register_forward_pre_hook(pause)
    handle = apply(llama, profile_of(llama), budget=0.3)
    runner = threading.Thread(target=lambda: llama(input_ids=IDS))
    leaver = threading.Thread(target=lambda: (handle.detach(), order.append("detach")))
    runner.start()
    assert began.wait(60)
    leaver.start()
    leaver.join(0.2)
    assert leaver.is_alive()
    go_on.set()
    runner.join(60)
    leaver.join(60)
    hook.remove()
    assert order == ["pass", "detach"]
    assert "forward" not in vars(llama)


def test_detach_within_a_pass_is_refused(llama: Any) -> None:
    handle = apply(llama, profile_of(llama), budget=0.3)
    hook = llama.model.layers[1].register_forward_pre_hook(lambda *_: handle.detach())
    with pytest.raises(UsageError, match="within a pass"):
        llama(input_ids=IDS)
    hook.remove()
    handle.detach()
    handle.detach()
    assert "forward" not in vars(llama)


def test_a_profile_taken_off_while_generate_runs_ends_it_with_one_error(llama: Any) -> None:
    handle = apply(llama, profile_of(llama), budget=0.3)

    def leave(ids: Tensor, scores: Tensor) -> Tensor:
        handle.detach()
        return scores

    with pytest.raises(CompressionError, match="has been detached"):
        llama.generate(input_ids=IDS, logits_processor=[leave], **GREEDY)


# -- copies ----------------------------------------------------------------------------------------


def deep(model: Any) -> Any:
    return copy.deepcopy(model)


def in_a_list(model: Any) -> Any:
    return copy.deepcopy([model, {"same": model}])[1]["same"]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [deep, in_a_list, pickled, torch_saved], ids=lambda w: w.__name__)
@pytest.mark.parametrize("wrap", [plain, dispatched], ids=lambda wrap: wrap.__name__)
def test_a_copy_of_an_applied_model_is_a_model_of_its_own(
    way: Callable[[Any], Any], wrap: Callable[[Any], Any]
) -> None:
    if wrap is dispatched and way in (pickled, torch_saved):
        pytest.skip("accelerate's hooks are closures, which no pickle holds")
    model = wrap(random_llama())
    profile = profile_of(model)
    dense = logits(model.generate(input_ids=IDS, **GREEDY))
    with apply(model, profile, budget=0.3) as handle:
        expected = logits(model.generate(input_ids=IDS, **GREEDY))
        clone = way(model)
        assert torch.equal(logits(clone.generate(input_ids=IDS, **GREEDY)), dense)
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.zero_()
        assert torch.equal(logits(model.generate(input_ids=IDS, **GREEDY)), expected)
        assert compressed(handle)
        clone = way(model)
    with apply(clone, profile, budget=0.3) as handle:
        assert torch.equal(logits(clone.generate(input_ids=IDS, **GREEDY)), expected)
        assert compressed(handle)
    assert torch.equal(logits(model.generate(input_ids=IDS, **GREEDY)), dense)


def test_a_copy_of_a_vision_model_keeps_its_tower() -> None:
    model, (inputs,) = tiny_prompts((4,))
    dense = logits(model.generate(**inputs, **GREEDY))
    with apply(model, profile_of(model), budget=0.5):
        clones = [copy.deepcopy(model), torch_saved(model)]
    for clone in clones:
        assert clone.config.text_config._attn_implementation == "sdpa"
        assert clone.model.visual.config._attn_implementation == "sdpa"
        assert torch.equal(logits(clone.generate(**inputs, **GREEDY)), dense)


def test_a_shallow_copy_shares_too_much_and_is_refused(llama: Any) -> None:
    with (
        apply(llama, profile_of(llama), budget=0.3),
        pytest.raises(CompressionError, match="without hkvprof's cache"),
    ):
        copy.copy(llama)(input_ids=IDS)


def test_a_saved_checkpoint_knows_nothing_of_the_profile(llama: Any, tmp_path: Any) -> None:
    dense = logits(llama.generate(input_ids=IDS, **GREEDY))
    with apply(llama, profile_of(llama), budget=0.3):
        llama.save_pretrained(tmp_path)
    assert "hkvprof" not in (tmp_path / "config.json").read_text()
    loaded = type(llama).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded.generate(input_ids=IDS, **GREEDY)), dense)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(llama: Any, way: Callable[[Any], Any]) -> None:
    with (
        apply(llama, profile_of(llama), budget=0.3) as handle,
        pytest.raises(UsageError, match="a handle cannot be copied"),
    ):
        way(handle)


def test_the_receipt_is_that_of_the_cache_used_last(llama: Any) -> None:
    with torch.no_grad(), apply(llama, profile_of(llama), budget=0.3) as handle:
        first, second = handle.new_cache(), handle.new_cache()
        llama(input_ids=IDS, **with_cache(llama, first))
        llama(input_ids=IDS[:, :120], **with_cache(llama, second))
        assert handle.receipt() == second.receipt()
        llama(input_ids=IDS[:, :1], **with_cache(llama, first))
        assert handle.receipt() == first.receipt() != second.receipt()
