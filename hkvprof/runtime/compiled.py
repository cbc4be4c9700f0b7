"""A static layer's decoding step with fixed shapes, for torch.compile.

The step is tensors in, tensors out: where segments end is a tensor that the step advances, so that
nothing is traced anew as they grow. Attention is one opaque operator (`hkvprof::attend`): its
kernels are compiled already. A whole model is recorded as a CUDA graph instead (runtime.graph):
the cache that transformers talks to is bookkeeping on the host, which torch.compile cannot trace in
one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hkvprof.errors import CompressionError
from hkvprof.runtime.kernels import Extents, for_device
from hkvprof.runtime.ragged import RaggedLayer
from hkvprof.runtime.storage import append_rows


@torch.library.custom_op("hkvprof::attend", mutates_args=())
def attend(
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    ends: Tensor,
    longest: int,
    query: Tensor,
    scaling: float,
) -> Tensor:
    """Kernels.attend, told where segments lie by int32 tensors alone.

    Shapes: [capacity, dim] twice, [segments] twice, query [segments, group, dim].
    """
    kernels = for_device(key.device, key.dtype)
    if kernels.name == "triton":  # reads lengths on the device; no other kernels do
        extents = Extents((), (), longest, starts, ends)
    else:
        first, last = starts.tolist(), ends.tolist()
        lengths = [end - start for start, end in zip(first, last, strict=True)]
        extents = Extents(first, lengths, longest, starts, ends)
    return kernels.attend(key, value, extents, query, scaling)


@attend.register_fake
def _(
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    ends: Tensor,
    longest: int,
    query: Tensor,
    scaling: float,
) -> Tensor:
    return torch.empty_like(query)


class StaticStep(nn.Module):
    """`step(key, value, query)` appends a token per segment and attends; for up to `tokens` steps.

    Shares the layer's storage: `layer.advance(steps)` tells it what was taken. Raises
    CompressionError for a layer with dynamic heads.
    """

    key: Tensor
    value: Tensor
    starts: Tensor
    ends: Tensor

    def __init__(self, layer: RaggedLayer, tokens: int) -> None:
        super().__init__()
        if layer.dynamic:
            raise CompressionError(
                f"layer {layer.account.layer} has {len(layer.dynamic)} dynamic heads, which select "
                "by kernels of their own: expected static heads only; use runtime.graph"
            )
        layer.reserve(tokens)
        storage = layer.storage
        self.longest, self.scaling = storage.longest, layer.scaling
        for name in ("key", "value", "starts", "ends"):
            self.register_buffer(name, getattr(storage, name), persistent=False)

    def forward(self, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
        """Of shapes [segments, 1, dim] twice and [segments, group, dim]; returns the latter."""
        append_rows(self.key, self.value, self.ends, key, value)
        return attend(
            self.key, self.value, self.starts, self.ends, self.longest, query, self.scaling
        )
