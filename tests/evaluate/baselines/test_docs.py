"""The page on evaluation names every method, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hkvprof
from hkvprof.evaluate import baselines
from hkvprof.evaluate.baselines import base
from hkvprof.evaluate.prefill import capture
from hkvprof.testbed.generator import make_sample

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_table_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
    rules = {name: rule for name, title, paper, rule in rows if name not in ("inside", "after")}
    papers = {name: paper for name, title, paper, rule in rows}
    known = baselines.baselines()
    assert [name for name in rules if name in known] == list(known)
    for name, method in known.items():
        assert (method.select.__doc__ or "").strip().splitlines()[0] == rules[name]
        assert papers[name] == method.paper


@torch.no_grad()
def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    use, write = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    model, processor = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
    messages = make_sample("list", 1, images=8, split="calibration").messages
    prompt = capture(model, processor.encode([messages]))
    known: dict[str, Any] = {
        "model": model,
        "processor": processor,
        "messages": messages,
        "next_token": prompt.logits.argmax(-1, keepdim=True),
    }
    exec(use, known)
    assert bool(known["logits"].isfinite().all())
    exec(write, known)
    with baselines.compress(model, prompt, "value_norm", share=0.1) as cache:
        layer = cache.covered[0].ragged
        kept = layer.storage.values(1)
        norms = prompt.calls[0].value[0, 1].norm(dim=-1)
        best = norms.topk(int(0.1 * prompt.tokens)).indices.sort().values
        assert torch.equal(kept, prompt.calls[0].value[0, 1, best])
