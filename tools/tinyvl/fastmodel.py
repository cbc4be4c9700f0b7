"""A training forward for Qwen2_5_VLForConditionalGeneration on packed batches.

It uses the parameters of the Hugging Face module, so what is trained is that model; tests show
that its logits equal the module's own. It is faster because all images have one grid, glyphs are
embedded once per batch from an atlas, and attention is written out: on CPUs the backward of fused
attention is 50 times slower on vision windows of 16 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hkvprof.testbed.rendering import CELL_PIXELS, PATCH_VALUES
from hkvprof.testbed.vocabulary import IMAGE_PAD, TOKEN_IDS
from tools.tinyvl.batching import Batch

MERGE = 4
"""Patches that are merged into one visual token."""
_VISION_EPS = 1e-6
_MASKED = -30000.0
"""Added to masked scores; finite, so that rows of padding stay free of NaN."""


@dataclass(frozen=True)
class _VisionPlan:
    """Rotary tables and window order for one grid of cells."""

    cos: Tensor
    sin: Tensor
    patches: Tensor
    """Patches in window order."""
    restore: Tensor
    """Merged tokens back in reading order."""
    window: int
    """Patches of one window."""


@dataclass
class Trace:
    """What the auxiliary losses read from a forward pass."""

    hidden: list[Tensor]
    """Output of each text layer, [B, L, hidden]."""
    attention: list[Tensor]
    """For each layer in `watched_heads`, the probabilities [rows, heads, L, L]."""


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _linear(module: Any, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    gate = F.silu(_linear(module.gate_proj, x))
    return _linear(module.down_proj, gate * _linear(module.up_proj, x))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Grouped attention, q [B, heads, L, dim], k and v [B, kv_heads, L, dim].

    Returns the output [B, heads, L, dim] and the probabilities [B, heads, L, L].
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    grouped = (q * dim**-0.5).reshape(batch, kv_heads, heads // kv_heads * length, dim)
    scores = torch.matmul(grouped, k.transpose(-1, -2))
    if bias is not None:
        scores = (scores.view(batch, heads, length, length) + bias).view_as(scores)
    weights = F.softmax(scores, -1)
    output = torch.matmul(weights, v).view(batch, heads, length, dim)
    return output, weights.view(batch, heads, length, length)


class FastForward:
    """Forward passes of one model in `dtype`, parameters staying as they are."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        self.dtype = dtype
        self.watched_heads: Mapping[int, Sequence[int]] = {}
        """Text layer -> query heads whose attention the trace keeps."""
        self.watched_rows = 3
        """Batch rows whose attention is kept."""
        self._plans: dict[tuple[int, int], _VisionPlan] = {}

    def __call__(self, batch: Batch, atlas: Tensor, ticks: Tensor) -> tuple[Tensor, Trace]:
        """Float32 logits [T, vocabulary] at the targets.

        `atlas` [drawings, 4, 1176] is what `batch.cells` indexes; `ticks` [8, 8, 4, 1176] as in
        rendering.tick_patches.
        """
        images = self.embed_images(batch, atlas, ticks)
        text = self.model.model.language_model
        hidden = text.embed_tokens.weight.to(self.dtype)[batch.ids]
        is_image = (batch.ids == TOKEN_IDS[IMAGE_PAD])[..., None]
        hidden = hidden.masked_scatter(is_image, images.reshape(-1, images.shape[-1]))
        hidden, trace = self.decode(hidden, batch.positions, batch.mask)
        logits = F.linear(hidden[batch.selected], self.model.lm_head.weight.to(self.dtype))
        return logits.float(), trace

    def embed_images(self, batch: Batch, atlas: Tensor, ticks: Tensor) -> Tensor:
        """Visual tokens [N, rows * columns, hidden] of the batch's images."""
        cells = self._embed_patches(atlas)[batch.cells]
        marks = self._embed_patches(ticks)[: batch.rows, : batch.columns]
        patches = cells + marks.reshape(1, batch.rows * batch.columns, MERGE, -1)
        return self._encode_images(patches.flatten(1, 2), batch.rows, batch.columns)

    def _embed_patches(self, patches: Tensor) -> Tensor:
        weight = self.model.model.visual.patch_embed.proj.weight.view(-1, PATCH_VALUES)
        return F.linear(patches.to(self.dtype), weight.to(self.dtype))

    def _plan(self, rows: int, columns: int) -> _VisionPlan:
        if (rows, columns) not in self._plans:
            self._plans[rows, columns] = self._make_plan(rows, columns)
        return self._plans[rows, columns]

    def _make_plan(self, rows: int, columns: int) -> _VisionPlan:
        side = self.model.config.vision_config.window_size // CELL_PIXELS
        assert rows % side == 0, "training grids keep all windows whole"
        assert columns % side == 0, "training grids keep all windows whole"
        frequencies = self.model.model.visual.rotary_pos_emb.inv_freq
        device = frequencies.device
        fine = torch.arange(2, device=device)
        height = 2 * torch.arange(rows, device=device)[:, None, None, None] + fine[:, None]
        width = 2 * torch.arange(columns, device=device)[None, :, None, None] + fine
        shape = (rows, columns, 2, 2)
        angles = torch.cat(
            [
                height.expand(shape).reshape(-1, 1) * frequencies,
                width.expand(shape).reshape(-1, 1) * frequencies,
            ],
            -1,
        )
        cells = torch.arange(rows * columns, device=device)
        order = cells.view(rows // side, side, columns // side, side).permute(0, 2, 1, 3).flatten()
        patches = (order[:, None] * MERGE + torch.arange(MERGE, device=device)).flatten()
        return _VisionPlan(
            cos=angles.cos()[patches].to(self.dtype),
            sin=angles.sin()[patches].to(self.dtype),
            patches=patches,
            restore=torch.argsort(order),
            window=side * side * MERGE,
        )

    def _encode_images(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Vision tower on patch embeddings [N, patches, hidden] in merge order."""
        tower = self.model.model.visual
        config = self.model.config.vision_config
        plan = self._plan(rows, columns)
        x = patches[:, plan.patches]
        for index, block in enumerate(tower.blocks):
            is_full = index in config.fullatt_block_indexes
            window = x.shape[1] if is_full else plan.window
            normed = _rms_norm(x, block.norm1.weight, _VISION_EPS)
            x = x + self._vision_attention(block.attn, normed, plan, window, config.num_heads)
            x = x + _gated_mlp(block.mlp, _rms_norm(x, block.norm2.weight, _VISION_EPS))
        merger = tower.merger
        merged = _rms_norm(x, merger.ln_q.weight, _VISION_EPS)
        merged = merged.reshape(len(x), -1, MERGE * x.shape[-1])[:, plan.restore]
        return _linear(merger.mlp[2], F.gelu(_linear(merger.mlp[0], merged)))

    def _vision_attention(
        self, module: Any, x: Tensor, plan: _VisionPlan, window: int, heads: int
    ) -> Tensor:
        count, length, width = x.shape
        qkv = _linear(module.qkv, x).view(count, length, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rotate(q, plan.cos, plan.sin), _rotate(k, plan.cos, plan.sin)

        def split(t: Tensor) -> Tensor:
            windows = t.reshape(count, heads, length // window, window, width // heads)
            return windows.transpose(1, 2).flatten(0, 1)

        output, _ = attention(split(q), split(k), split(v), None)
        return _linear(module.proj, output.transpose(1, 2).reshape(count, length, width))

    def _text_rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, L, dim / 2] of the interleaved sections (temporal, height, width)."""
        rotary = self.model.model.language_model.rotary_emb
        angles = positions[..., None].float() * rotary.inv_freq
        rope = self.model.config.text_config.rope_parameters
        sections = angles.split(list(rope["mrope_section"]), dim=-1)
        chosen = torch.cat([part[index % 3] for index, part in enumerate(sections)], -1)
        return chosen.cos()[:, None].to(self.dtype), chosen.sin()[:, None].to(self.dtype)

    def decode(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Trace]:
        """The text model on embeddings x [B, L, hidden]: its normed output, and the trace."""
        text = self.model.model.language_model
        eps = self.model.config.text_config.rms_norm_eps
        cos, sin = self._text_rotary(positions)
        bias = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        bias = bias.masked_fill(~mask, _MASKED)
        trace = Trace([], [])
        for index, layer in enumerate(text.layers):
            normed = _rms_norm(x, layer.input_layernorm.weight, eps)
            output, weights = self._text_attention(layer.self_attn, normed, cos, sin, bias)
            if index in self.watched_heads:
                kept = weights[: self.watched_rows][:, list(self.watched_heads[index])]
                trace.attention.append(kept)
            x = x + output
            x = x + _gated_mlp(layer.mlp, _rms_norm(x, layer.post_attention_layernorm.weight, eps))
            trace.hidden.append(x)
        return _rms_norm(x, text.norm.weight, eps), trace

    def _text_attention(
        self, module: Any, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.model.config.text_config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch, length, width = x.shape
        projections = (module.q_proj, module.k_proj, module.v_proj)
        weight = torch.cat([projection.weight for projection in projections]).to(x.dtype)
        shift = torch.cat([projection.bias for projection in projections]).to(x.dtype)
        qkv = F.linear(x, weight, shift).view(batch, length, heads + 2 * kv_heads, -1)
        qkv = qkv.transpose(1, 2)
        rotated = _rotate(qkv[:, : heads + kv_heads], cos, sin)
        output, weights = attention(
            rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :], bias
        )
        joined = output.transpose(1, 2).reshape(batch, length, width)
        return _linear(module.o_proj, joined), weights
