"""Write a set of long-text samples as JSON lines.

    python -m tools.make_longtext -o calibration/longtext --samples 54 --tokens 1500-7800

Lengths are counted by the SmolLM2 tokenizer (or another one, `--tokenizer FOLDER`).
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hkvprof.errors import HkvError, ModelError
from hkvprof.evaluate.longtext import SPLITS, CountTokens, make_samples, parse_range
from hkvprof.samples.read import Sample

README = """# Long-text samples

`samples.jsonl`: {count} samples of {low} to {high} tokens ({counter}), every second one
with follow-up questions. Tasks:
{tasks}.

Each line: `id`, `task`, `messages` (one user message: the context, marked
`"modality": "context"`, then the question), `reply` (the shortest correct answer; several facts
are separated by "; "; null where only the distance to the full cache can be judged) and
`followups` (`question` and `reply`, about the same context). An answer is right when it contains
the reply, apart from case and punctuation (`hkvprof.evaluate.longtext.is_correct`).

The prose is The Python Language Reference, copyright (c) 2001 Python Software Foundation, under
the PSF License Version 2 (see `hkvprof/evaluate/data/NOTICE`); the planted facts are invented
and, like the questions, under this project's license. Split: {split}. Made by:

    {command}
"""


def to_json(sample: Sample) -> dict[str, Any]:
    """The sample as one line of `samples.jsonl` holds it."""
    return {
        "id": sample.id,
        "task": sample.task,
        "messages": list(sample.messages),
        "reply": sample.reply,
        "followups": [{"question": t.question, "reply": t.reply} for t in sample.followups],
    }


def write_samples(samples: Iterable[Sample], path: Path) -> None:
    """Write JSON lines, one sample a line."""
    lines = [json.dumps(to_json(sample), ensure_ascii=False) + "\n" for sample in samples]
    path.write_text("".join(lines), encoding="utf-8")


def tokenizer_counter(folder: Path | None) -> CountTokens:
    """Counter of tokens without special ones; SmolLM2's tokenizer by default."""
    from transformers import AutoTokenizer

    from hkvprof.models.smollm2 import ensure_checkpoint

    path = ensure_checkpoint() if folder is None else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"expected a folder with a tokenizer at {path}, found: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--tokens", default="2000-4000", help="length or range of lengths")
    parser.add_argument("--split", choices=SPLITS, default="calibration")
    parser.add_argument("--tokenizer", type=Path, help="folder; default: SmolLM2-135M-Instruct")
    return parser


def run(arguments: Sequence[str]) -> str:
    """Write samples.jsonl and README.md; returns a line that says what was written."""
    options = _parser().parse_args(arguments)
    tokens = parse_range(options.tokens)
    counter = tokenizer_counter(options.tokenizer)
    samples = make_samples(options.samples, tokens, options.split, count_tokens=counter)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "samples.jsonl"
    write_samples(samples, target)
    text = README.format(
        count=len(samples),
        low=tokens[0],
        high=tokens[1],
        counter="SmolLM2-135M-Instruct's" if options.tokenizer is None else options.tokenizer.name,
        tasks=textwrap.fill(", ".join(dict.fromkeys(sample.task for sample in samples)), 98),
        split=options.split,
        command="python -m tools.make_longtext " + " ".join(arguments),
    )
    (options.output / "README.md").write_text(text, encoding="utf-8")
    return f"{target}: {len(samples)} samples, {target.stat().st_size} bytes"


def main() -> None:
    """Command line."""
    try:
        sys.stdout.write(run(sys.argv[1:]) + "\n")
    except HkvError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
