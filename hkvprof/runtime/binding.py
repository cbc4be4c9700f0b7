"""Ties a model to its applied profile: every way of calling the model leads through here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hkvprof.errors import CompressionError, HkvWarning, ModelError, UsageError
from hkvprof.models.adapter import ModelView
from hkvprof.models.attention import guarded, hook_attention, is_hooked, refuse_features
from hkvprof.models.calls import Call, Signature, rope_holder
from hkvprof.models.overrides import Overrides
from hkvprof.models.rotary import watching_positions
from hkvprof.profile.budgets import Budget
from hkvprof.runtime.accounts import LayerAccount, LayerState, Meter
from hkvprof.runtime.cache import Books, CompressedCache
from hkvprof.runtime.monitor import Monitor
from hkvprof.runtime.options import require_count
from hkvprof.runtime.passes import (
    Owner,
    checkpoints,
    current_pass,
    from_embeddings,
    prompt_length,
    refuse_batching,
)
from hkvprof.runtime.plan import Planner

HANDLE = "_hkvprof_handle"
"""The attribute under which a model keeps its handle."""
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_WITHOUT = "the pass used no cache (use_cache is false)"
_TRAINING = "the pass was part of training"
_FOREIGN = "the pass used a cache that hkvprof did not make"
_ROUND = (
    "attention was reached without hkvprof's cache: a part of the model (such as model.model) was "
    "called in its place"
)
_LOST = (
    "attention got other keys than the cache gave out, so that nothing was compressed although the "
    "profile covers the layer. This architecture, or release of transformers, is not supported: "
    "please report it with the output of `hkvprof doctor`"
)
_GENERATING: ContextVar[CompressedCache | None] = ContextVar("hkvprof_generating", default=None)
"""The cache of the `generate` that runs in this thread, of however many nested ones the first."""


class Binding:
    """Hooks a model and answers its calls until `release`; `books` are of the latest request."""

    def __init__(self, handle: Any, view: ModelView, planner: Planner) -> None:
        self.model: Any = handle.model
        self.books: Books | None = None
        self._view, self._planner, self._strict = view, planner, handle.strict
        self._monitor = Monitor.of(planner, view.layer_ids)
        self._owner = Owner(self.model)
        self._rope_holder = rope_holder(self.model)
        self._forward = Signature(self.model.forward)
        self._generate = Signature(self.model.generate, self._forward.keyword)
        self._has_warned = False
        self._hooks = ExitStack()
        try:
            self._attach(handle)
        except BaseException:
            self._hooks.close()
            raise

    def _attach(self, handle: Any) -> None:
        self._hooks.callback(hook_attention(self.model))
        self._hooks.enter_context(guarded(self._view.attention, self._unmarked))
        profile = self._planner.profile
        turns = profile.index is not None and profile.index.pairs > 0
        if turns or profile.asks_queries:
            watched = watching_positions(self.model, self._view, self._see_positions)
            self._hooks.enter_context(watched)
        methods = {"forward": self._on_forward, "generate": self._on_generate}
        methods |= {name: refuse_batching for name in _BATCHING if hasattr(self.model, name)}
        self._hooks.callback(Overrides(self.model, methods, {HANDLE: handle}).restore)

    def _see_positions(self, positions: Tensor, rows: int) -> None:
        """What rotary embeddings are told in a pass of ours."""
        now = current_pass()
        if now is not None and now.owner is self._owner and now.conversation is not None:
            now.conversation.positions.see(positions, rows)

    def release(self) -> None:
        """Give the model back as it was, when no pass runs."""
        with self._owner.leaving() as was_attached:
            if was_attached:
                self._hooks.close()

    def new_cache(self, prompt_tokens: int | None, dense: bool = False) -> CompressedCache:
        """A cache that only this model fills.

        `dense` ones hold drafts of assisted decoding, which are taken back when they were wrong.
        """
        self._owner.require_attached()
        if prompt_tokens is not None:
            require_count(prompt_tokens, "prompt_tokens", 1)
        view = self._view
        watch = None if self._monitor is None else self._monitor.watch()
        planner = self._planner
        if dense:
            planner = Planner(planner.profile, Budget.parse(1.0), planner.options, planner.origin)
        return CompressedCache(
            planner, view.grid, view.layer_ids, view.text_config, prompt_tokens, watch,
            self._owner,
        )  # fmt: skip

    # -- forward -------------------------------------------------------------------------------

    def _on_forward(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self._forward.read(args, kwargs)
        refuse_features({"output_attentions": call.get("output_attentions")})
        self._require_hooked()
        cache = self._cache_for(call)
        if cache is None:
            with self._owner.passing(None):
                return forward(*call.args, **call.kwargs)
        self._follow(cache)
        cache.conversation.see_ids(call.get("input_ids"), cache.get_seq_length())
        cache.conversation.positions.before = cache.get_seq_length()
        with (
            self._owner.passing(cache.conversation),
            cache.whole_pass(call.rows),
            self._own_rope_deltas(cache),
        ):
            output = forward(*call.args, **call.kwargs)
        if self._strict:
            cache.check_compressed()
        return output

    def _cache_for(self, call: Call) -> CompressedCache | None:
        """The cache of a pass, made where none was given; None for one that takes no part."""
        given = call.cache
        if isinstance(given, CompressedCache):
            return self._own(given)
        if given is not None:
            self._foreign(given)
            return None
        if self.model.training or not self._uses_cache(call):
            self._tell(_TRAINING if self.model.training else _WITHOUT)
            return None
        cache = self.new_cache(None)
        call.set_cache(cache)
        return cache

    def _uses_cache(self, call: Call) -> bool:
        """What the model will take for `use_cache`: the argument, else its config."""
        asked = call.get("use_cache")
        return bool(getattr(self._view.text_config, "use_cache", True) if asked is None else asked)

    @contextmanager
    def _own_rope_deltas(self, cache: CompressedCache) -> Iterator[None]:
        """Qwen-VL keeps a conversation's M-RoPE offset on the model: put this cache's own there."""
        if self._rope_holder is None:
            yield
            return
        with self._owner.alone:
            self._place_rope_deltas(cache)
            yield
            cache.conversation.rope_deltas = self._rope_holder.rope_deltas

    def _place_rope_deltas(self, cache: CompressedCache) -> None:
        if self._rope_holder is not None and cache.get_seq_length() > 0:
            self._rope_holder.rope_deltas = cache.conversation.rope_deltas

    # -- generate ------------------------------------------------------------------------------

    def _on_generate(
        self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self._generate.read(args, kwargs)
        config = self._effective_config(call)
        cache = call.cache
        if isinstance(cache, CompressedCache):
            if self._own(cache).get_seq_length() == 0 or _GENERATING.get() is None:
                cache.conversation.goal = prompt_length(call, config)
            self._place_rope_deltas(cache)
        elif cache is not None:
            self._foreign(cache)
        elif config.use_cache is False and not from_embeddings(call):
            self._warn_without_cache()
        else:
            drafts = bool(getattr(config, "is_assistant", False))
            cache = self.new_cache(prompt_length(call, config), dense=drafts)
            call.set_cache(cache)
        own = cache if isinstance(cache, CompressedCache) else None
        token = _GENERATING.set(_GENERATING.get() or own)
        try:
            with own.conversation.generation() if own is not None else nullcontext():
                return generate(*call.args, **call.kwargs)
        finally:
            _GENERATING.reset(token)

    def _effective_config(self, call: Call) -> Any:
        """The configuration that `generate` will go by: made by its own method.

        Raises ModelError for what cannot be combined with a compressed cache.
        """
        if self.model.training and checkpoints(self.model):
            raise ModelError(
                "generate() in training mode under gradient checkpointing uses no cache: call "
                "model.eval() first"
            )
        if isinstance(call.get("custom_generate"), str):
            raise ModelError(
                "custom_generate with a repository's name replaces transformers' generation and is "
                "not supported: pass a function, or detach first"
            )
        config, _ = self.model._prepare_generation_config(
            call.get("generation_config"), **call.others
        )
        kind = getattr(config, "cache_implementation", None)
        if kind is not None:
            raise ModelError(
                f"cache_implementation={kind!r} cannot be combined with hkvprof, which brings its "
                "own cache: leave it out of the call and of model.generation_config, or detach"
            )
        if getattr(config, "assistant_early_exit", None) is not None:
            raise ModelError(
                "assistant_early_exit is not supported: drafts of the first layers would need a "
                "cache of their own; leave it out, or give an assistant_model"
            )
        return config

    # -- what is told --------------------------------------------------------------------------

    def _own(self, cache: CompressedCache) -> CompressedCache:
        """The cache, if it was made for this model. Raises CompressionError for another's.

        One of an earlier `apply` goes on under the plan that it was made with.
        """
        if cache.owner is not self._owner:
            if cache.owner is None or cache.owner.model() is not self.model:
                raise CompressionError(
                    "this cache was made for another model: use the model it was made for, or a "
                    "new cache"
                )
            cache.owner = self._owner
        return cache

    def _foreign(self, cache: Any) -> None:
        if self._strict:
            raise CompressionError(
                f"expected a cache made by hkvprof, found {type(cache).__name__}, which would not "
                f"be compressed: leave {self._forward.keyword} out, pass handle.new_cache(), or "
                "apply with strict=False"
            )
        self._tell(_FOREIGN)

    def _unmarked(self, module: nn.Module) -> None:
        """A covered layer attends to keys that are not of a compressed cache."""
        now = current_pass()
        if now is None and module.training:  # what gradient checkpointing computes again
            self._tell(_TRAINING)
            return
        within = now is not None and now.owner is self._owner
        if within and now is not None and now.conversation is None:
            return
        if not self._strict:
            self._tell(_LOST if within else _ROUND)
        elif within:
            layer = self._view.layer_ids[self._view.attention.index(module)]
            raise CompressionError(f"layer {layer}: {_LOST}")
        else:
            raise CompressionError(
                f"{_ROUND}: call the model itself, or apply with strict=False to let such passes "
                "be dense"
            )

    def _follow(self, cache: CompressedCache) -> None:
        """The next receipt is this cache's, unless it serves another one's generation."""
        if _GENERATING.get() in (None, cache):
            self.books = cache.books

    def _tell(self, reason: str) -> None:
        """The next receipt says why a request was not compressed."""
        if _GENERATING.get() is None:
            accounts = [LayerAccount(n, LayerState.DENSE, reason) for n in self._view.layer_ids]
            self.books = Books(accounts, Meter(), self._planner)

    def _warn_without_cache(self) -> None:
        self._tell(_WITHOUT)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "use_cache is false (in the call, the generation_config or the checkpoint's "
                "config): generate() uses no cache at all, and nothing is compressed; pass "
                "use_cache=True",
                HkvWarning,
                stacklevel=5,
            )

    def _require_hooked(self) -> None:
        if not is_hooked(self._view.text_config):
            raise UsageError(
                "the model's attention implementation was changed while a profile is applied: "
                "detach, change it, and apply again"
            )
