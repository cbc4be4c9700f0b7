"""Why Triton kernels are not used, in words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hkvprof import lazy


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    lazy.no_triton.cache_clear()
    yield
    lazy.no_triton.cache_clear()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HKVPROF_TRITON", "0")
    assert lazy.no_triton() == "HKVPROF_TRITON=0"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "find_spec", lambda name: None)
    assert lazy.no_triton() == "triton is not installed"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.1.0", "triton 3.1.0 is older than 3.2"), ("3.2.0+git1", ""), ("3.10.0", "")],
)
def test_old_triton(version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "find_spec", lambda name: object())
    fake = type("triton", (), {"__version__": version})
    monkeypatch.setattr(lazy, "import_module", lambda name: fake)
    assert lazy.no_triton() == reason


def test_broken_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcuda.so\nand more")

    monkeypatch.setattr(lazy, "find_spec", lambda name: object())
    monkeypatch.setattr(lazy, "import_module", broken)
    assert lazy.no_triton() == "triton cannot be imported (libcuda.so)"
