"""Imports run one way only, and light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hkvprof"
BASE = {"errors", "heads", "lazy", "files"}
PROFILE = BASE | {"profile"}
SELECTION = PROFILE | {"selection"}
MODELS = PROFILE | {"models"}
SHARED = SELECTION | {"models"}
OFFLINE = SHARED | {"samples", "calibration"}
ALLOWED = {
    "errors": set(),
    "heads": {"errors"},
    "lazy": {"errors"},
    "files": {"errors"},
    "profile": BASE,
    "selection": PROFILE,
    "samples": {"errors", "files", "lazy"},
    "models": SHARED,
    "calibration": SHARED | {"samples"},
    "runtime": SHARED,
    "testbed": MODELS | {"samples"},
    "evaluate": OFFLINE | {"runtime", "testbed"},
    "bench": SHARED | {"runtime", "calibration.uniform"},
    "doctor": OFFLINE | {"runtime", "bench"},
    "report": OFFLINE | {"runtime", "evaluate", "bench", "doctor"},
    "cli": OFFLINE
    | {"runtime", "evaluate", "bench", "doctor", "report", "testbed", "serve", "engines"},
    "serve": SHARED | {"runtime", "samples"},
    "engines": SELECTION,
    "plugins": SHARED | {"runtime", "samples"},
    "__main__": {"cli"},
}
"""Per part (a module or folder of hkvprof): the parts it may import, besides itself."""
VERSION_READERS = {"cli", "calibration", "evaluate", "bench", "doctor", "models"}
"""Parts that may `import hkvprof` for its version."""


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imports(path: Path) -> list[str]:
    """Dotted names below hkvprof that `path` imports anywhere, functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, line {node.lineno}"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names]
    ours = [name for name in found if name.split(".")[0] == "hkvprof"]
    return [name.removeprefix("hkvprof.") for name in ours]


def part(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    mine = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert mine in ALLOWED, f"give {mine} a place in the layers (CONTRIBUTING.md)"
    for name in imports(path):
        if part(name) == mine or (name == "hkvprof" and mine in VERSION_READERS):
            continue
        allowed = part(name) in ALLOWED[mine] or any(
            name == entry or name.startswith(f"{entry}.") for entry in ALLOWED[mine]
        )
        assert allowed, f"{path.relative_to(ROOT)} imports {name}: {mine} may not"


def test_calibration_and_runtime_never_meet() -> None:
    assert "runtime" not in ALLOWED["calibration"]
    assert "calibration" not in ALLOWED["runtime"]


def test_the_package_needs_no_tools() -> None:
    """`tools/` and `tests/` are not in the wheel."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert "from tools" not in text, path
        assert "from tests" not in text, path


def test_there_are_no_cycles_between_files() -> None:
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(imports(path))
    names = set(graph)
    edges = {
        name: {_home(wanted, names) for wanted in graph[name]} - {name, None} for name in names
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


def _home(wanted: str, names: set[str]) -> str | None:
    """The module behind an imported name: `selection.index`, or `selection.index.HeadTables`."""
    return next((n for n in (wanted, wanted.rpartition(".")[0]) if n in names), None)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(result.stdout.split())


HEAVY = {"datasets", "typer", "rich", "PIL", "scipy"}


def test_the_runtime_stays_light() -> None:
    """The import loads none of them; its names bring what torch and transformers load, no more."""
    assert not loaded_by("import hkvprof.runtime") & (HEAVY | {"torch"})
    theirs = loaded_by("import torch, transformers.cache_utils")
    assert not (loaded_by("from hkvprof.runtime import apply") - theirs) & HEAVY


def test_what_the_runtime_needs_names_no_heavy_package() -> None:
    for path in modules():
        mine = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if mine in ALLOWED["runtime"] | {"runtime"}:
            assert not _foreign_imports(path) & HEAVY, path


def _foreign_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_profiles_are_read_without_torch() -> None:
    read = "import hkvprof; hkvprof.load_profile('tests/golden/profile-v2.safetensors')"
    for statement in ("import hkvprof.profile.record", read):
        assert not loaded_by(statement) & {"torch", "transformers", "datasets", "PIL", "typer"}


def test_the_record_knows_no_planning() -> None:
    names = "{name for name in sys.modules if name.startswith('hkvprof')}"
    code = f"import hkvprof.profile.record, sys; print(*{names})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planning = {f"hkvprof.profile.{name}" for name in ("planning", "budgets", "forecast")}
    assert not planning & set(told.stdout.split())


def test_the_package_itself_loads_nothing() -> None:
    assert not loaded_by("import hkvprof; dir(hkvprof)") & {"torch", "transformers", "numpy"}


def test_samples_are_read_without_torch() -> None:
    read = "from hkvprof.samples.read import load_samples; load_samples('calibration/mini')"
    assert not loaded_by(read) & {"torch", "transformers", "datasets", "typer"}


def test_help_needs_no_torch() -> None:
    run = "from hkvprof.cli import run; import sys; sys.stdout = sys.stderr; run(['--help'])"
    assert not loaded_by(f"{run}; sys.stdout = sys.__stdout__") & {"torch", "transformers"}


def test_lazy_names_lead_somewhere() -> None:
    import hkvprof
    import hkvprof.runtime

    for name in hkvprof.__all__:
        assert getattr(hkvprof, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hkvprof.nothing  # noqa: B018
    for name in hkvprof.runtime.__all__:
        assert callable(getattr(hkvprof.runtime, name))


def test_names_that_the_readme_showed_elsewhere_go_on_working() -> None:
    import hkvprof
    from hkvprof.profile.samples import load_samples, open_images
    from hkvprof.profile.uniform import uniform_profile

    assert load_samples is hkvprof.load_samples
    assert open_images is hkvprof.open_images
    assert uniform_profile is hkvprof.uniform_profile


def test_the_version_is_the_packages() -> None:
    import tomllib

    import hkvprof

    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert hkvprof.__version__ == project["project"]["version"]
