"""`python -m tests.cli.limited LIMIT FOLDER`: commands under a real limit of the system.

Prints, as JSON, what every command said: [exit code, stderr]. A process of its own, because limits
and lost privileges do not come back.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hkvprof.calibration.fitted import FittedTables
from hkvprof.cli import run
from hkvprof.cli.errors import guarded
from hkvprof.evaluate.journal import Journal
from hkvprof.evaluate.records import Answer
from hkvprof.runtime.kernels import build
from tests.calibration.made_rows import CONDITIONS, TYPES, make_row
from tests.profiles import GOLDEN, index_tables

PROFILE = Path(__file__).parents[2] / "profiles" / "tinyvl.hkv.safetensors"


def command(*arguments: object) -> list[Any]:
    """Exit code and stderr of `hkvprof ARGUMENTS`."""
    return _said(lambda: run([str(argument) for argument in arguments]))


def call(action: Callable[[], object]) -> list[Any]:
    """The same of a function, as the command line would end."""
    return _said(lambda: guarded(action, debug=False))


def _said(action: Callable[[], int]) -> list[Any]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = action()
    return [code, errors.getvalue()]


def answer(number: int) -> Answer:
    """An answer of some kilobytes."""
    return Answer(
        f"s{number}", "t", "inside", 0, "full", "", "x" * 3000, "x", "m", 1.0, 0.0, 1.0, 0.1, 4, 9,
        1, 1, 0, 1, 0.1, None,
    )  # fmt: skip


def rows(folder: Path) -> Path:
    """A folder of rows, made before the limit."""
    from hkvprof.calibration.rows import RowFolder

    made = RowFolder(folder, CONDITIONS)
    for number in range(3):
        made.add(make_row(number, "t", TYPES))
    made.keep_tables(FittedTables(index_tables(CONDITIONS.grid)), "digest")
    return folder


def convert(folder: Path) -> object:
    """The last step of a GGUF file's conversion: a checkpoint of 4 MB."""
    import torch
    from safetensors.torch import save_file

    from hkvprof.models.converted import converted_folder

    weights = {"a": torch.zeros(2**20)}
    return converted_folder(
        "gguf", lambda work: save_file(weights, work / "model.safetensors"), folder
    )


def compiled(folder: Path) -> str:
    """Why there is no native library, if there is none."""
    os.environ["HKVPROF_CACHE"] = str(folder)
    try:
        with build.library(("HKV_TYPE=0", "HKV_GROUP=1")):
            pass
    except build.BuildError as error:
        return str(error)
    return ""


def full_disk(folder: Path) -> dict[str, Any]:
    """No file may have more than 2 KiB (or: the disk at `folder` is that small)."""
    made = rows(folder.parent / "rows")
    journal = Journal(folder / "eval", {"a": 1})
    if not os.path.ismount(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    return {
        "merge": command("merge", made, "-o", folder / "p.safetensors"),
        "journal": call(lambda: journal.add([answer(i) for i in range(4)])),
        "gguf": call(lambda: convert(folder / "gguf")),
        "compiler": compiled(folder / "cache"),
    }


def no_rights(folder: Path) -> dict[str, Any]:
    """Of a process to which modes of files apply (root's only do without some capabilities)."""
    made = rows(folder / "rows")
    secret, closed = folder / "secret.safetensors", folder / "closed"
    secret.write_bytes(GOLDEN.read_bytes())
    closed.mkdir()
    for path, mode in ((secret, 0), (closed, 0o555), (folder, 0o755)):
        path.chmod(mode)
    out = closed / "out"
    return {
        "inspect": command("inspect", secret),
        "merge": command("merge", made, "-o", out),
        "eval": command("eval", "--model", "tinyvl", "--profile", PROFILE, "-o", out),
        "bench": command("bench", "--model", "tinyvl", "--profile", PROFILE, "--json", out),
        "eval of a secret": command("eval", "--model", "tinyvl", "--profile", secret),
        "gguf": call(lambda: convert(out)),
        "compiler": compiled(out),
    }


def little_memory(folder: Path) -> dict[str, Any]:
    """48 MiB of address space beyond what the process has now."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    command("inspect", PROFILE)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 48 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    shape = ("--shape", "qwen2.5-vl-7b", "--layers", 1, "--context", 64)
    large = folder / "large.safetensors"
    with large.open("wb") as stream:
        stream.truncate(200 * 2**20)
    return {"bench": command("bench", *shape), "inspect": command("inspect", large)}


LIMITS = {"full_disk": full_disk, "no_rights": no_rights, "little_memory": little_memory}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(LIMITS[sys.argv[1]](Path(sys.argv[2]))))
