"""SnapKV with the maximum over its window and wide pooling."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hkvprof.evaluate.baselines.base import LayerPrompt, Prompt, Selection, baseline
from hkvprof.evaluate.baselines.scores import WINDOW, keep_best, same_room, with_recent
from hkvprof.selection.static import pool, window_attention

WIDTH = 31


@baseline("snapkv_max", "SnapKV, max over the window, pooling 31", "hkvprof", public=False)
def snapkv_max(prompt: Prompt) -> Selection:
    """The strongest static score without offline knowledge (docs/method.md); heads alike."""
    scores = prompt.remember("snapkv_max", lambda: [_score(layer) for layer in prompt.layers])
    return keep_best(prompt, [with_recent(prompt, s) for s in scores], same_room(prompt))


def _score(layer: LayerPrompt) -> Float[Tensor, "kv_heads tokens"]:
    attention = window_attention(layer.query[:, -WINDOW:], layer.key, layer.scaling)
    return pool(attention, WIDTH)
