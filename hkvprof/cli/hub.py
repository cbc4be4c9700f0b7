"""`hkvprof push` and `pull`: profiles on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PUSH_EXAMPLES = """\b
Examples:
  hkvprof push mine.profile.safetensors me/qwen2.5-vl-7b-profile --license apache-2.0
  hkvprof push mine.profile.safetensors me/qwen2.5-vl-7b-profile --private --no-plot
Whoever has it calls hkvprof.apply(model, "hf:me/qwen2.5-vl-7b-profile"). Log in with `hf auth
login`, or set HF_TOKEN."""


def push(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A sound profile.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="A repository; made if it is not there.")
    ],
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="For the card, such as apache-2.0.")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="A card without a picture.")] = False,
) -> None:
    """Publish a profile with a card that says what it is; prints its pinned address."""
    from hkvprof.profile.hub import FILE, publish
    from hkvprof.profile.record import load_profile
    from hkvprof.report.card import CARD, PICTURE, card

    loaded = load_profile(profile)
    files = {FILE: profile.read_bytes()}
    if not no_plot:
        from hkvprof.report.profile_plot import profile_plot

        files[PICTURE] = profile_plot(loaded)
    files[CARD] = card(loaded, repository, licence, pictured=not no_plot).encode()
    typer.echo(publish(repository, files, f"Add {profile.name}", private))


PULL_EXAMPLES = """\b
Examples:
  hkvprof pull me/qwen2.5-vl-7b-profile
  hkvprof pull me/qwen2.5-vl-7b-profile@v2 -o mine.profile.safetensors
Prints the pinned address, which `apply` takes as well as the file."""


def pull(
    address: Annotated[
        str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="As given to push.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: NAME.profile.safetensors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Get a profile from the hub, check it, and write it to a file."""
    from hkvprof.cli.output import check_output, default_profile_path, say
    from hkvprof.files.atomic import write_atomically
    from hkvprof.profile.hub import PREFIX, HubAddress, fetch
    from hkvprof.profile.record import load_profile

    wanted = HubAddress.parse(address)
    path = output or default_profile_path(wanted.repository)
    check_output(path, force)
    fetched = fetch(f"{PREFIX}{address.removeprefix(PREFIX)}")
    load_profile(fetched.path)
    write_atomically(path, fetched.path.read_bytes())
    say(f"wrote {path}")
    typer.echo(fetched.address)
