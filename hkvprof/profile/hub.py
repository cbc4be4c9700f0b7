"""Profiles on the Hugging Face hub: `hf:owner/name[@revision]`. No torch.

A repository holds one profile under one name, beside its card. `huggingface_hub` does the talking,
with its own settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies) and its cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import ProfileError, UsageError

PREFIX = "hf:"
FILE = "profile.hkv.safetensors"
"""The profile's name in every repository."""
MAIN = "main"
_ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAddress:
    """`owner/name`, and a branch, tag or commit of it."""

    repository: str
    revision: str = MAIN

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """The address that `text` names, with `hf:` or without. Raises UsageError."""
        found = _ADDRESS.fullmatch(text.removeprefix(PREFIX))
        if found is None:
            raise UsageError(
                f"{text!r} is no repository of the hub: expected owner/name or owner/name@revision"
            )
        return cls(found[1], found[2] or MAIN)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.revision}"


@dataclass(frozen=True)
class FetchedProfile:
    """A profile's file here, and where it is from: the revision is a commit."""

    path: Path
    address: HubAddress

    def __str__(self) -> str:
        return f"{self.address}/{FILE}"


def on_hub(profile: object) -> bool:
    """Whether this names a profile of the hub, and no file."""
    return isinstance(profile, str) and profile.startswith(PREFIX)


def fetch(text: str) -> FetchedProfile:
    """Get the profile that `hf:owner/name[@revision]` names, from the cache where it is there.

    Raises UsageError for what is no address, ProfileError where it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    wanted = HubAddress.parse(text)
    try:
        path = Path(hf_hub_download(wanted.repository, FILE, revision=wanted.revision))
    except MemoryError:
        raise
    except Exception as error:  # of huggingface_hub, of its client, or of the disk
        raise ProfileError(_why_not(wanted, error)) from error
    commit = path.parent.name
    if not _COMMIT.fullmatch(commit):
        raise ProfileError(
            f"{wanted} came from the hub without its commit (found {str(path)!r}): a profile is "
            "pinned to one; ask a hub that names commits, or give the file itself"
        )
    return FetchedProfile(path, HubAddress(wanted.repository, commit))


def publish(repository: str, files: Mapping[str, bytes], message: str, private: bool) -> HubAddress:
    """Commit `files` to a repository, made if it is not there, and return the commit's address.

    Raises UsageError for a name that is none, ProfileError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    wanted = HubAddress.parse(repository)
    if wanted.revision != MAIN or repository.startswith(PREFIX):
        raise UsageError(f"{repository!r}: push to owner/name alone; what it makes is a commit")
    adds: list[Any] = [CommitOperationAdd(name, data) for name, data in sorted(files.items())]
    try:
        api = HfApi()
        api.create_repo(wanted.repository, private=private or None, exist_ok=True)
        made = api.create_commit(wanted.repository, adds, commit_message=message)
    except MemoryError:
        raise
    except Exception as error:  # of huggingface_hub, or of its client
        raise ProfileError(_why_not(wanted, error)) from error
    return HubAddress(wanted.repository, made.oid)


_REASONS = {
    "GatedRepoError": "it is gated: ask its owner for access, and log in with `hf auth login`",
    "RepositoryNotFoundError": (
        "there is no such repository, or it is private: check the name, and log in with "
        "`hf auth login` or set HF_TOKEN"
    ),
    "RevisionNotFoundError": "it has no such revision: give a branch, a tag or a commit of it",
    "RemoteEntryNotFoundError": f"it holds no {FILE}: expected a repository of `hkvprof push`",
    "LocalTokenNotFoundError": "no token is here: log in with `hf auth login` or set HF_TOKEN",
    "LocalEntryNotFoundError": (
        "it is not in the cache, and the hub cannot be asked (offline, or no connection)"
    ),
}
"""By the errors of huggingface_hub, the narrowest first."""


def _why_not(wanted: HubAddress, error: Exception) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    known = next((reason for name, reason in _REASONS.items() if name in kinds), None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if known is None and status in (401, 403):
        known = f"the hub refuses ({status}): log in with `hf auth login` as one who may do this"
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{wanted}: {known or f'the hub cannot be asked ({type(error).__name__}: {said})'}"
