"""The report's section on an evaluation: figures, answers and pictures, from files of strangers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from hkvprof.errors import UsageError
from hkvprof.evaluate.shown import FILE, MOST_SAMPLES, keep_shown, read_shown
from hkvprof.report.evaluated import evaluated
from hkvprof.samples.record import Sample, Turn
from tests.report.evaluations import write

EVIL = "<img src=x onerror=alert(1)>'"


def sample(name: str, task: str = "colours") -> Sample:
    picture = {"type": "image", "image": Image.new("RGB", (900, 300), "red")}
    content = [picture, {"type": "text", "text": f"Which colour? {EVIL}"}]
    message = {"role": "user", "content": content}
    return Sample(name, task, (message,), "red", (Turn("And now?", "red"),))


def test_figures_answers_and_pictures_stand_in_the_section(tmp_path: Path) -> None:
    write(tmp_path, EVIL)
    keep_shown(tmp_path, [sample("a")])
    text = evaluated(tmp_path)
    assert "-100.0 [-100.0, -100.0]" in text
    assert "Which colour?" in text
    assert text.count("<div class='question'>") == 1, "of the samples that were kept alone"
    assert text.count("<img") == 1, "the stranger's is text"
    kept = read_shown(tmp_path)["a"]
    image = Image.open(io.BytesIO(base64.b64decode(kept.pictures[0])))
    assert image.size == (160, 53)
    assert kept.questions[1] == "And now?"


def test_answers_without_pictures_are_shown(tmp_path: Path) -> None:
    write(tmp_path)
    text = evaluated(tmp_path)
    assert text.count("<div class='question'>") == 2
    assert "<img" not in text
    assert "blue" in text


def test_few_samples_are_kept_of_different_tasks_first(tmp_path: Path) -> None:
    samples = [sample(f"a{i}") for i in range(9)] + [sample("rare", "other")]
    keep_shown(tmp_path, samples)
    kept = read_shown(tmp_path)
    assert len(kept) == MOST_SAMPLES
    assert "rare" in kept


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"a": {"questions": [], "pictures": ["\'><script>"]}}',
     '{"a": {"questions": [1], "pictures": []}}',
     '{"a": {"questions": [], "pictures": ["aGFsbG8="]}}'],
)  # fmt: skip
def test_a_foreign_file_of_pictures_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UsageError, match="is not what `hkvprof eval` writes"):
        evaluated(tmp_path)


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder that `hkvprof eval -o` wrote"):
        evaluated(tmp_path)
