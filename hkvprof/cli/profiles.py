"""`hkvprof inspect`, `diff` and `validate`: what profile files say, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hkvprof.cli import options

INSPECT_EXAMPLES = """\b
Examples:
  hkvprof inspect tinyvl.profile.safetensors
  hkvprof inspect tinyvl.profile.safetensors --layer 3
  hkvprof inspect tinyvl.profile.safetensors --json | jq .borderline"""


def inspect(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile made by `hkvprof calibrate`.")
    ],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Show one layer, head by head (from 0).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII alone.")] = False,
    context: options.Context = None,
) -> None:
    """Show a profile: head types, budgets, borderline heads, how sure it is, provenance."""
    from hkvprof.cli.output import draws_ascii, stdout
    from hkvprof.profile.record import load_profile
    from hkvprof.profile.sizes import context_for
    from hkvprof.report import summary, terminal

    loaded = load_profile(profile)
    tokens = context_for(loaded.provenance, context)
    if layer is not None:
        page = summary.summarise_layer(loaded, layer)
    elif as_json:
        page = summary.summarise(loaded, tokens)
    if as_json:
        typer.echo(json.dumps(page, indent=2, sort_keys=True))
        return
    plain = draws_ascii(ascii_only)
    drawn = (
        terminal.overview(loaded, tokens, plain)
        if layer is None
        else terminal.layer_page(loaded, layer, plain)
    )
    stdout(plain).print(drawn)


DIFF_EXAMPLES = """\b
Examples:
  hkvprof diff old.safetensors new.safetensors
  hkvprof diff old.safetensors new.safetensors --json | jq .flips
Exit code: 0 the same, 3 different, 1 a file that cannot be read or is of another model."""

DIFFERENT = 3


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A profile.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show heads whose type or share differs between two profiles."""
    from hkvprof.profile.record import load_profile
    from hkvprof.report.difference import difference, lines

    found = difference(load_profile(first), load_profile(second))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, sort_keys=True))
    else:
        for line in lines(found):
            typer.echo(line)
    if not found.is_same:
        raise typer.Exit(DIFFERENT)


VALIDATE_EXAMPLES = """\b
Examples:
  hkvprof validate mine.safetensors
  hkvprof validate mine.safetensors Qwen/Qwen2.5-VL-7B-Instruct --json
  hkvprof validate head_score.json Qwen/Qwen2-VL-7B-Instruct --format sparsemm
Exit code: 0 sound (and of the model), 1 not a sound profile, 3 of another model, 4 of the same
geometry but another config. No weights are loaded: a fine-tune cannot be told from its base."""

OTHER_MODEL, OTHER_CONFIG = 3, 4


def validate(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A file.")],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Alias, hub id, folder or GGUF file.")
    ] = None,
    format_: Annotated[
        str,
        typer.Option("--format", help="Of another project's file: duo, sparsemm, rtp or lukv."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a profile's schema and bounds, and whether it belongs to a model."""
    found, said, code = _own(profile, model) if not format_ else _foreign(profile, model, format_)
    typer.echo(json.dumps(found, indent=2, sort_keys=True) if as_json else said)
    if code:
        raise typer.Exit(code)


_Verdict = tuple[dict[str, Any], str, int]
"""For JSON, in words, and the exit code."""


def _own(path: Path, model: str | None) -> _Verdict:
    """Of a profile, and of the model where one is named."""
    from hkvprof.profile.record import SCHEMA_VERSION, load_profile

    loaded = load_profile(path)
    found: dict[str, Any] = {
        "profile": str(path),
        "sound": True,
        "schema": SCHEMA_VERSION,
        "recipe": loaded.recipe,
        "architecture": loaded.fingerprint.architecture,
    }
    said, code = f"{path} is a sound profile of {loaded.fingerprint.architecture}", 0
    if model is not None:
        more, code = _against(loaded, model)
        found |= {"model": model, **more}
        said += f"; {more['verdict']}"
    return found, said, code


def _foreign(file: Path, model: str | None, format_: str) -> _Verdict:
    """Of another project's file, for the shape of a model."""
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.errors import UsageError
    from hkvprof.models.load import model_fingerprint
    from hkvprof.profile.exchange import imported
    from hkvprof.profile.formats import find_format

    chosen = find_format(format_)
    if model is None:
        raise UsageError(f"--format {format_} needs a MODEL: such a file does not name its own")
    quiet_transformers()
    imported(chosen, file, model_fingerprint(model), None)
    found = {"file": str(file), "sound": True, "format": format_, "model": model}
    return found, f"{file} is sound, and of the shape of {model}", 0


def _against(profile: Any, model: str) -> tuple[dict[str, Any], int]:
    """The verdict on a model, tier by tier, and the exit code."""
    from hkvprof.cli.output import quiet_transformers
    from hkvprof.models.load import model_fingerprint

    quiet_transformers()
    theirs = model_fingerprint(model)
    mismatches = profile.fingerprint.mismatches(theirs)
    if mismatches:
        verdict = f"made for another model than {model} (profile != model): {'; '.join(mismatches)}"
        return {"mismatches": mismatches, "same_config": False, "verdict": verdict}, OTHER_MODEL
    same = profile.fingerprint.config_hash == theirs.config_hash
    verdict = f"{model} is its model" if same else (
        f"{model} has its geometry, but its config differs in fields that do not change attention: "
        "compression works, the measured quality may not carry over"
    )  # fmt: skip
    found = {"mismatches": [], "same_config": same, "verdict": verdict}
    return found, 0 if same else OTHER_CONFIG
