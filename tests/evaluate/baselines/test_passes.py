"""Methods that run the model again: against attention weights of the eager implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.errors import ModelError
from hkvprof.evaluate.baselines import PromptView, find, offline
from hkvprof.evaluate.baselines import kvzip as kvzip_file
from hkvprof.evaluate.baselines.base import Kept
from hkvprof.evaluate.baselines.duo_attention import ends
from hkvprof.evaluate.baselines.razor_attention import compensated, ranked
from hkvprof.evaluate.prefill import capture
from hkvprof.models.decoder_input import watch_input
from hkvprof.models.processing import Encoded
from hkvprof.testbed.generator import make_sample
from tests.evaluate.baselines.synthetic import counts, random_prompt, with_values_as_numbers
from tests.models_for_tests import random_llama, token_ids

torch.set_num_threads(1)


def llama_prompt(tokens: int = 40, share: float = 0.4) -> PromptView:
    model = random_llama()
    ids = token_ids(1, tokens)
    return PromptView(
        model, capture(model, Encoded({"input_ids": ids}, torch.zeros_like(ids))), share
    )


@torch.no_grad()
def weights_of(model: Any, ids: Tensor) -> Tensor:
    """Attention of the whole sequence, [layers, query_heads, tokens, tokens]."""
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack([layer[0] for layer in attentions])


# -- KVzip ------------------------------------------------------------------------------------


def test_kvzip_scores_are_the_attention_of_the_repetition() -> None:
    prompt = llama_prompt()
    ids = prompt.prefill.ids
    weights = weights_of(prompt.model, torch.cat([ids, ids], dim=1))
    want = weights[:, :, 40:, :40].amax(dim=2).view(3, 2, 2, 40).amax(dim=2)
    found = torch.stack(kvzip_file.repeat_scores(prompt))
    assert torch.allclose(found, want, atol=1e-5)


def test_kvzip_repeats_each_chunk_right_after_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvzip_file, "CHUNK", 16)
    prompt = llama_prompt()
    ids = prompt.prefill.ids
    found = torch.stack(kvzip_file.repeat_scores(prompt))
    for begin, stop in ((0, 16), (16, 32), (32, 40)):
        lead = ids[:, max(0, begin - 8) : begin]
        fed = torch.cat([lead, ids[:, begin:stop]], dim=1)
        weights = weights_of(prompt.model, torch.cat([ids, fed], dim=1))
        seen = [*range(min(4, begin)), *range(begin, stop), *range(40, 40 + fed.shape[1])]
        part = weights[:, :, 40:][..., seen]
        part = part / part.sum(dim=-1, keepdim=True)  # the softmax among these tokens alone
        rows = part[:, :, max(0, lead.shape[1] - 1) :]
        sinks = min(4, begin)
        want = rows[..., sinks : sinks + stop - begin].amax(dim=2).view(3, 2, 2, -1).amax(dim=2)
        assert torch.allclose(found[..., begin:stop], want, atol=1e-5)


def test_kvzip_looks_at_repeating_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = llama_prompt()
    ids = prompt.prefill.ids
    ask, close = token_ids(1, 5, seed=7), token_ids(1, 2, seed=8)
    monkeypatch.setattr(kvzip_file, "_instructions", lambda prompt: (ask, ask, close))
    weights = weights_of(prompt.model, torch.cat([ids, ask, close, ids], dim=1))
    # From the last row of the instruction on, which predicts the first token of the context.
    want = weights[:, :, 46:, :40].amax(dim=2).view(3, 2, 2, 40).amax(dim=2)
    assert torch.allclose(torch.stack(kvzip_file.repeat_scores(prompt)), want, atol=1e-5)


def test_kvzip_has_one_threshold_for_all_heads() -> None:
    prompt = llama_prompt(share=0.4)
    selection = find("kvzip").select(prompt)
    scores = torch.stack(kvzip_file.repeat_scores(prompt))
    assert sum(map(sum, counts(selection))) == 16 * 6
    scores[..., :4] = scores[..., -4:] = torch.inf
    least = scores.flatten().sort(descending=True).values[16 * 6 - 1]
    want = (scores >= least).sum(dim=-1).tolist()
    assert counts(selection) == want
    assert min(map(min, want)) < max(map(max, want))


def test_kvzip_leaves_the_captured_prompt_alone() -> None:
    prompt = llama_prompt()
    before = [(call.key.clone(), call.value.clone()) for call in prompt.prefill.calls]
    kvzip_file.repeat_scores(prompt)
    for (key, value), call in zip(before, prompt.prefill.calls, strict=True):
        assert torch.equal(key, call.key)
        assert torch.equal(value, call.value)
    assert prompt.model.config._attn_implementation == "sdpa"


def test_kvzip_needs_embeddings() -> None:
    with pytest.raises(ModelError, match="embeddings"):
        kvzip_file.repeat_scores(random_prompt(0, 20, 0.5))


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any, Any]:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=4, split="calibration")
    return model, processor, capture(model, processor.encode([sample.messages]))


def test_kvzip_continues_the_positions_of_this_prompt(tinyvl: tuple[Any, Any, Any]) -> None:
    model, _, prefill = tinyvl
    known = kvzip_file.repeat_scores(PromptView(model, prefill, 0.2))
    stale = prefill.rope_deltas + 57
    model.model.rope_deltas = stale
    again = kvzip_file.repeat_scores(PromptView(model, prefill, 0.2))
    assert torch.equal(torch.stack(known), torch.stack(again))
    assert model.model.rope_deltas is stale


def test_kvzip_repeats_at_the_positions_that_follow(tinyvl: tuple[Any, Any, Any]) -> None:
    model, _, prefill = tinyvl
    with watch_input(model, prefill.view) as seen:
        kvzip_file.repeat_scores(PromptView(model, prefill, 0.2))
    known, fed = prefill.decoder_input.rotation, seen.rotation
    assert fed is not None
    angles = torch.atan2(known.sin, known.cos)
    step = angles[1] - angles[0]
    assert torch.allclose(fed.cos[0], (angles[-1] + step).cos(), atol=1e-3)
    assert torch.allclose(fed.sin[-1], (angles[-1] + len(fed.sin) * step).sin(), atol=1e-2)


def test_kvzip_asks_in_a_turn_of_its_own_or_goes_on(tinyvl: tuple[Any, Any, Any]) -> None:
    model, processor, prefill = tinyvl
    switch = "<|im_end|>\n<|im_start|>user\n"
    close = "<|im_end|>\n<|im_start|>assistant\n"
    first, later, end = kvzip_file._instructions(PromptView(model, prefill, 0.2))
    assert end[0].tolist() == processor.encode_text(close)
    assert first[0].tolist() == processor.encode_text(switch + kvzip_file.FIRST)
    assert later[0].tolist() == processor.encode_text(switch + kvzip_file.LATER)
    context = prefill.first(int((~prefill.text).nonzero().max()) + 2)
    first, _, _ = kvzip_file._instructions(PromptView(model, context, 0.2))
    assert first[0].tolist() == processor.encode_text("\n\n" + kvzip_file.FIRST)


class Tokenizer:
    """Renders with a template, as a tokenizer does."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        from jinja2 import Template

        return Template(self.chat_template).render(messages=messages)


def test_kvzip_templates_of_strings_and_of_parts() -> None:
    strings = [{"role": "user", "content": words} for words in kvzip_file._SAID]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in strings]
    plain = Tokenizer("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    listed = Tokenizer("{% for m in messages %}[{{ m.content[0].text }}]{% endfor %}>")
    assert kvzip_file._between(plain, strings) == ("][", "]>")
    assert kvzip_file._between(listed, strings) is None
    assert kvzip_file._between(listed, parts) == ("][", "]>")
    assert kvzip_file._between(Tokenizer(""), strings) is None


# -- retrieval heads --------------------------------------------------------------------------


def test_habits_by_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "DISTINCT", 12)
    prompt = llama_prompt()
    known = offline.habits(prompt)
    once = offline._random_ids(prompt)
    period = once.shape[1]
    assert period == 12
    assert len(set(once[0].tolist())) == 12
    assert not {0, 1, 2} & set(once[0].tolist())
    weights = weights_of(prompt.model, once.repeat(1, 4))
    echo, induction = torch.zeros(3, 4), torch.zeros(3, 4)
    rows = range(period, 4 * period)
    for row in rows:
        for past in range(row):
            if past % period == row % period:
                echo += weights[:, :, row, past] / len(rows)
            if past % period == (row + 1) % period:
                induction += weights[:, :, row, past] / len(rows)
    assert torch.allclose(known.echo, echo.view(3, 2, 2).amax(-1), atol=1e-5)
    assert torch.allclose(known.induction, induction.view(3, 2, 2).amax(-1), atol=1e-5)
    assert offline.habits(prompt) is known


def test_offline_pass_gives_the_position_offset_back(tinyvl: tuple[Any, Any, Any]) -> None:
    model, _, prefill = tinyvl
    mark = prefill.rope_deltas.clone()
    model.model.rope_deltas = mark
    offline._watch(PromptView(model, prefill, 0.2))
    assert model.model.rope_deltas is mark


def test_fourteen_induction_heads_for_an_echo_head() -> None:
    induction = torch.arange(20, 0, -1).float().view(4, 5)  # heads 0, 1, 2, ... in order
    echo = torch.zeros(4, 5)
    echo[3, 4] = 1.0
    order = ranked(offline.Habits(echo, induction))
    assert order[:16] == [*range(14), 19, 14]


def test_as_many_whole_heads_as_there_is_room_for() -> None:
    prompt = random_prompt(0, tokens=100, share=0.3)  # 4 heads, room for 120 tokens
    full, numbers = offline.full_heads(prompt, [2, 0, 1, 3], local=6)
    assert full == {2}
    assert numbers == [7, 7, 100, 6]
    full, numbers = offline.full_heads(prompt, [2, 0, 1, 3], local=20)
    assert not full
    assert numbers == [30] * 4


def test_ends() -> None:
    prompt = random_prompt(0, tokens=20, share=0.5)
    assert ends(prompt, 7).tolist() == [0, 1, 2, 16, 17, 18, 19]
    assert ends(prompt, 12).tolist() == [*range(4), *range(12, 20)]


def test_compensation_token_is_the_mean_of_what_is_dropped() -> None:
    prompt = with_values_as_numbers(random_prompt(0, tokens=20, share=0.5))
    layer = prompt.layers[0]
    result = compensated(prompt, layer, 1, 8)
    assert len(result.key) == 8
    # Seven real tokens: 0, 1, 2 and 16 to 19; 3 to 15 are dropped.
    assert result.value[:, 0].tolist() == [9.0, 0, 1, 2, 16, 17, 18, 19]
    assert torch.allclose(result.key[0], layer.key[1, 3:16].mean(dim=0))


def test_razor_attention_keeps_whole_heads_and_one_mean_token_elsewhere() -> None:
    prompt = llama_prompt(tokens=60, share=0.4)
    selection = find("razor_attention").select(prompt)
    numbers = counts(selection)
    assert sum(map(sum, numbers)) == 24 * 6
    order = ranked(offline.habits(prompt))
    whole = [h for h, n in enumerate(x for layer in numbers for x in layer) if n == 60]
    assert sorted(order[: len(whole)]) == whole
    for layer, choices in zip(prompt.layers, selection, strict=True):
        for head, choice in enumerate(choices):
            assert isinstance(choice, Kept)
            real = (choice.key[:, None] == layer.key[head][None]).all(-1).any(-1)
            assert int((~real).sum()) == (len(choice.key) < 60)
