"""Compile csrc with the user's own compiler into a private cache folder, once per machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from hkvprof.files import user_cache

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*"), key=lambda path: path.name)
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-shared", "-w"),
)
"""NaN and infinities keep their meaning: no -ffinite-math-only."""
TIMEOUT = 120
"""Seconds that a compilation may take."""


class BuildError(Exception):
    """Why there is no native library; the message fits after `because`."""


def library(defines: tuple[str, ...]) -> Path:
    """The shared library for these macro definitions, compiled unless the cache has it.

    The file name holds a hash of source, compiler, flags and CPU. Raises BuildError.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *_tuning(), *(f"-D{define}" for define in defines))
    folder = cache_folder()
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    parts = (*sources, *compiler, _version(compiler), *flags, _cpu())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = folder / f"native-{digest}.so"
    if not os.path.lexists(path):
        _compile([*compiler, *flags, str(SOURCES[0].with_name("native.cpp"))], path)
    check_private(path)
    return path


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
    check_private(folder)
    return folder


def check_private(path: Path) -> None:
    """Refuse what somebody else may have written: it would be executed."""
    found = os.lstat(path)
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if not kind or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BuildError(
            f"{path} is not yours alone (owner {found.st_uid}, mode {stat.filemode(found.st_mode)})"
            ": remove it, or set HKVPROF_CACHE to a folder that only you can write to"
        )


def find_compiler() -> list[str]:
    """$CXX, g++, clang++ or c++, as words of a command."""
    words = shlex.split(os.environ.get("CXX", ""))
    for candidate in [words] if words else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(candidate[0])
        if path:
            return [path, *candidate[1:]]
    wanted = f"CXX={words[0]} is not there" if words else "no C++ compiler was found"
    raise BuildError(f"{wanted}: install g++ or clang++ (Debian: apt install g++)")


def _version(compiler: list[str]) -> str:
    try:
        command = [*compiler, "--version"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(compiler)} does not run ({error})") from error


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


def _compile(command: list[str], path: Path) -> None:
    """Into a temporary file that then takes its place: several processes may do so at once."""
    try:
        handle, name = tempfile.mkstemp(prefix=".native-", suffix=".so", dir=path.parent)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written to ({error})") from error
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-o", name], capture_output=True, text=True, timeout=TIMEOUT
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{shlex.join(command)} failed: {first[:300]}")
        os.chmod(name, 0o700)
        os.replace(name, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    finally:
        if os.path.exists(name):
            os.unlink(name)
