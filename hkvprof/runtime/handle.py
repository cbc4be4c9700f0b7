"""`apply(model, profile)`: from then on plain `model.generate(...)` compresses its KV cache."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from hkvprof.artifact import Profile, load_profile
from hkvprof.errors import BudgetError, CompressionError, ModelError, ProfileError, UsageError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.approval import require_approval
from hkvprof.models.attention import hook_attention, refuse_features
from hkvprof.models.forward import rope_holder
from hkvprof.policy.budget import Budget
from hkvprof.runtime.cache import Books, CompressedCache
from hkvprof.runtime.monitor import Monitor
from hkvprof.runtime.options import COMPRESS_EVERY, MIN_TOKENS, SMOOTHING, Options
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.prefetch import queues_for
from hkvprof.runtime.receipt import Receipt

_HANDLE = "_hkvprof_handle"


def apply(
    model: Any,
    profile: Profile | str | Path,
    budget: float | int | str | None = None,
    strict: bool = True,
    min_tokens: int = MIN_TOKENS,
    decode_compression: bool = True,
    compress_every: int = COMPRESS_EVERY,
    host_dtype: str = "same",
    smoothing: float = SMOOTHING,
    retrieve_every: int = 1,
    prefetch: float | None = None,
    monitor: float = 0.0,
) -> Handle:
    """Compress the KV cache of every following generation of `model`.

    `budget` is the all-in share of dense K/V bytes to keep (0.10), a number of tokens per head
    (4096), or bytes ("2GiB"); default: the profile's own. Prompts shorter than `min_tokens` stay
    dense and the receipt says so. With `strict`, a covered layer that was not compressed, a foreign
    cache and a budget that does not fit a prompt raise; without, they stay dense with a reason.

    Generated tokens and later turns join the budget every `compress_every` tokens (static heads are
    pruned again, full chunks of dynamic heads move to the host); `decode_compression=False` keeps
    them whole. Dynamic heads: `host_dtype="int8"` halves their host memory, `smoothing` s keeps a
    token hot while s times its last score would (fewer transfers), and with `retrieve_every` n only
    every n-th step selects, then with the n - 1 successors of what it picks (docs/retrieval.md).
    `prefetch` c, on CUDA only: selection and reads of host memory for the next step run beside this
    one, but for heads whose query has a cosine below c to its last (0.85; docs/gpu.md).

    `monitor` is the share of requests (0.01) whose prompt is compared with the calibration's; the
    first one out of their domain warns (HkvWarning), all say so on their receipt (docs/method.md).

    Returns a handle that is also a context manager; `detach()` restores the model. Raises
    ProfileError if the profile is for another model, ModelError for unsupported models (and for
    unlisted architectures that `hkvprof doctor` has not passed here),
    BudgetError for budgets that cannot be met, UsageError if the model is already hooked.
    """
    if isinstance(profile, (str, Path)):
        profile = load_profile(profile)
    view = view_model(model)
    require_approval(view)
    check_fingerprint(profile, view)
    if getattr(model, _HANDLE, None) is not None:
        raise UsageError("this model already has a profile applied: call handle.detach() first")
    if decode_compression and compress_every == 0:
        raise UsageError(
            "compress_every must be at least 1; to keep generated tokens whole use "
            "decode_compression=False"
        )
    every = compress_every if decode_compression else 0
    options = Options(
        strict, min_tokens, every, host_dtype, smoothing, retrieve_every, prefetch, monitor
    )
    if prefetch is not None:
        queues_for(model.device)
    parsed = Budget.parse(profile.default_budget if budget is None else budget)
    floor = profile.keep.floor_tokens
    if parsed.tokens is not None and parsed.tokens < floor:
        raise BudgetError(
            f"a budget of {parsed.tokens} tokens is too small: sinks, recent tokens and the floor "
            f"need {floor}; raise the budget"
        )
    return Handle(model, view, Planner(profile, parsed, options))


def check_fingerprint(profile: Profile, view: ModelView) -> None:
    """Raise ProfileError naming the fields in which the profile's model differs; warn on others."""
    mismatches = profile.fingerprint.mismatches(view.fingerprint)
    if mismatches:
        more = f" and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
        raise ProfileError(
            "this profile was made for another model (profile != model): "
            + "; ".join(mismatches[:4])
            + f"{more}. Calibrate this model with `hkvprof calibrate`"
        )
    mine, theirs = profile.fingerprint, view.fingerprint
    if (
        mine.weights_digest
        and theirs.weights_digest
        and mine.weights_digest != theirs.weights_digest
    ):
        warnings.warn(
            "the profile was calibrated on other weights of this architecture (a fine-tune, or "
            "another checkpoint): head types may not carry over; calibrate this model to be sure",
            stacklevel=3,
        )
    elif mine.config_hash != theirs.config_hash:
        warnings.warn(
            "the model's config differs from the one calibrated in fields that do not change "
            "attention; compression works, its measured quality may not carry over",
            stacklevel=3,
        )


class Handle:
    """An applied profile. Use as a context manager, or call `detach()` when done."""

    def __init__(self, model: Any, view: ModelView, planner: Planner) -> None:
        self.model = model
        self.profile = planner.profile
        self.strict = planner.options.strict
        self._view = view
        self._planner = planner
        self._books: Books | None = None
        self._monitor = Monitor.of(planner, view.layer_ids)
        self._restore = hook_attention(model)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        model.generate = _generate_with_cache(model.generate, self)
        setattr(model, _HANDLE, self)

    def new_cache(self, prompt_tokens: int | None = None) -> CompressedCache:
        """A cache for one's own forward loop: `model(input_ids=..., past_key_values=cache)`.

        The prompt is compressed when `prompt_tokens` positions (padding included) have been seen,
        in however many passes; without that number, at the end of the first pass of several tokens.
        """
        self._require_attached()
        view = self._view
        cache = CompressedCache(
            self._planner, view.grid, view.layer_ids, view.text_config, prompt_tokens,
            None if self._monitor is None else self._monitor.watch(),
        )  # fmt: skip
        self._books = cache.books
        return cache

    def receipt(self) -> Receipt:
        """The account of the latest cache that this handle made; it outlives the cache."""
        if self._books is None:
            raise CompressionError("nothing has been generated yet: there is no receipt")
        return self._books.receipt()

    def detach(self) -> None:
        """Give the model back as it was; harmless when called twice."""
        if getattr(self.model, _HANDLE, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        del self.model.generate
        delattr(self.model, _HANDLE)
        self._restore()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _require_attached(self) -> None:
        if getattr(self.model, _HANDLE, None) is not self:
            raise UsageError("this handle is detached: call hkvprof.runtime.apply again")

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_features({"output_attentions": kwargs.get("output_attentions")})
        cache = kwargs.get("past_key_values")
        if cache is None:
            if module.training or kwargs.get("use_cache") is False:
                return None
            cache = kwargs["past_key_values"] = self.new_cache()
        if not isinstance(cache, CompressedCache):
            self._foreign_cache(cache)
            return None
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache.conversation.see_ids(ids, cache.get_seq_length())
        self._exchange_rope_deltas(cache)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CompressedCache):
            holder = rope_holder(self.model)
            if holder is not None:
                cache.conversation.rope_deltas = holder.rope_deltas
            if self.strict:
                cache.check_compressed()

    def _foreign_cache(self, cache: Any) -> None:
        if self.strict:
            raise CompressionError(
                f"expected a cache made by hkvprof, found {type(cache).__name__}, which would "
                "not be compressed: leave past_key_values out, pass handle.new_cache(), or apply "
                "with strict=False"
            )

    def _exchange_rope_deltas(self, cache: CompressedCache) -> None:
        """Qwen-VL keeps a conversation's M-RoPE offset on the model: put this cache's own there."""
        holder = rope_holder(self.model)
        if holder is not None and cache.get_seq_length() > 0:
            holder.rope_deltas = cache.conversation.rope_deltas


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Positions of the prompt that `generate` was given, where it was given one."""
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1]) if args and args[0] is not None else None


def _generate_with_cache(generate: Callable[..., Any], handle: Handle) -> Callable[..., Any]:
    """`generate` that brings its own compressed cache unless it was given one."""

    @functools.wraps(generate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config")
        kind = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if kind not in (None, "dynamic"):
            raise ModelError(
                f"cache_implementation={kind!r} cannot be combined with hkvprof, which brings its "
                "own cache: leave it out, or detach first"
            )
        cache = kwargs.get("past_key_values")
        if (
            cache is None
            and kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False
        ):
            kwargs["past_key_values"] = handle.new_cache(_prompt_length(args, kwargs))
        elif isinstance(cache, CompressedCache):
            if cache.get_seq_length() == 0:
                cache.conversation.goal = _prompt_length(args, kwargs)
            handle._exchange_rope_deltas(cache)
        elif cache is not None:
            handle._foreign_cache(cache)
        return generate(*args, **kwargs)

    return wrapped
