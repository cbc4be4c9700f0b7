"""What a decoder is fed with: embeddings of all modalities together, and rotary angles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hkvprof.errors import ModelError
from hkvprof.models.adapter import ModelView


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of a prompt's positions (halves rotated against each other, as in Llama).

    `cos`, `sin` [tokens, width] float32; width may be less than the head's (partial rotary). Where
    text follows an image they are those of M-RoPE. Some models scale both (YaRN).
    """

    cos: Float[Tensor, "tokens width"]
    sin: Float[Tensor, "tokens width"]

    def undo(self, rotated: Float[Tensor, "heads tokens dim"]) -> Float[Tensor, "heads tokens dim"]:
        """Queries or keys as they were before the rotation, float32."""
        square = self.cos**2 + self.sin**2
        return _turn(rotated.float(), self.cos / square, -self.sin / square)

    def ahead(self, steps: int) -> Float[Tensor, "width width"]:
        """Mean rotation matrix over the `steps` positions that follow the last one, which is text.

        The angle of one step is that between the first two tokens: the last two may have an image
        between them, after which positions jump.
        """
        angles = torch.atan2(self.sin, self.cos)
        step = angles[1] - angles[0]
        angle = angles[-1] + step * torch.arange(1, steps + 1, device=step.device)[:, None]
        scale = torch.hypot(self.sin[-1], self.cos[-1])
        cos, sin = scale * angle.cos().mean(dim=0), scale * angle.sin().mean(dim=0)
        half = len(cos) // 2
        matrix = torch.diag(cos)
        columns = torch.arange(half, device=cos.device)
        matrix[columns, columns + half] = -sin[:half]
        matrix[columns + half, columns] = sin[half:]
        return matrix


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    first, second = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


@dataclass
class DecoderInput:
    """Filled while a prompt runs: `embeddings` [1, tokens, hidden] as the first layer gets them
    (vision tokens merged in), `rotation` where the model uses rotary embeddings."""

    embeddings: Tensor | None = None
    rotation: Rotation | None = None

    def first(self, count: int) -> DecoderInput:
        """That of the first `count` tokens."""
        embeddings = None if self.embeddings is None else self.embeddings[:, :count]
        old = self.rotation
        return DecoderInput(
            embeddings, None if old is None else Rotation(old.cos[:count], old.sin[:count])
        )


@contextmanager
def watch_input(model: nn.Module, view: ModelView) -> Iterator[DecoderInput]:
    """Within: the input of the next prompt's first covered layer is kept. Batches of one."""
    seen = DecoderInput()
    attention = view.attention[0]
    block = next(m for m in model.modules() if any(child is attention for child in m.children()))

    def before_block(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None or len(hidden) != 1:
            raise ModelError("expected decoder layers that take hidden states of one prompt")
        seen.embeddings = hidden.detach()

    def before_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        if pair is not None:
            cos, sin = (mixed(part.detach().float(), view.text_config) for part in pair)
            seen.rotation = Rotation(cos, sin)

    hooks = [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        attention.register_forward_pre_hook(before_attention, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mixed(angles: Tensor, text_config: Any) -> Tensor:
    """[tokens, width]; older releases of transformers hand on M-RoPE's three sections unmixed."""
    if angles.ndim == 4:
        sections = list(text_config.rope_parameters["mrope_section"]) * 2
        blocks = angles.split(sections, dim=-1)
        angles = torch.cat([block[i % 3] for i, block in enumerate(blocks)], dim=-1)
    return angles[0]
