"""The records of an evaluation: what is asked and what is correct, and what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hkvprof.evaluate.metrics import Metric
from hkvprof.samples.read import Sample

FULL = "full"
"""The method that compresses nothing."""
OURS = "hkvprof"
"""The profile, through `hkvprof.runtime.apply`."""
REGIMES = {
    "inside": "question in the compressed prompt",
    "after": "context compressed first, question after it",
    "later": "a later question, after a first one inside the prompt",
    "several": "several questions in the compressed prompt, each answered on its own",
    "after_steps": "as after, the question fed token by token",
    "later_steps": "as later, the question fed token by token",
}
USUAL_REGIMES = ("inside", "after", "later")
"""What is asked unless regimes are named."""


@dataclass(frozen=True)
class Answer:
    """One question under one method; `budget` is "" for the full cache.

    - `turn` 0 is the sample's own question, later ones its follow-ups.
    - `text` is what greedy decoding says, `score` in [0, 1] what `metric` makes of it against
      `expected` (the first of the correct answers); None where there is no correct answer.
    - `kl` is the mean KL(full || this) in nats over the `steps` next-token distributions while the
      full cache's own continuation is forced, `agreement` the share of them with the same likeliest
      token; `nll` the mean negative log-likelihood, in nats per token, of the full cache's reply.
    - `true_kl` and `true_nll` are the same of what really follows a text, forced in place of the
      full cache's own continuation; None for questions.
    - `runtime_kl`: of an engine, KL(hkvprof || this) over the same distributions, where hkvprof
      runs in transformers under the engine's own plan.
    - the full cache's own `kl` is the noise of its dtype: dense against dense computed another way.
    - bytes are those when the prompt has been compressed; `storage_bytes` sums the cache's tensors
      (resident), independent of the receipt's `resident_bytes`.
    - `read_share`: bytes that a step read from the host in the mean, over dense bytes, and
      `limit_share`, the most that one could.
    - `compress_seconds`: deciding and packing, extra passes of the model included.
    - `questions`: how many answers this method gives to this sample in all.
    """

    sample: str
    task: str
    regime: str
    turn: int
    method: str
    budget: str
    text: str
    expected: str
    metric: str
    score: float | None
    kl: float
    agreement: float
    nll: float
    steps: int
    prompt_tokens: int
    resident_bytes: int
    storage_bytes: int
    host_bytes: int
    dense_bytes: int
    compress_seconds: float
    hit_rate: float | None
    questions: int = 1
    true_kl: float | None = None
    true_nll: float | None = None
    read_share: float = 0.0
    limit_share: float = 0.0
    runtime_kl: float | None = None


@dataclass(frozen=True)
class Gold:
    """The correct answers to one question, any of which will do, and how they are compared."""

    references: tuple[str, ...]
    metric: Metric

    def score(self, answer: str) -> float:
        """How good an answer is by the metric, between 0 and 1."""
        return self.metric(answer, self.references)


@dataclass(frozen=True)
class TaskSet:
    """Samples and how they are scored; `max_new_tokens` bounds every answer.

    `gold` holds, by sample id, the correct answers and the metric of questions that have several
    answers or a metric of their own. All others, and later questions, are scored by `metric`
    against the sample's reply. `truth` holds, by sample id, what really follows a text.
    """

    name: str
    samples: tuple[Sample, ...]
    metric: Metric
    max_new_tokens: int
    gold: Mapping[str, Gold] = field(default_factory=dict)
    truth: Mapping[str, str] = field(default_factory=dict)

    def gold_of(self, sample: Sample, turn: int) -> Gold:
        """What is correct in one turn of a sample: 0 is the prompt's question."""
        if turn > 0:
            return Gold((sample.followups[turn - 1].reply,), self.metric)
        return self.gold.get(sample.id) or Gold((sample.reply or "",), self.metric)
