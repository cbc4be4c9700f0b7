"""What a reader relies on in the package: unique names, short argument lists, docstrings."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "hkvprof"
MOST_ARGUMENTS = 12
LEAST_WORDS = 4
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(node: ast.AST, qualified: str = "") -> Iterator[tuple[str, Definition]]:
    """Classes, functions and methods with their dotted names, but not what is inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{qualified}{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{name}.")


def everything() -> Iterator[tuple[str, str, Definition]]:
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for name, node in definitions(parsed(path)):
            yield place, name, node


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(entry).partition("(")[0] for entry in node.decorator_list}


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for place, name, node in everything():
        if isinstance(node, ast.ClassDef) and is_public(name):
            homes.setdefault(node.name, []).append(place)
    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert not shared, shared


def test_no_function_takes_more_arguments_than_one_can_keep_apart() -> None:
    long, verbs = {}, verbs_of_the_command_line()
    for place, name, node in everything():
        if isinstance(node, ast.ClassDef) or "triton.jit" in decorators(node):
            continue
        if f"{place}:{name}" in verbs:
            continue
        given = node.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        if count > MOST_ARGUMENTS:
            long[f"{place}:{name}"] = count
    assert not long, f"pass a record: {long}"


def verbs_of_the_command_line() -> set[str]:
    """Functions that `app.command(...)` is given: their arguments are a verb's options."""
    written = re.findall(
        r"app\.command\(.*\)\((\w+)\.(\w+)\)", (ROOT / "cli/__init__.py").read_text()
    )
    assert len(written) > 5
    return {f"cli/{module}.py:{name}" for module, name in written}


def test_what_is_public_says_what_it_is() -> None:
    """In at least four words; an override may refer to what it overrides."""
    mute = []
    for place, name, node in everything():
        if not is_public(name) or has_no_reader(node):
            continue
        words = (ast.get_docstring(node) or "").split()
        if len(words) < LEAST_WORDS and words[:1] != ["See"]:
            mute.append(f"{place}:{node.lineno} {name}: {' '.join(words)!r}")
    assert not mute, "\n".join(mute)


def has_no_reader(node: Definition) -> bool:
    """Whether this is a member of a protocol (its body is `...`), or the setter of a property."""
    is_setter = any(name.endswith(".setter") for name in decorators(node))
    return is_setter or ast.unparse(node.body[-1]) == "..."
