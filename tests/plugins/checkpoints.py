"""A random Llama with a word tokenizer as a folder, as harnesses load it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.heads import KeepRule
from tests.models_for_tests import random_llama

WORDS = 64
SPECIAL = ("<pad>", "<s>", "</s>")


def words(count: int, seed: int = 0) -> str:
    """Text of `count` tokens, none of them special."""
    return " ".join(f"w{3 + (seed * 31 + i * i * 7 + i) % (WORDS - 3)}" for i in range(count))


CHAT = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
"""A chat template: what is said, without roles."""


def save_checkpoint(folder: Path, template: str | None = None) -> Path:
    """Model, tokenizer (with that chat template) and, as `profile.safetensors`, a profile that
    mixes both head types."""
    model = random_llama(max_position_embeddings=512)
    model.save_pretrained(folder)
    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), WORDS))]
    tokenizer = Tokenizer(
        WordLevel({name: i for i, name in enumerate(names)}, unk_token=SPECIAL[0])
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    ).save_pretrained(folder)
    types = uniform_profile(model).strategy.copy()
    types[:, 1] = 1
    keep = KeepRule(sinks=2, recent=4)
    uniform_profile(model, types, chunk=8, keep=keep).save(folder / "profile.safetensors")
    return folder
