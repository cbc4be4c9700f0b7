"""The bytes of every schema version: written the same, read for ever."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hkvprof import load_profile
from hkvprof.errors import ProfileError
from hkvprof.profile.certificate import KEY as CERTIFICATE
from hkvprof.profile.record import SCHEMA_VERSION
from tests.profiles import (
    GOLDEN,
    GOLDEN_V1,
    GOLDEN_V1_INDEX,
    GOLDEN_V2,
    GOLDEN_V3,
    make_profile,
    one_length,
    plain_profile,
    with_key_bias,
    with_queries,
)

ROOT = Path(__file__).parents[2]
SHA256 = {
    GOLDEN: "56830007b36421440388e964c04fce99690ccf897490bb86fc4d0592a963b79a",
    GOLDEN_V3: "5d4aebf28f9ee0c68bbea7bfc32471b5675b209280939cc4524dadcd9639fcb5",
    GOLDEN_V2: "6990cf65bc0b510f151ede8a87133ba53ea8482608346fff74862f41c378fca8",
    GOLDEN_V1: "573212a7031ef4bf8d89b2f6103250aa607fa46af741ea8606b8e88d85f9dee0",
    GOLDEN_V1_INDEX: "38d4ed3c3e1c2559c4a095c732a207e296d2443ba0019f79eec61aab9136a471",
}


@pytest.mark.parametrize("path", SHA256, ids=lambda path: path.name)
def test_golden_files_are_those_that_were_committed(path: Path) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path]


def test_writing_makes_the_same_bytes() -> None:
    assert SCHEMA_VERSION == 4, "commit a golden file of the new schema and keep this one loading"
    assert with_queries(with_key_bias(make_profile())).to_bytes() == GOLDEN.read_bytes()


def test_golden_file_loads_with_the_numbers_it_was_made_of() -> None:
    golden, made = load_profile(GOLDEN), with_queries(with_key_bias(make_profile()))
    for name in (
        "ratios",
        "strategy",
        "budget",
        "sparsity_mean",
        "sparsity_std",
        "lengths",
        "loss",
    ):
        np.testing.assert_array_equal(getattr(golden, name), getattr(made, name))
    assert golden.index is not None
    assert golden.index.sizes == (16, 32)
    for name, array in made.index.tensors().items():
        np.testing.assert_array_equal(golden.index.tensors()[name], array)
    assert golden.queries is not None
    for name, array in made.queries.tensors().items():
        np.testing.assert_array_equal(golden.queries.tensors()[name], array)
    assert golden.statistics is not None
    for name, array in made.statistics.tensors().items():
        np.testing.assert_array_equal(golden.statistics.tensors()[name], array)
    for name in ("fingerprint", "strategies", "keep", "kappas", "recipe", "default_budget"):
        assert getattr(golden, name) == getattr(made, name)
    assert golden.provenance == made.provenance


def test_loading_and_saving_again_keeps_the_bytes(tmp_path) -> None:
    again = load_profile(GOLDEN).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == GOLDEN.read_bytes()


def test_version_3_becomes_a_profile_of_today() -> None:
    """All that stays on the device was in the model's own dtype."""
    assert load_profile(GOLDEN_V3).to_bytes() == make_profile().to_bytes()


def test_certificates_of_version_3_still_speak_of_their_profile() -> None:
    """What a file says in more words, with the same meaning, is not other content."""
    for path in sorted((ROOT / "profiles").glob("*.safetensors")):
        profile = load_profile(path)
        assert (profile.certificate is None) == (CERTIFICATE not in profile.provenance)


def test_version_1_without_an_index_becomes_a_profile_of_today() -> None:
    expected = replace(one_length(plain_profile(make_profile())), statistics=None)
    assert load_profile(GOLDEN_V1).to_bytes() == expected.to_bytes()


def test_version_2_becomes_a_profile_of_one_prompt_length() -> None:
    """Its mean one, by the provenance; without one, any."""
    loaded = load_profile(GOLDEN_V2)
    assert loaded.lengths.tolist() == [401]
    assert loaded.to_bytes() == replace(one_length(make_profile()), statistics=None).to_bytes()
    for tokens in (1, 401, 10**6):
        np.testing.assert_array_equal(loaded.loss_at(tokens), loaded.loss[0])


def test_version_1_with_an_index_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match=r"quantised in a way .* no longer reads.*calibrate"):
        load_profile(GOLDEN_V1_INDEX)


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
    assert metadata["schema"] == 4
    assert metadata["fingerprint"]["grid"] == {
        "layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 8,
    }  # fmt: skip
    np.testing.assert_array_equal(budget, make_profile().budget)


@pytest.mark.parametrize("size", [16, 32])
def test_the_documented_code_of_the_projected_index_is_the_one_in_use(size: int) -> None:
    """docs/profile-format.md, "The projected index", in plain numpy against selection/index.py."""
    torch = pytest.importorskip("torch")
    from hkvprof.selection.index import HeadTables, ProjectedIndex
    from hkvprof.selection.rotary import Positions

    arrays = with_key_bias(make_profile()).index
    at, codes = arrays.sizes.index(size), size // 8
    owner = arrays.subspaces[at][1, 1]
    used = len(owner)
    p, q = (
        getattr(arrays, f"{n}_projection")[1, 1, :, :used].astype(np.float64)
        for n in ("key", "query")
    )
    mean, deviation = arrays.key_mean[1, 1], arrays.deviation[1, 1, :used].astype(np.float64)
    centroid = arrays.codebooks[at][1, 1] * (deviation * 6 / 127)
    keys = np.random.default_rng(0).normal(size=(5, 8))
    query = np.random.default_rng(1).normal(size=8)
    positions = np.array([[3, 3, 3, 3, 4], [0, 0, 1, 1, 4], [0, 1, 0, 1, 4]])
    bias, angle = arrays.key_bias[1, 1], positions[arrays.axis].T * arrays.frequency
    turned = np.zeros((5, 8))
    turned[:, :3] = bias[:3] * np.cos(angle) - bias[3:6] * np.sin(angle)
    turned[:, 3:6] = bias[3:6] * np.cos(angle) + bias[:3] * np.sin(angle)
    t = (keys - turned - mean) @ p
    code = np.zeros((5, codes), dtype=np.int64)
    score = turned @ query
    for number in range(codes):
        mine = owner == number
        if mine.any():
            code[:, number] = ((t[:, None, mine] - centroid[:, mine]) ** 2).sum(-1).argmin(-1)
            score += centroid[code[:, number]][:, mine] @ (query @ q)[mine]

    head = HeadTables.load(arrays, 1, 1, size, torch.device("cpu"))
    told = Positions(0, 5, torch.from_numpy(positions.astype(np.int32)))
    index = ProjectedIndex.build(torch.tensor(keys).float(), head, told)
    np.testing.assert_array_equal(index.codes.numpy(), code)
    found = index.logits(torch.tensor(query).float())
    np.testing.assert_allclose(found.numpy(), score, rtol=1e-4, atol=1e-4)
