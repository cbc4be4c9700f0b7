"""The bytes of schema version 1: written the same, read for ever."""

import hashlib

import numpy as np
import pytest

from hkvprof import load_profile
from hkvprof.artifact import SCHEMA_VERSION
from tests.profiles import GOLDEN, make_profile

SHA256 = "38d4ed3c3e1c2559c4a095c732a207e296d2443ba0019f79eec61aab9136a471"


def test_golden_file_is_the_one_that_was_committed() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256


def test_writing_makes_the_same_bytes() -> None:
    assert SCHEMA_VERSION == 1, "commit a golden file of the new schema and keep this one loading"
    assert make_profile().to_bytes() == GOLDEN.read_bytes()


def test_golden_file_loads_with_the_numbers_it_was_made_of() -> None:
    golden, made = load_profile(GOLDEN), make_profile()
    for name in ("ratios", "strategy", "budget", "sparsity_mean", "sparsity_std", "loss"):
        np.testing.assert_array_equal(getattr(golden, name), getattr(made, name))
    assert golden.index is not None
    assert golden.index.sizes == (16, 32)
    np.testing.assert_array_equal(golden.index.key_projection, made.index.key_projection)
    for name in ("fingerprint", "strategies", "keep", "kappas", "recipe", "default_budget"):
        assert getattr(golden, name) == getattr(made, name)
    assert golden.provenance == made.provenance


def test_loading_and_saving_again_keeps_the_bytes(tmp_path) -> None:
    again = load_profile(GOLDEN).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == GOLDEN.read_bytes()


def test_a_stranger_can_read_it_as_documented() -> None:
    """The reader that docs/profile-format.md describes: no hkvprof, no safetensors."""
    import json
    import struct

    data = GOLDEN.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = json.loads(header["__metadata__"]["hkvprof"])
    entry = header["budget"]
    begin, end = entry["data_offsets"]
    budget = np.frombuffer(data[8 + size + begin : 8 + size + end], "<f4").reshape(entry["shape"])
    assert metadata["schema"] == 1
    assert metadata["fingerprint"]["grid"] == {
        "layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 8,
    }  # fmt: skip
    np.testing.assert_array_equal(budget, make_profile().budget)


@pytest.mark.parametrize("size", [16, 32])
def test_the_documented_code_of_the_projected_index_is_the_one_in_use(size: int) -> None:
    """docs/profile-format.md, "The projected index", in plain numpy against policy/index.py."""
    torch = pytest.importorskip("torch")
    from hkvprof.policy.index import HeadTables, ProjectedIndex

    tables = make_profile().index
    at = tables.sizes.index(size)
    p, q = (getattr(tables, f"{n}_projection")[1, 1].astype(np.float64) for n in ("key", "query"))
    mean, deviation = tables.key_mean[1, 1], tables.deviation[1, 1].astype(np.float64)
    bits = tables.bits[at, 1, 1].astype(int)
    keys = np.random.default_rng(0).normal(size=(5, 8))
    query = np.random.default_rng(1).normal(size=8)
    step = deviation * np.array([0, 1.596, 0.996, 0.586, 0.335, 0.188])[bits]
    half = 2.0 ** (bits - 1)
    code = np.clip(np.floor((keys - mean) @ p / step), -half, half - 1) + half
    expected = ((code - half + 0.5) * step) @ (query @ q)

    head = HeadTables(
        torch.tensor(p).float(), torch.tensor(q).float(), torch.tensor(mean),
        torch.tensor(deviation).float(), tuple(bits.tolist()),
    )  # fmt: skip
    index = ProjectedIndex.build(torch.tensor(keys).float(), head, size)
    found = index.logits(torch.tensor(query).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    shifts = np.cumsum(bits) - bits
    words = (code.astype(np.int64) << shifts).sum(axis=1)
    unsigned = index.words.numpy().astype(np.int64) & ((1 << size) - 1)
    np.testing.assert_array_equal(unsigned, words)
