"""What a calibration would take (`calibrate --dry-run`), in words and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hkvprof.calibration.estimate import Memory, Timing
from hkvprof.report.summary import human

_PASSES = "memory is counted from shapes, without a vision tower's activations"


@dataclass(frozen=True)
class DryRun:
    """What a calibration would take.

    `tokens` of all usable samples' prompts, `measured` of the samples have rows already; `seconds`
    are for what is left. `timing` is None where the model could not be loaded: `untimed` says why.
    """

    samples: int
    unusable: dict[str, str]
    measured: int
    tokens: list[int]
    memory: Memory
    timing: Timing | None
    seconds: float | None
    untimed: str = ""

    @property
    def basis(self) -> str:
        """What the figures rest on."""
        if self.timing is None:
            return f"time is unknown ({self.untimed}); {_PASSES}"
        return (
            f"time is that of one sample of {self.timing.tokens:,} tokens, on this machine, per "
            f"token: much longer prompts take longer; {_PASSES}"
        )

    def to_json(self) -> dict[str, Any]:
        """The dry run as a JSON-ready dict."""
        return {
            "samples": self.samples,
            "unusable": self.unusable,
            "measured": self.measured,
            "tokens": {
                "total": sum(self.tokens),
                "min": min(self.tokens),
                "max": max(self.tokens),
            },
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
            "timing": self.timing and asdict(self.timing),
            "basis": self.basis,
        }

    def lines(self) -> list[str]:
        """The dry run in words, as lines."""
        memory, spare = self.memory, ""
        if self.unusable:
            spare = f"; {len(self.unusable)} cannot be used"
        parts = {
            "weights": memory.weights,
            "keys and values": memory.cache,
            "one layer over the prompt": memory.prompt,
            "the reply's gradients": memory.reply,
            "statistics": memory.statistics,
        }
        return [
            f"samples  {self.samples}, {self.measured} of them measured already{spare}",
            f"tokens   {sum(self.tokens):,}, {min(self.tokens):,} to {max(self.tokens):,} a sample",
            f"memory   {human(memory.peak)} at the peak, in the longest sample: "
            + ", ".join(f"{name} {human(size)}" for name, size in parts.items()),
            f"time     {'unknown' if self.seconds is None else duration(self.seconds)}",
            f"basis    {self.basis}",
        ]


def duration(seconds: float) -> str:
    """Seconds as people write them: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
