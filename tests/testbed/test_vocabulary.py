"""The vocabulary against the shipped tokenizer."""

from __future__ import annotations

import json
import random

from transformers import AutoTokenizer

from hkvprof.models.load import load_model
from hkvprof.models.sources import TINYVL_FOLDER
from hkvprof.testbed import vocabulary
from hkvprof.testbed.generator import TASKS, ask_questions, scene_messages
from hkvprof.testbed.scenes import draw_scene, random_labels
from tools.tinyvl.batching import pack_scene


def test_token_ids_are_those_of_the_checkpoint() -> None:
    shipped = json.loads((TINYVL_FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(shipped) == vocabulary.VOCABULARY_SIZE
    assert all(shipped[token] == index for token, index in vocabulary.TOKEN_IDS.items())
    assert vocabulary.build_tokenizer().get_vocab() == shipped


def test_plain_encoding_equals_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINYVL_FOLDER)
    built = vocabulary.build_tokenizer()
    rng = random.Random(0)
    for _ in range(20):
        scene = draw_scene(rng, random_labels(6, rng), 4, 4, 3)
        texts = [part for part in scene.prompt_parts() if isinstance(part, str)]
        for question in ask_questions(scene, rng, 16):
            texts += [question.text, question.reply]
        for text in texts:
            assert list(vocabulary.encode_text(text)) == tokenizer(text).input_ids
            assert tokenizer(text).input_ids == built(text).input_ids


def test_chat_template_is_the_training_layout() -> None:
    _, processor = load_model(TINYVL_FOLDER, device="cpu")
    rng = random.Random(1)
    scene = draw_scene(rng, random_labels(4, rng), 4, 4, 2)
    (question,) = ask_questions(scene, rng, 1)
    row = pack_scene(scene, [question])
    prompt = (
        processor.encode([scene_messages(scene, question.text)]).inputs["input_ids"][0].tolist()
    )
    assert row.ids.tolist()[: len(prompt)] == prompt
    assert row.first_answers == [len(prompt) - 1]


def test_names_and_classes() -> None:
    cells = range(vocabulary.CELL_CLASSES)
    assert len({vocabulary.cell_name(cell) for cell in cells}) == vocabulary.CELL_CLASSES
    for cell in cells:
        kinds = (cell == vocabulary.BLANK, vocabulary.is_glyph(cell), vocabulary.is_item(cell))
        assert sum(kinds) == 1
        if vocabulary.is_item(cell):
            colour, shape = vocabulary.colour_of(cell), vocabulary.shape_of(cell)
            assert vocabulary.item_class(colour, shape) == cell
    assert vocabulary.place_name(5, 4) == "B2"
    assert len(TASKS) == 16
