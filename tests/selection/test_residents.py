"""Tokens in fewer bits: against a quantiser written out, and what may never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.profile.costs import quantised_bytes, scale_group
from hkvprof.selection.residents import Residents, RowFormat, hadamard, rotate

DIMS = [8, 24, 64, 80, 112, 128]


def tokens(count: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a large bias in few channels, and values."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, dim, generator=generator)
    key[:, :3] += 90
    return key, value


def store(key: torch.Tensor, value: torch.Tensor, bits: int) -> Residents:
    """All of a segment's tokens, around their own mean."""
    return Residents.around(key, value, bits).append(key, value)


def written_out(part: np.ndarray, bits: int) -> np.ndarray:
    """One token's channels as its row gives them back, channel by channel."""
    group = scale_group(bits, len(part))
    out = np.zeros(len(part))
    for first in range(0, len(part), group):
        block = part[first : first + group]
        most = 127 if bits == 8 else 7.5
        scale = float(np.float16(max(np.abs(block).max() / most, 2.0**-24)))
        for channel, x in enumerate(block):
            if bits == 8:
                level = max(-127, min(127, round(float(x) / scale)))
            else:
                level = max(0, min(15, round(float(x) / scale + 7.5))) - 7.5
            out[first + channel] = level * scale
    return out


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_as_documented_and_as_long_as_they_are_counted(bits: int, dim: int) -> None:
    key, value = tokens(5, dim)
    format = RowFormat(bits, dim)
    rows = format.encode(key, value)
    assert (rows.shape, rows.dtype) == ((5, quantised_bytes(bits, dim)), torch.uint8)
    for given_part, found in zip((key, value), format.decode(rows), strict=True):
        wanted = np.stack([written_out(row, bits) for row in given_part.numpy()])
        step = given_part.abs().max() / (127 if bits == 8 else 7.5)
        np.testing.assert_allclose(found.numpy(), wanted, atol=float(step) * 1e-3)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_its_own_inverse_and_keeps_products(dim: int) -> None:
    matrix = hadamard(dim, torch.device("cpu")).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64))
    key, query = tokens(4, dim)
    torch.testing.assert_close(rotate(key) @ rotate(query).T, key @ query.T, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_bias_of_keys_costs_no_precision(dim: int) -> None:
    """Four bits of biased keys alone are a trap; centred and rotated they are not."""
    key, value = tokens(256, dim)
    stored = store(key, value, 4)
    found = stored.decode()[0]
    naive = RowFormat(4, dim).decode(RowFormat(4, dim).encode(key, value))[0]
    centred = key - key.mean(dim=0)
    error = (found - key).square().sum() / centred.square().sum()
    assert error < 0.02 < 0.2 < (naive - key).square().sum() / centred.square().sum()


@given(st.sampled_from([4, 8]), st.sampled_from(DIMS), st.integers(1, 40), st.integers(0, 99))
def test_what_is_stored_stays_as_it_is(bits: int, dim: int, count: int, seed: int) -> None:
    key, value = tokens(count, dim, seed)
    stored = store(key, value, bits)
    more = stored.append(*tokens(3, dim, seed + 1))
    assert torch.equal(more.rows[:count], stored.rows)
    some = torch.arange(count).flip(0)
    chosen = more.take(some).decode()
    for part, whole in zip(chosen, stored.decode(), strict=True):
        assert torch.equal(part, whole.flip(0))
    assert stored.nbytes == count * quantised_bytes(bits, dim) + 2 * dim * key.element_size()


@pytest.mark.parametrize("bits", [4, 8])
def test_strange_numbers_do_not_spread_to_other_tokens(bits: int) -> None:
    key, value = tokens(4, 64)
    clean = store(key, value, bits)
    key[2, 5], value[2, 7] = float("nan"), float("inf")
    rows = clean.encode(key, value)
    assert torch.equal(rows[[0, 1, 3]], clean.rows[[0, 1, 3]])
    assert all(bool(part.isfinite().all()) for part in clean.format.decode(rows))
    zeros = store(torch.zeros(2, 64), torch.zeros(2, 64), bits)
    for part in zeros.decode():
        assert float(part.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_back_in_the_models_dtype(dtype: torch.dtype) -> None:
    key, value = (part.to(dtype) for part in tokens(6, 64))
    stored = store(key, value, 8)
    found = stored.decode()
    assert {stored.mean.dtype, found[0].dtype, found[1].dtype} == {dtype}
    torch.testing.assert_close(found[1].float(), value.float(), atol=0.05, rtol=0.02)
