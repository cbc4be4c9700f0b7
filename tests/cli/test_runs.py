"""Runs that go on or start anew, dry runs, and the limits of the machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hkvprof.files.atomic import is_part
from hkvprof.models.load import load_empty
from tests.cli.runs import Bed, save_samples
from tests.warm import Ended


def rows_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("row-*"))


def failed(ended: Ended, code: int = 1) -> str:
    """The one line that an error is."""
    assert ended.code == code, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith(("error", "interrupt"))]
    assert "Traceback" not in ended.err
    return line


@pytest.fixture(scope="module")
def rows(bed: Bed, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all samples."""
    folder = tmp_path_factory.mktemp("runs")
    ended = bed.warm.command(
        *bed.calibrate("--rows", str(folder / "rows"), "-o", str(folder / "profile"))
    )
    assert ended.code == 0, ended.err
    return folder / "rows"


def some_rows(rows: Path, target: Path, count: int) -> Path:
    """A folder of rows as a run leaves it that was stopped after `count` samples."""
    target.mkdir()
    for file in [
        *rows_of(rows)[:count],
        *(rows / n for n in ("conditions.json", "index.safetensors")),
    ]:
        (target / file.name).write_bytes(file.read_bytes())
    return target


# -- going on, and starting anew ------------------------------------------------------------------


def test_a_run_goes_on_and_says_so(bed: Bed, rows: Path, whole: bytes, tmp_path: Path) -> None:
    some_rows(rows, tmp_path / "p.rows", 3)
    for more in ((), ("--resume", "--force")):
        ended = bed.warm.command(*bed.calibrate("-o", str(tmp_path / "p"), *more))
        assert ended.code == 0, ended.err
        said = f"continuing: 3 of 4 samples are measured in {tmp_path / 'p.rows'}"
        assert (said in ended.err) == (not more)  # the second run has nothing to go on from
        assert (tmp_path / "p").read_bytes() == whole
        assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_a_run_starts_anew_on_demand(bed: Bed, rows: Path, whole: bytes, tmp_path: Path) -> None:
    """Also where the rows are of other conditions, which a run cannot go on from."""
    some_rows(rows, tmp_path / "p.rows", 3)
    options = bed.calibrate("-o", str(tmp_path / "p"), "--dtype", "bfloat16")
    line = failed(bed.warm.command(*options), 2)
    assert "other conditions (dtype)" in line
    assert line.endswith("start anew with --no-resume")
    assert len(rows_of(tmp_path / "p.rows")) == 3
    ended = bed.warm.command(*options, "--no-resume")
    assert ended.code == 0, ended.err
    assert f"what was measured in {tmp_path / 'p.rows'} is dropped" in ended.err
    assert "measuring heads: 4/4" in ended.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_starting_anew_removes_rows_alone(bed: Bed, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    options = bed.calibrate("--rows", str(folder), "-o", str(tmp_path / "p"), "--no-resume")
    assert "no folder of rows and not empty" in failed(bed.warm.command(*options), 2)
    assert (folder / "notes.txt").read_text() == "mine"
    shard = bed.calibrate("--rows", str(tmp_path / "r"), "--shard", "1/2", "--no-resume")
    assert "other shards" in failed(bed.warm.command(*shard), 2)


# -- dry runs -------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_would_take(bed: Bed, rows: Path, tmp_path: Path) -> None:
    some_rows(rows, tmp_path / "rows", 3)
    options = bed.calibrate("--dry-run", "--rows", str(tmp_path / "rows"), "-o", "/p")
    ended = bed.warm.command(*options, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["samples"], found["measured"]) == (4, 3)
    assert found["tokens"] == {"total": 40 + 41 + 42 + 43, "min": 40, "max": 43}
    empty, _ = load_empty(bed.model)
    weights = 4 * sum(parameter.numel() for parameter in empty.parameters())
    memory = found["memory"]
    assert memory["weights"] == weights
    assert memory["cache"] == 2 * 3 * 2 * 16 * 4 * (43 + 192)  # layers, heads, width, float32
    assert weights + memory["cache"] < memory["peak"] < weights + 16 * 2**20
    assert found["timing"]["tokens"] == 42
    # One sample is left, the index is there: its prompt is read, and measured.
    measure = found["timing"]["look"] + found["timing"]["measure"]
    assert any(found["seconds"] == round(measure * tokens, 1) for tokens in range(40, 44))
    assert len(rows_of(tmp_path / "rows")) == 3
    ended = bed.warm.command(*options)
    assert [line.split()[0] for line in ended.out.splitlines()] == [
        "samples", "tokens", "memory", "time", "basis",
    ]  # fmt: skip
    assert "per token: much longer prompts take longer" in ended.out


def test_a_dry_run_without_weights_says_that_time_is_unknown(bed: Bed, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in bed.model.iterdir():
        if file.suffix in (".json", ".jinja"):
            (bare / file.name).write_bytes(file.read_bytes())
    data = save_samples(tmp_path / "data.jsonl", short=2)
    options = ["calibrate", "--model", str(bare), "--data", str(data), "--dry-run"]
    ended = bed.warm.command(*options, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["seconds"] is None
    assert found["timing"] is None
    assert "time is unknown (cannot load a model from" in found["basis"]
    assert found["tokens"]["total"] > 0
    assert "--json goes with --dry-run" in failed(bed.warm.command(*options[:-1], "--json"), 2)


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1500, 65536])
def test_a_full_disk_keeps_what_is_measured(
    bed: Bed, whole: bytes, tmp_path: Path, limit: int
) -> None:
    """No file may grow beyond `limit` bytes: conditions, the index or the profile fail."""
    path = tmp_path / "p"
    line = failed(bed.warm.command(*bed.calibrate("-o", str(path)), file_limit=limit))
    assert "cannot write" in line
    assert "File too large" in line
    assert not path.exists()
    assert not [entry for entry in tmp_path.rglob("*") if is_part(entry)]
    kept = len(rows_of(tmp_path / "p.rows"))
    assert (f"{kept} of 4 samples are measured" in line) == bool(kept)
    ended = bed.warm.command(*bed.calibrate("-o", str(path)))
    assert ended.code == 0, ended.err
    assert path.read_bytes() == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(bed: Bed, rows: Path, small_disk: Path, tmp_path: Path) -> None:
    line = failed(bed.warm.command(*bed.calibrate("-o", str(small_disk / "p"))))
    assert "No space left on device" in line
    old = small_disk / "old"
    old.write_bytes(b"old")
    (small_disk / "filler").write_bytes(bytes(30_000))
    line = failed(bed.warm.command("merge", str(rows), "-o", str(old), "--force"))
    assert "No space left on device" in line
    assert old.read_bytes() == b"old"
    assert not [entry for entry in small_disk.rglob("*") if is_part(entry)]


def test_places_that_cannot_be_written_are_refused_before_the_model(
    bed: Bed, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for more, says in (
        (("-o", str(tmp_path)), "is a folder"),
        (("-o", str(tmp_path / "file" / "p")), "cannot write into"),
        (("-o", "/proc/p"), "cannot write"),
        (("-o", str(tmp_path / "p"), "--rows", str(tmp_path / "file")), "is a file"),
        (("-o", str(tmp_path / "p"), "--rows", str(tmp_path / "file" / "r")), "cannot write into"),
    ):
        ended = bed.warm.command(*bed.calibrate(*more))
        assert says in failed(ended, 2 if "proc" not in more[1] else 1)
        assert "loading" not in ended.err or "proc" in more[1]
    for target in ("file/p", "."):
        failed(bed.warm.command("merge", str(rows), "-o", str(tmp_path / target)), 2)
    line = failed(bed.warm.command("merge", str(rows), "-o", str(tmp_path / "p"), file_limit=1500))
    assert "File too large" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_place_of_a_row_is_one_line(bed: Bed, rows: Path, tmp_path: Path) -> None:
    folder = some_rows(rows, tmp_path / "rows", 3)
    blocked = folder / rows_of(rows)[3].name
    blocked.mkdir()
    (blocked / "x").touch()
    options = bed.calibrate("--rows", str(folder), "-o", str(tmp_path / "p"))
    assert "is not a sound row" in failed(bed.warm.command(*options), 2)
    assert len(rows_of(folder)) == 4
    assert not (tmp_path / "p").exists()
