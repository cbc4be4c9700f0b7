"""`apply(model, profile)`: from then on plain `model.generate(...)` compresses its KV cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from hkvprof.errors import BudgetError, CompressionError, ProfileError, UsageError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.approval import require_approval
from hkvprof.models.load import load_empty
from hkvprof.models.processing import ChatProcessor
from hkvprof.models.wrappers import unwrap
from hkvprof.profile.budgets import Budget, Fetch, FetchLike
from hkvprof.profile.hub import fetch as fetch_profile
from hkvprof.profile.hub import on_hub
from hkvprof.profile.record import Profile, load_profile
from hkvprof.runtime.binding import HANDLE, Binding
from hkvprof.runtime.cache import Books, CompressedCache
from hkvprof.runtime.options import Options
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.receipt import Receipt
from hkvprof.runtime.retrieval import queues_for
from hkvprof.runtime.selfcheck import require_tested_seam
from hkvprof.runtime.shown import html_table


def apply(
    model: Any,
    profile: Profile | OpenedProfile | str | Path,
    budget: float | int | str | None = None,
    options: Options | None = None,
    fetch: FetchLike = None,
    **changes: Any,
) -> Handle:
    """Compress the KV cache of every following generation of `model`.

    `model` may be wrapped: by torch.compile, peft, DDP or a pipeline; the transformers model inside
    is what the profile is applied to.

    `profile` is a profile, its file, or `hf:owner/name[@revision]` on the Hugging Face hub.

    `budget` is the all-in share of dense K/V bytes to keep (0.10), a number of tokens per head
    (4096), or bytes ("2GiB"); default: the profile's own. `fetch` is the most that a decoding step
    reads from host memory per row: a share of the row's dense bytes (0.01), bytes ("2MiB"), 0 (no
    host memory at all) or "unlimited"; default: as little as loses no more than 3%
    (profile.dealing). Passes of several tokens read what they need. All else is an option: a record
    (hkvprof.Options says what each one does), single ones by name, or both:
    `apply(model, profile, 0.10, min_tokens=512, compress_every=0)`.

    Returns a handle that is also a context manager; `detach()` restores the model. Raises
    ProfileError if the profile is for another model, ModelError for unsupported models (for
    unlisted architectures that `hkvprof doctor` has not passed here, and for untested releases of
    transformers that fail a built-in check),
    BudgetError for budgets that cannot be met, UsageError for unknown or impossible options and
    if the model is already hooked.
    """
    options = Options.changed(options, changes)
    require_tested_seam(apply)
    profile, origin = open_profile(profile)
    model = unwrap(model)
    view = view_model(model)
    require_approval(view)
    check_fingerprint(profile, view)
    if vars(model).get(HANDLE) is not None:
        raise UsageError("this model already has a profile applied: call handle.detach() first")
    if options.prefetch is not None:
        queues_for(model.device)
    parsed = budget_for(profile, budget)
    return Handle(model, view, Planner(profile, parsed, options, origin, Fetch.parse(fetch)))


class OpenedProfile(NamedTuple):
    """A profile that is read, and where it came from, as receipts tell it."""

    profile: Profile
    origin: str


def budget_for(profile: Profile, budget: float | int | str | None) -> Budget:
    """The budget, by default the profile's own. Raises BudgetError for fewer tokens than a head of
    the profile must keep."""
    parsed = Budget.parse(profile.default_budget if budget is None else budget)
    floor = profile.keep.floor_tokens
    if parsed.tokens is not None and parsed.tokens < floor:
        raise BudgetError(
            f"a budget of {parsed.tokens} tokens is too small: sinks, recent tokens and the floor "
            f"need {floor}; raise the budget, or did you mean '{parsed.tokens}%'?"
        )
    return parsed


def open_profile(profile: Profile | OpenedProfile | str | Path) -> OpenedProfile:
    """A profile, its file or `hf:owner/name[@revision]`; one that is open already, as it is.

    Raises ProfileError and UsageError.
    """
    if isinstance(profile, OpenedProfile):
        return profile
    if isinstance(profile, Profile):
        return OpenedProfile(profile, "")
    if on_hub(profile):
        fetched = fetch_profile(str(profile))
        return OpenedProfile(load_profile(fetched.path), str(fetched))
    return OpenedProfile(load_profile(profile), Path(profile).name)


class Handle:
    """An applied profile. Use as a context manager, or call `detach()` when done.

    `model` is the transformers model inside of what `apply` was given.
    """

    def __init__(self, model: Any, view: ModelView, planner: Planner) -> None:
        self.model = model
        self.profile = planner.profile
        self.strict = planner.options.strict
        self._planner = planner
        self._binding = Binding(self, view, planner)

    def new_cache(self, prompt_tokens: int | None = None) -> CompressedCache:
        """A cache for one's own forward loop: `model(input_ids=..., cache=cache)`, or
        `past_key_values=cache`.

        The prompt is compressed when `prompt_tokens` positions (padding included) have been seen,
        in however many passes; without that number, at the end of the first pass of several tokens.
        """
        cache = self._binding.new_cache(prompt_tokens)
        self._binding.books = cache.books
        return cache

    def receipt(self) -> Receipt:
        """The account of the latest request; it outlives the request's cache.

        Where a request ran without a compressed cache, its receipt says why.
        """
        if self._books is None:
            raise CompressionError("nothing has been generated yet: there is no receipt")
        return self._books.receipt()

    @property
    def _books(self) -> Books | None:
        return self._binding.books

    def detach(self) -> None:
        """Give the model back as it was, when no pass is running; harmless when called twice.

        Caches made under this handle can be used no more. Raises UsageError within a pass.
        """
        self._binding.release()

    def _facts(self) -> dict[str, str]:
        grid, planner = self.profile.grid, self._planner
        applied = vars(self.model).get(HANDLE) is self
        return {
            "model": self.profile.fingerprint.architecture,
            "compressed": f"{grid.layers} layers of {grid.kv_heads} KV heads",
            "budget": str(planner.budget),
            "reads": str(planner.fetch),
            "profile": planner.origin or "made in this process",
            "state": "applied" if applied else "detached",
        }

    def __repr__(self) -> str:
        return f"<Handle: {', '.join(f'{name} {value}' for name, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        """A table in a notebook."""
        return html_table("Handle", self._facts())

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise UsageError: neither copies nor files hold an applied profile."""
        raise UsageError(
            "a handle cannot be copied or saved: copies of its model come without the profile; "
            "apply it to them"
        )


def check_fingerprint(profile: Profile, view: ModelView) -> None:
    """Raise ProfileError naming the fields in which the profile's model differs; warn on others."""
    calibrated, given = profile.fingerprint, view.fingerprint
    mismatches = calibrated.mismatches(given)
    if mismatches:
        more = f" and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
        raise ProfileError(
            "this profile was made for another model (profile != model): "
            + "; ".join(mismatches[:4])
            + f"{more}. Calibrate this model with `hkvprof calibrate`"
        )
    remarks = calibrated.remarks(given)
    if remarks:
        warnings.warn(
            f"the profile was {'; '.join(remarks)}: head types may not carry over; calibrate this "
            "model to be sure",
            stacklevel=3,
        )
    elif calibrated.config_hash != given.config_hash:
        warnings.warn(
            "the model's config differs from the one calibrated in fields that do not change "
            "attention; compression works, its measured quality may not carry over",
            stacklevel=3,
        )


def without_weights(name_or_path: str | Path, profile: Profile) -> tuple[Any, ChatProcessor]:
    """The model as `load_empty` gives it, and its processor, where the profile is of this model.

    Raises ProfileError where it is not, ModelError. What `apply` only warns of is left to it.
    """
    empty, processor = load_empty(name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_fingerprint(profile, view_model(empty))
    return empty, processor
