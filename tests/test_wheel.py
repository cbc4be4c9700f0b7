"""The built sdist and wheel, in an environment of their own and outside the repository.

`make test-wheel`: nothing is pinned but torch, whose newest releases are CUDA builds of gigabytes;
everything else is what the package index gives. HKVPROF_TRANSFORMERS=5.23.0 pins that one too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
NOT_BUILT_FROM = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")

pytestmark = pytest.mark.slow


def call(*command: object, cwd: Path, **more: str) -> str:
    """What a command prints, shown as well."""
    words = [str(word) for word in command]
    sys.stdout.write(f"\n$ {' '.join(words)}\n")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=cwd, env={**kept, **more}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    sys.stdout.write(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source") / "hkvprof"
    shutil.copytree(ROOT, source, ignore=NOT_BUILT_FROM)
    tools = tmp_path_factory.mktemp("tools")
    venv.create(tools, with_pip=True)
    call(tools / "bin" / "pip", "install", "-q", "build", cwd=tools)
    call(tools / "bin" / "python", "-m", "build", "--outdir", tools / "dist", source, cwd=tools)
    (sdist,), (wheel,) = (tools / "dist").glob("*.tar.gz"), (tools / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has torch alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    call(folder / "bin" / "pip", "install", "-q", TORCH, cwd=folder)
    return folder / "bin"


def files(programs: Path, cwd: Path) -> list[str]:
    """What is installed."""
    shown = call(programs / "pip", "show", "-f", "hkvprof", cwd=cwd)
    lines = shown.split("Files:")[1].splitlines()
    return sorted(line.strip() for line in lines if "dist-info" not in line and ".pyc" not in line)


def test_the_wheel_is_a_working_tool(
    built: tuple[Path, Path], environment: Path, tmp_path: Path
) -> None:
    sdist, wheel = built
    pinned = os.environ.get("HKVPROF_TRANSFORMERS")
    more = [f"transformers=={pinned}"] if pinned else []
    call(environment / "pip", "install", "-q", wheel, *more, cwd=tmp_path)
    call(environment / "pip", "check", cwd=tmp_path)
    call(environment / "pip", "list", "--format=freeze", cwd=tmp_path)
    where = call(environment / "python", "-c", "import hkvprof; print(hkvprof.__file__)",
                 cwd=tmp_path)  # fmt: skip
    assert str(environment.parent) in where
    alone = {"HF_HUB_OFFLINE": "1", "HKVPROF_CACHE": str(tmp_path / "cache"),
             "HOME": str(tmp_path / "home")}  # fmt: skip
    said = call(environment / "hkvprof", "demo", "--quick", cwd=tmp_path, **alone)
    assert "torch kernels" not in said
    assert "slower than it could be" not in said, "the C++ sources travel in the wheel"
    made = tmp_path / "hkvprof-demo"
    assert {path.name for path in made.iterdir()} == {
        "samples", "heldout", "tinyvl.profile.safetensors", "eval", "report.html",
    }  # fmt: skip
    answers = made / "eval"
    assert {"answers.jsonl", "summary.json"} <= {path.name for path in answers.iterdir()}
    assert not (answers / "quality.svg").exists(), "plots need an extra"
    profile = made / "tinyvl.profile.safetensors"
    call(environment / "hkvprof", "doctor", "tinyvl", profile, "--only", "image,masked-images",
         cwd=tmp_path, **alone)  # fmt: skip
    call(environment / "pip", "install", "-q", f"{wheel}[report]", *more, cwd=tmp_path)
    line = next(line for line in said.splitlines() if line.startswith("$ hkvprof eval"))
    again = [word for word in shlex.split(line)[2:] if word != "--no-plot"]
    call(environment / "hkvprof", *again, cwd=tmp_path, **alone)
    assert (answers / "quality.svg").stat().st_size > 10_000
    mine = files(environment, tmp_path)
    call(environment / "pip", "install", "-q", "--force-reinstall", "--no-deps", sdist,
         cwd=tmp_path)  # fmt: skip
    assert files(environment, tmp_path) == mine, "the sdist lacks files"
    call(environment / "hkvprof", "inspect", profile, cwd=tmp_path, **alone)
