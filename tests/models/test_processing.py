"""Chat messages to model inputs: both vision paths agree, context is found, causes are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from hkvprof.errors import ModelError, SampleError
from hkvprof.heads import Modality
from hkvprof.models import processors
from hkvprof.models import vision as vision_backend
from hkvprof.models.processing import TextProcessor
from hkvprof.models.sources import TINYVL_FOLDER
from hkvprof.models.vision import AutoVisionProcessor, PillowVisionProcessor
from tests.models.conversations import VISION_CASES, Messages, assistant, picture, user

ROOT = Path(__file__).parents[2]
TORCHVISION = os.environ.get("HKVPROF_TORCHVISION", "")
QWEN = "Qwen2VLImageProcessor"
RESIZED = {"sizes that are no multiple of a patch", "other modes than RGB"}
GREY_LEVEL = 1 / 255 / 0.2613
"""One step of an 8-bit channel after normalisation by the smallest image_std of Qwen-VL."""
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pillow() -> PillowVisionProcessor:
    """The embedded model's processor without torchvision, whatever is installed."""
    source = str(TINYVL_FOLDER)
    image_processor = processors.pillow_image_processor(source, QWEN, local=True)
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    return PillowVisionProcessor(image_processor, tokenizer, config)


@pytest.fixture(scope="module")
def auto_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What AutoProcessor makes of every case, in a process with torchvision."""
    if not TORCHVISION and not vision_backend.torchvision_works():
        pytest.skip(
            "torchvision is not usable here; to compare both paths: pip install --no-deps --target "
            "/tmp/tv torchvision (any build of the release for this torch), then "
            "HKVPROF_TORCHVISION=/tmp/tv pytest tests/models/test_processing.py"
        )
    out = tmp_path_factory.mktemp("auto") / "inputs.pt"
    run_python("-m", "tests.models.torchvision_shim", str(out), path=TORCHVISION)
    return torch.load(out, weights_only=True)["cases"]


def run_python(*arguments: str, path: str) -> str:
    """Standard output of a Python process that sees `path` before everything else."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT))))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", VISION_CASES)
def test_pillow_and_auto_processor_give_the_same_inputs(
    name: str, pillow: PillowVisionProcessor, auto_inputs: dict[str, Any]
) -> None:
    mine = pillow.encode(VISION_CASES[name]())
    theirs, modality = auto_inputs[name]
    assert sorted(mine.inputs) == sorted(theirs)
    assert torch.equal(mine.modality, modality)
    for key, tensor in mine.inputs.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert tensor.shape == theirs[key].shape, key
        if key != "pixel_values":
            assert torch.equal(tensor, theirs[key]), key
    if "pixel_values" in theirs:
        difference = (mine.inputs["pixel_values"] - theirs["pixel_values"]).abs()
        if name in RESIZED:  # Pillow and torch round differently while they resample
            assert difference.max() < 2.05 * GREY_LEVEL
            assert difference.mean() < 0.05 * GREY_LEVEL
        else:
            assert difference.max() < 1e-6


@pytest.mark.parametrize("name", VISION_CASES)
def test_placeholders_match_patches(name: str, pillow: PillowVisionProcessor) -> None:
    encoded = pillow.encode(VISION_CASES[name]())
    ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    grids = encoded.inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
    assert int((ids == pillow.config.image_token_id).sum()) == int(grids.prod(dim=-1).sum()) // 4
    assert torch.equal(encoded.modality == Modality.IMAGE, ids == pillow.config.image_token_id)
    assert bool((mask.diff(dim=1) >= 0).all()), "padding must be on the left"
    assert encoded.tokens == ids.shape[1]
    if grids.numel():
        assert encoded.inputs["pixel_values"].shape[0] == int(grids.prod(dim=-1).sum())


def test_rows_of_a_batch_are_those_of_single_prompts(pillow: PillowVisionProcessor) -> None:
    conversations = VISION_CASES["a batch padded on the left"]()
    batch = pillow.encode(conversations)
    pixels = 0
    for row, conversation in enumerate(conversations):
        single = pillow.encode([conversation])
        tokens = single.tokens
        assert torch.equal(batch.inputs["input_ids"][row, -tokens:], single.inputs["input_ids"][0])
        assert int(batch.inputs["attention_mask"][row].sum()) == tokens
        assert torch.equal(batch.modality[row, -tokens:], single.modality[0])
        if "pixel_values" in single.inputs:
            own = single.inputs["pixel_values"]
            assert torch.equal(batch.inputs["pixel_values"][pixels : pixels + len(own)], own)
            pixels += len(own)


def test_inputs_move_to_a_dtype(pillow: PillowVisionProcessor) -> None:
    encoded = pillow.encode(VISION_CASES["one image"]())
    moved = encoded.to(torch.device("cpu"), torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["input_ids"].dtype == encoded.inputs["input_ids"].dtype


def test_text_round_trips(pillow: PillowVisionProcessor) -> None:
    conversation = [user("how many disc"), assistant("disc")]
    whole = pillow.render(conversation, reply_next=False)
    opened = pillow.render(conversation[:1], reply_next=True)
    assert whole.startswith(opened)
    assert (
        pillow.encode_text(opened)
        == pillow.encode([conversation[:1]]).inputs["input_ids"][0].tolist()
    )
    reply = pillow.encode_text(whole[len(opened) :])
    assert pillow.tokenizer.eos_token_id in reply
    assert pillow.decode(reply) == "disc"
    assert pillow.decode(torch.tensor(reply)) == "disc"
    assert pillow.encode_text(opened) + reply == pillow.encode_text(whole)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "frames": [picture(28, 28)], "fps": 1}, "video input needs torchvision"),
        ({"type": "video", "path": "a.mp4"}, "a video must be given as its frames"),
        ({"type": "video", "frames": [picture(28, 28)]}, "a video must be given as its frames"),
        ({"type": "text", "text": "long", "modality": "context"}, "for text-only models"),
        ({"type": "text", "text": "an <|image_pad|> here"}, r"contains <\|image_pad\|>"),
        ({"type": "image", "image": picture(1, 400)}, "refuses an image: .*aspect ratio"),
    ],
)
def test_parts_that_a_vision_model_refuses(
    part: dict[str, Any], message: str, pillow: PillowVisionProcessor
) -> None:
    with pytest.raises(SampleError, match=message):
        pillow.encode([[{"role": "user", "content": [part]}]])


class StubProcessor:
    """Stands for AutoProcessor: renders a fixed text, remembers how it was called."""

    chat_template = "set"
    image_token = "<image>"

    def __init__(self, rendered: str) -> None:
        self.tokenizer = byte_tokenizer()
        self.rendered = rendered
        self.called: dict[str, Any] = {}

    def apply_chat_template(self, messages: Messages, **options: Any) -> str:
        return self.rendered

    def __call__(self, **options: Any) -> dict[str, Any]:
        self.called = options
        return {"input_ids": torch.tensor([[1, 2]]), "note": "no tensor"}


@pytest.mark.parametrize(("rendered", "adds"), [("<|begin|>Hello", False), ("Hello", True)])
def test_a_template_that_begins_the_text_is_not_begun_twice(rendered: str, adds: bool) -> None:
    stub = StubProcessor(rendered)
    config = AutoConfig.from_pretrained(TINYVL_FOLDER)
    encoded = AutoVisionProcessor(stub, config).encode([[user(picture(56, 56), "any")]])
    assert stub.called["add_special_tokens"] is adds
    assert len(stub.called["images"][0]) == 1
    assert list(encoded.inputs) == ["input_ids"]


def test_the_auto_path_refuses_what_the_pillow_path_refuses() -> None:
    processor = AutoVisionProcessor(StubProcessor("x"), AutoConfig.from_pretrained(TINYVL_FOLDER))
    for part in ({"type": "video"}, {"type": "text", "text": "<image>"}):
        with pytest.raises(SampleError):
            processor.encode([[{"role": "user", "content": [part]}]])


# -- text-only models -------------------------------------------------------------------------


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a chat template that trims messages."""
    alphabet = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def text() -> TextProcessor:
    return TextProcessor(byte_tokenizer(), config=None)


def context(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "modality": "context"}


def spans(processor: TextProcessor, encoded: Any, row: int) -> str:
    return processor.decode(
        encoded.inputs["input_ids"][row][encoded.modality[row] == Modality.CONTEXT]
    )


def test_context_is_found_in_a_padded_batch(text: TextProcessor) -> None:
    contexts = ["Grüße, the key is 42. ✓", "short", "  padded with blanks \n"]
    batch = [
        [
            {"role": "user", "content": [{"type": "text", "text": "Read."}, context(c)]},
            assistant("ok"),
        ]
        for c in contexts
    ]
    batch.append([user("no context at all, and longer than all of the others together, by far")])
    encoded = text.encode(batch)
    assert [spans(text, encoded, row) for row in range(4)] == [c.strip() for c in contexts] + [""]
    mask = encoded.inputs["attention_mask"]
    assert not bool(mask[1, 0]), "the short row is padded on the left"
    assert bool((encoded.modality[mask == 0] == Modality.TEXT).all())


def test_context_that_repeats_an_earlier_part_is_found_at_its_own_place(
    text: TextProcessor,
) -> None:
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "key"}, context("key"), context("s")],
    }
    encoded = text.encode([[message]])
    where = (encoded.modality[0] == Modality.CONTEXT).nonzero()[:, 0].tolist()
    rendered = text.render([message], reply_next=True)
    assert rendered == "<|user|>key\n\nkey\n\ns<|end|><|assistant|>"
    begin = len("<|user|>key\n\n") - len("<|user|>") + 1  # one token for the role, one per letter
    assert where == [begin, begin + 1, begin + 2, begin + 5]


def test_plain_strings_and_the_reply_mark(text: TextProcessor) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (
        text.render(conversation, reply_next=False) == "<|system|>Be brief.<|end|><|user|>Hi<|end|>"
    )
    encoded = text.encode([conversation])
    assert encoded.inputs.keys() == {"input_ids", "attention_mask"}
    rendered = text.render(conversation, reply_next=True)
    assert text.encode_text(rendered) == encoded.inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_text_model_refuses_other_parts(kind: str, text: TextProcessor) -> None:
    with pytest.raises(SampleError, match=f"part of type '{kind}', but the model is text-only"):
        text.encode([[{"role": "user", "content": [{"type": kind, "path": "x"}]}]])


def test_a_template_that_changes_context_is_refused() -> None:
    shouting = TextProcessor(byte_tokenizer(TEMPLATE.replace("trim", "upper")), config=None)
    with pytest.raises(SampleError, match="changed a context part"):
        shouting.encode([[{"role": "user", "content": [context("quiet")]}]])


def test_a_template_that_refuses_the_messages(text: TextProcessor) -> None:
    with pytest.raises(SampleError, match="chat template refuses the messages: no critics"):
        text.encode([[{"role": "critic", "content": "Boo"}]])


def test_a_model_without_chat_template() -> None:
    with pytest.raises(ModelError, match="no chat template: use an instruction-tuned model"):
        TextProcessor(byte_tokenizer(None), config=None).encode([[user("Hi")]])
