"""Where results go: default names, checks before long work, consoles."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from hkvprof.errors import UsageError
from hkvprof.files.atomic import refuse_overwrite, writable


def default_profile_path(model: str) -> Path:
    """`./<model>.profile.safetensors`, the model's name reduced to safe characters."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip(".-")
    return Path(f"{name or 'model'}.profile.safetensors")


def check_output(path: Path, force: bool) -> None:
    """Raise UsageError unless `path` can be written: called before anything is loaded."""
    check_file(path, "-o")
    refuse_overwrite(path, force)
    check_folder(path.absolute().parent)


def check_file(path: Path, option: str) -> None:
    """Raise UsageError for what is there and is no file: a folder, a device."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give {option} a file name")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no ordinary file, and would be replaced by one: give {option} "
                         "another name")  # fmt: skip


def check_folder(path: Path) -> None:
    """Raise UsageError unless files can be written into `path`, or it can be made."""
    if not writable(path):
        raise UsageError(f"cannot write into {path.absolute()}: choose another place with -o")


def stdout(ascii_only: bool = False) -> Console:
    """A console for results; as wide as needed when not a terminal."""
    if ascii_only or not sys.stdout.isatty():
        return Console(file=sys.stdout, width=200, no_color=True, highlight=False, markup=False)
    return Console(file=sys.stdout, highlight=False, markup=False)


def draws_ascii(wanted: bool) -> bool:
    """Whether pictures are to be plain ASCII: on demand, off a terminal, or without UTF-8."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return wanted or not sys.stdout.isatty() or encoding != "utf8"


def say(message: str) -> None:
    """A line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and advice, in this process, for the command line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
