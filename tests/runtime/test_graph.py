"""Replayed steps equal steps taken one by one: the device advances by tensors alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import ragged
from hkvprof.runtime.graph import GraphDecoder
from hkvprof.runtime.kernels import Extents, QuantisedRows
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.kernels.triton_cases import DEVICES, triton_kernels
from tests.runtime.test_quantised import in_bits


class HostTurnedBack:
    """A graph where there is none: in a replay the host believes that it is the recorded step.

    The step runs again, but all numbers that the host keeps are those of the recording, so that
    only what tensors say can make a difference, as in the replay of a CUDA graph.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.recordings = 0

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recordings += 1
        recorded = self._numbers()
        storages = [layer.ragged.storage.key for layer in self.cache.covered]
        self.cache.advance(1)  # the host's part

        def replay() -> Tensor:
            now = self._numbers()
            self._set(recorded)
            out = step()
            for layer, storage in zip(self.cache.covered, storages, strict=True):
                assert layer.ragged.storage.key is storage, "the storage moved"
            self._set(now)
            return out

        return replay

    def _numbers(self) -> list[Any]:
        return [
            (layer._seen, layer.ragged.seen, list(layer.ragged.storage.lengths),
             copy.deepcopy(vars(layer.account)["heads"]),
             {name: value for name, value in vars(layer.account).items() if name != "heads"})
            for layer in self.cache.covered
        ]  # fmt: skip

    def _set(self, numbers: list[Any]) -> None:
        for layer, (seen, total, lengths, heads, account) in zip(
            self.cache.covered, numbers, strict=True
        ):
            layer._seen, layer.ragged.seen = seen, total
            layer.ragged.storage.lengths = list(lengths)
            vars(layer.account).update(account)
            for mine, old in zip(layer.account.heads, heads, strict=True):
                vars(mine).update(vars(old))


class FromTensors(TorchKernels):
    """Believes what tensors say of lengths, as the Triton kernels do, not what the host says."""

    name = "from tensors"

    def attend(
        self,
        key: Tensor,
        value: Tensor,
        extents: Extents,
        query: Tensor,
        scaling: float,
        quantised: QuantisedRows | None = None,
    ) -> Tensor:
        starts, ends = extents.device_starts.tolist(), extents.device_ends.tolist()
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        told = Extents.of(starts, lengths, key.device)
        return super().attend(key, value, told, query, scaling, quantised)


def profile_of(model: Any, types: str) -> Any:
    kinds: Any = types
    if types == "mixed":
        kinds = np.arange(6).reshape(3, 2) % 2
    if types == "in 8 bits":
        return in_bits(model, 8, np.arange(6).reshape(3, 2) % 2, index="mean", chunk=8)
    return uniform_profile(model, kinds, index="mean", chunk=8)


@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
@pytest.mark.parametrize(
    ("types", "steps", "rows", "options"),
    [
        ("static", 60, (220, 200), {"budget": 0.5, "compress_every": 40}),
        ("static", 40, (150, 131), {"budget": 0.3, "compress_every": 0}),
        ("mixed", 60, (220, 200), {"budget": 0.5, "compress_every": 40, "smoothing": 0.5}),
        ("in 8 bits", 90, (220, 200), {"budget": 0.5, "compress_every": 60, "host_dtype": "int8"}),
        ("mixed", 60, (150, 150), {"budget": 0.3}),  # less room than queries are kept
    ],
)
@torch.no_grad()
def test_replays_are_steps(
    device: str,
    types: str,
    steps: int,
    rows: tuple[int, int],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits, lengths and receipts, over growth and compressions, rows of unequal length."""
    fast = FromTensors() if device == "cpu" else triton_kernels(torch.float32)
    monkeypatch.setattr(ragged, "for_device", lambda device, dtype: fast)
    model = random_llama().to(device)
    ids, mask = (tensor.to(device) for tensor in left_padded(list(rows)))
    forced = token_ids(2, steps, seed=5).to(device)
    with apply(model, profile_of(model, types), **options) as handle:
        plain, replayed = handle.new_cache(), handle.new_cache()
        for cache in (plain, replayed):
            model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
        recorder = HostTurnedBack(replayed) if device == "cpu" else None
        decoder = GraphDecoder(model, replayed, ahead=10, recorder=recorder)
        starts = torch.tensor([0, rows[0] - rows[1]], device=device)
        for step, one in enumerate(forced.split(1, dim=1)):
            positions = rows[0] + step - starts[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            expected = model(
                input_ids=one, attention_mask=mask, position_ids=positions,
                **with_cache(model, plain),
            )  # fmt: skip
            got = decoder(one)
            torch.testing.assert_close(got, expected.logits[:, -1], rtol=1e-4, atol=1e-4)
        assert decoder.replays >= steps / 4
        assert plain.get_seq_length() == replayed.get_seq_length() == rows[0] + steps
        for one, other in zip(replayed.covered, plain.covered, strict=True):
            if plain.receipt().query_bytes:
                torch.testing.assert_close(one._window, other._window, rtol=1e-4, atol=1e-4)
        for mine, other in zip(replayed.receipt().layers, plain.receipt().layers, strict=True):
            assert [_stable(head) for head in mine.heads] == [_stable(head) for head in other.heads]
            assert (mine.steps, mine.dense_bytes) == (other.steps, other.dense_bytes)
            assert mine.compressions == other.compressions
    if recorder is not None:
        assert recorder.recordings > 1


def _stable(head: Any) -> dict[str, Any]:
    """An account without slack, of which a graph reserves more."""
    return {name: value for name, value in asdict(head).items() if name != "resident_bytes"}


@torch.no_grad()
def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    with apply(model, uniform_profile(model, "static"), budget=0.3) as handle:
        cache = handle.new_cache()
        if not torch.cuda.is_available():
            with pytest.raises(UsageError, match="need a CUDA device; this model is on cpu"):
                GraphDecoder(model, cache)
        recorder = HostTurnedBack(cache)
        with pytest.raises(CompressionError, match=r"layer 0 is not compressed.*no prompt yet"):
            GraphDecoder(model, cache, recorder=recorder)
        model(input_ids=token_ids(1, 30), **with_cache(model, cache))
        with pytest.raises(CompressionError, match="shorter than min_tokens"):
            GraphDecoder(model, cache, recorder=recorder)
        cache.reset()
        model(input_ids=token_ids(1, 90), **with_cache(model, cache))
        monkeypatch.setattr(ragged, "for_device", lambda device, dtype: TorchKernels())
        with pytest.raises(CompressionError, match="plain torch make the host wait"):
            GraphDecoder(model, cache, recorder=recorder)
    model = random_llama(hidden_size=48)
    with apply(model, in_bits(model, 8), budget=0.4) as handle:
        cache = handle.new_cache()
        model(input_ids=token_ids(1, 90), **with_cache(model, cache))
        with pytest.raises(
            CompressionError, match=r"layer 0 keeps tokens in fewer .* of width 12,"
        ):
            GraphDecoder(model, cache, recorder=HostTurnedBack(cache))
