"""What hkvprof needs to know of a model, read once from its config and modules.

Nothing outside hkvprof.models reads a Hugging Face config; what differs between architectures is
asked of their adapter (hkvprof.models.architectures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hkvprof.errors import ModelError
from hkvprof.heads import HeadGrid, ModelFingerprint
from hkvprof.models.architectures import Adapter, adapter_for, is_registered
from hkvprof.models.fingerprint import attention_layers, fingerprint_of
from hkvprof.models.quantised import untested
from hkvprof.models.wrappers import unwrap


@dataclass(frozen=True)
class ModelView:
    """A decoder as hkvprof sees it: its geometry and the attention modules that are covered.

    `attention[i]` is the attention module of covered layer i, `layer_ids[i]` its number in the
    model's cache. Sliding-window and linear layers are not covered: they stay as they are.
    `generic`: no adapter lists the architecture, it was read by rules that fit most models; nobody
    has tested it. `untested` names a kind of quantised weights that nobody has tested; else "".
    """

    fingerprint: ModelFingerprint
    layer_ids: tuple[int, ...]
    attention: tuple[nn.Module, ...]
    text_config: Any
    adapter: Adapter
    generic: bool
    untested: str = ""

    @property
    def unproven(self) -> str:
        """What of this model the tests have not run; empty for a model like those tested."""
        if self.generic:
            return "this architecture is not among those hkvprof was tested on"
        if self.untested:
            return f"quantised weights of this kind ({self.untested}) were not tested with hkvprof"
        return ""

    @property
    def grid(self) -> HeadGrid:
        """Geometry of the covered layers."""
        return self.fingerprint.grid

    def output_projection(self, layer: int) -> Tensor:
        """W_O of a covered layer, [hidden, query_heads * head_dim]. Raises ModelError."""
        return self.adapter.output_projection(self.attention[layer])


def view_model(model: Any) -> ModelView:
    """Translate a transformers model, or what wraps one (wrappers.unwrap).

    Raises ModelError, with the reason, for unsupported ones.
    """
    model = unwrap(model)
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ModelError(
            f"expected a transformers generation model, found {type(model).__name__}: load it with "
            "hkvprof.load_model or AutoModel...from_pretrained"
        )
    adapter = adapter_for(model.config)
    reason = adapter.refusal(model)
    if reason:
        raise ModelError(
            f"{getattr(model.config, 'model_type', 'this model')} is not supported: {reason}; "
            "`hkvprof models` lists models that work"
        )
    text_config = model.config.get_text_config(decoder=True)
    modules = adapter.attention_modules(model)
    layer_ids = adapter.full_attention_layers(text_config)
    missing = [index for index in layer_ids if index not in modules]
    if not layer_ids or missing:
        raise ModelError(
            f"{type(model).__name__} has no supported layer"
            + (f" {missing[0]}: no attention module with that layer_idx" if missing else "")
            + ": expected decoder layers with full attention through transformers' "
            f"AttentionInterface, each with a head_dim and {' or '.join(adapter.output_names)}; "
            "docs/adding-a-model.md says how to teach hkvprof other names"
        )
    attention = tuple(modules[index] for index in layer_ids)
    grid = adapter.head_grid(text_config, attention)
    fingerprint = fingerprint_of(model, adapter, grid, attention)
    return ModelView(
        fingerprint=fingerprint,
        layer_ids=tuple(layer_ids),
        attention=attention,
        text_config=text_config,
        adapter=adapter,
        generic=not is_registered(model.config),
        untested=untested(fingerprint.quantisation, attention_layers(adapter, attention)),
    )
