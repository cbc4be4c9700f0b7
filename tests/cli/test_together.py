"""Several processes, joined by gloo on the CPU: the profile of one, and one voice."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hkvprof.calibration.distributed import local_device
from hkvprof.calibration.group import is_distributed, is_follower
from hkvprof.errors import UsageError
from tests.cli.runs import Bed, save_samples
from tests.warm import ENVIRONMENT, KILLED, ROOT, Ended


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def together(bed: Bed, *arguments: str, size: int = 2, kill: int | None = None) -> list[Ended]:
    """The same command in processes that torchrun would start; rank `kill` is killed while the
    first one measures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = [
        {"arguments": list(arguments), "environment": variables(rank, size, port)}
        | ({"kill_when": "measuring heads: 1/"} if rank == kill else {})
        for rank in range(size)
    ]
    return bed.warm.run(*runs)


def test_two_processes_make_the_profile_of_one(bed: Bed, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "two"
    leader, follower = together(bed, *bed.calibrate("-o", str(path)))
    assert (leader.code, follower.code) == (0, 0), leader.err + follower.err
    assert path.read_bytes() == whole
    assert "measuring heads: 2/2" in leader.err  # of 4
    assert f"Profile: {path}" in leader.out
    assert follower.out + follower.err == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["two"]


def test_more_processes_than_samples(bed: Bed, tmp_path: Path) -> None:
    data = save_samples(tmp_path / "data.jsonl", 1)
    one, three = tmp_path / "one", tmp_path / "three"
    alone = bed.warm.command(*bed.calibrate("-o", str(one), data=data))
    all_three = together(bed, *bed.calibrate("-o", str(three), data=data), size=3)
    assert [ended.code for ended in (alone, *all_three)] == [0] * 4
    assert three.read_bytes() == one.read_bytes()


def test_an_error_in_one_process_ends_all_with_one_message(bed: Bed, tmp_path: Path) -> None:
    data, path = save_samples(tmp_path / "data.jsonl", short=1), tmp_path / "p"
    options = bed.calibrate("-o", str(path), "--recipe", "paper", data=data)
    ended = together(bed, *options)
    assert [process.code for process in ended] == [1, 1]
    said = [line for process in ended for line in process.err.splitlines() if "error:" in line]
    (line,) = said
    assert line.startswith("error: sample s1: the prompt has 2 tokens")
    assert "(rank 1 of 2)" in line
    assert not path.exists()
    # What was measured is kept, and the bad sample can be skipped.
    ended = together(bed, *options, "--on-error", "skip")
    assert [process.code for process in ended] == [0, 0], ended[0].err
    alone = bed.calibrate("-o", f"{path}1", "--recipe", "paper", "--on-error", "skip", data=data)
    assert bed.warm.command(*alone).code == 0
    assert Path(f"{path}1").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other(bed: Bed, whole: bytes, tmp_path: Path, rank: int) -> None:
    """Without torchrun's own watch; the run then goes on in one process."""
    path = tmp_path / "p"
    data = save_samples(tmp_path / "data.jsonl", 40)
    options = bed.calibrate("-o", str(path), data=data)
    ended = together(bed, *options, kill=rank)
    assert ended[rank].code == KILLED
    other = ended[1 - rank]
    assert other.code == 1
    assert "error: the connection to another process was lost" in other.err
    assert "run again to go on" in other.err or not list(tmp_path.glob("p.rows/row-*"))
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--nope",), "No such option"),
        (("--dry-run",), "--dry-run is for one process"),
        (("--shard", "1/2", "--rows", "r"), "--shard is for runs without torchrun"),
        (("--device-map", "auto"), "--device-map spreads"),
        (("--fsdp", "--device", "cpu"), "leave out --device"),
        (("--budget", "9GiB"), "is not a share"),
    ],
)
def test_wrong_usage_is_said(bed: Bed, options: tuple[str, ...], says: str) -> None:
    arguments = ["calibrate", "--model", "m", "--data", "d", *options]
    ended = together(bed, *arguments)
    assert 2 in [process.code for process in ended]
    (line,) = [line for process in ended for line in process.err.splitlines()]
    assert says in line


def test_fsdp_needs_several_processes(bed: Bed) -> None:
    ended = bed.warm.command("calibrate", "--model", "m", "--data", "d", "--fsdp")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "torchrun --nproc-per-node N" in ended.err


needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@needs_accelerate
def test_a_model_spread_by_fsdp_gives_the_same_profile(
    bed: Bed, whole: bytes, tmp_path: Path
) -> None:
    """Weights are sharded over two processes; samples are measured in step."""
    path, rows = tmp_path / "p", tmp_path / "rows"
    options = bed.calibrate("-o", str(path), "--rows", str(rows), "--fsdp")
    options = [word for word in options if word not in ("--device", "cpu")]
    ended = together(bed, *options)
    assert [process.code for process in ended] == [0, 0], ended[0].err
    assert path.read_bytes() == whole
    # It goes on from rows, of FSDP or not.
    next(rows.glob("row-*")).unlink()
    ended = together(bed, *options, "--force")
    assert "continuing: 3 of 4 samples" in ended[0].err
    assert path.read_bytes() == whole


def test_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_distributed()
    assert local_device("cuda:1") == "cuda:1"
    for name, value in variables(2, 4, 1).items():
        monkeypatch.setenv(name, value)
    assert is_distributed()
    assert is_follower()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert local_device(None) == local_device("cuda") == "cuda:2"
    assert local_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="one device for all processes"):
        local_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--nproc-per-node 2"):
        local_device(None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_device(None) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_distributed()


@pytest.mark.slow
def test_torchrun_itself(bed: Bed, whole: bytes, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "hkvprof"]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT}

    def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *arguments], capture_output=True, text=True, timeout=600, check=False,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    path = tmp_path / "p"
    ended = torchrun(*bed.calibrate("-o", str(path)))
    assert ended.returncode == 0, ended.stderr
    assert path.read_bytes() == whole
    ended = torchrun(*bed.calibrate("-o", str(path)))
    assert ended.returncode != 0
    assert ended.stderr.count("already exists") == 1
