"""Compiling at first use: the cache, what it refuses, and what happens without a compiler."""

import ctypes
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Extents, build, loading
from tests.runtime.kernels.cases import attend_exactly, compiler

CPU = torch.device("cpu")
DEFINES = ("HKV_TYPE=0", "HKV_GROUP=1")


COMPILED: dict[tuple[str, ...], bytes] = {}
compile_once = build._compile


def compile_remembered(command: list[str]) -> bytes:
    """Seconds for every other test."""
    if tuple(command) not in COMPILED:
        COMPILED[tuple(command)] = compile_once(command)
    return COMPILED[tuple(command)]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and a process that has loaded nothing."""
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HKVPROF_NATIVE", raising=False)
    monkeypatch.setattr(loading, "STATE", loading._State())
    monkeypatch.setattr(build, "_compile", compile_remembered)


def attend_once() -> None:
    """One step, checked."""
    key, value, query = torch.randn(9, 8), torch.randn(9, 8), torch.randn(1, 1, 8)
    kernel = kernels.for_device(CPU, torch.float32)
    got = kernel.attend(key, value, Extents.of([0], [9]), query, 0.3)
    exact = attend_exactly(key, value, [0], [9], query, 0.3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def built(folder: Path) -> Path:
    """The only library in the cache, made now."""
    with build.library(DEFINES):
        pass
    (path,) = libraries(folder)
    return path


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "kernels").iterdir())


@compiler
def test_the_second_load_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.status() == "native: not compiled yet"
    attend_once()
    assert kernels.status().startswith("native: query heads per KV head 1; ")
    (path,) = libraries(tmp_path)
    assert path.stat().st_mode & 0o022 == 0
    monkeypatch.setattr(loading, "STATE", loading._State())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    attend_once()


@compiler
def test_other_flags_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DHKV_OTHER"))
    with build.library(DEFINES):
        pass
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
        ("exit 0", "it made no shared library"),
        (
            'test "$1" = --version || for out; do :; done; echo garbage >"${out:-/dev/null}"',
            "it made no shared library",
        ),
        (
            'test "$1" = --version || for out; do :; done; : >"${out:-/dev/null}"',
            "it made no shared library",
        ),
        ("kill -SEGV $$", "does not run"),
        ("printf '\\377\\376 error: \\377' >&2; test \"$1\" = --version", "error"),
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
@pytest.mark.parametrize("target", ["folder", "file", "link", "folder link", "pipe", "directory"])
def test_what_others_may_write_is_not_loaded(target: str, tmp_path: Path) -> None:
    path = built(tmp_path)
    if target == "folder":
        path.parent.chmod(0o770)
    elif target == "file":
        path.chmod(0o702)
    elif target == "link":
        path.symlink_to(path.rename(tmp_path / "elsewhere.so"))
    elif target == "folder link":
        path.parent.symlink_to(path.parent.rename(tmp_path / "elsewhere"))
    else:
        path.unlink()
        os.mkfifo(path, 0o600) if target == "pipe" else path.mkdir(0o700)
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
    with build.library(("HKV_TYPE=1", "HKV_GROUP=7")):
        pass
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


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:5000],
    "cut at the end": lambda data: data[:-1],
    "garbage": lambda data: os.urandom(len(data)),
    "a changed byte": lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
    "zeros in the middle": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "without its digest": lambda data: data[: data.rindex(build._END)],
    "more at the end": lambda data: data + b"x",
}


@compiler
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_library_is_built_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that loads it first: a library that is cut off would kill it (SIGBUS)."""
    path = built(tmp_path)
    whole = path.read_bytes()
    made = whole[: whole.rindex(build._END)]
    path.write_bytes(DAMAGES[kind](whole))
    path.chmod(0o600)
    monkeypatch.setattr(build, "_compile", lambda _: made)
    attend_once()
    assert kernels.status().startswith("native: ")
    assert path.read_bytes() == whole


@compiler
def test_a_library_of_another_machine_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound, and private, but it does not load, or has other functions."""
    path = built(tmp_path)
    whole = path.read_bytes()
    made = whole[: whole.rindex(build._END)]
    other = tmp_path / "other.so"
    source = tmp_path / "other.cpp"
    source.write_text("extern int absent(); int present() { return absent(); }")
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", source, "-o", other], check=True)
    build._keep(path, other.read_bytes())
    monkeypatch.setattr(build, "_compile", lambda _: made)
    attend_once()
    assert kernels.status().startswith("native: ")
    assert path.read_bytes() == whole


@compiler
def test_what_never_loads_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that makes libraries of something else; the next process asks it again."""
    compiler_path = build.find_compiler()[0]
    source = tmp_path / "other.cpp"
    source.write_text("int other() { return 1; }")
    body = (
        f'test "$1" = --version && exit; for out; do :; done; '
        f'exec {compiler_path} -shared -fPIC {source} -o "$out"'
    )
    monkeypatch.setenv("CXX", write_script(tmp_path / "odd", body))
    with pytest.warns(UserWarning, match="what the compiler makes cannot be loaded"):
        attend_once()
    assert kernels.status().startswith("torch: ")
    assert libraries(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("g++ 'x", "is no command (No closing quotation)"),
        ('"', "is no command (No closing quotation)"),
        ("no-such-compiler", "CXX='no-such-compiler' is no program"),
        ("/no/such/compiler -O2", "CXX='/no/such/compiler' is no program"),
        ("/tmp", "CXX='/tmp' is no program"),
        ("''", "CXX='' is no program"),
        ("\udcff", "is no program"),
        ("cat", "cat"),
        ("true", "it made no shared library"),
        ("false", "does not run"),
    ],
)
def test_a_cxx_that_is_no_compiler_leaves_torch_and_a_reason(
    words: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", words)
    with pytest.warns(UserWarning, match="decoding with compressed caches is slower") as caught:
        attend_once()
    assert reason in str(caught[0].message)
    assert reason in kernels.status()
    attend_once()


@compiler
def test_a_cxx_with_arguments_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env '{build.find_compiler()[0]}' -DHKV_OTHER='a b'")
    attend_once()
    assert kernels.status().startswith("native: ")


@compiler
@pytest.mark.parametrize("words", ["", "  "])
def test_an_empty_cxx_is_none(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", words)
    attend_once()
    assert kernels.status().startswith("native: ")


@compiler
def test_it_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, name, then the folder that holds the name."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        sync(descriptor)

    def record_replace(*names: Any) -> None:
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    built(tmp_path)
    assert done == ["data", "name", "folder"]


@compiler
def test_a_folder_put_in_place_between_check_and_load_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who may write above the folder changes it; what was checked is what is loaded."""
    path = built(tmp_path)
    with build.library(DEFINES) as name:
        path.parent.rename(tmp_path / "aside")
        path.parent.mkdir()
        path.write_bytes(b"not what was checked")
        loading._bound(ctypes.CDLL(name))


@compiler
def test_libraries_with_the_same_descriptor_are_told_apart(tmp_path: Path) -> None:
    """The loader gives what it has under a name without a look at the file."""
    names = []
    for group in (1, 2):
        with build.library(("HKV_TYPE=0", f"HKV_GROUP={group}")) as name:
            names.append(name)
            library = ctypes.CDLL(name)
            base = ctypes.cast(library.hkv_attend, ctypes.c_void_p).value
        names.append(str(base))
    first, first_base, second, second_base = names
    assert first.rsplit("/", 1)[1] == second.rsplit("/", 1)[1], "the descriptor's number came again"
    assert first_base != second_base
