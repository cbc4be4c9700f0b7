"""`hkvprof serve`: a model with a profile behind an OpenAI-compatible address."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from hkvprof.cli import options
from hkvprof.errors import UsageError

EXAMPLES = """\b
Examples:
  hkvprof serve tinyvl --profile tinyvl.profile.safetensors --budget 0.1
  hkvprof serve Qwen/Qwen2.5-VL-7B-Instruct --profile hf:me/profile --budget 0.2 --port 8001
Then, with OpenAI's client: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
docs/serving.md says what is answered and what is refused."""


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, hub id or folder.")],
    profile: Annotated[
        str, typer.Option("--profile", help="A profile, or hf:owner/name[@revision].")
    ],
    budget: Annotated[
        str | None, typer.Option("--budget", help="Share, tokens or bytes; default: the profile's.")
    ] = None,
    fetch: options.Fetch = None,
    host: Annotated[str, typer.Option("--host", help="Who can reach it: by default, you.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    allowed_media: Annotated[
        Path | None,
        typer.Option("--allowed-media", help="Folder whose images requests may name."),
    ] = None,
    monitor: Annotated[
        float, typer.Option("--monitor", help="Share of requests compared with the calibration.")
    ] = 0.0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="As transformers takes it, such as auto.")
    ] = None,
) -> None:
    """Serve a model with its KV cache compressed, as OpenAI's chat completions."""
    from hkvprof.cli.output import say
    from hkvprof.lazy import require_extra

    uvicorn = require_extra("uvicorn", "serve")
    from hkvprof.profile.budgets import Fetch
    from hkvprof.runtime.handle import apply, budget_for, open_profile
    from hkvprof.runtime.options import Options
    from hkvprof.serve.app import Address, make_app
    from hkvprof.serve.engine import Engine

    if allowed_media is not None and not allowed_media.is_dir():
        raise UsageError(f"--allowed-media {allowed_media}: no such folder")
    chosen = Options(monitor=monitor)
    sound = open_profile(profile)
    budget_for(sound.profile, budget)
    Fetch.parse(fetch)
    with _listen(host, port) as listener:
        address = Address(host, listener.getsockname()[1], allowed_media)
        options.open_empty(model, sound.profile)
        loaded, processor = options.open_model(model, dtype, device, device_map)
        handle = apply(loaded, sound, budget, chosen, fetch=fetch)
        if not address.is_local:
            say(f"warning: whoever reaches {host} may use the model: there is no password")
        app = make_app(Engine(model, handle, processor), address)
        slow = {"timeout_graceful_shutdown": SHUTDOWN_SECONDS}
        config = uvicorn.Config(app, log_level="warning", **slow)
        say(f"serving {model} at {address.url} (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):  # the usual way to end it
            uvicorn.Server(config).run([listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before a model is loaded. Raises UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port} ({error}): choose others with --host and --port"
        ) from None


SHUTDOWN_SECONDS = 30
"""For what runs to end by itself, after Ctrl-C or SIGTERM."""
