"""How the tests run: with which kernels, on which examples, in which order.

Without a C++ compiler the suite runs on the torch kernels, and says so. Without a CUDA device the
Triton kernels are tested in Triton's interpreter, which must be chosen before triton is imported.

Properties are tried on the same examples every time; `make test-random` tries many others, and
`make test-order` runs the tests in random order. A file of tests that changes the process for
those after it fails.

What transformers only logs as deprecated fails a test, as a warning does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, is_hypothesis_test, settings

from hkvprof.runtime.kernels.build import BuildError, find_compiler

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # or triton 3.9 warns when it compiles
if importlib.util.find_spec("triton") is None:
    TRITON = "not tested (triton is not installed)"
elif torch.cuda.is_available():
    TRITON = "on the CUDA device, with `-m gpu`"
else:
    os.environ["TRITON_INTERPRET"] = "1"
    TRITON = "in the interpreter"

try:
    find_compiler()
except BuildError as error:
    os.environ.setdefault("HKVPROF_NATIVE", "0")
    REASON = str(error)
else:
    REASON = ""

# Sums depend on it in their last bits: the same for one file as for all.
torch.set_num_threads(1)

# Neither asks the clock: a busy machine makes no example too slow.
CLOCKLESS: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **CLOCKLESS)
settings.register_profile("random", print_blob=True, database=None, **CLOCKLESS)
settings.load_profile("fixed")


class Deprecations(logging.Handler):
    """Turns what is logged as deprecated into a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            warnings.warn(record.getMessage(), FutureWarning, stacklevel=2)


logging.getLogger("transformers").addHandler(Deprecations(logging.WARNING))


def pytest_report_header() -> list[str]:
    """The kernels that the tests run on."""
    lines = [f"hkvprof Triton kernels: {TRITON}"]
    return [*lines, f"hkvprof kernels: torch only ({REASON})"] if REASON else lines


def pytest_addoption(parser: pytest.Parser) -> None:
    """Order and number of examples."""
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="files, and tests of each, in random order"
    )
    parser.addoption("--examples", type=int, help="of every property, whatever it says itself")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every property its number of examples, then shuffle."""
    examples = config.getoption("--examples")
    for item in items:
        test = getattr(item, "obj", None)
        if examples and is_hypothesis_test(test):
            # As hypothesis' own plugin does it: a second `settings` on a test is refused.
            own = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(own, max_examples=examples)
    seed = config.getoption("--shuffle")
    if seed is not None:
        items[:] = _shuffled(items, Random(seed))


def _shuffled(items: list[pytest.Item], random: Random) -> list[pytest.Item]:
    """Files stay together, because they share what is costly to make."""
    files: dict[Any, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    for tests in files.values():
        random.shuffle(tests)
    order = list(files.values())
    random.shuffle(order)
    return [item for tests in order for item in tests]


def _process() -> dict[str, Any]:
    """What a test could leave to those after it; torch's compiler names its cache once for all."""
    return {
        "the working directory": os.getcwd(),
        "the environment": sorted(i for i in os.environ.items() if not i[0].startswith("TORCHIN")),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


_before: dict[Any, dict[str, Any]] = {}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Remember the process as a file finds it."""
    if item.path not in _before:
        _before[item.path] = _process()
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """The command line quiets transformers for its whole process: every test hears it again."""
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Fail the last test of a file that leaves the process other than it was."""
    done = yield
    if nextitem is None or nextitem.path != item.path:
        before, after = _before.pop(item.path), _process()
        changed = [name for name in before if before[name] != after[name]]
        differ = [(before[name], after[name]) for name in changed]
        assert not changed, f"{item.path.name} leaves other than they were: {changed}: {differ}"
    return done
