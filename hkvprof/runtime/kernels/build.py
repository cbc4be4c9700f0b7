"""Compile csrc with the user's own compiler into a private cache folder, once per machine.

A library is executed, so it is opened once, and what is checked is what is loaded: its owner and
mode, and a digest that the file ends with, through one descriptor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from hkvprof.errors import HkvError
from hkvprof.files.atomic import user_cache, write_atomically

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*"), key=lambda path: path.name)
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-shared", "-w"),
)
"""NaN and infinities keep their meaning: no -ffinite-math-only."""
TIMEOUT = 120
"""Seconds that a compilation may take."""
_END = b"\nhkvprof: sha256 of all before\n"
"""Between a library and its digest, the last 32 bytes of the file; the loader reads neither."""
_LARGEST = 64 * 2**20
_ELF = b"\x7fELF\x02\x01"
_SEGMENT = struct.Struct("<IIQQQQQQ")
_LOADS = count()


class BuildError(Exception):
    """Why there is no native library; the message fits after `because`."""


@contextmanager
def library(defines: tuple[str, ...], anew: bool = False) -> Iterator[str]:
    """A name to load the shared library for these macro definitions by, while within.

    It is compiled if the cache does not have it, has it damaged, or `anew` is set. Raises
    BuildError.
    """
    command, path = _job(defines)
    descriptor = None if anew else _sound(path)
    if descriptor is None:
        _keep(path, _compile(command))
        descriptor = _sound(path)
    if descriptor is None:
        raise BuildError(f"{path} is damaged right after it was written: look after the disk")
    try:
        # The loader remembers libraries by name, and numbers of descriptors come again.
        yield f"/proc/self/{'./' * next(_LOADS)}fd/{descriptor}"
    finally:
        os.close(descriptor)


def discard(defines: tuple[str, ...]) -> None:
    """Remove the library from the cache, so that it is compiled again. Raises BuildError."""
    with suppress(OSError):
        _job(defines)[1].unlink()


def cache_folder() -> Path:
    """`kernels` in the user's cache folder, made private."""
    try:
        folder = user_cache().absolute() / "kernels"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"the cache folder cannot be made ({error}): set HKVPROF_CACHE to a folder of yours"
        ) from error
    return folder


def _job(defines: tuple[str, ...]) -> tuple[list[str], Path]:
    """The compiler's command, and the file whose name holds a hash of source, compiler, flags and
    CPU."""
    compiler = find_compiler()
    flags = (*FLAGS, *_tuning(), *(f"-D{define}" for define in defines))
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    parts = (*sources, *compiler, _version(compiler), *flags, _cpu())
    joined = "\0".join(parts).encode(errors="surrogateescape")
    name = f"native-{hashlib.sha256(joined).hexdigest()[:24]}.so"
    return [*compiler, *flags, str(SOURCES[0].with_name("native.cpp"))], cache_folder() / name


def _sound(path: Path) -> int | None:
    """A descriptor of the library at `path`; None if there is none, or a damaged one.

    Raises BuildError for what somebody else may have written: it would be executed. The folders
    above need no check: nobody else can make a folder and a file that belong to the user.
    """
    folder = _private(path.parent, None, os.O_DIRECTORY)
    if folder is None:
        return None
    try:
        descriptor = _private(path, folder, os.O_NONBLOCK)
    finally:
        os.close(folder)
    if descriptor is None:
        return None
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        data, _, digest = stream.read(_LARGEST).rpartition(_END)
    if data and hashlib.sha256(data).digest() == digest:
        return descriptor
    os.close(descriptor)
    return None


def _private(path: Path, folder: int | None, flags: int) -> int | None:
    """Descriptor of a folder, or of a file in the opened `folder`, that is the user's alone."""
    name = path if folder is None else path.name
    try:
        descriptor = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder
        )
    except FileNotFoundError:
        return None
    except OSError as error:  # a link, or of another kind
        raise _not_yours(path, error.strerror or str(error)) from error
    status = os.fstat(descriptor)
    kind = stat.S_ISREG(status.st_mode) if folder is not None else stat.S_ISDIR(status.st_mode)
    if kind and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return descriptor
    os.close(descriptor)
    raise _not_yours(path, f"owner {status.st_uid}, mode {stat.filemode(status.st_mode)}")


def _not_yours(path: Path, found: str) -> BuildError:
    return BuildError(
        f"{path} is not yours alone ({found}): remove it, or set HKVPROF_CACHE to a folder that "
        "only you can write to"
    )


def find_compiler() -> list[str]:
    """$CXX, g++, clang++ or c++, as words of a command. Raises BuildError."""
    given = os.environ.get("CXX", "")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX={given!r} is no command ({error}): mend or unset it") from error
    for candidate in [words] if words else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(candidate[0])
        if path:
            return [path, *candidate[1:]]
    wanted = f"CXX={words[0]!r} is no program" if words else "no C++ compiler was found"
    raise BuildError(f"{wanted}: install g++ or clang++ (Debian: apt install g++)")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises BuildError where it cannot be run, or does not end."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(command[:1])} does not run ({error})") from error


def _version(compiler: list[str]) -> str:
    done = _run([*compiler, "--version"])
    if done.returncode:
        command = shlex.join(compiler)
        raise BuildError(f"{command} does not run (--version gives {done.returncode})")
    return done.stdout


def _tuning() -> tuple[str, ...]:
    """Use every instruction of this CPU."""
    names = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
    name = names.get(platform.machine())
    return () if name is None else (name,)


def _cpu() -> str:
    """Model and features of this CPU: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(command: list[str]) -> bytes:
    """The library that the compiler makes, in a folder of its own. Raises BuildError."""
    try:
        with tempfile.TemporaryDirectory(prefix="hkvprof-") as folder:
            out = Path(folder) / "native.so"
            done = _run([*command, "-o", str(out)])
            data = out.read_bytes() if out.is_file() else b""
    except OSError as error:
        raise BuildError(f"there is no folder for the compiler to write to ({error})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{shlex.join(command)} failed: {first[:300]}")
    if not _whole(data):
        raise BuildError(
            f"{shlex.join(command)} failed: it made no shared library, and said so not"
        )
    return data


def _whole(data: bytes) -> bool:
    """Whether these are the bytes of a 64-bit ELF file with all its segments: loading one that was
    cut off would kill the process."""
    if not data.startswith(_ELF) or len(data) < 64:
        return False
    (first,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if size != _SEGMENT.size or not count or first + size * count > len(data):
        return False
    segments = (_SEGMENT.unpack_from(data, first + size * n) for n in range(count))
    return all(segment[2] + segment[5] <= len(data) for segment in segments)


def _keep(path: Path, data: bytes) -> None:
    """Several processes may do so at once."""
    try:
        write_atomically(path, data + _END + hashlib.sha256(data).digest())
    except HkvError as error:
        raise BuildError(f"{path.parent} cannot be written to ({error.__cause__})") from error
