"""Scenes, questions and samples; replies are checked against a reading of the question's words."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import UsageError
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import (
    TASKS,
    SampleShape,
    ask_questions,
    draw_question,
    heldout_samples,
    make_sample,
    scene_split,
)
from hkvprof.testbed.scenes import Scene, consecutive_labels, draw_scene, random_labels
from hkvprof.testbed.tasks import SceneQuestion
from hkvprof.testbed.vocabulary import COLOUR_NAMES, ROW_NAMES, SHAPE_NAMES, cell_name

SEVERAL = [name for name, task in TASKS.items() if task.needs_several_images]


def names_of(scene: Scene, label: str) -> list[str]:
    """The names of the cells of the image with this label."""
    return [cell_name(cell) for cell in scene.images[scene.labels.index(int(label[1:]))]]


def all_names(scene: Scene) -> list[list[str]]:
    return [[cell_name(cell) for cell in image] for image in scene.images]


def matches(name: str, wanted: str) -> bool:
    """Whether a cell is `wanted`: a colour, a shape, or both."""
    words = name.split()
    return len(words) == 2 and all(word in words for word in wanted.split())


def scoped(scene: Scene, place: str) -> list[str]:
    """All cells of `all images` or of `image #3`."""
    if place == "all images":
        return [name for names in all_names(scene) for name in names]
    return names_of(scene, place.split()[-1])


def row_of(scene: Scene, name: str, label: str) -> list[str]:
    start = ROW_NAMES.index(name) * scene.columns
    return names_of(scene, label)[start : start + scene.columns]


def at(scene: Scene, place: str, label: str) -> str:
    return row_of(scene, place[0], label)[int(place[1:]) - 1]


def label_with_most(scene: Scene, wanted: str, labels: list[str]) -> str:
    counts = {lab: sum(matches(name, wanted) for name in names_of(scene, lab)) for lab in labels}
    (best,) = (label for label, count in counts.items() if count == max(counts.values()))
    return best


def read_answer(scene: Scene, question: SceneQuestion) -> str:
    """Answer the question from its words alone, by brute force over the cells."""
    words = question.text.split()
    label = words[-1]
    every_label = [f"#{number}" for number in scene.labels]
    match question.task:
        case "ocr":
            return "".join(name for name in row_of(scene, words[2], label) if name != "none")
        case "list":
            return " ".join(row_of(scene, words[2], label))
        case "cell":
            return at(scene, words[3], label)
        case "attr":
            (found,) = (name for name in names_of(scene, label) if matches(name, words[4]))
            return found.split()[0]
        case "find":
            wanted = " ".join(words[3:5])
            places = [f"{row}{c + 1}" for row in ROW_NAMES for c in range(scene.columns)]
            cells = zip(places, names_of(scene, label), strict=False)
            (place,) = (place for place, name in cells if name == wanted)
            return place
        case "which":
            wanted = " ".join(words[-2:])
            (found,) = (lab for lab in every_label if wanted in names_of(scene, lab))
            return found
        case "kv":
            text = " ".join(part for part in scene.prompt_parts() if isinstance(part, str))
            return text.split(f"code {words[2]} {words[3]} is ")[1].split()[0]
        case "diff":
            before = names_of(scene, every_label[every_label.index(label) - 1])
            pairs = zip(before, names_of(scene, label), strict=True)
            ((position, (old, new)),) = ((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
            row, column = divmod(position, scene.columns)
            return f"{ROW_NAMES[row]}{column + 1} {old} to {new}"
        case "count":
            return str(sum(matches(name, words[2]) for name in names_of(scene, label)))
        case "maj" | "majall":
            values = COLOUR_NAMES if words[1] == "colour" else SHAPE_NAMES
            place = "all images" if question.task == "majall" else label
            tally = Counter({v: sum(matches(n, v) for n in scoped(scene, place)) for v in values})
            (first, most), (_, second) = tally.most_common(2)
            assert most > second
            return first
        case "more":
            first, second, place = words[3], words[5], question.text.split(" in ")[1]
            cells = scoped(scene, place)
            counts = [sum(matches(name, v) for name in cells) for v in (first, second)]
            assert counts[0] != counts[1]
            return first if counts[0] > counts[1] else second
        case "any":
            wanted, place = question.text.removeprefix("is there any ").split(" in ")
            return "yes" if any(matches(name, wanted) for name in scoped(scene, place)) else "no"
        case "nimg":
            wanted = " ".join(words[-2:])
            return str(sum(wanted in names for names in all_names(scene)))
        case "top":
            return label_with_most(scene, words[-1], every_label)
        case "cmp":
            return label_with_most(scene, words[4], [words[5], words[7]])
    raise AssertionError(question.task)


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(2, 16),
    grid=st.sampled_from([(2, 4), (4, 4), (3, 5), (6, 6), (8, 8)]),
)
def test_replies_agree_with_a_reading_of_the_scene(
    task: str, seed: int, images: int, grid: tuple[int, int]
) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng, random_labels(images, rng), *grid, 2)
    for question in ask_questions(scene, rng, 3, names=[task]):
        assert question.task == task
        assert question.reply == read_answer(scene, question)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 16))
def test_scenes_hold_what_they_promise(seed: int, images: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng, random_labels(images, rng), 4, 4, 3)
    assert len(scene.images) == len(scene.kinds) == images
    assert sorted(set(scene.labels)) == list(scene.labels)
    assert scene.labels[0] >= 1
    assert scene.labels[-1] <= 32
    assert len({(fact.colour, fact.shape) for fact in scene.facts}) == 3
    for image, change in scene.changes.items():
        before, after = scene.images[image - 1], scene.images[image]
        assert [p for p in range(16) if before[p] != after[p]] == [change.position]
        assert all(fact.image != image - 1 for fact in scene.facts)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_arguments(task: str) -> None:
    first, again = (make_sample(task, 7, images=3, followups=1) for _ in range(2))
    assert described(first) == described(again)
    assert described(first) != described(make_sample(task, 8, images=3, followups=1))
    assert first.id == f"calibration-{task}-000007"
    assert first.task == task
    assert first.reply
    assert len(first.followups) == 1


def described(sample: Sample) -> tuple[object, ...]:
    """A sample with its images as bytes, to compare."""
    parts = [
        part["image"].tobytes() if part["type"] == "image" else part["text"]
        for part in sample.messages[0]["content"]
    ]
    return sample.id, parts, sample.reply, sample.followups


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), task=st.sampled_from(list(TASKS)))
def test_splits_share_no_scene(seed: int, task: str) -> None:
    drawn = {
        split: draw_question(task, random.Random(seed), split, SampleShape(4, 2, 4))[0]
        for split in ("calibration", "heldout")
    }
    assert {split: scene_split(scene) for split, scene in drawn.items()} == {
        "calibration": "calibration",
        "heldout": "heldout",
    }
    assert drawn["calibration"].images != drawn["heldout"].images


def test_digest_ignores_labels_and_facts() -> None:
    scenes = [draw_scene(random.Random(4), labels, 4, 4, 2) for labels in ((1, 2), (9, 30))]
    assert scenes[0].prompt_parts() != scenes[1].prompt_parts()
    assert scenes[0].digest == scenes[1].digest


@pytest.mark.parametrize("images", range(1, 17))
def test_one_to_sixteen_images(images: int) -> None:
    sample = make_sample("cell", 0, images=images, split="heldout")
    content = sample.messages[0]["content"]
    assert sum(part["type"] == "image" for part in content) == images
    assert [part["text"] for part in content if part.get("text", "").startswith("image")] == [
        f"image #{label} :" for label in consecutive_labels(images)
    ]
    assert content[-1]["type"] == "text"


def test_random_labels_reach_the_highest() -> None:
    samples = [make_sample("cell", seed, images=8, labels="random") for seed in range(12)]
    texts = [part.get("text", "") for s in samples for part in s.messages[0]["content"]]
    labels = {int(t.split("#")[1].split()[0]) for t in texts if t.startswith("image #")}
    assert min(labels) < 4
    assert max(labels) > 29


def test_heldout_samples_count_on() -> None:
    samples = list(heldout_samples(["ocr", "kv"], 2, SampleShape(images=2), first=5))
    assert [sample.id for sample in samples] == [
        "heldout-ocr-000005",
        "heldout-ocr-000006",
        "heldout-kv-000005",
        "heldout-kv-000006",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "guess"}, "expected one of ocr"),
        ({"task": "diff", "images": 1}, "takes 2 to 32 images"),
        ({"images": 33}, "takes 1 to 32 images"),
        ({"rows": 9}, "expected 2 to 8"),
        ({"split": "test"}, "expected calibration or heldout"),
        ({"labels": "none"}, "expected consecutive or random"),
        ({"followups": -1}, "expected 0 to 8 followups"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, object], message: str) -> None:
    request: dict[str, object] = {"task": "ocr", "seed": 0, "images": 4, **changes}
    with pytest.raises(UsageError, match=message):
        make_sample(**request)  # type: ignore[arg-type]


def test_single_image_scenes_admit_no_task_over_several() -> None:
    rng = random.Random(0)
    for _ in range(20):
        scene = draw_scene(rng, (1,), 4, 4, 1)
        assert not {question.task for question in ask_questions(scene, rng, 20)} & set(SEVERAL)
