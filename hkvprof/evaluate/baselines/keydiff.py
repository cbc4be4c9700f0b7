"""KeyDiff: tokens whose keys differ most from the others'."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hkvprof.evaluate.baselines.base import LayerPrompt, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import keep_best, same_room, with_recent


@baseline("keydiff", "KeyDiff", "arXiv 2504.15364")
def keydiff(prompt: PromptView) -> Selection:
    """Least cosine similarity to the mean of the normalised keys; attention is not looked at.

    The recent tokens stay too, which is not in the paper: it serves the method better here.
    """
    scores = prompt.remember("keydiff", lambda: [_score(layer) for layer in prompt.layers])
    return keep_best(prompt, [with_recent(prompt, s) for s in scores], same_room(prompt))


def _score(layer: LayerPrompt) -> Float[Tensor, "kv_heads tokens"]:
    key = layer.key.float()
    mean = normalize(key, dim=-1).mean(dim=1, keepdim=True)
    return -cosine_similarity(key, mean, dim=-1)
