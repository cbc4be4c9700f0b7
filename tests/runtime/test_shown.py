"""Handles and receipts as an interactive session shows them."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import torch

from hkvprof import uniform_profile
from hkvprof.runtime.shown import html_table
from tests.models_for_tests import apply, random_llama


def test_a_handle_says_what_it_is_and_whether_it_is_applied() -> None:
    model = random_llama()
    handle = apply(model, uniform_profile(model), budget=0.25)
    shown = repr(handle)
    assert shown.startswith("<Handle: model LlamaForCausalLM, compressed ")
    assert "budget 0.25 of dense bytes" in shown
    assert shown.endswith("state applied>")
    assert "<td style='text-align:left'>applied</td>" in handle._repr_html_()
    handle.detach()
    assert repr(handle).endswith("state detached>")


def test_a_receipt_is_a_line_and_a_table() -> None:
    model = random_llama()
    with apply(model, uniform_profile(model), budget=0.25) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(torch.arange(100)[None] % 50, past_key_values=cache)
        receipt = handle.receipt()
    assert repr(receipt) == f"<Receipt: {receipt}>"
    assert "\n" not in repr(receipt)
    page = receipt._repr_html_()
    assert f"{receipt.resident_share:.1%} of dense" in page
    assert "<b>" not in replace(receipt, profile="<b>x")._repr_html_()


def test_tables_are_sound_html_of_anything() -> None:
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Reader().feed(html_table("a<b", {"<script>": "</table>", "&": 3}))
    assert opened == []
