"""EleutherAI's lm-evaluation-harness on compressed caches (needs `hkvprof[lm-eval]`).

    python -m hkvprof.plugins.lm_eval run --model hkvprof \\
        --model_args pretrained=smollm2,profile=smollm2.hkv.safetensors,budget=0.1 --tasks ...

The harness finds models only once their module is imported, which this command does before it
hands over to the harness's own command line. In Python, import this module and pass
`model="hkvprof"` to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import logging
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.lazy import require_extra

try:
    require_extra("lm_eval.models.huggingface", "lm-eval")
except UsageError as error:
    if __name__ == "__main__":
        raise SystemExit(f"error: {error}") from None
    raise

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from hkvprof.models.calls import with_cache
from hkvprof.plugins.requests import Pair, batches, score
from hkvprof.plugins.session import Arguments, Counts, Session

_LOG = logging.getLogger(__name__)

HARNESS = (
    "max_length",
    "truncation",
    "add_bos_token",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments of the harness's `hf` model that mean the same here."""


@register_model("hkvprof")
class HkvLM(HFLM):
    """The harness's `hf` model with a profile applied; `--model_args` as in docs/harnesses.md."""

    def __init__(self, **given: Any) -> None:
        """Raises HkvError where arguments, profile or model do not fit."""
        arguments = Arguments.read(given, HARNESS)
        self.session = Session(arguments)
        super().__init__(
            pretrained=self.session.model,
            tokenizer=self.session.processor.tokenizer,
            backend="causal",
            batch_size=arguments.batch_size,
            **arguments.harness,
        )

    @property
    def counts(self) -> Counts:
        """Requests of all calls so far that were compressed, and that were not."""
        return self.session.counts

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Refused: its windows begin with a single token of context, so nothing is compressed."""
        tasks = sorted({str(request.task_name) for request in requests})
        raise UsageError(
            f"loglikelihood_rolling (perplexity of whole texts; here: {', '.join(tasks)}) has no "
            "prompt whose cache could be compressed: leave these tasks out, or use --model hf"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the harness does; raises CompressionError if no request was compressed."""
        with self.session.call("generate_until"):
            lengths = (len(self.tok_encode(request.args[0])) for request in requests)
            self.session.foresee(min(length, self.max_length) for length in lengths)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: Any, max_length: int, stop: Any, **kwargs: Any) -> Any:
        """One batch [rows, tokens] on a cache of its own, which tells what was compressed."""
        cache = self.session.handle.new_cache()
        kwargs.update(with_cache(self.model, cache))
        output = super()._model_generate(context, max_length, stop, **kwargs)
        self.session.count(cache.receipt(), len(context))
        return output

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of (texts, context ids, continuation ids).

        Raises CompressionError if no request was compressed.
        """
        pairs = [Pair.fit(context, wanted, self.max_length) for _, context, wanted in requests]
        cut = sum(len(p.context) < len(r[1]) for p, r in zip(pairs, requests, strict=True))
        if cut:
            _LOG.warning("%d contexts were cut to max_length=%d tokens", cut, self.max_length)
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests")
        with self.session.call("loglikelihood"), bar:
            self.session.foresee(len(pair.context) for pair in pairs)
            size = override_bs or int(self.batch_size)
            for batch in batches(pairs, size, self.session.min_tokens):
                answers |= self._scored(requests, pairs, batch)
                bar.update(len(batch))
        return [answers[i] for i in range(len(pairs))]

    def _scored(
        self, requests: Any, pairs: list[Pair], batch: list[int]
    ) -> dict[int, tuple[float, bool]]:
        """Answers to the requests of one batch, by number."""
        scores, receipt = score(
            self.model,
            self.session.handle.new_cache,
            [pairs[i] for i in batch],
            self.softmax_dtype,
        )
        self.session.count(receipt, len(batch))
        answers = {i: (s.logprob, s.greedy) for i, s in zip(batch, scores, strict=True)}
        for i, answer in answers.items():
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """The harness's own entries of the results file, and `hkvprof` with the counts."""
        return {**super().get_model_info(), "hkvprof": self.session.to_json()}


if __name__ == "__main__":
    cli_evaluate()
