"""Accuracy of SmolLM2-135M-Instruct with its full cache on the long-text tasks.

    python -m tools.longtext_accuracy --samples 12 --tokens 2000-3000

What the model cannot do uncompressed says nothing about compression: the table tells which tasks
may be judged by their answers. Greedy decoding, fp32, CPU, one thread: some 10 s a question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hkvprof.errors import HkvError
from hkvprof.evaluate.longtext import (
    JOINT,
    SPLITS,
    TASKS,
    is_correct,
    make_samples,
    parse_range,
)
from hkvprof.samples.read import Sample
from tools.make_longtext import tokenizer_counter

MAX_NEW_TOKENS = 48


def prompt(sample: Sample, tokenizer: Any) -> str:
    """The sample's prompt in the model's chat format, text parts joined by blank lines."""
    messages = [
        {"role": m["role"], "content": JOINT.join(part["text"] for part in m["content"])}
        for m in sample.messages
    ]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def answer(sample: Sample, model: Any, tokenizer: Any) -> str:
    """The model's greedy answer, at most `MAX_NEW_TOKENS` tokens."""
    inputs = tokenizer(prompt(sample, tokenizer), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def accuracy(
    samples: Iterable[Sample], model: Any, tokenizer: Any, show: bool = False
) -> dict[str, list[bool]]:
    """Task -> one verdict per sample that has an expected reply."""
    verdicts: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.reply is None:
            continue
        given = answer(sample, model, tokenizer)
        right = is_correct(given, sample.reply)
        verdicts.setdefault(sample.task, []).append(right)
        if show:
            sys.stdout.write(f"{sample.id} {right} {sample.reply!r} {given!r}\n")
            sys.stdout.flush()
    return verdicts


def table(verdicts: dict[str, list[bool]]) -> str:
    """Markdown table: task, number of samples, share answered correctly."""
    rows = ["| task | n | right |", "|---|---|---|"]
    for task, right in verdicts.items():
        rows.append(f"| {task} | {len(right)} | {sum(right) / len(right):.0%} |")
    return "\n".join(rows) + "\n"


def run(arguments: Sequence[str]) -> str:
    """Measure and return the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hkvprof.models.smollm2 import ensure_checkpoint

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=12, help="per task")
    parser.add_argument("--tokens", default="2000-3000")
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:-1]))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print every answer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = ensure_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    samples = make_samples(
        options.samples * len(options.tasks),
        parse_range(options.tokens),
        options.split,
        options.tasks,
        tokenizer_counter(None),
    )
    return table(accuracy(samples, model, tokenizer, options.show))


def main() -> None:
    """Command line."""
    try:
        sys.stdout.write(run(sys.argv[1:]))
    except HkvError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
