"""lm-evaluation-harness: its own `hf` model's numbers at full budget, real compression below."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.errors import BudgetError, CompressionError, SampleError, UsageError
from hkvprof.models.calls import with_cache
from tests.plugins.checkpoints import save_checkpoint, words

REASON = "lm-evaluation-harness is not installed: pip install 'hkvprof[lm-eval]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the harness's own
    pytest.importorskip("lm_eval", reason=REASON)
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from hkvprof.plugins.lm_eval import HkvLM

torch.set_num_threads(1)
PAIRS = [
    (words(200), " w5 w9 w3"),
    (words(200), " w5 w9"),
    (words(200), " w7"),
    (words(90, 1), " w8 w8 w8 w12 w9"),
    (words(70, 2), " w11 w4"),
    (words(5, 3), " w6 w5"),
    ("", "w6 w5 w17"),
    (words(600, 4), " w20 w3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


def ours(folder: Path, **more: Any) -> HkvLM:
    return HkvLM(
        pretrained=str(folder),
        profile=str(folder / "profile.safetensors"),
        device="cpu",
        **{"budget": 0.35, "dtype": "float32", **more},
    )


def theirs(folder: Path, **more: Any) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **more)


def scoring(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def writing(prompts: list[str], tokens: int = 12) -> list[Instance]:
    settings = {"until": ["w63"], "max_gen_toks": tokens, "do_sample": False}
    return [Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)]


def numbers(answers: list[tuple[float, bool]]) -> list[float]:
    return [logprob for logprob, _ in answers]


@pytest.mark.parametrize("size", [1, 3])
def test_full_budget_gives_the_numbers_of_the_hf_model(folder: Path, size: int) -> None:
    lm = ours(folder, budget=1.0, batch_size=size)
    expected = theirs(folder).loglikelihood(scoring(PAIRS), disable_tqdm=True)
    found = lm.loglikelihood(scoring(PAIRS), disable_tqdm=True)
    assert numbers(found) == pytest.approx(numbers(expected), abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert lm.counts.to_json() == {"compressed": 0, "dense": len(PAIRS)}


@pytest.mark.parametrize("size", [1, 2])
def test_full_budget_writes_what_the_hf_model_writes(folder: Path, size: int) -> None:
    prompts = [words(200), words(90, 1), words(4, 2)]
    expected = theirs(folder).generate_until(writing(prompts), disable_tqdm=True)
    lm = ours(folder, budget=1.0, batch_size=size)
    assert lm.generate_until(writing(prompts), disable_tqdm=True) == expected
    assert all(expected)


def test_loglikelihood_is_that_of_decoding_on_a_compressed_cache(folder: Path) -> None:
    lm = ours(folder)
    found = lm.loglikelihood(scoring(PAIRS[:4]), disable_tqdm=True)
    with torch.no_grad():
        for (context, wanted), (logprob, _) in zip(PAIRS[:4], found, strict=True):
            ids, targets = lm.tok_encode(context), lm.tok_encode(wanted)
            cache = lm.session.handle.new_cache(prompt_tokens=len(ids))
            total, fed = 0.0, torch.tensor([ids])
            for target in targets:
                logits = lm.model(fed, **with_cache(lm.model, cache)).logits[0, -1]
                total += float(logits.log_softmax(-1)[target])
                fed = torch.tensor([[target]])
            assert logprob == pytest.approx(total, abs=1e-3)
    dense = theirs(folder).loglikelihood(scoring(PAIRS[:4]), disable_tqdm=True)
    assert max(abs(a - b) for a, b in zip(numbers(found), numbers(dense), strict=True)) > 0.1
    assert lm.counts.to_json() == {"compressed": 4, "dense": 0}


def test_generation_is_compressed_and_counted(folder: Path) -> None:
    lm = ours(folder, batch_size=2)
    prompts = [words(200), words(180, 1), words(4, 2), words(3, 2)]
    dense = theirs(folder).generate_until(writing(prompts), disable_tqdm=True)
    found = lm.generate_until(writing(prompts), disable_tqdm=True)
    assert lm.counts.to_json() == {"compressed": 2, "dense": 2}
    assert found[:2] != dense[:2]
    assert found[2:] == dense[2:]
    model = lm.get_model_info()["hkvprof"]
    assert model == {
        "budget": "0.35 of dense bytes",
        "min_tokens": 64,
        "compressed": 2,
        "dense": 2,
    }


def test_nothing_compressed_is_an_error(folder: Path) -> None:
    lm = ours(folder)
    with pytest.raises(CompressionError, match=r"all 2 loglikelihood requests.*min_tokens=64"):
        lm.loglikelihood(scoring(PAIRS[5:7]), disable_tqdm=True)
    with pytest.raises(CompressionError, match="all 1 generate_until requests"):
        lm.generate_until(writing([words(20)]), disable_tqdm=True)
    lm.loglikelihood(scoring(PAIRS[4:7]), disable_tqdm=True)  # one of three is


def test_prompts_too_short_for_the_budget_fail_before_the_run(folder: Path) -> None:
    lm = ours(folder, budget=0.12)
    for call, requests in (
        (lm.loglikelihood, scoring(PAIRS[:5])),
        (lm.generate_until, writing([words(200), words(70)])),
    ):
        with pytest.raises(BudgetError, match=r"70 tokens.*min_tokens in --model_args \(now 64\)"):
            call(requests, disable_tqdm=True)
    assert lm.counts.total == 0


def test_min_tokens_is_an_argument(folder: Path) -> None:
    lm = ours(folder, min_tokens=100)
    lm.loglikelihood(scoring(PAIRS[:6]), disable_tqdm=True)
    assert lm.counts.to_json() == {"compressed": 3, "dense": 3}


def test_arguments_of_the_hf_model_keep_their_meaning(folder: Path) -> None:
    short, hf = ours(folder, max_length=100), theirs(folder, max_length=100)
    assert short.max_length == hf.max_length == 100
    full = ours(folder, budget=1.0, max_length=100)
    expected = numbers(hf.loglikelihood(scoring(PAIRS), disable_tqdm=True))
    found = numbers(full.loglikelihood(scoring(PAIRS), disable_tqdm=True))
    assert found == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_done_is_refused_by_name(folder: Path) -> None:
    lm = ours(folder)
    request = Instance("loglikelihood_rolling", {}, ("w4 w5",), 0, ("wikitext", 0, 1))
    with pytest.raises(UsageError, match=r"loglikelihood_rolling .*wikitext"):
        lm.loglikelihood_rolling([request])
    with pytest.raises(SampleError, match="empty continuation"):
        lm.loglikelihood(scoring([(words(100), "")]), disable_tqdm=True)
    with pytest.raises(UsageError, match="no argument 'peft'"):
        ours(folder, peft="adapter")
    with pytest.raises(UsageError, match="batch_size must be a number"):
        ours(folder, batch_size="auto")


def test_answers_reach_the_harnesses_cache(folder: Path) -> None:
    noted: list[Any] = []

    class Hook:
        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            noted.append((kind, request, answer))

    lm = ours(folder, batch_size=2)
    lm.set_cache_hook(Hook())
    found = lm.loglikelihood(scoring(PAIRS[:4]), disable_tqdm=True)
    assert sorted(noted) == sorted(
        ("loglikelihood", pair, answer) for pair, answer in zip(PAIRS[:4], found, strict=True)
    )


def test_the_embedded_vision_model_takes_text() -> None:
    lm = HkvLM(
        pretrained="tinyvl",
        profile="profiles/tinyvl.hkv.safetensors",
        budget=0.25,
        dtype="float32",
        device="cpu",
        batch_size=2,
    )
    text = "What is the number on the red card ? " * 12
    pairs = [(text, " red"), (text, " blue card"), (text[:200], " red")]
    found = numbers(lm.loglikelihood(scoring(pairs), disable_tqdm=True))
    alone = [numbers(lm.loglikelihood(scoring([p]), disable_tqdm=True))[0] for p in pairs[:2]]
    assert found[:2] == pytest.approx(alone, abs=1e-3)
    assert lm.counts.compressed >= 4


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task of three documents, read from a local file."""
    docs = [{"prompt": words(120 + i, i), "answers": ["w5 w6", "w7", "w9"]} for i in range(3)]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps({**doc, "gold": 1}) + "\n" for doc in docs))
    (tmp_path / "tiny.yaml").write_text(
        "task: hkvprof_tiny\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{prompt}}"\n'
        'doc_to_choice: "{{answers}}"\n'
        'doc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_whole_evaluation(
    folder: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    assert get_model("hkvprof") is HkvLM
    results = lm_eval.simple_evaluate(
        model="hkvprof",
        model_args=f"pretrained={folder},profile={folder}/profile.safetensors,budget=0.35",
        tasks=["hkvprof_tiny"],
        task_manager=TaskManager(include_path=str(task_folder)),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    assert results is not None
    assert 0 <= results["results"]["hkvprof_tiny"]["acc,none"] <= 1
    assert results["config"]["hkvprof"]["compressed"] == 9


def test_the_command_line_knows_the_model(folder: Path, task_folder: Path) -> None:
    given = f"pretrained={folder},profile={folder}/profile.safetensors,budget=0.35,buget=1"
    command = f"-m hkvprof.plugins.lm_eval run --model hkvprof --model_args {given}".split()
    run = subprocess.run(
        [sys.executable, *command, "--tasks", "hkvprof_tiny", "--include_path", str(task_folder)],
        env={**os.environ, "HF_DATASETS_CACHE": str(task_folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode
    assert "UsageError: --model hkvprof knows no argument 'buget'" in run.stderr
