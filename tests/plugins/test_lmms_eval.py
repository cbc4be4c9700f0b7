"""lmms-eval: plain generation at full budget, hkvprof's own below, and what is refused."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hkvprof
from hkvprof.errors import BudgetError, CompressionError, SampleError, UsageError
from hkvprof.runtime import apply
from hkvprof.samples.read import open_images
from hkvprof.testbed.generator import make_sample

REASON = "lmms-eval is not installed: pip install 'hkvprof[lmms-eval]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the harness's own
    pytest.importorskip("lmms_eval", reason=REASON)
    import lmms_eval.models as registry
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.model_utils import gen_metrics

    from hkvprof.plugins.lmms_eval import HkvVLM, conversation

torch.set_num_threads(1)
PROFILE = "profiles/tinyvl.hkv.safetensors"
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
EntryPoint = importlib.metadata.EntryPoint


def ours(**more: Any) -> HkvVLM:
    given = {"pretrained": "tinyvl", "profile": PROFILE, "dtype": "float32", "device": "cpu"}
    return HkvVLM(**{**given, "budget": 0.1, **more})


def messages_of(seed: int, images: int = 12) -> list[dict[str, Any]]:
    """A held-out question in the harness's message format."""
    found = []
    for message in open_images(make_sample("find", seed, images=images, split="heldout")):
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        content = [
            {"type": "image", "url": part["image"]} if part["type"] == "image" else dict(part)
            for part in parts
        ]
        found.append({"role": message["role"], "content": content})
    return found


def asking(lm: HkvVLM, documents: list[Any], settings: dict[str, Any] = SETTINGS) -> list[Instance]:
    """Requests of a task `tiny` whose documents are the messages themselves."""
    lm.task_dict["tiny"] = {"test": documents}
    return [
        Instance(
            "generate_until",
            ("", lambda document: document, settings, i, "tiny", "test"),
            0,
            {"task": "tiny", "doc_id": i, "repeats": 1},
        )
        for i in range(len(documents))
    ]


def texts(results: list[Any]) -> list[str]:
    return [result.text for result in results]


def by_hand(documents: list[Any], budget: float) -> list[str]:
    """One after the other, without the plug-in."""
    model, processor = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
    replies = []
    for document in documents:
        encoded = processor.encode([conversation(document)])
        with apply(model, PROFILE, budget=budget, min_tokens=64):
            inputs = encoded.to(model.device, model.dtype)
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        replies.append(processor.decode(output[0, encoded.tokens :]))
    return replies


@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_replies_are_those_of_plain_generation(budget: float) -> None:
    documents = [messages_of(seed) for seed in range(3)]
    lm = ours(budget=budget)
    found = lm.generate_until(asking(lm, documents))
    assert texts(found) == by_hand(documents, budget)
    assert all(texts(found))
    assert lm.counts.compressed == (3 if budget < 1 else 0)
    assert found[0].token_counts.input_tokens > 200
    assert 0 < found[0].token_counts.output_tokens <= 6


def test_batches_are_left_padded_and_counted_row_by_row() -> None:
    documents = [messages_of(0), messages_of(1, images=14), messages_of(2, images=2)]
    lm = ours(budget=1.0, batch_size=3)
    assert texts(lm.generate_until(asking(lm, documents))) == by_hand(documents, 1.0)
    lm.session.close()
    lm = ours(budget=0.2, batch_size=2, min_tokens=150)
    lm.generate_until(asking(lm, documents))
    assert lm.counts.to_json() == {"compressed": 2, "dense": 1}


def test_counts_reach_the_results_file() -> None:
    gen_metrics.reset_logged_metrics()
    lm = ours()
    lm.generate_until(asking(lm, [messages_of(0)]))
    summary = gen_metrics.summarize_logged_metrics()
    assert summary["avg_hkvprof_compressed"] == 1
    assert summary["avg_hkvprof_dense"] == 0


def test_nothing_compressed_is_an_error() -> None:
    lm = ours(budget=0.5)
    text = {"type": "text", "text": "which ?"}
    with pytest.raises(CompressionError, match=r"all 1 generate_until requests.*min_tokens=64"):
        lm.generate_until(asking(lm, [[{"role": "user", "content": [text]}]]))


def test_prompts_too_short_for_the_budget_are_named() -> None:
    lm = ours(budget=0.02)
    with pytest.raises(BudgetError, match=r"min_tokens in --model_args \(now 64\)"):
        lm.generate_until(asking(lm, [messages_of(0, images=4)]))


def test_replies_end_where_the_task_says() -> None:
    lm = ours(budget=1.0)
    (whole,) = texts(lm.generate_until(asking(lm, [messages_of(0)])))
    stop = whole[len(whole) // 2]
    settings = {**SETTINGS, "until": [stop]}
    (cut,) = texts(lm.generate_until(asking(lm, [messages_of(0)], settings)))
    assert cut == whole[: whole.find(stop)]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_other_media_are_refused_by_name(kind: str) -> None:
    lm = ours()
    document = [{"role": "user", "content": [{"type": kind, "url": "clip.mp4"}]}]
    with pytest.raises(SampleError, match=f"task tiny, document 0: {kind} input is not supported"):
        lm.generate_until(asking(lm, [document]))


def test_other_requests_and_arguments_are_refused_by_name() -> None:
    lm = ours()
    requests = asking(lm, [messages_of(0)])
    for call in (lm.loglikelihood, lm.generate_until_multi_round, lm.generate_visual_cot):
        with pytest.raises(UsageError, match=rf"support {call.__name__} requests \(here: tiny\)"):
            call(requests)
    with pytest.raises(UsageError, match="no argument 'max_pixels'"):
        ours(max_pixels=4)
    with pytest.raises(UsageError, match="sets stop_sequences"):
        lm.generate_until(asking(lm, [messages_of(0)], {"stop_sequences": ["a"]}))


def test_images_may_be_files(tmp_path: Path) -> None:
    (message,) = messages_of(0, images=2)
    picture = next(part["url"] for part in message["content"] if part["type"] == "image")
    picture.save(tmp_path / "one.png")
    part = {"type": "image", "url": str(tmp_path / "one.png")}
    ((loaded,),) = (m["content"] for m in conversation([{"role": "user", "content": [part]}]))
    assert loaded["image"].tobytes() == picture.convert("RGB").tobytes()
    part["url"] = str(tmp_path / "two.png")
    with pytest.raises(SampleError, match=r"two\.png"):
        conversation([{"role": "user", "content": [part]}])


def test_the_harness_may_clean_up() -> None:
    lm = ours()
    lm.generate_until(asking(lm, [messages_of(0)]))
    lm.clean()
    assert lm.counts.compressed == 1


def test_the_entry_point_leads_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = "lmms_eval.models"
    ((name, value),) = project["entry-points"][group].items()
    points = importlib.metadata.EntryPoints([EntryPoint(name, value, group)])
    monkeypatch.setattr(registry.registry_v2, "entry_points", lambda: points)
    fresh = registry.ModelRegistryV2()
    fresh.load_entrypoint_manifests()
    assert fresh.get_model_class("hkvprof") is HkvVLM


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A generative task of two documents with two images each, read from a local file."""
    lines = []
    for seed in range(2):
        (message,) = messages_of(seed)
        pictures = [part["url"] for part in message["content"] if part["type"] == "image"]
        question = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        streams = [io.BytesIO() for _ in pictures]
        for picture, stream in zip(pictures, streams, strict=True):
            picture.save(stream, format="png")
        images = [base64.b64encode(stream.getvalue()).decode() for stream in streams]
        lines.append(json.dumps({"question": question, "images": images, "answer": "red"}))
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "utils.py").write_text(
        "import base64, io\n"
        "from PIL import Image\n"
        "def to_visual(doc):\n"
        "    raw = [base64.b64decode(image) for image in doc['images']]\n"
        "    return [Image.open(io.BytesIO(data)).convert('RGB') for data in raw]\n"
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: hkvprof_tiny\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'docs.jsonl'}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function utils.to_visual\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_whole_evaluation(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    manager = TaskManager(include_path=str(task_folder), model_name="hkvprof")
    lm = ours()
    results = simple_evaluate(
        model=lm, tasks=["hkvprof_tiny"], task_manager=manager, batch_size=1, bootstrap_iters=0
    )
    assert results is not None
    assert 0 <= results["results"]["hkvprof_tiny"]["exact_match,none"] <= 1
    assert lm.counts.to_json() == {"compressed": 2, "dense": 0}
