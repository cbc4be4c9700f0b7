"""Rows on disk: runs that stop and go on, shards, merging, damaged files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

import hkvprof
from hkvprof.calibration.calibrate import Run, calibrate, measure
from hkvprof.calibration.merge import measured_by, merge
from hkvprof.calibration.probe import Probe
from hkvprof.calibration.recipe import Recipe
from hkvprof.calibration.rows import (
    INDEX,
    ROW_SCHEMA,
    Conditions,
    RowFolder,
    read_conditions,
    read_row,
    read_rows,
    read_tables,
)
from hkvprof.cli import run
from hkvprof.errors import UsageError
from hkvprof.heads import KeepRule, Modality
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import make_sample

BUDGET = 0.2
KEEP = KeepRule(2, 4, 8)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [
        make_sample(task, 40 + i, images=2, split="calibration", followups=i % 2)
        for i, task in enumerate(("ocr", "list", "find", "kv"))
    ]


@pytest.fixture(scope="module")
def whole(tiny: tuple[Any, Any], samples: list[Sample]) -> bytes:
    """The profile of one uninterrupted run."""
    return calibrate(*tiny, samples, Recipe(budget=BUDGET, keep=KEEP)).to_bytes()


@pytest.fixture(scope="module")
def folder(
    tiny: tuple[Any, Any], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Rows of all samples."""
    path = tmp_path_factory.mktemp("rows") / "rows"
    assert measure(*tiny, samples, path, Recipe(keep=KEEP)) == 4
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of samples, as they are measured."""
    seen: list[str] = []
    work = Probe.measure

    def count(self: Probe, tables: Any) -> Any:
        seen.append(self.sample.id)
        return work(self, tables)

    monkeypatch.setattr(Probe, "measure", count)
    return seen


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rows_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("row-*"))


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(
    tiny: tuple[Any, Any], samples: list[Sample], whole: bytes, tmp_path: Path, measured: list[str]
) -> None:
    def two(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        for number, item in enumerate(items):
            if description == "measuring heads" and number == 2:
                raise KeyboardInterrupt
            yield item

    recipe, folder = Recipe(budget=BUDGET, keep=KEEP), tmp_path / "rows"
    with pytest.raises(KeyboardInterrupt):
        calibrate(*tiny, samples, recipe, rows=folder, track=two)
    ids = sorted(sample.id for sample in samples)
    assert measured == ids[:2]
    assert calibrate(*tiny, samples, recipe, rows=folder).to_bytes() == whole
    assert measured == ids


def test_a_sample_that_changed_is_measured_again(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path, measured: list[str]
) -> None:
    rows = copy(folder, tmp_path / "rows")
    changed = [replace(samples[0], reply="another"), *samples[1:]]
    found = calibrate(*tiny, changed, Recipe(keep=KEEP), rows=rows)
    assert measured == [samples[0].id]
    turned = replace(samples[1], messages=samples[2].messages)
    calibrate(*tiny, [changed[0], turned, *samples[2:]], Recipe(keep=KEEP), rows=rows)
    assert measured == [samples[0].id, samples[1].id]
    # The folder now speaks of the changed samples.
    assert merge([rows]).to_bytes() != found.to_bytes()


def test_shards_make_the_same_profile(
    tiny: tuple[Any, Any], samples: list[Sample], whole: bytes, tmp_path: Path, measured: list[str]
) -> None:
    """In one folder, or in a folder each, whatever the order."""
    shared, apart = tmp_path / "shared", [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    counts = [measure(*tiny, samples, shared, Recipe(keep=KEEP), shard=(n, 3)) for n in (2, 1, 3)]
    assert sorted(counts) == [1, 1, 2]
    for number, path in enumerate(apart, start=1):
        measure(*tiny, samples[::-1], path, Recipe(keep=KEEP), shard=(number, 3))
    assert len(measured) == 2 * len(samples)
    recipe = replace(measured_by(shared), budget=BUDGET)
    assert merge([shared], recipe).to_bytes() == whole
    assert merge(apart[::-1], recipe).to_bytes() == whole
    with pytest.raises(UsageError, match="both hold samples"):
        merge([shared, *apart], recipe)


def test_a_shard_waits_for_the_index_that_another_fits(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is told so, fits nothing itself, and its rows are those of one process, to the byte."""
    shared, told, waits = tmp_path / "shared", list[str](), threading.Event()
    conditions = read_conditions(folder)

    def track(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        told.append(description)
        if description.startswith("waiting"):
            waits.set()
        return iterable

    def second_shard() -> int:
        return measure(*tiny, samples, shared, Recipe(keep=KEEP), shard=(2, 2), track=track)

    monkeypatch.setattr(Run, "fit", lambda *_: pytest.fail("fitted again"))
    with ThreadPoolExecutor(1) as other:
        first = RowFolder(shared, conditions)
        with first.in_turn(lambda _: pytest.fail("nobody is there yet")):
            second = other.submit(second_shard)
            assert waits.wait(60)
            first.keep_tables(*read_tables(folder, conditions))
        assert second.result() == 2
    assert told == ["waiting for the index that another process fits", "measuring heads"]
    rows = list(shared.glob("row-*.safetensors"))
    assert len(rows) == 2
    assert all(row.read_bytes() == (folder / row.name).read_bytes() for row in rows)


def test_an_index_is_fitted_again_where_who_fitted_it_failed(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path
) -> None:
    shared = RowFolder(tmp_path / "shared", read_conditions(folder))
    with (
        pytest.raises(UsageError, match="fails"),
        shared.in_turn(lambda _: pytest.fail("nobody is there yet")),
    ):
        raise UsageError("fails")
    assert measure(*tiny, samples, shared.path, Recipe(keep=KEEP), shard=(1, 4)) == 1
    assert (shared.path / INDEX).read_bytes() == (folder / INDEX).read_bytes()


def test_the_default_budget_and_theta_are_decided_when_merging(folder: Path) -> None:
    one, other = (merge([folder], Recipe(budget=share, keep=KEEP)) for share in (0.1, 0.3))
    assert (one.default_budget, other.default_budget) == (0.1, 0.3)
    assert np.array_equal(one.loss, other.loss)
    assert float(one.budget.mean()) < float(other.budget.mean())
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"theta": 0.0}):
        with pytest.raises(UsageError, match=r"expected a|must (lie|be)"):
            Recipe(**wrong)  # type: ignore[arg-type]


def test_rows_tell_text_from_images_and_profiles_how_sure_they_are(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path
) -> None:
    conditions = read_conditions(folder)
    for row in read_rows(folder, conditions):
        sample = next(sample for sample in samples if sample.id == row.id)
        modality = tiny[1].encode([sample.messages]).modality
        assert row.vision_tokens == int((modality == Modality.IMAGE).sum()) > 0
    found = merge([folder]).provenance["confidence"]
    assert found["samples"] == 4
    assert "holds images or video" in found["kinds"]["reason"]
    text = replace(samples[0], messages=({"role": "user", "content": "code star . " * 20},))
    measure(*tiny, [text], tmp_path / "text", Recipe(keep=KEEP))
    (row,) = read_rows(tmp_path / "text", conditions)
    assert row.vision_tokens == 0
    assert merge([tmp_path / "text"]).provenance["confidence"]["reason"].startswith("too few")


def test_conditions_come_back_as_they_were(folder: Path) -> None:
    found = read_conditions(folder)
    assert Conditions.from_json(found.to_json()) == found
    assert found.keep == KEEP
    assert found.itemsize == 4
    assert found.differences(replace(found, dtype="bfloat16", replies="own")) == [
        "replies",
        "dtype",
    ]


def test_sizes_are_told_on_and_nothing_depends_on_them(folder: Path) -> None:
    found = read_conditions(folder)
    assert found.sizes is not None
    assert found.sizes.full_weight_bytes == 2 * found.sizes.weight_bytes > 0
    assert merge([folder]).sizes == found.sizes
    older = replace(found, sizes=None)
    assert found.differences(older) == []
    assert found.digest == older.digest
    assert Conditions.from_json(older.to_json()).sizes is None


# -- what does not belong together ----------------------------------------------------------------


def test_other_conditions_are_refused(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path, measured: list[str]
) -> None:
    for recipe, names in (
        (Recipe(keep=KEEP, replies="own"), "replies"),
        (Recipe(keep=KeepRule(1, 2, 8)), "keep"),
        (Recipe("paper", keep=KEEP), "recipe, strategies, ratios"),
    ):
        with pytest.raises(UsageError, match=rf"other conditions \({names}\)"):
            calibrate(*tiny, samples, recipe, rows=folder)
    with pytest.raises(UsageError, match="fitted on other samples"):
        measure(*tiny, samples[:3], folder, Recipe(keep=KEEP))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UsageError, match="no folder of rows and not empty"):
        measure(*tiny, samples, tmp_path / "photos")
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(UsageError, match="expected 1 <= part <= parts"):
            measure(*tiny, samples, tmp_path / "rows", shard=shard)
    assert measured == []


def test_folders_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "other")
    for file in rows_of(other)[1:]:
        file.unlink()
    (row,) = read_rows(other, read_conditions(other))
    tables, fitted_on = read_tables(folder, read_conditions(folder))
    (other / INDEX).unlink()
    changed = RowFolder(other, read_conditions(other))
    index = replace(tables.index, key_mean=tables.index.key_mean + 1)
    changed.keep_tables(replace(tables, index=index), fitted_on)
    rest = copy(folder, tmp_path / "rest")
    (rest / rows_of(other)[0].name).unlink()
    with pytest.raises(UsageError, match="its index differs"):
        merge([rest, other])
    conditions = replace(read_conditions(folder), keep=KeepRule(1, 2, 8))
    RowFolder(tmp_path / "keep", conditions).add(row)
    with pytest.raises(UsageError, match=r"different conditions \(keep\)"):
        merge([folder, tmp_path / "keep"])
    with pytest.raises(UsageError, match="holds no rows"):
        merge([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])
    (tmp_path / "other" / INDEX).unlink()
    with pytest.raises(UsageError, match="no index tables"):
        merge([other])
    for file in rows_of(other):
        file.unlink()
    with pytest.raises(UsageError, match="no rows yet"):
        merge([other])


def test_a_sample_lies_in_one_folder(folder: Path, tmp_path: Path) -> None:
    """Equal rows or not: whoever gives two folders with one sample did not mean to."""
    other, one = copy(folder, tmp_path / "other"), copy(folder, tmp_path / "one")
    ids = sorted(row.id for row in read_rows(folder, read_conditions(folder)))
    with pytest.raises(UsageError) as error:
        merge([folder, other])
    for name in (str(folder), str(other), *ids):
        assert name in str(error.value)
    for file in rows_of(one)[1:]:
        file.unlink()
    (row,) = read_rows(one, read_conditions(one))
    with pytest.raises(UsageError, match=f"both hold sample '{row.id}': a sample counts once"):
        merge([folder, one])
    (tmp_path / "link").symlink_to(folder)
    for twice in ([folder, folder], [folder, tmp_path / "link"], [folder, folder / "."]):
        with pytest.raises(UsageError, match="is given 2 times"):
            merge(twice)


def test_folders_of_an_older_hkvprof_are_refused_by_name(
    tiny: tuple[Any, Any], samples: list[Sample], folder: Path, tmp_path: Path, measured: list[str]
) -> None:
    """Rows once held less, and their conditions did not say what rows hold."""
    old = copy(folder, tmp_path / "old")
    plain = json.loads((old / "conditions.json").read_text())
    assert plain.pop("row_schema") == ROW_SCHEMA
    (old / "conditions.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=r"other conditions \(row_schema\)"):
        calibrate(*tiny, samples, Recipe(keep=KEEP), rows=old)
    with pytest.raises(UsageError, match=r"different conditions \(row_schema\)"):
        merge([folder, old])
    with pytest.raises(UsageError, match="rows of version 1, and this hkvprof reads 2: measure"):
        merge([old])
    assert measured == []


# -- damaged files --------------------------------------------------------------------------------


def damage(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    if how == "empty":
        return b""
    if how == "text":
        return b"not a row"
    tensors = {name: value.copy() for name, value in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["hkvprof_row"])
    if how == "nan":
        tensors["losses"][0, 0, 0, 0, 0] = np.nan
    elif how == "shape":
        tensors["losses"] = tensors["losses"][:, :, :-1].copy()
    elif how == "mass":
        tensors["modality_mass"] = tensors["modality_mass"] / 2
    elif how == "drift":
        tensors["drift"] = tensors["drift"] - 2
    elif how == "less":
        del tensors["entropy"]
    elif how == "dtype":
        tensors["sparsity"] = tensors["sparsity"].astype(np.float64)
    elif how == "more":
        tensors["extra"] = np.zeros(1, np.float32)
    elif how == "tokens":
        about["tokens"] = -1
    elif how == "vision":
        about["vision_tokens"] = about["tokens"] + 1
    elif how == "no vision":
        del about["vision_tokens"]
    elif how == "id":
        about["id"] = "another"
    elif how == "conditions":
        about["conditions"] = "x"
    elif how == "missing":
        del about["task"]
    return save(tensors, {"hkvprof_row": json.dumps(about)})


@pytest.mark.parametrize(
    "how",
    ["cut", "empty", "text", "nan", "shape", "mass", "drift", "less", "dtype", "more", "tokens",
     "vision", "no vision", "id", "conditions", "missing"],
)  # fmt: skip
def test_damaged_rows_are_named(folder: Path, tmp_path: Path, how: str) -> None:
    rows = copy(folder, tmp_path / "rows")
    file = rows_of(rows)[0]
    file.write_bytes(damage(file.read_bytes(), how))
    with pytest.raises(UsageError, match="not a sound row") as error:
        merge([rows])
    assert str(file) in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4000), st.integers(1, 255), st.integers(0, 3))
def test_flipped_bytes_raise_one_kind_of_error(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, place: int, flip: int, cut: int
) -> None:
    """Where a header is damaged; a number that changed within bounds cannot be told."""
    source = rows_of(folder)[0]
    data = bytearray(source.read_bytes())
    data[place] ^= flip
    file = tmp_path_factory.mktemp("row") / source.name
    file.write_bytes(bytes(data[: len(data) - cut]))
    try:
        row = read_row(file, read_conditions(folder))
    except UsageError:
        return
    assert row.losses.shape == read_row(source, read_conditions(folder)).losses.shape


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": 1}'])
def test_damaged_conditions_are_named(folder: Path, tmp_path: Path, text: str) -> None:
    rows = copy(folder, tmp_path / "rows")
    (rows / "conditions.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read"):
        merge([rows])


def test_damaged_tables_are_named(folder: Path, tmp_path: Path) -> None:
    rows = copy(folder, tmp_path / "rows")
    (rows / INDEX).write_bytes((rows / INDEX).read_bytes()[:-1])
    with pytest.raises(UsageError, match="cannot be read"):
        merge([rows])


# -- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Text samples as a file."""
    lines = [
        {"id": f"s{i}", "task": "t", "reply": "yellow star",
         "messages": [{"role": "user", "content": "code yellow star is 715 . " * 12 + str(i)}]}
        for i in range(3)
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def command(data: Path, *more: str) -> list[str]:
    return ["calibrate", "--model", "tinyvl", "--dtype", "float32", "--device", "cpu",
            "--data", str(data), *more]  # fmt: skip


def test_the_commands_resume_shard_and_merge(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, calls = Probe.measure, []

    def fails(self: Probe, tables: Any) -> Any:
        calls.append(self.sample.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(self, tables)

    monkeypatch.setattr(Probe, "measure", fails)
    out = tmp_path / "p.safetensors"
    waiting = tmp_path / "p.safetensors.rows"
    assert run(command(data, "-o", str(out))) not in (0, None)
    assert len(rows_of(waiting)) == 2
    assert not out.exists()
    assert run(command(data, "-o", str(out))) == 0, capsys.readouterr().err
    assert calls == ["s0", "s1", "s2", "s2"]
    assert out.exists()
    assert not waiting.exists()
    rows = tmp_path / "rows"
    for part in ("1/2", "2/2"):
        assert run(command(data, "--rows", str(rows), "--shard", part)) == 0
    printed = capsys.readouterr().out
    assert "2 samples of shard 1 of 2 measured into" in printed
    merged = tmp_path / "merged.safetensors"
    assert run(["merge", str(rows), "-o", str(merged)]) == 0
    assert "Profile:" in capsys.readouterr().out
    one, other = (hkvprof.load_profile(path) for path in (out, merged))
    assert np.array_equal(one.loss, other.loss)
    assert np.array_equal(one.strategy, other.strategy)
    assert run(["merge", str(rows), "-o", str(merged)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--shard", "1/2"), "--shard needs --rows"),
        (("--rows", "r", "--shard", "2"), "expected I/N"),
        (("--rows", "r", "--shard", "3/2"), "expected I/N"),
    ],
)
def test_bad_shards_are_wrong_usage(
    data: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(data, *more)) == 2
    assert says in capsys.readouterr().err


def test_merging_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.safetensors"
    assert run(["merge", str(tmp_path), "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "holds no rows" in err
    assert not out.exists()
