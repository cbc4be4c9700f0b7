"""The training loop on a few steps of a small budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hkvprof.errors import UsageError
from hkvprof.models.load import load_model
from tools.tinyvl import schedule
from tools.tinyvl.train import Settings, Trainer, main, run, start

SMALL = Settings(seed=3, steps=40, tokens=400, compute="float32")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.slow
def test_steps_lower_the_loss() -> None:
    trainer = Trainer(Settings(seed=0, steps=1000, tokens=400))
    losses = [trainer.step() for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("fraction", [0.0, 0.9], ids=["lookup", "grown"])
def test_resume_gives_the_identical_state(tmp_path: Path, fraction: float) -> None:
    whole = Trainer(SMALL)
    whole.progress.step = round(fraction * 40)
    whole.step()
    whole.save_state(tmp_path / "state.pt")
    resumed = start(tmp_path, SMALL, resume=True)
    for trainer in (whole, resumed):
        trainer.step()
    assert resumed.progress.step == whole.progress.step
    assert resumed.progress.accuracy == whole.progress.accuracy
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert same_tensors(resumed.heads.state_dict(), whole.heads.state_dict())


def test_run_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    run(Trainer(Settings(steps=4, tokens=300, compute="float32")), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["stage"] == "grown"
    model, processor = load_model(tmp_path / "checkpoint", device="cpu")
    assert model.config.text_config.num_hidden_layers == 6
    assert processor.tokenizer("image #31 :").input_ids


def test_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        start(tmp_path, SMALL, resume=True)
    (tmp_path / "state.pt").touch()
    assert main(["--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_schedule_ends_where_it_should() -> None:
    end = schedule.LOOKUP_STAGE_END
    assert schedule.role_weight(0.0) == schedule.role_weight(end) == 1
    assert schedule.role_weight(1.0) == schedule.sum_weight(1.0) == 0
    assert schedule.sum_weight(end - 0.01) == 0
    assert schedule.learning_rate(0.0, 0) < schedule.learning_rate(0.1, 100) == 1
    assert schedule.learning_rate(1.0, 100) < 0.02


def test_curriculum_rises_by_accuracy_or_time() -> None:
    accuracy = schedule.RunningAccuracy()
    curriculum = schedule.Curriculum()
    assert not curriculum.advance(0.0, accuracy)
    assert curriculum.advance(schedule.LOOKUP_LEVELS[0].until, accuracy)
    for task in ("ocr", "list", "cell"):
        accuracy.update(task, 1.0, 1000)
    assert not curriculum.advance(0.0, accuracy)
    curriculum.steps_on_level = 200
    assert curriculum.advance(0.0, accuracy)
    assert curriculum.level == 2
    assert not accuracy.values
