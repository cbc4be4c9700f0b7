"""Other projects' files: written as those read them, read back, and refused when wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.errors import HkvError, ProfileError, UsageError
from hkvprof.heads import HeadGrid, HeadType
from hkvprof.profile.exchange import head_ranks, imported
from hkvprof.profile.formats import FORMATS, find_format
from hkvprof.profile.record import load_profile
from tests.profiles import GRID, STRATEGIES, fingerprint, make_profile

MEASURED = load_profile("profiles/smollm2.hkv.safetensors")
NAMES = sorted(FORMATS)


def files_of(name: str) -> dict[str, bytes]:
    """Files of a format for GRID, a little different for every head."""
    return dict(FORMATS[name].write(make_profile()).files)


def read(name: str, files: dict[str, bytes], grid: HeadGrid = GRID, budget: Any = None) -> Any:
    return FORMATS[name].read(files, grid, budget)


# -- what is written -------------------------------------------------------------------------------


def test_ranks_are_those_of_the_losses_under_pruning() -> None:
    ranks = head_ranks(MEASURED)
    static = [s.head_type is HeadType.STATIC and s.resident_bits == 16 for s in MEASURED.strategies]
    place = int(np.argmin(np.abs(MEASURED.ratios - 0.2)))
    lost = MEASURED.loss_at(MEASURED.usual_tokens)[static][..., place].min(axis=0)
    assert (np.argsort(ranks, axis=None) == np.argsort(lost, axis=None)).all()
    assert ranks.min() == 0
    assert ranks.max() == 1
    assert np.allclose(np.sort(ranks, axis=None), np.linspace(0, 1, ranks.size))


def test_heads_that_tie_share_a_rank() -> None:
    profile = make_profile()
    loss = profile.loss.copy()
    loss[:, :2] = 0
    loss[:, :2, 0, 0] = 1
    ranks = head_ranks(replace(profile, loss=loss))
    assert ranks[0, 0] == 1
    assert set(np.delete(ranks.ravel(), 0)) == {(GRID.total - 2) / 2 / (GRID.total - 1)}


def test_profiles_that_tell_no_head_from_another_are_refused() -> None:
    profile = make_profile("uniform")
    even = replace(profile, sparsity_mean=np.zeros_like(profile.sparsity_mean))
    for name in ("duo", "rtp"):
        with pytest.raises(UsageError, match="tells no head from another"):
            FORMATS[name].write(even)
    strategies = tuple(replace(STRATEGIES[2], chunk=size) for size in (4, 8, 16, 32))
    with pytest.raises(UsageError, match="without static heads"):
        FORMATS["duo"].write(replace(make_profile(), strategies=strategies, index=None))


def test_a_paper_profile_is_ranked_by_what_it_measured() -> None:
    profile = make_profile("paper")
    mean = profile.sparsity_mean[0].reshape(GRID.layers, GRID.kv_heads, GRID.group).mean(axis=-1)
    assert (np.argsort(head_ranks(profile), axis=None) == np.argsort(-mean, axis=None)).all()


def test_duo_is_read_as_numpy_reads_it() -> None:
    files = FORMATS["duo"].write(MEASURED).files
    scores = np.loadtxt(io.BytesIO(files["full_attention_heads.tsv"]), delimiter="\t")
    assert scores.shape == (30, 3)
    assert np.allclose(scores, head_ranks(MEASURED), atol=1e-8)
    config = json.loads(files["config.json"])
    assert (config["sink_size"], config["recent_size"]) == (128, 256)


def test_sparsemm_deals_out_the_plan_of_the_default_budget() -> None:
    """By its own arithmetic: places in the file, means, sums over a group; `ratio` 0."""
    grid = MEASURED.grid
    scores = json.loads(FORMATS["sparsemm"].write(MEASURED).files["head_score.json"])
    values = np.array([np.mean(one) for one in scores.values()])
    values = (values / values.sum()).reshape(grid.layers, grid.kv_heads, grid.group).sum(axis=-1)
    capacity = values * grid.total * MEASURED.default_budget
    mean = MEASURED.budget.astype(np.float64).mean()
    assert np.allclose(capacity, MEASURED.budget / mean * MEASURED.default_budget, rtol=1e-5)


def test_rtp_marks_the_needier_half_for_all_query_heads_of_a_group() -> None:
    config = json.loads(FORMATS["rtp"].write(MEASURED).files["headwise_config.json"])
    pattern = config["headwise_config"]
    rows = np.array([pattern[str(layer)] for layer in range(30)])
    assert rows.shape == (30, 9)
    heads = rows.reshape(30, 3, 3)
    assert (heads == heads[..., :1]).all()
    assert (heads[..., 0] == (head_ranks(MEASURED) >= 0.5)).all()
    assert heads[..., 0].mean() == pytest.approx(0.5, abs=0.02)


def test_lukv_is_the_plan_at_every_budget() -> None:
    data = FORMATS["lukv"].write(MEASURED).files["budget_curve.npy"]
    curves = np.load(io.BytesIO(data), allow_pickle=False)
    assert curves.shape == (99, 30, 3)
    for step in (50, 90):
        plan = MEASURED.allocation(1 - step / 100, MEASURED.usual_tokens)
        assert np.allclose(1 - curves[step - 1], plan.ratio)
        assert 1 - curves[step - 1].mean() == pytest.approx(1 - step / 100, abs=2e-3)


def test_budgets_that_nothing_fits_repeat_the_last_that_fits_and_say_so() -> None:
    profile = make_profile()
    written = FORMATS["lukv"].write(replace(profile, provenance={"tokens": {"mean": 100.0}}))
    assert "the last 13 curves repeat" in written.not_held[-1]
    curves = np.load(io.BytesIO(written.files["budget_curve.npy"]))
    assert (curves[-13:] == curves[-14]).all()
    assert 1 - curves[-14].mean() == pytest.approx(0.14, abs=1e-3)


# -- and read back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_makes_a_sound_profile_again(name: str, tmp_path: Path) -> None:
    for file, data in files_of(name).items():
        (tmp_path / file).write_bytes(data)
    profile, not_held = imported(FORMATS[name], tmp_path, fingerprint(), None)
    again = load_profile(profile.save(tmp_path / "p"))
    assert again.fingerprint == fingerprint()
    assert (again.head_types == HeadType.STATIC).all()
    assert again.provenance["imported"]["format"] == name
    assert again.provenance["imported"]["not_held"] == list(not_held)
    assert again.budget.mean() == pytest.approx(again.default_budget, rel=1e-5)
    plan = again.allocation(again.default_budget, 40_000)
    assert plan.ratio.mean() == pytest.approx(again.default_budget, rel=1e-3)


def test_a_pattern_keeps_full_heads_whole() -> None:
    scores = np.array([[0.9, 0.1], [0.5, 0.49], [1.0, 0.0]])
    text = "\n".join("\t".join(map(str, row)) for row in scores)
    config = json.dumps({"sink_size": 16, "recent_size": 64})
    files = {"full_attention_heads.tsv": text.encode(), "config.json": config.encode()}
    reading = read("duo", files)
    assert ((reading.share == 1) == (scores >= 0.5)).all()
    for budget, full in ((0.01, 0), (0.17, 1), (0.34, 2), (1.0, 6)):
        shares = read("duo", files, budget=budget).share
        best = set(np.argsort(-scores, axis=None)[:full].tolist())
        assert set(np.flatnonzero(shares == 1).tolist()) == best
    with pytest.raises(UsageError, match="less than the windows"):
        read("duo", files, budget=0.001)
    assert (reading.keep.sinks, reading.keep.recent) == (16, 64)
    assert reading.share.min() == pytest.approx(81 / 32768)


def test_a_head_is_full_where_one_of_its_query_heads_is() -> None:
    pattern = {"0": [0, 1, 0, 0], "1": [1, 1, 0, 0], "2": [0, 0, 0, 0], "sink_token_num": 2}
    files = {"headwise_config.json": json.dumps({"headwise_config": pattern}).encode()}
    reading = read("rtp", files)
    assert (reading.share == 1).tolist() == [[True, False], [True, False], [False, False]]
    assert any("1 KV heads serve both kinds" in said for said in reading.not_held)
    assert (reading.keep.sinks, reading.keep.recent) == (2, 8192)


def test_sparsemm_scores_are_summed_over_groups_as_it_does() -> None:
    scores = {f"{layer}-{head}": [0.0, 0.0] for layer in range(3) for head in range(4)}
    scores |= {"0-0": [0.2, 0.4], "0-1": [0.0, 0.2], "2-3": [0.4, 0.4]}
    reading = read("sparsemm", {"head_score.json": json.dumps(scores).encode()}, budget=0.2)
    means = np.zeros(6)
    means[0], means[5] = 0.3 + 0.1, 0.4
    expected = 0.2 * (0.1 + 0.9 * means / means.mean())
    assert np.allclose(reading.share.ravel(), expected)
    assert reading.budget == 0.2


def test_a_budget_picks_the_curve_of_lukv() -> None:
    curves = np.tile(np.linspace(0.01, 0.99, 99)[:, None, None], (1, 3, 2))
    curves[:, 0, 0] -= 0.01
    curves[:, 0, 1] += 0.01
    stream = io.BytesIO()
    np.save(stream, curves)
    files = {"budget_curve.npy": stream.getvalue()}
    assert read("lukv", files, budget=0.25).share[1, 0] == pytest.approx(0.25)
    assert read("lukv", files).share[0, 0] == pytest.approx(0.11)
    for budget in (0.255, 1.0, 0.001):
        with pytest.raises(UsageError, match=r"0\.01, 0\.02 and so on"):
            read("lukv", files, budget=budget)


def test_a_pattern_of_zeros_and_ones_takes_no_budget() -> None:
    with pytest.raises(UsageError, match="its pattern says what heads keep"):
        read("rtp", files_of("rtp"), budget=0.1)


def test_unknown_formats_are_told_those_there_are() -> None:
    with pytest.raises(UsageError, match="one of duo, sparsemm, rtp, lukv"):
        find_format("kvzip")


# -- wrong files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [{"layers": 4}, {"query_heads": 8, "kv_heads": 4}])
def test_files_of_another_model_are_refused(name: str, change: dict[str, int]) -> None:
    other = replace(GRID, **change)
    with pytest.raises(ProfileError, match=r"another model|query heads"):
        read(name, files_of(name), other)


def rewritten(name: str, change: Callable[[Any], Any]) -> dict[str, bytes]:
    """The JSON of a format after `change`."""
    file = FORMATS[name].files[-1]
    files = files_of(name)
    return {**files, file: json.dumps(change(json.loads(files[file]))).encode()}


def of_pattern(change: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda value: {"headwise_config": {**value["headwise_config"], **change}}


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    ("sparsemm", lambda v: [], "an object of lists"),
    ("sparsemm", lambda v: {**v, "0-0": []}, "a list of numbers"),
    ("sparsemm", lambda v: {**v, "0-0": [-0.1]}, "at least 0"),
    ("sparsemm", lambda v: {**v, "0-0": ["1"]}, "a list of numbers"),
    ("sparsemm", lambda v: {**v, "0-0": [True]}, "a list of numbers"),
    ("sparsemm", lambda v: {**v, "0-0": [0.1, 0.2]}, "as many for every head"),
    ("sparsemm", lambda v: dict(sorted(v.items(), reverse=True)), "out of order"),
    ("sparsemm", lambda v: {**v, "layer": [1]}, "has besides layer"),
    ("sparsemm", lambda v: {name: [0] for name in v}, "0 for all heads"),
    ("sparsemm", lambda v: {name: [0.5] for name in v}, "no head from another"),
    ("rtp", lambda v: v["headwise_config"], "the key headwise_config"),
    ("rtp", of_pattern({"0": [1, 0, 2, 0]}), "0 .window. and 1"),
    ("rtp", of_pattern({"0": [True, False, True, False]}), "0 .window. and 1"),
    ("rtp", of_pattern({"1": [1, 0]}), "layer 1 has 2 heads, the model 4"),
    ("rtp", of_pattern({"sink_token_num": -1}), "sink_token_num should be a whole number"),
    ("rtp", of_pattern({"swa_token_num": 10**6}), "swa_token_num should be a whole number"),
    ("duo", lambda v: {**v, "recent_size": None}, "recent_size should be a whole number"),
    ("duo", lambda v: [], "should hold an object"),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG)
def test_wrong_json_is_refused(name: str, change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        read(name, rewritten(name, change))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.1\t0.2\n0.3\t0.4\n", "3 lines"),
        ("0.1\t0.2\n0.3\n0.4\t0.5\n", "1 or 2 numbers"),
        ("0.1\tnan\n0.3\t0.3\n0.4\t0.5\n", "outside"),
        ("0.1\t1.5\n0.3\t0.3\n0.4\t0.5\n", "outside"),
        ("0.1\tx\n0.3\t0.3\n0.4\t0.5\n", "no table of numbers"),
        ("1\t1\n1\t1\n1\t1\n", "before its training"),
        ("", "no numbers"),
    ],
)
def test_wrong_tables_are_refused(text: str, said: str) -> None:
    files = {**files_of("duo"), "full_attention_heads.tsv": text.encode()}
    with pytest.raises(ProfileError, match=said):
        read("duo", files)


def npy(array: Any) -> dict[str, bytes]:
    stream = io.BytesIO()
    np.save(stream, array)
    return {"budget_curve.npy": stream.getvalue()}


RAMP = np.tile(np.linspace(0.01, 0.99, 99)[:, None, None], (1, 3, 2))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (npy(RAMP[::-1]), "out of order"),
        (npy(RAMP * 2), "outside"),
        (npy(np.where(RAMP > 0.5, np.nan, RAMP)), "outside"),
        (npy(RAMP.astype(int)), "expected floats"),
        (npy(np.array([{}, {}], dtype=object)), "expected floats"),
        ({"budget_curve.npy": npy(RAMP)["budget_curve.npy"][:-8]}, "cut short"),
        ({"budget_curve.npy": b"PK\x03\x04 an archive"}, "no .npy file"),
        ({"budget_curve.npy": b""}, "no .npy file"),
    ],
)
def test_wrong_arrays_are_refused(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        read("lukv", files)


def test_an_array_that_claims_to_be_huge_takes_no_memory() -> None:
    header = npy(RAMP)["budget_curve.npy"][:128].replace(b"(99, 3, 2), ", b"(9999999999,),")
    with pytest.raises(ProfileError, match=r"another model|no \.npy file"):
        read("lukv", {"budget_curve.npy": header})


def cacheless(rng: np.random.Generator, samples: int) -> dict[str, list[float]]:
    """Scores as SparseMM's script made them without a cache: one step and one box a sample."""
    boxes = 1 / rng.integers(2, 30, samples)
    hits = rng.random((GRID.layers * GRID.query_heads, samples)) < 0.3
    hits[0] = True
    names = [f"{layer}-{head}" for layer in range(3) for head in range(4)]
    return {name: (row * boxes).tolist() for name, row in zip(names, hits, strict=True)}


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_were_made_without_a_cache_are_told(seed: int) -> None:
    """SparseMM's issue 10. One head that was hit twice in one sample tells a sound file."""
    scores = cacheless(np.random.default_rng(seed), 20)
    with pytest.raises(ProfileError, match="issue 10"):
        read("sparsemm", {"head_score.json": json.dumps(scores).encode()})
    scores["0-0"][3] *= 2
    assert read("sparsemm", {"head_score.json": json.dumps(scores).encode()}).share.min() > 0


@given(data=st.binary(max_size=200), name=st.sampled_from(NAMES), which=st.integers(0, 1))
def test_any_bytes_are_read_or_refused(data: bytes, name: str, which: int) -> None:
    files = files_of(name)
    file = FORMATS[name].files[which % len(FORMATS[name].files)]
    with suppress(HkvError):
        read(name, {**files, file: data})


@given(cut=st.integers(0, 400), name=st.sampled_from(NAMES), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(cut: int, name: str, byte: int) -> None:
    files = files_of(name)
    file = FORMATS[name].files[0]
    data = bytearray(files[file])
    data[cut % len(data)] = byte
    try:
        reading = read(name, {**files, file: bytes(data)})
    except HkvError:
        return
    assert ((reading.share > 0) & (reading.share <= 1)).all()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"DuoAttention reads full_attention_heads\.tsv and"):
        imported(FORMATS["duo"], tmp_path / "nothing", fingerprint(), None)
    (tmp_path / "any name.json").write_bytes(files_of("sparsemm")["head_score.json"])
    profile, _ = imported(FORMATS["sparsemm"], tmp_path / "any name.json", fingerprint(), None)
    assert profile.provenance["imported"]["file"] == "any name.json"
