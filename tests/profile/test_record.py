"""Profiles: round trips, read-only arrays, and files from strangers."""

import json
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from hkvprof.errors import BudgetError, ProfileError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.profile.costs import dynamic_layout
from hkvprof.profile.planning import Rules
from hkvprof.profile.record import (
    METADATA_KEY,
    SCHEMA_VERSION,
    Profile,
    ProjectedIndexTables,
    load_profile,
)
from tests.profiles import GOLDEN, make_profile, plain_profile, with_key_bias, with_queries

SEARCH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def parts() -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors of the golden file, for tampering."""
    profile = with_queries(make_profile())
    return json.loads(json.dumps(profile._metadata())), dict(profile.tensors())


def write(path: Path, metadata: object, tensors: dict[str, np.ndarray]) -> Path:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    path.write_bytes(save(tensors, {METADATA_KEY: text}))
    return path


def refused(path: Path) -> str:
    """Loading must raise ProfileError naming the file; its message."""
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("recipe", ["paper", "measured", "uniform"])
def test_round_trip(tmp_path: Path, recipe: str) -> None:
    made = make_profile(recipe, HeadGrid(layers=5, query_heads=6, kv_heads=3, head_dim=16))
    read = load_profile(made.save(tmp_path / "sub" / "p.safetensors"))
    assert read.to_bytes() == made.to_bytes()
    assert read.head_types.shape == (5, 3)
    assert read.grid.group == 2


def test_round_trip_without_index(tmp_path: Path) -> None:
    read = load_profile(plain_profile(make_profile()).save(tmp_path / "p.safetensors"))
    assert read.index is None
    assert len(read.strategies) == 3


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e9, 1e9)
        | st.text(max_size=20, alphabet=st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5, alphabet="abé\n\0"), inner, max_size=3),
        max_leaves=8,
    )
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_any_json_survives_in_provenance(value: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = replace(make_profile(), provenance={"note": value})
        assert load_profile(made.save(Path(folder) / "p")).provenance == {"note": value}


def test_arrays_are_read_only() -> None:
    for profile in (make_profile(), load_profile(GOLDEN)):
        for array in [*profile.tensors().values(), profile.head_types]:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_provenance_that_is_no_json_is_refused_on_saving(value: object, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="plain JSON"):
        replace(make_profile(), provenance={"x": value}).save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


# Files from strangers


@given(st.integers(0, GOLDEN.stat().st_size - 1))
@SEARCH
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOLDEN.read_bytes()[:length])
    refused(path)


@given(st.integers(0, GOLDEN.stat().st_size * 8 - 1), st.integers(0, 2000))
@SEARCH
def test_a_flipped_bit_loads_soundly_or_is_refused(tmp_path: Path, bit: int, near: int) -> None:
    for position in (bit, near * 8 + bit % 8):  # the header is at the front
        data = bytearray(GOLDEN.read_bytes())
        data[position // 8] ^= 1 << position % 8
        path = tmp_path / "flipped.safetensors"
        path.write_bytes(data)
        try:
            profile = load_profile(path)
        except ProfileError:
            continue
        assert profile.grid.total == profile.strategy.size
        profile.to_bytes()


@given(st.binary(max_size=200))
@SEARCH
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(data)
    refused(path)


METADATA_PATHS = [
    ("schema",), ("fingerprint",), ("fingerprint", "grid"), ("fingerprint", "grid", "layers"),
    ("fingerprint", "grid", "kv_heads"), ("fingerprint", "grid", "head_dim"),
    ("fingerprint", "architecture"), ("fingerprint", "rope"), ("fingerprint", "vision"),
    ("fingerprint", "hub_id"), ("recipe",), ("default_budget",), ("keep",), ("keep", "sinks"),
    ("keep", "recent"), ("keep", "window"), ("strategies",), ("strategies", 0),
    ("strategies", 0, "head_type"), ("strategies", 0, "pool"), ("strategies", 3, "bits"),
    ("strategies", 2, "chunk"), ("strategies", 3, "index"), ("strategies", 0, "text_prior"),
    ("kappas",), ("kappas", 0), ("index_sizes",), ("index_sizes", 0), ("provenance",),
]  # fmt: skip
JUNK = [None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [[]], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("keys", METADATA_PATHS, ids=lambda keys: ".".join(map(str, keys)))
def test_metadata_of_the_wrong_kind_is_refused_or_harmless(tmp_path: Path, keys: tuple) -> None:
    for number, junk in enumerate(JUNK):
        metadata, tensors = parts()
        place = metadata
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = junk
        path = write(tmp_path / f"{number}.safetensors", metadata, tensors)
        try:
            profile = load_profile(path)
        except ProfileError:
            continue
        profile.to_bytes()
        profile.allocation(0.5, 4096)
        assert profile.fingerprint.mismatches(make_profile().fingerprint) is not None


@pytest.mark.parametrize("keys", METADATA_PATHS, ids=lambda keys: ".".join(map(str, keys)))
def test_missing_metadata_is_refused_or_harmless(tmp_path: Path, keys: tuple) -> None:
    metadata, tensors = parts()
    place = metadata
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    path = write(tmp_path / "p.safetensors", metadata, tensors)
    with suppress(ProfileError):
        load_profile(path).to_bytes()


@pytest.mark.parametrize("name", sorted(make_profile().tensors()))
def test_tensors_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.safetensors"
    _, tensors = parts()
    whole = tensors[name]
    changes = [
        whole.astype(np.float64), np.zeros(whole.shape, np.int8), whole[None], whole[:0],
        np.zeros((), whole.dtype), whole.reshape(-1), np.zeros((2**20,), np.uint8),
    ]  # fmt: skip
    for changed in changes:
        if changed.shape == whole.shape and changed.dtype == whole.dtype:
            continue
        metadata, tensors = parts()
        tensors[name] = np.ascontiguousarray(changed).reshape(changed.shape)
        refused(write(path, metadata, tensors))
    metadata, tensors = parts()
    del tensors[name]
    if name == "static_margin":  # may be left out
        assert load_profile(write(path, metadata, tensors)).static_margin is None
        return
    refused(write(path, metadata, tensors))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    for name, tensor in parts()[1].items():
        if tensor.dtype.kind != "f":
            continue
        metadata, tensors = parts()
        tensors[name] = tensor.copy()
        tensors[name].flat[0] = value
        refused(write(tmp_path / "p.safetensors", metadata, tensors))


@pytest.mark.parametrize(
    ("name", "value"),
    [("strategy", 4), ("budget", 0), ("budget", 1.5), ("loss", -1), ("ratios", 0.9),
     ("output_error", -0.5), ("lengths", 0), ("lengths", 1024), ("lengths", 2**41),
     ("static_margin", -0.5),
     ("index.deviation", -1), ("index.subspace_16", 2),
     ("index.subspace_32", 4), ("index.subspace_32", 255)],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(tmp_path: Path, name: str, value: float) -> None:
    metadata, tensors = parts()
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = value
    refused(write(tmp_path / "p.safetensors", metadata, tensors))


@pytest.mark.parametrize("used", [0, 2, 5, 64])
def test_codebooks_of_other_channels_are_refused(tmp_path: Path, used: int) -> None:
    """Of four channels, 16 bits describe three; a codebook and its subspaces must agree."""
    path = tmp_path / "p.safetensors"
    codebook, owner = np.zeros((3, 2, 256, used), np.int8), np.zeros((3, 2, used), np.uint8)
    for changes in (
        {"index.codebook_16": codebook},
        {"index.subspace_16": owner},
        {"index.codebook_16": codebook, "index.subspace_16": owner},
    ):
        metadata, tensors = parts()
        if len(changes) == 2 and 1 <= used <= 4:
            load_profile(write(path, metadata, {**tensors, **changes}))
        else:
            refused(write(path, metadata, {**tensors, **changes}))


@pytest.mark.parametrize("sizes", [[], [16], [32], [16, 64], [16, 32, 64], [32, 16, 32]])
def test_index_sizes_name_the_codebooks_of_the_file(tmp_path: Path, sizes: list[int]) -> None:
    metadata, tensors = parts()
    refused(write(tmp_path / "p.safetensors", {**metadata, "index_sizes": sizes}, tensors))


def test_index_sizes_may_come_in_any_order(tmp_path: Path) -> None:
    metadata, tensors = parts()
    path = write(tmp_path / "p.safetensors", {**metadata, "index_sizes": [32, 16]}, tensors)
    index = load_profile(path).index
    assert index is not None
    assert index.sizes == (32, 16)
    np.testing.assert_array_equal(index.subspaces[0][0, 0], [3, 1, 0, 1])


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    for name in ("surprise", "index.surprise", "fingerprint", "recipe"):
        metadata, tensors = parts()
        tensors[name] = np.zeros(1, np.float32)
        refused(write(tmp_path / "p.safetensors", metadata, tensors))


def test_a_huge_shape_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    for shape, end in (([2**40], 2**42), ([2**62, 4], 16), ([2**63, 2**63], 0)):
        header = json.dumps(
            {"loss": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        ).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
        refused(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "X"])
def test_other_dtypes_in_the_header_are_refused(tmp_path: Path, dtype: str) -> None:
    data = GOLDEN.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    header = {name: {**entry, "dtype": dtype} for name, entry in header.items()}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    path = tmp_path / "p.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(path)


def test_a_newer_schema_says_what_to_do(tmp_path: Path) -> None:
    metadata, tensors = parts()
    message = refused(
        write(tmp_path / "p.safetensors", {**metadata, "schema": SCHEMA_VERSION + 1}, tensors)
    )
    assert f"schema version {SCHEMA_VERSION + 1}" in message
    assert "upgrade" in message


def test_other_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": np.zeros(4, np.float32)}))
    assert "without hkvprof metadata" in refused(path)
    path.write_bytes(save({"weight": np.zeros(4, np.float32)}, {"format": "pt"}))
    assert "without hkvprof metadata" in refused(path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{", "[" * 50_000, "NaN"])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path / "p.safetensors", text, parts()[1]))


def test_keys_that_occur_twice_are_refused(tmp_path: Path) -> None:
    metadata, tensors = parts()
    text = json.dumps(metadata)
    twice = '{"schema": 3, ' + text[1:]
    assert "twice" in refused(write(tmp_path / "p.safetensors", twice, tensors))


def test_unknown_metadata_is_refused(tmp_path: Path) -> None:
    metadata, tensors = parts()
    message = refused(write(tmp_path / "p.safetensors", {**metadata, "extra": 1}, tensors))
    assert "extra" in message


def test_places_that_are_no_profile(tmp_path: Path) -> None:
    assert "hkvprof calibrate" in refused(tmp_path / "missing.safetensors")
    refused(tmp_path)
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")


def test_a_checkpoint_sized_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with path.open("wb") as stream:
        stream.truncate(300 * 2**20)  # sparse
    assert "model checkpoint" in refused(path)


# Profiles built in memory


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "guess"}, {"default_budget": 0}, {"default_budget": float("nan")},
        {"default_budget": True}, {"keep": KeepRule(sinks=-1)}, {"strategies": ()},
        {"strategies": (Strategy(HeadType.STATIC, pool=2),) * 4}, {"kappas": (0.05, 1.5)},
        {"strategies": (Strategy(HeadType.DYNAMIC, index="magic"),) * 4},
        {"strategies": (Strategy(HeadType.DYNAMIC, index="projected", bits=8),) * 4},
        {"index": None}, {"provenance": []},
    ],
    ids=str,
)  # fmt: skip
def test_unsound_profiles_cannot_be_made(change: dict) -> None:
    with pytest.raises(ProfileError):
        replace(make_profile(), **change)


@pytest.mark.parametrize("sizes", [(16, 16), (8, 32), (32,), (16.0, 32.0)])
def test_unsound_index_sizes_are_refused(sizes: tuple) -> None:
    index = make_profile().index
    assert isinstance(index, ProjectedIndexTables)
    with pytest.raises(ProfileError):
        replace(make_profile(), index=replace(index, sizes=sizes))


@pytest.mark.parametrize("name", ["codebooks", "subspaces"])
def test_every_index_size_needs_its_arrays(name: str) -> None:
    index = make_profile().index
    assert isinstance(index, ProjectedIndexTables)
    for arrays in ((), getattr(index, name)[:1], getattr(index, name) * 2):
        with pytest.raises(ProfileError):
            replace(make_profile(), index=replace(index, **{name: arrays}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frequency": None}, "all or none"),
        ({"key_bias": None}, "all or none"),
        ({"axis": np.array([0, 1, 3], np.uint8)}, "beyond its 3 axes"),
        ({"axis": np.array([0, 1], np.uint8)}, "index.axis"),
        ({"frequency": np.array([1.0, 0.5, 0.0], np.float32)}, "outside"),
        ({"frequency": np.array([1.0, 0.5, 4.0], np.float32)}, "outside"),
        ({"frequency": np.ones((3, 1), np.float32)}, "0 pairs"),
        ({"frequency": np.ones(5, np.float32)}, "5 pairs"),
        ({"key_bias": np.ones((3, 2, 8), np.float32)}, "do not turn"),
        ({"key_bias": np.zeros((3, 2, 8), np.float32)}, "0 throughout"),
        ({"key_bias": np.zeros((3, 2, 7), np.float32)}, "index.key_bias"),
        ({"key_bias": np.zeros((3, 2, 8), np.float64)}, "index.key_bias"),
    ],
    ids=str,
)
def test_unsound_key_biases_are_refused(change: dict, said: str) -> None:
    profile = with_key_bias(make_profile())
    with pytest.raises(ProfileError, match=said):
        replace(profile, index=replace(profile.index, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"centres": np.ones((3, 4, 3, 7), np.float16)}, "queries.centres"),
        ({"centres": np.ones((3, 2, 3, 8), np.float16)}, "queries.centres"),
        ({"centres": np.ones((3, 4, 3, 8), np.float32)}, "queries.centres"),
        ({"centres": np.full((3, 4, 3, 8), np.inf, np.float16)}, "NaN or infinite"),
        ({"weights": np.full((3, 4, 2), 0.5, np.float32)}, "queries.centres"),
        ({"weights": np.full((3, 4, 3), 0.5, np.float32)}, "shares that sum to 1"),
        ({"weights": np.tile(np.float32([2, -1, 0]), (3, 4, 1))}, "shares that sum to 1"),
        ({"weights": np.ones((3, 4, 0), np.float32)}, "expected 1 to 64 query centres, found 0"),
        ({"weights": np.ones((3, 4, 65), np.float32)}, "expected 1 to 64 query centres, found 65"),
        ({"weights": np.ones((3, 4), np.float32)}, "expected 1 to 64 query centres, found 0"),
        ({"frequency": np.array([1.0, 0.5, 0.0], np.float32)}, "outside"),
        ({"frequency": np.array([1.0, 0.5, 4.0], np.float32)}, "outside"),
        ({"frequency": np.array([1.0, np.nan], np.float32)}, "NaN or infinite"),
        ({"frequency": np.ones((3, 1), np.float32)}, "0 pairs"),
        ({"frequency": np.ones(5, np.float32)}, "5 pairs"),
        ({"frequency": np.ones(3, np.float64)}, "queries.frequency"),
    ],
    ids=str,
)
def test_unsound_queries_are_refused(change: dict, said: str) -> None:
    profile = with_queries(make_profile())
    with pytest.raises(ProfileError, match=said):
        replace(profile, queries=replace(profile.queries, **change))


def test_calibrated_scores_need_their_queries(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"calibrated scores need queries\.\*"):
        replace(with_queries(make_profile()), queries=None)
    metadata, tensors = parts()
    for name in ("queries.weights", "queries.frequency"):
        fewer = {key: one for key, one in tensors.items() if key != name}
        assert name.partition(".")[2] in refused(write(tmp_path / "p", metadata, fewer))


@pytest.mark.parametrize("score", ["magic", "", None, 1, ["window"], "Window"])
def test_unknown_scores_are_refused(tmp_path: Path, score: object) -> None:
    metadata, tensors = parts()
    metadata["strategies"][0]["score"] = score
    assert "unknown score" in refused(write(tmp_path / "p", metadata, tensors))


def test_scores_are_for_static_heads(tmp_path: Path) -> None:
    metadata, tensors = parts()
    metadata["strategies"][2]["score"] = "calibrated"
    assert "no score of its own" in refused(write(tmp_path / "p", metadata, tensors))


def test_a_score_by_the_window_is_not_told_and_no_other_content() -> None:
    profile = make_profile()
    told = profile.strategies[0].to_json()
    assert "score" not in told
    assert Strategy.from_json({**told, "score": "window"}) == profile.strategies[0]
    asked = replace(profile.strategies[0], score="calibrated")
    assert Strategy.from_json(asked.to_json()) == asked
    assert asked.name == "static-calibrated-pool31"
    assert with_queries(profile).content_digest != profile.content_digest


def test_positions_on_several_axes_are_planned_for() -> None:
    """Twelve bytes per token, whatever the heads: those get what is left."""
    plain, biased = make_profile(), with_key_bias(make_profile())
    assert plain.position_bytes(1000) == 0
    assert biased.position_bytes(1000) == 12_000
    plans = [profile.plan(0.5, 1000) for profile in (plain, biased)]
    assert plans[1].position_bytes == 12_000
    limit = 0.5 * plans[1].dense_bytes + 8 * 6
    assert plans[1].resident_bytes <= limit
    ratios = [profile.allocation(0.5, 1000).ratio.mean() for profile in (plain, biased)]
    assert ratios[0] - ratios[1] == pytest.approx(12 / biased.grid.token_bytes(2), abs=1e-4)
    assert biased.plan(1.0, 1000).position_bytes == 0


# Planning


def test_measured_profiles_are_planned_anew_for_every_budget() -> None:
    profile = make_profile()
    for budget in (0.1, 0.2, "50%", 4096, "1MiB"):
        plan = profile.allocation(budget, tokens=32768)
        assert plan.ratio.shape == plan.strategy.shape == (3, 2)
    assert profile.allocation(1.0, 32768).ratio.min() == 1


@pytest.mark.parametrize("recipe", ["paper", "uniform"])
def test_other_recipes_keep_their_types_and_scale(recipe: str) -> None:
    profile: Profile = make_profile(recipe)
    for share in (0.3, 0.5, 0.9, 1.0):
        plan = profile.allocation(share, tokens=100_000)
        np.testing.assert_array_equal(plan.strategy, profile.strategy)
        assert plan.ratio.astype(np.float64).mean() <= share
        assert plan.ratio.astype(np.float64).mean() == pytest.approx(share, rel=1e-3)


def test_a_budget_below_the_floor_says_so() -> None:
    for recipe in ("measured", "paper"):
        with pytest.raises(BudgetError, match="too small"):
            make_profile(recipe).allocation(0.01, tokens=200)


def test_bytes_count_the_batch() -> None:
    profile = make_profile()
    dense = 4096 * profile.grid.token_bytes(2)
    one = profile.allocation(f"{dense // 5}B", 4096)
    four = profile.allocation(f"{4 * dense // 5}B", 4096, rows=4)
    np.testing.assert_allclose(one.ratio, four.ratio, rtol=1e-3)


def test_a_dynamic_head_always_has_room_for_its_index() -> None:
    """Between the floor and the first measured ratio the index alone can be too large."""
    grid = HeadGrid(layers=3, query_heads=4, kv_heads=2, head_dim=128)
    profile = make_profile(grid=grid)
    for tokens in (64, 1000, 32768):
        for share in (0.3, 0.1, 0.07, 0.0625, 0.05):
            try:
                plan = profile.allocation(share, tokens)
            except BudgetError:
                assert share * tokens < 30
                continue
            for choice, ratio in zip(plan.strategy.flat, plan.ratio.flat, strict=True):
                strategy = profile.strategies[choice]
                assert strategy.head_type is HeadType.STATIC or dynamic_layout(
                    strategy, float(ratio), tokens, profile.keep, 128, 2
                )


@pytest.mark.parametrize(
    "planning",
    [None, [], {}, {"even": 0.5, "transfer_weight": 0.0}, {"more": 0.5}, {"even": "0.5"},
     {"even": 1.5}],
)  # fmt: skip
def test_planning_rules_out_of_bounds_are_refused(tmp_path: Path, planning: object) -> None:
    metadata, tensors = parts()
    refused(write(tmp_path / "p.safetensors", {**metadata, "planning": planning}, tensors))


def test_planning_rules_are_kept(tmp_path: Path) -> None:
    profile = replace(make_profile(), rules=Rules(0.25))
    assert load_profile(profile.save(tmp_path / "p.safetensors")).rules == Rules(0.25)


@pytest.mark.parametrize("name", ["lengths", "planning", "resident_bits", "score", "queries"])
def test_older_files_hold_nothing_newer(tmp_path: Path, name: str) -> None:
    metadata, tensors = parts()
    for other in {"lengths", "planning"} - {name}:
        metadata.pop(other, None)
        tensors.pop(other, None)
    for strategy in metadata["strategies"]:
        for other in {"resident_bits", "score"} - {name}:
            strategy.pop(other, None)
    if name != "queries":
        tensors = {key: one for key, one in tensors.items() if not key.startswith("queries.")}
    older = metadata
    path = write(tmp_path / "p.safetensors", {**older, "schema": 2}, tensors)
    assert name in refused(path)
