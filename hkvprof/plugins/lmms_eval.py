"""EvolvingLMMs-Lab's lmms-eval on compressed caches (needs `hkvprof[lmms-eval]`).

    python -m lmms_eval --model hkvprof \\
        --model_args pretrained=tinyvl,profile=tinyvl.hkv.safetensors,budget=0.1 --tasks ...

The harness finds the model through the entry point `hkvprof.plugins.manifest`. Images and text are
encoded by hkvprof's own processor, so that every model works that `hkvprof.load_model` loads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hkvprof.lazy import require_extra

require_extra("lmms_eval", "lmms-eval")

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from hkvprof.errors import SampleError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.plugins.requests import Generation
from hkvprof.plugins.session import Arguments, Counts, Session
from hkvprof.samples.images import decode


class HkvVLM(lmms):
    """A chat model of the harness; `--model_args` as in docs/harnesses.md."""

    is_simple = False

    def __init__(self, **given: Any) -> None:
        """Raises HkvError where arguments, profile or model do not fit."""
        super().__init__()
        arguments = Arguments.read(given)
        self.session = Session(arguments)
        self.batch_size = arguments.batch_size

    @property
    def device(self) -> torch.device:
        """The device that inputs are moved to."""
        device: torch.device = self.session.model.device
        return device

    @property
    def counts(self) -> Counts:
        """Requests of all calls so far that were compressed, and that were not."""
        return self.session.counts

    def loglikelihood(self, requests: Any) -> NoReturn:
        """Refused with an error: the plug-in answers `generate_until` requests alone."""
        raise _unsupported("loglikelihood", "use the generative variant of the task", requests)

    def generate_until_multi_round(self, requests: Any) -> NoReturn:
        """Refused with an error: the plug-in answers `generate_until` requests alone."""
        raise _unsupported("generate_until_multi_round", "leave the task out", requests)

    def generate_visual_cot(self, requests: Any) -> NoReturn:
        """Refused with an error: the plug-in answers `generate_until` requests alone."""
        raise _unsupported("generate_visual_cot", "leave the task out", requests)

    def generate_until(self, requests: Any) -> list[GenerationResult]:
        """Replies to requests (context, doc_to_messages, settings, doc id, task, split).

        Raises CompressionError if no request was compressed, SampleError for video and audio.
        """
        results: list[GenerationResult] = []
        began = time.perf_counter()
        with self.session.call("generate_until"), tqdm(total=len(requests)) as bar:
            for batch in _alike(requests, self.batch_size):
                generation = Generation.read(batch[0].args[2])
                results += self._reply([self._conversation(r.args) for r in batch], generation)
                bar.update(len(batch))
        self._log(results, time.perf_counter() - began)
        return results

    def clean(self) -> None:
        """Give the model's memory back, as the harness wants it before it judges replies."""
        self.session.close()
        super().clean()

    def _conversation(self, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = args
        try:
            return conversation(doc_to_messages(self.task_dict[task][split][doc_id]))
        except SampleError as error:
            raise SampleError(f"task {task}, document {doc_id}: {error}") from None

    def _reply(
        self, conversations: list[list[dict[str, Any]]], generation: Generation
    ) -> list[GenerationResult]:
        """Replies to one batch, on a cache of its own."""
        session, model = self.session, self.session.model
        encoded = session.processor.encode(conversations)
        inputs = encoded.to(model.device, model.dtype)
        cache = session.handle.new_cache()
        output = model.generate(
            **inputs,
            **with_cache(model, cache),
            pad_token_id=session.processor.tokenizer.pad_token_id,
            **generation.options,
        )
        session.count(cache.receipt(), len(conversations))
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            _result(session.processor, generation, ids, prompt)
            for ids, prompt in zip(output[:, encoded.tokens :].tolist(), prompts, strict=True)
        ]

    def _log(self, results: list[GenerationResult], seconds: float) -> None:
        """Speed and counts, for the `throughput` entry of the results file."""
        tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                f"hkvprof_{name}": count for name, count in self.session.latest.to_json().items()
            },
        )


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The harness's messages in the chat format of transformers, images decoded to RGB.

    Raises SampleError naming media that cannot be encoded.
    """
    return [
        {"role": message["role"], "content": [_part(part) for part in message["content"]]}
        for message in messages
    ]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind, url = part["type"], part.get("url")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise SampleError(f"{kind} input is not supported: expected images and text alone")
    return {"type": "image", "image": decode(url, url if isinstance(url, str) else "in memory")}


def _result(
    processor: Any, generation: Generation, ids: list[int], prompt: int
) -> GenerationResult:
    stop, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    while len(ids) > 1 and ids[-1] in (stop, pad) and ids[-2] in (stop, pad):
        ids = ids[:-1]  # rows of a batch that ended early are filled up
    counts = TokenCounts(input_tokens=prompt, output_tokens=len(ids))
    return GenerationResult(text=generation.cut(processor.decode(ids)), token_counts=counts)


def _alike(requests: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of neighbours with equal settings, in the order of the requests."""
    batches: list[list[Any]] = []
    for request in requests:
        last = batches[-1] if batches else []
        if last and len(last) < size and last[0].args[2] == request.args[2]:
            last.append(request)
        else:
            batches.append([request])
    return batches


def _unsupported(kind: str, advice: str, requests: Any) -> UsageError:
    tasks = sorted({str(request.task_name) for request in requests})
    return UsageError(
        f"--model hkvprof does not support {kind} requests (here: {', '.join(tasks)}): {advice}"
    )
