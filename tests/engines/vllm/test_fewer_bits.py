"""In the running engine: groups of heads whose pages hold 16, 8 and 4 bits, on a tiny model.

Needs vLLM for CPUs (`make test-vllm`); every test starts an engine in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hkvprof.heads import HeadType, Strategy
from hkvprof.profile.blocks import plan_blocks
from hkvprof.profile.record import Profile
from hkvprof.selection.residents import rotate
from tests.engines.vllm.lab import Lab, answered_by_transformers, assert_tidy
from tests.engines.vllm.tiny import Told, profile, prompts, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]
LENGTHS = (530, 700, 1000)
BUDGET = 0.12


def three_kinds() -> Profile:
    """A profile whose first layer is best in 16 bits, the second in 8 and the third in 4."""
    own = profile()
    few = tuple(Strategy(HeadType.STATIC, pool=1, resident_bits=bits) for bits in (8, 4))
    loss = np.stack([own.loss[:, 0], own.loss[:, 0], own.loss[:, 0], own.loss[:, 3]], axis=1)
    for layer in range(3):
        loss[:, layer, layer] /= 100
    return replace(own, strategies=(own.strategies[0], *few, own.strategies[3]), loss=loss,
                   output_error=loss.copy())  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("engine")
    return Lab(save_model(folder / "model"), three_kinds().save(folder / "p"), LENGTHS)


@pytest.fixture(scope="module")
def usual(lab: Lab) -> Told:
    """Whole prompts in one chunk, with what is stored of them."""
    values = str(lab.profile.with_suffix(".pt"))
    return lab.run(BUDGET, engine={"max_num_batched_tokens": 4096}, values=values)


def test_the_plan_has_all_three_kinds() -> None:
    plan = plan_blocks(three_kinds(), BUDGET, 32, 4)
    for layer, bits in enumerate((16, 8, 4)):
        assert {plan.bits[group] for group in plan.group[layer]} == {bits}
    for made in map(plan.at, LENGTHS):
        assert set(made.bits) == {16, 8, 4}
        assert max(made.kept_tokens) < made.tokens


def test_what_is_held_is_what_the_transformers_runtime_holds(
    lab: Lab, usual: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[int, dict[str, torch.Tensor]] = torch.load(lab.profile.with_suffix(".pt"))
    for number, prompt in enumerate(prompts(LENGTHS)):
        wanted = answered_by_transformers(lab, three_kinds(), BUDGET, prompt, monkeypatch)
        assert len(wanted.kept) == len(stored[len(prompt)]) == 6
        for name, found in stored[len(prompt)].items():
            assert usual.kept[str(len(prompt))][name] == wanted.kept[name].tolist(), name
            # Both models compute in float32: here and there a code, or the scale of a row, is the
            # next one; before it is turned back that is one number, or a few.
            away = rotate(found - wanted.stored[name]).abs()
            assert float((away > 1e-3).float().mean()) < 3e-3, name
            assert float(away.max()) < 0.1 * float(found.abs().max()), name
        assert usual.tokens[number] == [wanted.tokens]
        own = torch.tensor(usual.logprobs[number][0])
        torch.testing.assert_close(own, torch.tensor(wanted.logprobs), rtol=2e-3, atol=2e-3)


def test_receipts_tell_bits_and_memory_comes_back(usual: Told) -> None:
    plan = plan_blocks(three_kinds(), BUDGET, 32, 4)
    for length, receipt in zip(LENGTHS, usual.receipts, strict=True):
        made = plan.at(length)
        assert receipt["resident_bits"] == list(made.bits)
        assert receipt["kept_tokens"] == list(made.kept_tokens)
        assert receipt["blocks_freed"] == sum(made.dropped)
    assert_tidy(usual)


def test_chunks_and_preemption_change_nothing(lab: Lab) -> None:
    """Replies long enough that blocks run out; rows are computed again with tokens after them."""
    asked = {"prompts": prompts((520, 530, 40, 525, 515), 3), "max_tokens": 200}
    roomy = lab.run(BUDGET, **asked)
    groups = plan_blocks(three_kinds(), BUDGET, 32, 4).groups
    engine = {"num_gpu_blocks_override": 29 * groups + 4, "enable_prefix_caching": True,
              "max_model_len": 768, "max_num_batched_tokens": 123}  # fmt: skip
    tight = lab.run(BUDGET, **asked, engine=engine, waves=2)
    assert tight.preemptions > 0
    assert roomy.preemptions == 0
    assert tight.kept == roomy.kept
    assert tight.tokens == roomy.tokens * 2
    assert_tidy(tight)


def test_the_whole_budget_is_plain_vllm_to_the_bit(lab: Lab) -> None:
    plain, split = lab.run(None), lab.run(1.0)
    assert split.tokens == plain.tokens
    assert split.logprobs == plain.logprobs
    assert {tuple(receipt["resident_bits"]) for receipt in split.receipts} == {(16,)}
