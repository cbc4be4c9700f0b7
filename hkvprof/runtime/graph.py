"""Decoding steps of a compressed cache, recorded once and replayed as a CUDA graph.

A step's launches depend on nothing that changes from step to step but tensors: lengths, slot maps
and positions advance on the device. What the host books per step (lengths, accounts) does not
happen in a replay, and is booked here. Where the host has to decide something (storage grows, the
next compression comes near) steps are taken one by one, and a new graph is recorded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.errors import CompressionError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.runtime.accounts import LayerState
from hkvprof.runtime.cache import CompressedCache
from hkvprof.runtime.devices import at

AHEAD = 96
"""Steps per graph at most: what `compress_every` leaves of 128 where windows are of 16."""
WORTH = 8
"""Fewer steps than these are taken one by one: recording takes as long as a few of them."""


class Recorder(Protocol):
    """Turns a step into something that can be replayed."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Note what `step` asks of the device, without the device doing it; the host's part runs.

        The result does it, and returns the tensor that `step` returned.
        """
        ...


class CudaGraphs:
    """Records steps by torch.cuda.CUDAGraph, on a stream of its own.

    `torch.cuda.graph` also collects garbage and gives all cached memory back, pinned memory too,
    which takes long to get again; other threads may go on using the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the step in a graph; the result replays it."""
        with at(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
            torch.cuda.synchronize(self._device)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    out = step()
                finally:
                    graph.capture_end()

        def replay() -> Tensor:
            with at(self._device):
                graph.replay()
            return out

        return replay


def take_step(
    model: Any, ids: Int[Tensor, "rows 1"], positions: Int[Tensor, ...], cache: Any
) -> Float[Tensor, "rows vocabulary"]:
    """A pass over a token per row at `positions`, which go on by one; its logits."""
    out = model(input_ids=ids, position_ids=positions, **with_cache(model, cache), use_cache=True)
    positions += 1
    return out.logits[:, -1]


class GraphDecoder:
    """`decoder(input_ids)` is the model's pass over one token per row and `cache`.

    `cache` (`Handle.new_cache()`) holds a compressed prompt, and the profile stays applied. Padding
    is on the left alone; positions go on from the prompt's. Raises UsageError where the device is
    not CUDA or prefetch is on, CompressionError where a layer is dense or its kernels are plain
    torch, which makes the host wait.
    """

    def __init__(
        self,
        model: Any,
        cache: CompressedCache,
        ahead: int = AHEAD,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and model.device.type != "cuda":
            raise UsageError(
                f"CUDA graphs need a CUDA device; this model is on {model.device.type}: call the "
                "model itself"
            )
        self.replays = 0
        """Steps replayed so far."""
        self._model, self._cache, self._ahead = model, cache, max(1, ahead)
        self._recorder: Recorder = CudaGraphs(model.device) if recorder is None else recorder
        self._check()
        rows = len(cache.conversation.starts)
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._positions = self._next_positions()
        self._replay: Callable[[], Tensor] | None = None
        self._left = 0

    @torch.no_grad()
    def __call__(self, input_ids: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits that follow these tokens."""
        self._ids.copy_(input_ids)
        if self._replay is None or self._left == 0:
            return self._by_hand()
        conversation, seen = self._cache.conversation, self._cache.get_seq_length()
        conversation.see_ids(self._ids, seen)
        out = self._replay().clone()
        self._cache.advance(1)
        self.replays += 1
        self._left -= 1
        return out

    def _by_hand(self) -> Tensor:
        """One step; where the host has nothing to decide for a while after it, record the next."""
        self._replay = None
        room = min(self._ahead, self._cache.quiet_steps - 1)
        if room >= WORTH:
            self._cache.reserve(room + 1)
        out = self._step().clone()
        if room >= WORTH:
            ids = self._cache.conversation.token_ids
            self._replay = self._recorder.record(self._step)
            self._cache.advance(-1)  # the host took the step that was recorded, the device did not
            self._cache.conversation.token_ids = ids
            self._left = room
        return out

    def _step(self) -> Tensor:
        """What is recorded: a pass over the tokens in `_ids`."""
        with self._cache.conversation.without_masks():
            return take_step(self._model, self._ids, self._positions, self._cache)

    def _next_positions(self) -> Int[Tensor, "rows 1"]:
        """Of the next token: how many its row has seen, and M-RoPE's offset where there is one."""
        conversation = self._cache.conversation
        seen = [self._cache.get_seq_length() - start for start in conversation.starts]
        positions = torch.tensor(seen, device=self._model.device)[:, None]
        deltas = conversation.rope_deltas
        return positions if deltas is None else positions + deltas.to(positions.device)

    def _check(self) -> None:
        options = self._cache.conversation.planner.options
        if options.prefetch is not None:
            raise UsageError(
                "prefetch works across steps and cannot be part of a graph of one step: apply the "
                "profile without prefetch, or call the model itself"
            )
        if self._cache.conversation.hides:
            raise CompressionError(
                "the last pass's attention mask hides tokens after the prompt, and recorded steps "
                "have no mask: call the model itself, with attention_mask"
            )
        for layer in self._cache.covered:
            if layer.ragged is None:
                empty = layer.account.state is LayerState.EMPTY
                reason = "no prompt yet" if empty else layer.account.reason
                raise CompressionError(
                    f"layer {layer.account.layer} is not compressed ({reason}): expected a cache "
                    "whose prompt was compressed; call the model itself"
                )
            width = layer.ragged.storage.key.shape[1]
            if layer.ragged.has_few_bits and width % 8:
                raise CompressionError(
                    f"layer {layer.account.layer} keeps tokens in fewer bits, on the device or the "
                    f"host, of width {width}, which no CUDA kernel reads, and plain torch makes "
                    'the host wait: call the model itself, or use host_dtype="same" and a profile '
                    "whose strategies keep 16 bits"
                )
            if layer.ragged.kernels.name == "torch":
                raise CompressionError(
                    "steps in plain torch make the host wait and cannot be recorded: expected the "
                    "Triton kernels (the receipt's `kernels` says why they are not used)"
                )
            if any(head.index.positions is not None for head in layer.ragged.dynamic.values()):
                raise CompressionError(
                    f"layer {layer.account.layer} has heads whose keys have a bias that turns with "
                    "positions, which no CUDA kernel scores yet, and plain torch makes the host "
                    "wait: call the model itself"
                )
