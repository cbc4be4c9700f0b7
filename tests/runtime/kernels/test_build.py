"""Compiling at first use: the cache, what it refuses, and what happens without a compiler."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Extents, build, loading
from tests.runtime.kernels.cases import attend_exactly, compiler

CPU = torch.device("cpu")
DEFINES = ("HKV_TYPE=0", "HKV_GROUP=1")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and a process that has loaded nothing."""
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HKVPROF_NATIVE", raising=False)
    monkeypatch.setattr(loading, "STATE", loading._State())


def attend_once() -> None:
    """One step, checked."""
    key, value, query = torch.randn(9, 8), torch.randn(9, 8), torch.randn(1, 1, 8)
    kernel = kernels.for_device(CPU, torch.float32)
    got = kernel.attend(key, value, Extents.of([0], [9]), query, 0.3)
    exact = attend_exactly(key, value, [0], [9], query, 0.3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "kernels").iterdir())


@compiler
def test_the_second_load_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.status() == "native: not compiled yet"
    attend_once()
    assert kernels.status().startswith("native: query heads per KV head 1; ")
    (path,) = libraries(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(loading, "STATE", loading._State())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    attend_once()


@compiler
def test_other_flags_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library(DEFINES)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DHKV_OTHER"))
    build.library(DEFINES)
    assert len(libraries(tmp_path)) == 2


def write_script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'x.cpp:1: error: out of luck' >&2; test \"$1\" = --version", "out of luck"),
        ("exit 1", "does not run"),
    ],
)
def test_a_broken_compiler_warns_once_and_torch_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.setenv("CXX", write_script(tmp_path / "broken", body))
    with pytest.warns(UserWarning, match="decoding with compressed caches is slower") as caught:
        attend_once()
    assert message in str(caught[0].message)
    attend_once()  # no second warning: it would be an error
    assert kernels.for_device(CPU, torch.float32).name == "torch"
    assert kernels.status().startswith("torch: ")
    assert message in kernels.status()
    assert not (tmp_path / "cache" / "kernels").exists() or libraries(tmp_path) == []


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"install g\+\+ or clang\+\+"):
        attend_once()


def test_switched_off_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HKVPROF_NATIVE", "0")
    assert kernels.for_device(CPU, torch.float32).name == "torch"
    attend_once()
    assert kernels.status() == "torch: HKVPROF_NATIVE=0"


@compiler
@pytest.mark.parametrize("target", ["folder", "file", "link"])
def test_what_others_may_write_is_not_loaded(target: str, tmp_path: Path) -> None:
    path = build.library(DEFINES)
    if target == "folder":
        path.parent.chmod(0o770)
    elif target == "file":
        path.chmod(0o702)
    else:
        moved = path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(moved)
    with pytest.warns(UserWarning, match="is not yours alone"):
        attend_once()
    assert kernels.for_device(CPU, torch.float32).name == "torch"


@compiler
def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import torch; from hkvprof.runtime import kernels;"
        "k = kernels.for_device(torch.device('cpu'), torch.float32);"
        "e = kernels.Extents.of([0], [9]);"
        "k.attend(torch.ones(9, 8), torch.ones(9, 8), e, torch.ones(1, 1, 8), 1.0);"
        "print(kernels.status())"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        assert out.startswith("native: query heads per KV head 1; threads of ")
    assert len(libraries(tmp_path)) == 1


@pytest.mark.slow
@compiler
def test_compiling_takes_seconds() -> None:
    """CPU time of the compiler, which a busy machine does not stretch as it does the clock."""
    before, began = os.times(), time.perf_counter()
    build.library(("HKV_TYPE=1", "HKV_GROUP=7"))
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    assert min(spent, time.perf_counter() - began) < 20


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    code = "import hkvprof.runtime.kernels as k; print(k.status())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout == "native: not compiled yet\n"
    assert not (tmp_path / "cache").exists()
