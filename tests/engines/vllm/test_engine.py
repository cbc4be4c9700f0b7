"""In the running engine, on a tiny model: exact at budget 1.0, right and tidy below.

Needs vLLM for CPUs (`make test-vllm`); every test starts an engine in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkvprof.profile.blocks import plan_blocks
from tests.engines.vllm.lab import Lab, answered_by_transformers, assert_close, assert_tidy
from tests.engines.vllm.tiny import Told, profile, prompts, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]
LENGTHS = (40, 300, 417, 700, 1000)
BUDGET = 0.3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("engine")
    return Lab(save_model(folder / "model"), profile().save(folder / "p.safetensors"), LENGTHS)


@pytest.fixture(scope="module")
def usual(lab: Lab) -> Told:
    """Whole prompts in one chunk, one after another in the batch, budget BUDGET."""
    return lab.run(BUDGET, engine={"max_num_batched_tokens": 4096})


def test_the_whole_budget_is_plain_vllm_to_the_bit(lab: Lab) -> None:
    plain, split = lab.run(None), lab.run(1.0)
    assert split.tokens == plain.tokens
    assert split.logprobs == plain.logprobs
    assert_tidy(split)


def test_heads_keep_what_the_transformers_runtime_keeps(
    lab: Lab, usual: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in prompts(LENGTHS):
        wanted = answered_by_transformers(lab, profile(), BUDGET, prompt, monkeypatch).kept
        found = usual.kept.get(str(len(prompt)), {})
        assert bool(found) == (len(prompt) >= 256)
        for name, tokens in found.items():
            assert tokens == wanted[name].tolist(), name
    assert len({len(tokens) for tokens in usual.kept["1000"].values()}) > 1


def test_chunks_of_a_prompt_change_nothing(lab: Lab, usual: Told) -> None:
    """Of 41 tokens: most prompts end in a chunk shorter than the window of 16 rows."""
    chunked = lab.run(BUDGET, engine={"max_num_batched_tokens": 41, "max_num_seqs": 8})
    assert chunked.kept == usual.kept
    assert_close(chunked, usual)
    assert_tidy(chunked)


def test_prefix_caching_stays_exact(lab: Lab, usual: Told) -> None:
    cached = lab.run(BUDGET, engine={"enable_prefix_caching": True}, waves=3)
    count = len(LENGTHS)
    assert cached.tokens == usual.tokens * 3
    assert cached.kept == usual.kept
    assert cached.cached[:count] == [0] * count
    # What the group with the largest share gives free bounds what others may take over.
    plan = plan_blocks(profile(), BUDGET, 32, 4)
    given = [32 * min(n for n in plan.at(length).dropped if n) for length in LENGTHS[2:]]
    assert cached.cached[count + 2 : 2 * count] == given
    assert_tidy(cached)


def test_preempted_requests_answer_the_same(lab: Lab) -> None:
    """A pool for little more than one prompt; replies long enough that blocks run out."""
    asked = {"prompts": prompts((300, 310, 320, 330), 3), "max_tokens": 150}
    roomy = lab.run(BUDGET, **asked)
    for caching in (False, True):
        engine = {"num_gpu_blocks_override": 100, "enable_prefix_caching": caching,
                  "max_model_len": 480}  # fmt: skip
        tight = lab.run(BUDGET, **asked, engine=engine)
        assert tight.preemptions > 0
        assert roomy.preemptions == 0
        assert_close(tight, roomy)
        assert_tidy(tight)


def test_aborted_requests_leave_nothing_behind(lab: Lab, usual: Told) -> None:
    for step in (1, 3, 9):
        engine = {"max_num_batched_tokens": 300, "max_num_seqs": 8}
        told = lab.run(BUDGET, abort=[1, 3], abort_at=step, engine=engine)
        for number in (0, 2, 4):
            assert told.tokens[number] == usual.tokens[number]
        assert_tidy(told)


def test_several_replies_and_streams_are_the_same_replies(lab: Lab, usual: Told) -> None:
    """Draws among the likeliest token alone: vLLM gives greedy requests one reply.

    A low temperature would not do. After three tokens of prompt 417 the two likeliest differ by
    .0073 in log-probability, and at .011 the second is drawn one time in three.
    """
    several = lab.run(BUDGET, n=2, temperature=1.0, top_k=1)
    for reply in (0, 1):
        tokens, logprobs = (
            [[replies[reply]] for replies in told] for told in (several.tokens, several.logprobs)
        )
        assert_close(replace(several, tokens=tokens, logprobs=logprobs), usual)
    assert_tidy(several)
    assert_close(lab.run(BUDGET, stream=True), usual)


def test_a_request_has_its_own_budget_and_gets_a_receipt(lab: Lab, usual: Told) -> None:
    """Rows of different budgets in one batch; 1.0 opts out, and rows move as short ones end."""
    own: list[Any] = [None, None, {"hkvprof_budget": 1.0}, {"hkvprof_budget": "60%"}, None]
    told = lab.run(BUDGET, extra_args=own, engine={"max_num_batched_tokens": 512})
    plan = plan_blocks(profile(), BUDGET, 32, 4)
    for number in (0, 1, 4):
        assert told.tokens[number] == usual.tokens[number]
    assert told.tokens[2] == lab.run(None, prompts=prompts(LENGTHS)[2:3]).tokens[0]
    assert "417" not in told.kept
    wanted = plan.at(700, share=0.6)
    sizes = {len(tokens) for tokens in told.kept["700"].values()}
    moved = zip(wanted.dropped, wanted.kept_tokens, strict=True)
    assert sizes == {kept for dropped, kept in moved if dropped}
    for length, args, found in zip(LENGTHS, own, told.receipts, strict=True):
        share = None if args is None else {1.0: 1.0, "60%": 0.6}[args["hkvprof_budget"]]
        planned = plan.at(length, share=share)
        assert found["blocks_freed"] == sum(planned.dropped)
        assert found["blocks_held"] == plan.groups * -(-(length + 7) // 32) - sum(planned.dropped)
        assert found["kept_tokens"] == list(planned.kept_tokens)
        assert found["resident_bits"] == list(planned.bits)
        assert found["budget"] == (BUDGET if share is None else share)
        assert found["dense_reason"] == planned.dense_reason
    assert_tidy(told)


def test_a_budget_that_is_not_understood_is_refused_with_the_request(lab: Lab) -> None:
    extra = [{"hkvprof_budget": 4096}]
    error = lab.start(BUDGET, prompts=prompts((300,)), extra_args=extra).error
    assert "hkvprof_budget must be a share" in error


def test_torch_compile_changes_nothing(lab: Lab, usual: Told) -> None:
    compiled = lab.run(BUDGET, engine={"enforce_eager": False})
    assert compiled.kept == usual.kept
    assert_close(compiled, usual)


def test_a_soak_leaves_nothing_behind(lab: Lab) -> None:
    """Random lengths and budgets, aborts and preemptions, prefix hits of earlier waves."""
    draw = np.random.default_rng(7)
    asked = {
        "prompts": prompts(tuple(draw.integers(20, 460, size=60).tolist()), 9),
        "extra_args": [
            None if budget is None else {"hkvprof_budget": budget}
            for budget in draw.choice([None, None, 0.5, 1.0], size=60)
        ],
        "max_tokens": 40,
    }
    aborted = draw.choice(60, size=12, replace=False).tolist()
    groups = plan_blocks(profile(), BUDGET, 32, 4).groups
    engine = {"enable_prefix_caching": True, "num_gpu_blocks_override": 50 * groups,
              "max_model_len": 512, "max_num_batched_tokens": 512}  # fmt: skip
    tight = lab.run(BUDGET, **asked, abort=aborted, abort_at=25, waves=2, engine=engine)
    roomy = lab.run(BUDGET, **asked)
    assert tight.preemptions > 0
    assert roomy.preemptions == 0
    for wave in (tight.tokens[:60], tight.tokens[60:]):
        for number, (found, wanted) in enumerate(zip(wave, roomy.tokens, strict=True)):
            if number not in aborted:
                assert found == wanted, number
    assert_tidy(tight)


def test_more_requests_run_at_once_in_the_same_memory(lab: Lab) -> None:
    asked = {"prompts": prompts((512,) * 12, 5), "max_tokens": 32}
    # Blocks of plain vLLM span all six heads, those of groups a part: equal bytes.
    groups = plan_blocks(profile(), 0.2, 32, 4).groups
    runs = {}
    for budget, blocks in {None: 40, 0.2: 40 * groups}.items():
        engine = {"num_gpu_blocks_override": blocks, "max_model_len": 1024}
        runs[budget] = lab.run(budget, **asked, engine=engine)
    assert runs[0.2].most_running >= 2 * runs[None].most_running


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                 "prompt_lookup_max": 2}}, "speculative decoding"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8"),
        ({"enable_lora": True}, "LoRA"),
        ({"hf_overrides": {"architectures": ["GPTNeoXForCausalLM"]}}, "the model GPTNeoX"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager disabled"),
    ],
)  # fmt: skip
def test_what_is_not_proven_is_refused_by_name(lab: Lab, engine: dict[str, Any], told: str) -> None:
    assert told in lab.start(BUDGET, engine=engine).error


def test_a_profile_of_another_model_is_refused(lab: Lab, tmp_path: Path) -> None:
    from tests.profiles import make_profile

    other = make_profile().save(tmp_path / "other.safetensors")
    error = replace(lab, profile=other).start(BUDGET).error
    assert "give the profile of this model" in error
