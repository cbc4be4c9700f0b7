"""kill -9 at random moments: always the old file or the new one, and the next run goes on."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from hkvprof import load_profile
from hkvprof.calibration.rows import CONDITIONS, INDEX, read_conditions, read_rows, read_tables
from hkvprof.files.atomic import is_part
from tests.cli.runs import Bed, save_samples
from tests.warm import KILLED, Ended

FEW = {"calibrate": 4, "merge": 3, "write": 3}
MANY = {"calibrate": 100, "merge": 50, "write": 50}
SEED = 7
SAMPLES = 8


def parts(folder: Path) -> list[Path]:
    """What killed writers left."""
    return [path for path in folder.rglob("*") if is_part(path)]


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def check_rows(folder: Path) -> int:
    """Every file of a folder of rows is whole. Returns how many samples are measured."""
    if not (folder / CONDITIONS).exists():
        assert not [path for path in folder.glob("*") if not is_part(path)]
        return 0
    conditions = read_conditions(folder)
    if (folder / INDEX).exists():
        read_tables(folder, conditions)
    return len(read_rows(folder, conditions))


def kill_calibrations(bed: Bed, kills: int, folder: Path) -> Counter[str]:
    """A run is killed, every other time the one that goes on, too; then one goes on to the end."""
    draw = random.Random(SEED)
    whole, target, rows = (folder / name for name in ("whole", "killed", "killed.rows"))
    data = save_samples(folder / "data.jsonl", SAMPLES)
    seconds = done(bed.warm.command(*bed.calibrate("-o", str(whole), data=data))).seconds
    options = bed.calibrate("-o", str(target), "--resume", data=data)
    found: Counter[str] = Counter()
    while found["kills"] < kills:
        for _ in range(1 + found["kills"] % 2):
            ended = bed.warm.command(*options, kill_after=draw.uniform(0, seconds))
            found["kills"] += ended.code == KILLED
            found[f"{check_rows(rows)} rows"] += ended.code == KILLED
            assert len(parts(folder)) <= 1
            if target.exists():
                break
        if not target.exists():
            before = check_rows(rows)
            ended = done(bed.warm.command(*options))
            assert not before or f"continuing: {before} of {SAMPLES} samples" in ended.err
            assert not rows.exists()
        assert target.read_bytes() == whole.read_bytes()
        found["identical profiles"] += 1
        target.unlink()
    assert parts(folder) == []
    return found


def kill_merges(bed: Bed, kills: int, folder: Path) -> Counter[str]:
    """A profile is replaced by that of other rows."""
    draw = random.Random(SEED)
    rows, target, new = folder / "rows", folder / "killed", folder / "new"
    done(bed.warm.command(*bed.calibrate("--rows", str(rows), "-o", str(target))))
    old = target.read_bytes()
    seconds = done(bed.warm.command("merge", str(rows), "-o", str(new))).seconds
    assert new.read_bytes() != old
    found: Counter[str] = Counter()
    while found["kills"] < kills:
        ended = bed.warm.command(
            "merge", str(rows), "-o", str(target), "--force", kill_after=draw.uniform(0, seconds)
        )
        found["kills"] += ended.code == KILLED
        now = target.read_bytes()
        assert now in (old, new.read_bytes())
        found["old" if now == old else "new"] += 1
        assert len(parts(folder)) <= 1
        target.write_bytes(old)
    done(bed.warm.command("merge", str(rows), "-o", str(target), "--force"))
    assert target.read_bytes() == new.read_bytes()
    assert parts(folder) == []
    return found


def kill_writers(bed: Bed, kills: int, folder: Path) -> Counter[str]:
    """Two profiles are written to one path in turn, without a pause, so that kills hit writes."""
    draw = random.Random(SEED)
    names = [str(folder / name) for name in ("one", "other")]
    for name, budget in zip(names, ("0.2", "0.4"), strict=True):
        done(bed.warm.command(*bed.calibrate("-o", name, "--recipe", "paper", "--budget", budget)))
    contents = [Path(name).read_bytes() for name in names]
    found: Counter[str] = Counter()
    target = folder / "killed"
    for _ in range(kills):
        ended = bed.warm.command(loop=[*names, str(target)], kill_after=draw.uniform(0.01, 0.3))
        assert ended.code == KILLED
        found["kills"] += 1
        assert len(parts(folder)) <= 1
        found["in the middle of a write"] += len(parts(folder))
        if target.exists():
            found["whole"] += 1
            assert target.read_bytes() in contents
    load_profile(names[0]).save(target)
    assert target.read_bytes() == contents[0]
    assert parts(folder) == []
    return found


KINDS = {"calibrate": kill_calibrations, "merge": kill_merges, "write": kill_writers}


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(bed: Bed, tmp_path: Path, kind: str) -> None:
    assert KINDS[kind](bed, FEW[kind], tmp_path)["kills"] >= FEW[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_kills(
    bed: Bed, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = KINDS[kind](bed, MANY[kind], tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}: {dict(found)}\n")
    assert found["kills"] >= MANY[kind]
