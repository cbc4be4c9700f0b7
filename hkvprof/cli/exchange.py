"""`hkvprof export` and `import`: head scores and patterns in the files of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Format = Annotated[
    str, typer.Option("--format", help="duo, sparsemm, rtp or lukv (docs/sharing.md).")
]

EXPORT_EXAMPLES = """\b
Examples:
  hkvprof export tinyvl.profile.safetensors --format duo
  hkvprof export tinyvl.profile.safetensors --format rtp -o for-rtp
What a format cannot hold is said on stderr."""


def export(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A sound profile.")],
    format_: _Format,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder; default: NAME.FORMAT.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write a profile's head scores as DuoAttention, SparseMM, RTP-LLM or LU-KV read them."""
    from hkvprof.cli.output import check_output
    from hkvprof.files.atomic import write_atomically
    from hkvprof.profile.formats import find_format
    from hkvprof.profile.record import load_profile

    chosen = find_format(format_)
    folder = output or Path(f"{profile.name.partition('.')[0]}.{chosen.name}")
    for name in chosen.files:
        check_output(folder / name, force)
    written = chosen.write(load_profile(profile))
    for name, data in written.files.items():
        write_atomically(folder / name, data)
        typer.echo(folder / name)
    _say_what_is_not_held(f"{chosen.reader}'s files do not hold", written.not_held)


IMPORT_EXAMPLES = """\b
Examples:
  hkvprof import attn_patterns/MODEL/EXPERIMENT --format duo --model MODEL -o p.safetensors
  hkvprof import qwen.json --format sparsemm --model Qwen/Qwen2-VL-7B-Instruct -o p.safetensors
  hkvprof validate qwen.json Qwen/Qwen2-VL-7B-Instruct --format sparsemm
No weights are loaded. What a profile cannot hold of the files is said on stderr."""


def import_(
    files: Annotated[Path, typer.Argument(metavar="FILE", help="The file, or its folder.")],
    format_: _Format,
    model: Annotated[str, typer.Option("--model", help="Alias, hub id or folder: whose heads.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile.")],
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Mean share; default 0.10, duo: half the heads whole."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Make a profile of another project's head scores, checked against the model's heads."""
    from hkvprof.cli.options import parse_share
    from hkvprof.cli.output import check_output, quiet_transformers
    from hkvprof.models.load import model_fingerprint
    from hkvprof.profile.exchange import imported
    from hkvprof.profile.formats import find_format

    chosen, share = find_format(format_), None if budget is None else parse_share(budget)
    check_output(output, force)
    quiet_transformers()
    profile, not_held = imported(chosen, files, model_fingerprint(model), share)
    profile.save(output)
    typer.echo(output)
    _say_what_is_not_held("the profile does not hold, or holds otherwise", not_held)


def _say_what_is_not_held(who: str, entries: tuple[str, ...]) -> None:
    from hkvprof.cli.output import say

    say(f"{who}:")
    for entry in entries:
        say(f"- {entry}")
